import itertools
import os

import imageio.v3 as iio
import pytest
import torch
from conftest import generator, tiny_action_model, tiny_model, tiny_text, tiny_vae

import play
from nfd_teacher import stream_walks
from play import NAMES, Player, parse_actions
from vae import MemoryBlock
from weights import UserError, save_weights, shipped

RIGHT, UP = NAMES.index("right"), NAMES.index("up")


# ------------------------------------------------------------------------------------ the player
def parts():
    """(model, VAE, text) of a small world, in double precision."""
    model = tiny_action_model(num_layers=2, window=3).requires_grad_(False)
    return model.double(), tiny_vae(1).double(), tiny_text("a red circle").double()


def world(most, seed=0):
    return Player(*parts(), generator(seed), most=most)


def test_without_speculation_a_player_shows_what_the_stream_makes():
    actions, player = [0, RIGHT, RIGHT, UP, 0, UP], world(1)
    streamed = stream_walks(*parts(), torch.tensor([actions]), generator())
    for action, (_, video) in zip(actions, streamed, strict=False):
        assert (player.step(action) - video[0, 0]).abs().max() < 1e-10


def test_without_speculation_every_frame_is_a_block_and_is_shown():
    player = world(1)
    for action in (0, RIGHT, RIGHT, UP, 0, UP):
        player.step(action)
    assert player.made == player.blocks == 6
    assert player.dropped == 0


@pytest.fixture
def held():
    """A player whose action has stayed for 40 frames, so that it makes frames ahead."""
    player = world(4)
    for _ in range(40):
        player.step(RIGHT)
    return player


def test_a_guess_that_holds_makes_four_frames_a_block(held):
    before = held.blocks
    for _ in range(40):
        held.step(RIGHT)
    assert held.guesses() == 4
    assert held.blocks - before <= 11


def test_a_guess_that_holds_drops_no_frame(held):
    assert held.dropped == 0


def test_a_guess_that_fails_drops_all_frames_ahead(held):
    while not held.ahead:
        held.step(RIGHT)
    ahead = len(held.ahead)
    held.step(UP)
    assert held.dropped == ahead > 0


@pytest.fixture
def rejected():
    """A player that dropped frames, one that made only those shown, and frames shown a block."""
    actions, shown = [RIGHT] * 25 + [UP] * 2 + [RIGHT], []
    speculated, plain = world(4), world(4)
    speculated.guesses = itertools.repeat(4).__next__
    for action in actions:
        if action != speculated.action or not speculated.ahead:  # a new block begins
            shown.append(0)
        speculated.step(action)
        shown[-1] += 1
    plain.guesses = iter(shown).__next__
    for action in actions:
        plain.step(action)
    for player in (speculated, plain):
        player._drop()
        player._remember()
    return speculated, plain, shown


def test_blocks_are_cut_where_an_action_changes(rejected):
    speculated, plain, shown = rejected
    assert speculated.dropped > plain.dropped == 0
    assert max(shown) == 4


def test_dropped_frames_leave_no_trace_in_the_random_state(rejected):
    speculated, plain, _ = rejected
    assert torch.equal(speculated.generator.get_state(), plain.generator.get_state())


@pytest.mark.parametrize("part", ["k", "v"])
def test_dropped_frames_leave_no_trace_in_the_cache(rejected, part):
    caches = [player.cache for player in rejected[:2]]
    held = 2 * caches[0].tokens
    assert [cache.frames for cache in caches] == [2, 2]
    speculated, plain = (getattr(cache, part)[:, :, :held] for cache in caches)
    assert torch.equal(speculated, plain)


def remembering(player):
    """Give a player's autoencoder a memory; that of an untrained one changes no pixel."""
    torch.manual_seed(0)
    for block in player.vae.modules():
        if isinstance(block, MemoryBlock):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    return player


def run_ahead(player, wishes):
    """Play (action, frames, frames too many), the last of which are taken back each time.

    -> (frames shown, their actions, and how many of them each block shows)
    """
    frames, actions, blocks = [], [], []
    for action, count, more in wishes:
        for index in range(count + more):
            begins = action != player.action or not player.ahead
            frame = player.step(action)
            if index < count:
                frames.append(frame)
                actions.append(action)
                blocks += [0] * begins
                blocks[-1] += 1
            if index == count - 1:
                mark = player.mark()
        player.back(mark)
    return frames, actions, blocks


WISHES = [(RIGHT, 6, 5), (UP, 3, 1), (RIGHT, 1, 9), (0, 2, 0), (0, 5, 14), (UP, 7, 2), (UP, 1, 3)]


@pytest.mark.parametrize("most", [1, 4])
def test_frames_taken_back_are_as_if_never_made(most):
    ahead, plain = remembering(world(most)), remembering(world(most))
    ahead.guesses = itertools.repeat(most).__next__
    frames, actions, blocks = run_ahead(ahead, WISHES)
    plain.guesses = iter(blocks).__next__
    for frame, action in zip(frames, actions, strict=True):
        assert torch.equal(plain.step(action), frame)
    assert torch.equal(plain.generator.get_state(), ahead.generator.get_state())
    assert ahead.holds == plain.holds


