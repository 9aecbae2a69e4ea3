import http.client
import itertools
import json
import os
import socket
import threading
import time
from http.server import ThreadingHTTPServer

import imageio.v3 as iio
import pytest
import torch

import play
from model import DiT, ModelConfig
from page import Show, handler
from play import NAMES, Player, parse_actions
from sample import stream
from text import TextEncoder
from vae import VAE, VAEConfig
from weights import UserError, save_weights


def parts(dtype=torch.float64):
    torch.manual_seed(0)
    model = DiT(
        ModelConfig(
            dim=16,
            ffn_dim=16,
            freq_dim=8,
            num_heads=1,
            num_layers=2,
            chunk=1,
            window=3,
            num_actions=5,
        )
    )
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    torch.nn.init.normal_(model.action_embedding.weight)
    vae = VAE(VAEConfig(8, 1, 16, 16, 16))
    return (
        model.to(dtype).eval().requires_grad_(False),
        vae.to(dtype).eval().requires_grad_(False),
        TextEncoder()(["a red circle"]).detach().to(dtype),
    )


def world(most, seed=0):
    return Player(*parts(), torch.Generator().manual_seed(seed), most=most)


RIGHT, UP = NAMES.index("right"), NAMES.index("up")


def test_without_speculation_a_player_shows_what_the_stream_makes():
    model, vae, text = parts()
    actions = [0, RIGHT, RIGHT, UP, 0, UP]
    streamed = stream(
        model,
        vae,
        text,
        torch.Generator().manual_seed(0),
        actions=lambda frames: torch.tensor([[actions[frames]]]),
    )
    player = world(1)
    for action, (_, video) in zip(actions, streamed):
        assert (player.step(action) - video[0, 0]).abs().max() < 1e-10
    assert player.made == player.blocks == len(actions)
    assert player.dropped == 0


def test_a_guess_that_holds_makes_frames_ahead_and_one_that_fails_drops_them():
    player = world(4)
    for _ in range(40):
        player.step(RIGHT)
    before = player.blocks
    for _ in range(40):
        player.step(RIGHT)
    assert player.blocks - before <= 11
    assert player.dropped == 0
    assert player.guesses() == 4
    assert player.ahead or (player.step(RIGHT) is not None and player.ahead)
    ahead = len(player.ahead)
    player.step(UP)
    assert player.dropped == ahead > 0


def test_after_a_rejection_cache_and_random_state_are_bit_for_bit_as_if_nothing_had_been_dropped():
    speculated, plain = world(4), world(4)
    actions = [RIGHT] * 25 + [UP] * 2 + [RIGHT]
    speculated.guesses = lambda: 4
    shown = []
    for action in actions:
        if (
            action != speculated.action or not speculated.ahead
        ):  # a new block begins: note what the last one came to
            shown.append(0)
        speculated.step(action)
        shown[-1] += 1
    assert speculated.dropped > 0
    assert max(shown) == 4
    counts = iter(shown)
    plain.guesses = lambda: next(
        counts
    )  # the same blocks, but only as long as what was kept of them
    for action in actions:
        plain.step(action)
    assert plain.dropped == 0
    for player in (speculated, plain):
        player._drop()
        player._remember()
    assert torch.equal(speculated.generator.get_state(), plain.generator.get_state())
    held = speculated.cache.frames * speculated.cache.tokens
    assert speculated.cache.frames == plain.cache.frames == 2
    assert torch.equal(speculated.cache.k[:, :, :held], plain.cache.k[:, :, :held])
    assert torch.equal(speculated.cache.v[:, :, :held], plain.cache.v[:, :, :held])


def test_guesses_follow_how_often_an_action_stays():
    always, never, sometimes = world(8), world(8), world(8)
    for frame in range(60):
        always.step(RIGHT)
        never.step(RIGHT if frame % 2 else UP)
        sometimes.step(frame // 2 % 5)
    assert always.guesses() == 8
    assert never.guesses() == 1
    assert never.made == 60
    assert 1 < sometimes.guesses() < 8


def test_an_action_controls_exactly_the_next_frame():
    one, other = world(4), world(4)
    for frame in range(8):
        a, b = one.step(RIGHT), other.step(RIGHT if frame < 5 else UP)
        assert torch.allclose(a, b, atol=1e-9) == (frame < 5)


def test_actions_are_read_as_written():
    assert parse_actions("right*3, up,none*2") == [RIGHT] * 3 + [UP] + [0] * 2
    for wrong in ("", "right,", "sideways", "up*0", "up*-1", "up*two", "up**2"):
        with pytest.raises(UserError, match="cannot read"):
            parse_actions(wrong)


# -------------------------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder, (model, vae, _) = tmp_path_factory.mktemp("weights"), parts()
    save_weights(str(folder / "player.safetensors"), model.state_dict(), model.config)
    save_weights(str(folder / "vae.safetensors"), vae.state_dict(), vae.config)
    return folder, ["--weights", folder / "player.safetensors", "--vae", folder / "vae.safetensors"]


def test_plays_a_script_into_a_video(tiny, command_line):
    status, out, err = command_line(play, "--actions", "right*20,up*10,none*5", *tiny[1])
    assert status == 0, err
    assert iio.imread("play.mp4").shape == (35, 64, 64, 3)
    assert "35 frames" in out
    assert os.listdir() == ["play.mp4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--actions", "jump"], "cannot read 'jump'"),
        (["--actions", "up", "--out", "a.avi"], "must end in"),
        (["--looks", " "], "--looks is empty"),
        (["--ahead", 0], "at least 1"),
        (["--port", 70000], "--port"),
        (["--actions", "up", "--weights", "none.safetensors"], "none.safetensors"),
    ],
)
def test_bad_input_ends_in_one_clear_line(tiny, command_line, flags, message):
    status, _, err = command_line(play, *(tiny[1] if "--weights" not in flags else []), *flags)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not os.listdir()


