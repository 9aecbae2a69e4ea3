import itertools
import socket
import time

import imageio.v3 as iio
import torch
from conftest import generator, tiny_model, tiny_vae
from pages import plain_frames, player, running, state, steer, until, watch

import play
from media import to_uint8
from page import AHEAD, Show, stream_text
from play import NAMES
from sample import text_to_video
from text import TextEncoder


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
