import http.client
import itertools
import re
import threading
import time
from http.server import ThreadingHTTPServer

import imageio.v3 as iio
import pytest
import torch
from pages import ask, plain_frames, player, running, state, steer, until, watch

import page as server
from data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from page import AHEAD, Show


# -------------------------------------------------------------------------------- what is served
@pytest.mark.parametrize("path", ["/", "/?x=1"])
def test_the_page_has_a_picture(page, path):
    status, content = ask(page[0], "GET", path)
    assert status == 200
    assert b"<canvas" in content


def test_the_page_fits_narrow_screens(page):
    assert b'<meta name="viewport" content="width=device-width' in ask(page[0], "GET", "/")[1]


def test_head_is_answered_without_a_body(page):
    assert ask(page[0], "HEAD", "/") == (200, b"")


def test_the_page_shows_its_frames_as_pictures(page):
    for image in watch(page[0], 2).values():
        assert iio.imread(image, extension=".png").shape == (64, 64, 3)


def test_a_request_for_a_newer_frame_ends_without_one(page):
    port, show = page
    watch(port, 1)
    show.paused = True
    assert until(lambda: show.number == show.newest(show.number)[0])
    assert ask(port, "GET", f"/frame?after={show.number}") == (200, show.image)


def test_the_page_takes_actions(page):
    port, show = page
    steer(port, action="left")
    assert show.action == "left"


def test_a_prompt_steers_the_text_model(page):
    port, _ = page
    steer(port, prompt="a blue star")
    watch(port, 5)
    now = state(port)
    assert (now["mode"], now["prompt"]) == ("text", "a blue star")
    assert now["number"] >= 5


def test_an_action_drops_no_frame_of_the_text_model():
    counts = itertools.count()

    def counted(prompt, seed):
        for number in counts:
            yield torch.full((3, 64, 64), number / 127.5 - 1)

    with running(Show(None, counted, fps=200, mode="text")) as (port, _):
        shown = watch(port, 3)
        steer(port, action="up")
        shown |= watch(port, 10)
    for number, image in shown.items():
        assert (iio.imread(image, extension=".png") == number - 1).all()


def test_new_looks_begin_a_new_world_to_play_in(page):
    port, _ = page
    steer(port, prompt="a blue star")
    steer(port, looks="a red star")
    assert (state(port)["mode"], state(port)["looks"]) == ("play", "a red star")


def test_worlds_have_the_looks_wished_for_and_a_seed_each():
    asked = []

    def noted(looks, seed):
        asked.append((looks, seed))
        return player(looks, seed)

    with running(Show(noted, plain_frames, looks="a red star", seed=7)) as (port, _):
        for _ in range(2):
            assert until(lambda: len(watch(port, 1)) and asked)
            known = len(asked)
            steer(port, looks="a blue star")
            assert until(lambda known=known: len(asked) > known)
    assert asked == [("a red star", 7), ("a blue star", 8), ("a blue star", 9)]


def test_the_page_names_the_words_that_the_models_know(page):
    tables = {"colours": COLOURS, "shapes": SHAPES, "backgrounds": BACKGROUNDS, "motions": MOTIONS}
    assert state(page[0])["words"] == {kind: list(table) for kind, table in tables.items()}


def test_many_tabs_see_frames_at_once(page):
    tabs = [threading.Thread(target=watch, args=(page[0], 10)) for _ in range(12)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join(timeout=30)
    assert not any(tab.is_alive() for tab in tabs)


def test_a_tab_needs_no_connection_of_its_own(page):
    port, number = page[0], 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    for _ in range(20):  # ten tabs, two frames each, on one connection
        connection.request("GET", "/frame?after=0")
        answer = connection.getresponse()
        assert answer.read()
        number = int(answer.headers["X-Frame"])
    assert number > 0


def test_nothing_runs_when_all_tabs_are_closed(page):
    port, show = page
    watch(port, 2)
    time.sleep(2.1)
    assert until(lambda: len(show.waiting) == AHEAD)
    number = show.number
    time.sleep(0.3)
    assert show.number == number
    assert len(show.waiting) == AHEAD


def test_the_page_goes_on_with_the_next_tab(page):
    port, _ = page
    watch(port, 2)
    time.sleep(2.1)
    assert watch(port, 2 + AHEAD)


def test_a_pause_stops_the_picture_until_it_ends(page):
    port, show = page
    watch(port, 2)
    steer(port, paused=True)
    number = show.number
    time.sleep(0.3)
    assert show.number - number <= 1
    steer(port, paused=False)
    assert watch(port, 2)


def bursts(prompt, seed):
    """Make five frames at once every tenth of a second: 50 frames/s."""
    for number in itertools.count():
        time.sleep(0.1 * (number % 5 == 0))
        yield torch.zeros(3, 64, 64)


def test_the_rate_shown_is_of_all_frames_not_of_the_quick_ones():
    with running(Show(None, bursts, fps=1000, mode="text")) as (port, show):
        watch(port, 80)
        assert 15 < show.state()["frames/s"] < 100


# ------------------------------------------------------------------------------------- at the start
@pytest.mark.parametrize("browser", [True, False])
def test_the_page_opens_unless_told_not_to(monkeypatch, capsys, browser):
    opened, shows = [], []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server.Show, "start", lambda show: shows.append(show))
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", ThreadingHTTPServer.server_close)
    device = torch.device("cpu")
    server.serve(player, device, torch.float32, 0, "a blue star", 3, browser=browser)
    url = re.search(r"http://\S+", capsys.readouterr().out)[0]
    assert until(lambda: opened == [url] * browser)
    assert (shows[0].looks, shows[0].seed) == ("a blue star", 3)