def test_a_text_model_is_not_one_to_play_with(tiny, command_line, tmp_path):
    model = DiT(ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1))
    save_weights("text.safetensors", model.state_dict(), model.config)
    status, _, err = command_line(
        play,
        "--actions",
        "up",
        "--vae",
        tiny[0] / "vae.safetensors",
        "--weights",
        "text.safetensors",
    )
    assert status == 2
    assert "not an action model" in err


# ------------------------------------------------------------------------------------------------------------ the page
@pytest.fixture
def page():
    """A running page on a free port: (its port, its Show)."""
    streamed = lambda prompt: (
        torch.full((3, 64, 64), 0.01 * len(prompt())) for _ in itertools.count()
    )
    show = Show(lambda looks: world(4), streamed, fps=200)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(show))
    server.daemon_threads = True
    for target in (show.run, server.serve_forever):
        threading.Thread(target=target, daemon=True).start()
    yield server.server_address[1], show
    server.shutdown()
    server.server_close()


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


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


def test_the_page_shows_frames_and_takes_actions_and_prompts(page):
    port, show = page
    assert b"<img" in ask(port, "GET", "/")[1]
    jpeg = watch(port, 2).split(b"\r\n\r\n")[2].split(b"\r\n--frame")[0]
    assert iio.imread(jpeg, extension=".jpg").shape == (256, 256, 3)
    assert ask(port, "POST", "/steer", json.dumps({"action": "left"}))[0] == 200
    assert show.action == "left"
    assert ask(port, "POST", "/steer", json.dumps({"prompt": "a blue star"}))[0] == 200
    watch(port, 5)
    state = json.loads(ask(port, "GET", "/state")[1])
    assert state["mode"] == "text"
    assert state["prompt"] == "a blue star"
    assert state["frame"] >= 5
    assert ask(port, "POST", "/steer", json.dumps({"looks": "a red star"}))[0] == 200
    assert show.state()["mode"] == "play"


def test_several_tabs_see_the_same_frames_and_nothing_runs_when_all_are_closed(page):
    port, show = page
    tabs = [threading.Thread(target=watch, args=(port, 10)) for _ in range(3)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join(timeout=30)
    assert not any(tab.is_alive() for tab in tabs)
    assert until(lambda: show.viewers == 0)
    time.sleep(0.3)
    number = show.number
    time.sleep(0.3)
    assert show.number == number
    assert watch(port, 2)  # and on it goes with the next tab


def test_the_rate_shown_is_of_all_frames_not_of_the_quick_ones():
    def bursts(prompt):  # five at once every tenth of a second: 50 frames/s
        for number in itertools.count():
            time.sleep(0.1 * (number % 5 == 0))
            yield torch.zeros(3, 64, 64)

    show = Show(None, bursts, fps=1000)
    show.mode, show.viewers = "text", 1
    threading.Thread(target=show.run, daemon=True).start()
    assert until(lambda: show.number > 80)
    assert 15 < show.state()["frames/s"] < 100
    show.viewers = 0


def test_junk_is_refused_and_harms_nothing(page):
    port, show = page
    for body in (
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
    ):
        assert ask(port, "POST", "/steer", body)[0] == 400
    assert ask(port, "POST", "/other", "{}")[0] == 400
    assert ask(port, "GET", "/../play.py")[0] == 404
    assert ask(port, "PUT", "/")[0] == 501
    assert ask(port, "GET", "/", Host="example.com")[0] == 403
    with socket.create_connection(("127.0.0.1", port)) as junk:
        junk.sendall(b"\x00\xff nonsense\r\n\r\n")
        junk.recv(1000)
    assert show.state()["action"] == "none"
    assert watch(port, 2)


def test_a_port_that_is_taken_is_named(page, tiny, command_line):
    status, _, err = command_line(play, "--port", page[0], *tiny[1])
    assert status == 2
    assert "choose another with --port" in err
