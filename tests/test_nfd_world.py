import pytest
import torch
from conftest import generator

from data import COLOURS, REACH, SIZE, draw, palette
from metrics import frame_quality, recover
from nfd_world import ACTIONS, MOVES, RADIUS, STEP, actions_obeyed, measure_walks, sample_walks

WALL = RADIUS * REACH + 1


# ------------------------------------------------------------------------------------------ walks
@pytest.fixture(scope="module")
def walks():
    return sample_walks(200, 60, generator())


@pytest.mark.parametrize("axis", [0, 1])
def test_an_action_moves_the_shape_by_a_step_up_to_a_wall(walks, axis):
    at = walks.track()[axis]
    goal = at[:, :-1] + STEP * MOVES[walks.actions[:, 1:]][..., axis]
    assert torch.allclose(at[:, 1:], goal.clamp(WALL, SIZE - WALL), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_walls_stop_some_of_the_moves(walks, axis):
    at = walks.track()[axis]
    goal = at[:, :-1] + STEP * MOVES[walks.actions[:, 1:]][..., axis]
    assert 0.02 < ((goal < WALL) | (goal > SIZE - WALL)).float().mean() < 0.5


def test_a_walk_never_leaves_its_walls(walks):
    at = torch.stack(walks.track())
    assert at.min() >= WALL - 1e-4
    assert at.max() <= SIZE - WALL + 1e-4


def test_no_action_leads_to_the_first_frame(walks):
    assert (walks.actions[:, 0] == 0).all()


def test_every_action_is_drawn_often(walks):
    assert (torch.bincount(walks.actions.flatten(), minlength=len(ACTIONS)) > 1000).all()


def test_some_walks_hold_their_actions_and_some_change_them(walks):
    held = (walks.actions.diff(dim=1) == 0).float().mean(1)
    assert held.min() < 0.4
    assert held.max() > 0.95


def test_a_video_of_walks_has_a_frame_for_each_action():
    assert sample_walks(3, 5, generator(1)).render().shape == (3, 5, 3, 64, 64)


def test_the_same_seed_gives_the_same_walks():
    first, second = (sample_walks(3, 5, generator(1)).render() for _ in range(2))
    assert torch.equal(first, second)


def test_a_shape_of_its_colour_is_where_the_track_says():
    walks = sample_walks(3, 5, generator(1))
    x, y = (at[:, 4].long() for at in walks.track())
    middle = walks.render()[torch.arange(3), 4, :, y, x]
    assert torch.allclose(middle, palette(COLOURS)[walks.colour], atol=1e-4)


def test_the_prompt_of_a_walk_names_its_colour():
    walks = sample_walks(3, 5, generator(1))
    for colour, prompt in zip(walks.colour, walks.prompts(), strict=True):
        assert list(COLOURS)[colour] in prompt


# ------------------------------------------------------------------------------------ the measure
@pytest.fixture(scope="module")
def real():
    """(walks, their video, what was recovered of it)."""
    walks = sample_walks(12, 60, generator())
    video = walks.render()
    return walks, video, recover(video)


def test_real_walks_obey_their_actions(real):
    walks, _, found = real
    assert actions_obeyed(found, walks.actions).float().mean() > 0.99


def test_real_walks_do_not_obey_the_actions_of_others(real):
    walks, _, found = real
    others = actions_obeyed(found, walks.actions.roll(1, 0)).float().mean()
    assert 0.1 < others < 0.5  # one in five, and more where neither moves


def test_a_delay_of_one_frame_is_not_obedience(real):
    walks, _, found = real
    late = actions_obeyed(found, walks.actions.roll(1, 1))
    assert late.float().mean() < 0.9  # it shows where actions change


def test_frame_quality_of_real_walks_is_full(real):
    _, video, found = real
    assert frame_quality(video, found).mean() > 0.98


def test_frame_quality_of_noisy_walks_is_low(real):
    _, video, found = real
    assert frame_quality(video + 0.3 * torch.randn_like(video), found).mean() < 0.7


def test_walks_are_measured_as_a_whole_and_at_their_end(real):
    walks, video, _ = real
    names = ("action accuracy", "frame quality", "looks")
    expected = {name + part for name in names for part in ("", ", last 10 s")}
    assert set(measure_walks(video, walks)) == expected


def test_every_measure_of_real_walks_is_full(real):
    walks, video, _ = real
    assert min(measure_walks(video, walks).values()) > 98


def test_looks_tell_walks_of_other_prompts_apart(real):
    walks, video, _ = real
    others = walks[torch.arange(12).roll(1)]
    assert measure_walks(video, others)["looks"] < 20


def held_to_the_right(x, radius):
    """The share of frames that obey "right" in a walk drawn at x [1, F] with radius [1, F]."""
    red_circle, still = torch.zeros(3, 1, dtype=torch.long), torch.zeros_like(x)
    found = recover(draw(*red_circle, x, torch.full_like(x, 32), radius, still))
    right = torch.full(x.shape, list(ACTIONS).index("right"))
    return actions_obeyed(found, right).float().mean()


@pytest.mark.parametrize(("beyond", "share"), [(0, 1), (3, 0)])
def test_a_wall_stops_a_shape_of_the_walks_own_size(beyond, share):
    radius = torch.full((1, 120), 13.0)
    assert held_to_the_right(SIZE - REACH * radius - 1 + beyond, radius) == share


def test_a_shape_that_grows_at_the_wall_does_not_obey():
    growing = torch.linspace(10, 15, 120)[None]
    assert held_to_the_right(SIZE - REACH * growing - 1, growing) < 0.5