def test_a_mark_can_be_returned_to_more_than_once(held):
    mark, shown = held.mark(), []
    for _ in range(3):
        shown.append(torch.stack([held.step(UP) for _ in range(12)]))
        held.back(mark)
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0], shown[2])


def test_frames_taken_back_count_as_dropped(held):
    mark, before = held.mark(), held.dropped + len(held.ahead)
    made = held.made
    for _ in range(6):
        held.step(UP)
    held.back(mark)
    assert held.dropped - before == held.made - made >= 6


def test_a_player_given_up_within_a_block_goes_on_from_its_mark(held):
    mark, passes = held.mark(), iter([None] * 3)
    expected = torch.stack([held.step(UP) for _ in range(6)])
    held.back(mark)
    hook = held.model.register_forward_pre_hook(lambda *_: next(passes))
    with hook, pytest.raises(StopIteration):
        held.step(UP)
    held.back(mark)
    assert torch.equal(torch.stack([held.step(UP) for _ in range(6)]), expected)


def test_a_block_has_at_most_as_many_frames_as_is_asked_for(held):
    held.step(UP)
    made = held.made
    held.step(RIGHT, most=2)
    assert held.made - made == 2


@pytest.mark.parametrize(("frames_an_action", "least", "most"), [(60, 8, 8), (1, 1, 1), (2, 2, 7)])
def test_guesses_follow_how_often_an_action_stays(frames_an_action, least, most):
    player = world(8)
    for frame in range(60):
        player.step(frame // frames_an_action % 5)
    assert least <= player.guesses() <= most


def test_where_actions_never_stay_nothing_is_made_in_vain():
    player = world(8)
    for frame in range(60):
        player.step(RIGHT if frame % 2 else UP)
    assert player.made == 60


def test_an_action_controls_exactly_the_next_frame():
    one, other = world(4), world(4)
    for frame in range(8):
        a, b = one.step(RIGHT), other.step(RIGHT if frame < 5 else UP)
        assert torch.allclose(a, b, atol=1e-9) == (frame < 5)


def test_a_player_takes_the_steps_of_its_model_or_those_it_is_told():
    model = tiny_action_model(steps=2)
    lengths = [
        len(Player(model, tiny_vae(1), tiny_text(), generator(), steps).times)
        for steps in (None, 5)
    ]
    assert lengths == [3, 6]


# ---------------------------------------------------------------------------------- command line
def test_actions_are_read_as_written():
    assert parse_actions("right*3, up,none*2") == [RIGHT] * 3 + [UP] + [0] * 2


@pytest.mark.parametrize(
    "text", ["", "right,", "sideways", "up*", "up*0", "up*-1", "up*two", "up**2"]
)
def test_actions_that_cannot_be_read_are_refused(text):
    with pytest.raises(UserError, match="cannot read"):
        parse_actions(text)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags that name the weights of a small world."""
    folder, (model, vae, _) = tmp_path_factory.mktemp("weights"), parts()
    paths = [str(folder / name) for name in ("player.safetensors", "vae.safetensors")]
    for path, network in zip(paths, (model, vae), strict=True):
        save_weights(path, network.state_dict(), network.config)
    return ["--weights", paths[0], "--vae", paths[1]]


def test_plays_a_script_into_a_video(flags, command_line):
    status, out, err = command_line(play, "--actions", "right*20,up*10,none*5", *flags)
    assert status == 0, err
    assert iio.imread("play.mp4").shape == (35, 64, 64, 3)
    assert "35 frames" in out
    assert os.listdir() == ["play.mp4"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--actions", "jump"], "cannot read 'jump'"),
        (["--actions", "up", "--out", "a.avi"], "must end in"),
        (["--looks", " "], "--looks: is empty"),
        (["--ahead", 0], "--ahead"),
        (["--steps", 0], "--steps"),
        (["--port", 70000], "--port"),
        (["--actions", "up", "--weights", "none.safetensors"], "none.safetensors"),
        (["--actions", "up", "--vae", shipped("vae")], "frame-wise VAE"),
        (["--actions", "up", "--weights", shipped("student")], "holds 'student', not"),
    ],
)
def test_bad_input_ends_in_one_clear_line(flags, command_line, wrong, message):
    status, _, err = command_line(play, *flags, *wrong)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not os.listdir()


def test_a_text_model_is_not_one_to_play_with(flags, command_line):
    model = tiny_model()
    save_weights("text.safetensors", model.state_dict(), model.config)
    wrong = ("--actions", "up", "--weights", "text.safetensors")
    status, _, err = command_line(play, *flags, *wrong)
    assert status == 2
    assert "text.safetensors" in err
    assert "action" in err
