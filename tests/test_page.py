import http.client
import itertools
import json
import socket
import threading
import time
from http.server import ThreadingHTTPServer

import imageio.v3 as iio
import pytest
import torch
from conftest import generator, tiny_action_model, tiny_model, tiny_text, tiny_vae

import play
from page import Show, handler, stream_text
from play import Player
from sample import text_to_video
from text import TextEncoder


def player(looks):
    return Player(tiny_action_model(), tiny_vae(1), tiny_text(looks), generator(), most=4)


def plain_frames(prompt):
    """Frames that are as bright as the prompt is long."""
    while True:
        yield torch.full((3, 64, 64), 0.01 * len(prompt()))


@pytest.fixture
def page():
    """A running page on a free port: (its port, its Show)."""
    show = Show(player, plain_frames, fps=200)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(show))
    server.daemon_threads = True
    for target in (show.run, server.serve_forever):
        threading.Thread(target=target, daemon=True).start()
    yield server.server_address[1], show
    server.shutdown()
    server.server_close()


def ask(port, method, path, body=None, **headers):
    """-> (status, content) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def steer(port, **wish):
    assert ask(port, "POST", "/steer", json.dumps(wish))[0] == 200


def watch(port, frames):
    """Open the endless image, as a tab does, take some frames and close it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as tab:
        tab.sendall(b"GET /frames HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while got.count(b"--frame") <= frames:
            got += tab.recv(65536)
    return got


def until(condition):
    end = time.time() + 20
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return condition()


# -------------------------------------------------------------------------------- what is served
def test_the_page_has_an_image(page):
    status, content = ask(page[0], "GET", "/")
    assert status == 200
    assert b"<img" in content


def test_the_page_shows_its_frames_as_jpeg_pictures(page):
    jpeg = watch(page[0], 2).split(b"\r\n\r\n")[2].split(b"\r\n--frame")[0]
    assert iio.imread(jpeg, extension=".jpg").shape == (256, 256, 3)


def test_the_page_takes_actions(page):
    port, show = page
    steer(port, action="left")
    assert show.action == "left"


def test_a_prompt_steers_the_text_model(page):
    port, _ = page
    steer(port, prompt="a blue star")
    watch(port, 5)
    state = json.loads(ask(port, "GET", "/state")[1])
    assert (state["mode"], state["prompt"]) == ("text", "a blue star")
    assert state["frame"] >= 5


def test_new_looks_begin_a_new_world_to_play_in(page):
    port, show = page
    steer(port, prompt="a blue star")
    steer(port, looks="a red star")
    assert show.state()["mode"] == "play"
    assert show.state()["looks"] == "a red star"


def test_several_tabs_see_frames_at_once(page):
    tabs = [threading.Thread(target=watch, args=(page[0], 10)) for _ in range(3)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join(timeout=30)
    assert not any(tab.is_alive() for tab in tabs)


def test_nothing_runs_when_all_tabs_are_closed(page):
    port, show = page
    watch(port, 2)
    assert until(lambda: show.viewers == 0)
    time.sleep(0.3)
    number = show.number
    time.sleep(0.3)
    assert show.number == number


def test_the_page_goes_on_with_the_next_tab(page):
    port, show = page
    watch(port, 2)
    assert until(lambda: show.viewers == 0)
    assert watch(port, 2)


def test_the_rate_shown_is_of_all_frames_not_of_the_quick_ones():
    def bursts(prompt):  # five at once every tenth of a second: 50 frames/s
        for number in itertools.count():
            time.sleep(0.1 * (number % 5 == 0))
            yield torch.zeros(3, 64, 64)

    show = Show(None, bursts, fps=1000, mode="text", viewers=1)
    threading.Thread(target=show.run, daemon=True).start()
    assert until(lambda: show.number > 80)
    assert 15 < show.state()["frames/s"] < 100
    show.viewers = 0


def test_a_new_prompt_shows_in_the_text_models_next_chunk():
    torch.manual_seed(0)
    model, vae, encoder = tiny_model(), tiny_vae(), TextEncoder().requires_grad_(False)
    prompts = iter(["a red star", "a blue star"])
    made = stream_text(model, vae, encoder, lambda: next(prompts))
    steered = torch.stack(list(itertools.islice(made, 9 + 12)))
    plain = text_to_video(model, vae, encoder(["a red star"]), generator())
    kept = torch.cat([next(plain)[1][0] for _ in range(2)])
    assert (steered == kept).flatten(1).all(1).tolist() == [True] * 9 + [False] * 12


# --------------------------------------------------------------------------------- what is refused
WISHES = (
    "",
    "{",
    "[]",
    "3",
    '{"action": "jump"}',
    '{"action": 7}',
    '{"prompt": ""}',
    '{"prompt": 5}',
    '{"a": 1, "b": 2}',
    "x" * 5000,
    b"\xff\xfe",
)


@pytest.mark.parametrize("wish", WISHES, ids=range(len(WISHES)))
def test_junk_is_refused_and_harms_nothing(page, wish):
    port, show = page
    assert ask(port, "POST", "/steer", wish)[0] == 400
    assert show.state()["action"] == "none"
    assert watch(port, 2)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [("POST", "/other", "{}", 400), ("GET", "/../play.py", None, 404), ("PUT", "/", None, 501)],
)
def test_there_is_nothing_but_the_page(page, method, path, body, status):
    assert ask(page[0], method, path, body)[0] == status


def test_another_sites_page_cannot_steer_this_one(page):
    assert ask(page[0], "GET", "/", Host="example.com")[0] == 403


def test_bytes_that_are_no_request_harm_nothing(page):
    port, _ = page
    with socket.create_connection(("127.0.0.1", port)) as junk:
        junk.sendall(b"\x00\xff nonsense\r\n\r\n")
        junk.recv(1000)
    assert watch(port, 2)


def test_a_port_that_is_taken_is_named(page, command_line):
    status, _, err = command_line(play, "--port", page[0])
    assert status == 2
    assert "choose another with --port" in err
