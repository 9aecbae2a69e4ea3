import contextlib
import http.client
import itertools
import json
import re
import socket
import threading
import time
from http.server import ThreadingHTTPServer

import imageio.v3 as iio
import pytest
import torch
from conftest import generator, tiny_action_model, tiny_model, tiny_text, tiny_vae

import page as server
import play
from data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from media import to_uint8
from page import AHEAD, Show, handler, stream_text
from play import NAMES, Player
from sample import text_to_video
from text import TextEncoder


class Noted(Player):
    """A player whose marks hold the actions that led to the world so far."""

    actions = ()

    def step(self, action, most=None):
        frame = super().step(action, most)
        self.actions = (*self.actions, action)
        return frame


def player(looks, seed, most=4):
    model = tiny_action_model(num_layers=2, window=3).requires_grad_(False).double()
    text = tiny_text(looks).double()
    return Noted(model, tiny_vae(1).double(), text, generator(seed), most=most)


def plain_frames(prompt, seed):
    """Frames that are as bright as the prompt is long."""
    while True:
        yield torch.full((3, 64, 64), 0.01 * len(prompt()))


@contextlib.contextmanager
def running(show):
    """Run a page on a free port: (its port, its Show)."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler(show))
    httpd.daemon_threads = True
    show.start()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd.server_address[1], show
    show.paused = True
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def page():
    with running(Show(player, plain_frames, fps=200)) as ends:
        yield ends


def ask(port, method, path, body=None, **headers):
    """-> (status, content) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def wish(port, body, **headers):
    """-> the status that a wish is answered with."""
    headers = {"Content-Type": "application/json"} | headers
    return ask(port, "POST", "/steer", body, **headers)[0]


def steer(port, **wished):
    assert wish(port, json.dumps(wished)) == 200


def state(port):
    return json.loads(ask(port, "GET", "/state")[1])


def watch(port, frames):
    """Look at some frames, as a tab does: {number: PNG}."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    seen, number, end = {}, 0, time.time() + 20
    while len(seen) < frames and time.time() < end:
        connection.request("GET", f"/frame?after={number}")
        answer = connection.getresponse()
        image, last = answer.read(), number
        number = int(answer.headers["X-Frame"])
        if number != last:
            seen[number] = image
    assert len(seen) == frames
    return seen


def until(condition):
    end = time.time() + 20
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return condition()


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


# ------------------------------------------------------------------------- frames made in advance
def test_frames_come_evenly_though_they_are_made_in_bursts():
    def blocks(prompt, seed):  # five frames every 0.3 s
        for number in itertools.count():
            time.sleep(0.3 * (number % 5 == 0))
            yield torch.zeros(3, 64, 64)

    with running(Show(None, blocks, fps=10, mode="text")) as (_, show):
        assert until(lambda: len(show.waiting) == AHEAD)
        times = []
        for after in range(40):
            show.newest(after)
            times.append(time.perf_counter())
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) < 0.16


def test_no_more_frames_wait_than_agreed(page):
    _, show = page
    assert until(lambda: len(show.waiting) == AHEAD)
    time.sleep(0.2)
    assert len(show.waiting) == AHEAD


def replayed(actions, seed=0):
    """The PNGs that a player without any lookahead shows."""
    world = player(play.LOOKS, seed, most=1)
    frames = [to_uint8(world.step(action)).numpy() for action in actions]
    return [iio.imwrite("<bytes>", frame, extension=".png") for frame in frames]


def test_what_is_shown_is_what_a_player_without_lookahead_shows():
    def alone(looks, seed):
        return player(looks, seed, most=1)

    shown = {}
    with running(Show(alone, plain_frames, fps=100)) as (port, show):
        for name in ("right", "up", "none", "left", "right", "left", "up", "none"):
            steer(port, action=name)
            first = show.number
            for number in range(first, first + 6):
                shown |= dict([show.newest(number)])
        steer(port, paused=True)
        assert until(lambda: show.newest(show.number)[0] == show.number)
        actions = show.mark["actions"]
    expected = replayed(actions)
    assert len(set(actions)) == 4
    assert len(shown) > 30
    assert all(image == expected[number - 1] for number, image in shown.items())


def shown_after(show, action):
    """Steer while frames wait -> how many more frames were shown under the action before."""
    before = show.action
    show.newest(show.number)
    show.steer({"action": action})
    first = show.number
    while NAMES.index(action) not in show.mark["actions"][first:]:
        show.newest(show.number)
    return show.mark["actions"][first:].count(NAMES.index(before))


def test_an_action_shows_in_the_second_next_frame_at_the_latest():
    with running(Show(player, plain_frames, fps=10)) as (_, show):
        for action in ("right", "up", "left", "none", "right"):
            assert until(lambda: show.newest(0) and len(show.waiting) == AHEAD)
            assert shown_after(show, action) <= 1


def test_frames_taken_back_count_as_dropped():
    with running(Show(player, plain_frames, fps=10)) as (port, show):
        assert until(lambda: len(show.waiting) == AHEAD)
        steer(port, action="up")
        assert until(lambda: len(show.waiting) == AHEAD)
    assert show.state()["guesses kept, %"] < 100


def test_frames_in_the_making_are_given_up_when_an_action_changes():
    passes = []

    def slow(looks, seed):
        made = player(looks, seed)
        made.model.register_forward_hook(lambda *_: passes.append(time.sleep(0.2)))
        return made

    with running(Show(slow, plain_frames)) as (port, show):
        assert until(lambda: passes)
        count = len(passes)
        steer(port, action="up")
        assert until(lambda: not show.stale)
        assert len(passes) - count <= 1


def test_the_first_block_after_a_change_has_one_frame():
    asked = []

    def noted(looks, seed):
        made = player(looks, seed)
        step = made.step

        def counted(action, most):
            asked.append((action, most))
            return step(action, most)

        made.step = counted
        return made

    with running(Show(noted, plain_frames)) as (port, show):
        assert until(lambda: len(show.waiting) == AHEAD)
        steer(port, action="up")
        assert until(lambda: len(show.waiting) == AHEAD)
    first = asked.index((NAMES.index("up"), 1))
    assert [most for _, most in asked[:3]] == [1, 2, 3]
    assert [most for _, most in asked[first : first + 3]] == [1, 2, 3]


# ------------------------------------------------------------------------------------- errors
def test_an_error_is_shown_and_the_next_wish_goes_on(capsys):
    def picky(looks, seed):
        if "bad" in looks:
            raise RuntimeError("no such looks")
        return player(looks, seed)

    with running(Show(picky, plain_frames, fps=100)) as (port, _):
        steer(port, looks="bad")
        assert until(lambda: state(port)["error"])
        assert state(port)["error"] == "RuntimeError: no such looks"
        steer(port, looks="a red star")
        watch(port, 12)
        assert not state(port)["error"]


def test_an_error_amid_a_world_begins_another_at_the_next_action(capsys):
    worlds = []

    def failing(looks, seed):
        made = player(looks, seed)
        worlds.append(made)
        if len(worlds) == 1:
            steps = iter([made.step] * 3)
            made.step = lambda action, most: next(steps)(action, most)
        return made

    with running(Show(failing, plain_frames, fps=100)) as (port, _):
        assert until(lambda: state(port)["error"])
        steer(port, action="up")
        watch(port, 12)
    assert len(worlds) == 2


def test_a_tab_that_is_closed_leaves_no_traceback(page, capsys):
    port, show = page
    watch(port, 1)
    show.paused = True
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as tab:
            tab.sendall(b"GET /frame?after=%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % show.number)
            tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
    time.sleep(1.3)
    assert "Traceback" not in capsys.readouterr().err


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
    "[" * 1999,
    '{"looks": "\\ud800"}',
    '{"prompt": "a \\udfff star"}',
    '{"paused": 1}',
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


@pytest.mark.parametrize("junk", WISHES, ids=range(len(WISHES)))
def test_junk_is_refused_and_harms_nothing(page, junk):
    port, show = page
    assert wish(port, junk) == 400
    assert show.state()["action"] == "none"
    assert watch(port, 2)


@pytest.mark.parametrize("junk", ["{", '{"looks": "\\ud800"}', b"\xff\xfe"])
def test_what_is_no_json_is_told_in_plain_words(page, junk):
    json_type = {"Content-Type": "application/json"}
    assert ask(page[0], "POST", "/steer", junk, **json_type)[1] == b"a wish is JSON in UTF-8"


def test_a_body_shorter_than_it_says_is_soon_refused(page):
    json_type = {"Content-Type": "application/json", "Content-Length": "99"}
    started = time.monotonic()
    assert ask(page[0], "POST", "/steer", "{}", **json_type)[0] == 408
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/other", 400),
        ("GET", "/../play.py", 404),
        ("GET", "/frame", 404),
        ("GET", "/frame?after=x", 404),
        ("PUT", "/", 501),
    ],
)
def test_there_is_nothing_but_the_page(page, method, path, status):
    json_type = {"Content-Type": "application/json"}
    assert ask(page[0], method, path, "{}", **json_type)[0] == status


def test_a_name_that_leads_here_is_not_this_machine(page):
    assert ask(page[0], "GET", "/", Host="example.com")[0] == 403


FOREIGN = (
    {"Origin": "http://example.com"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=range(len(FOREIGN)))
def test_another_sites_page_cannot_steer_this_one(page, headers):
    port, show = page
    assert wish(port, '{"action": "up"}', **headers) == 403
    assert show.action == "none"


@pytest.mark.parametrize("path", ["/frame?after=0", "/state"])
def test_another_sites_page_cannot_watch(page, path):
    assert ask(page[0], "GET", path, **{"Sec-Fetch-Site": "cross-site"})[0] == 403


def test_another_sites_page_can_link_to_this_one(page):
    assert ask(page[0], "GET", "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200


def test_the_page_itself_can_steer(page):
    port, _ = page
    own = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    assert wish(port, '{"action": "up"}', **own) == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_form_cannot_steer(page, kind):
    port, show = page
    assert wish(port, '{"action": "up"}', **{"Content-Type": kind}) == 415
    assert show.action == "none"


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
