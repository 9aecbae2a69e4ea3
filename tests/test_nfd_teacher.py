import os
from types import SimpleNamespace

import pytest
import torch
from conftest import generator, tiny_action_model, tiny_model, tiny_text, tiny_vae

from diffusion import Schedule
from metrics import recover
from nfd_teacher import (
    ActionConfig,
    WalkLatents,
    draw_walk_times,
    own_past,
    solve_frame,
    stream_walks,
    with_actions,
)
from nfd_world import ACTIONS, RADIUS, sample_walks
from sample import text_to_video


# -------------------------------------------------------------------------------------- the model
def changed(before, after, least=1e-4):
    """Which frames of two batches [B, T, C, h, w] differ: [B, T]."""
    return (before - after).flatten(2).norm(dim=2) > least


def test_an_action_reaches_its_frame_and_what_comes_after():
    model, x, t = tiny_action_model(), torch.randn(2, 5, 8, 8, 8), torch.rand(2, 5)
    text = tiny_text().expand(2, -1, -1)
    actions = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 2, 2]])
    other = actions.clone()
    other[:, 2] = 1
    before, after = (model(x, t, (text, a), chunk=1) for a in (actions, other))
    assert changed(before, after, 0).tolist() == [[False] * 2 + [True] * 3] * 2


def test_a_config_without_actions_is_refused():
    with pytest.raises(ValueError, match="num_actions"):
        ActionConfig(num_actions=0)


@pytest.fixture
def teacher_and_student():
    """A text model of 5 layers, and the action model of 3 that is made of it."""
    teacher = tiny_model(num_layers=5)
    return teacher, with_actions(teacher, layers=3)


def test_an_action_model_begins_as_its_teacher_without_actions(teacher_and_student):
    teacher, model = teacher_and_student
    x, t = torch.randn(2, 5, 8, 8, 8), torch.rand(2, 5)
    text, actions = tiny_text().expand(2, -1, -1), torch.randint(len(ACTIONS), (2, 5))
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in (0, 2, 4))  # evenly spaced
    assert torch.equal(model(x, t, (text, actions), chunk=1), teacher(x, t, text, chunk=1))


def test_making_an_action_model_leaves_its_teacher_as_it_is(teacher_and_student):
    assert len(teacher_and_student[0].blocks) == 5


def test_an_action_model_goes_frame_by_frame(teacher_and_student):
    assert teacher_and_student[1].config.chunk == 1


def test_an_action_model_learns_its_actions(teacher_and_student):
    assert teacher_and_student[1].action_embedding.weight.requires_grad


def test_an_action_model_made_of_another_knows_its_actions():
    other = tiny_action_model()
    model = with_actions(other, layers=1)
    assert torch.equal(model.action_embedding.weight, other.action_embedding.weight)


# ---------------------------------------------------------------------------------------- sampling
def take(stream, count):
    """The latents [B, count, C, h, w] of a stream's first chunks."""
    return torch.cat([next(stream)[0] for _ in range(count)], dim=1)


def test_actions_that_say_nothing_leave_what_the_text_model_streams():
    teacher = tiny_model(chunk=1, window=16, shift=12.0)
    model, text = with_actions(teacher, layers=1), tiny_text()
    actions = torch.randint(len(ACTIONS), (1, 4))
    plain = take(text_to_video(teacher, tiny_vae(1), text, generator()), 4)
    walk = take(stream_walks(model, tiny_vae(1), text, actions, generator()), 4)
    assert torch.equal(walk, plain)


def test_a_streams_action_changes_its_frame_and_none_before():
    model, actions = tiny_action_model(), torch.tensor([[0, 1, 1, 1]])
    parts = (model, tiny_vae(1), tiny_text())
    other = torch.tensor([[0, 1, 2, 1]])
    before, after = (take(stream_walks(*parts, a, generator()), 4) for a in (actions, other))
    assert changed(before, after).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stream_takes_the_steps_it_is_told(steps):
    model, passes = tiny_action_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    actions = torch.zeros(1, 1, dtype=torch.long)
    next(stream_walks(model, tiny_vae(1), tiny_text(), actions, generator(), steps, ode=True))
    assert len(passes) == steps


def test_a_frame_along_the_ode_takes_plain_euler_steps():
    model, x = tiny_action_model(), torch.randn(1, 1, 8, 8, 8)
    condition = (model.text_keys(tiny_text()), torch.tensor([[3]]))
    cache, times = model.new_cache(1, 8, 8), torch.tensor([1.0, 0.6, 0.0])
    made = solve_frame(model, x, times, condition, cache)
    with torch.no_grad():
        for t, r in ((1.0, 0.6), (0.6, 0.0)):
            v = model(x, torch.full((1, 1), t), condition, chunk=1)
            x = x - (t - r) * v  # no null prompts, no guidance
    assert torch.allclose(made, x, atol=1e-5)


# -------------------------------------------------------------------------------- walks as latents
@pytest.fixture(scope="module")
def batch():
    """(walks, x0, prompts, actions, past) of 200 pieces; x0 says of which walk and frame it is."""
    data = WalkLatents.__new__(WalkLatents)  # without a VAE: the draw is what is tested
    data.walks = sample_walks(8, 48, generator())
    places = (100 * torch.arange(8)[:, None] + torch.arange(48)).float()
    data.latents = places[..., None, None, None]
    data.drifted = data.latents + 0.5
    return data.walks, *data.batch(200, 24, generator(), "cpu")


def test_a_piece_of_a_walk_is_of_neighbouring_frames(batch):
    _, x0, *_ = batch
    frame = x0[:, :, 0, 0, 0] % 100
    assert (frame.diff(dim=1) == 1).all()
    assert frame[:, 0].max() > 0


def test_a_piece_of_a_walk_has_its_actions(batch):
    walks, x0, _, actions, _ = batch
    place = x0[:, :, 0, 0, 0].long()
    assert torch.equal(actions[:, 1:], walks.actions[place // 100, place % 100][:, 1:])


def test_no_action_leads_to_the_first_frame_of_a_piece(batch):
    assert not batch[3][:, 0].any()


def test_drawing_pieces_leaves_the_walks_actions_as_they_are(batch):
    assert torch.equal(batch[0].actions, sample_walks(8, 48, generator()).actions)


def test_a_piece_of_a_walk_has_its_prompt(batch):
    walks, x0, prompts, *_ = batch
    assert prompts == walks[x0[:, 0, 0, 0, 0].long() // 100].prompts()


def test_the_past_of_a_piece_is_of_the_same_frames(batch):
    _, x0, _, _, past = batch
    assert torch.equal(past, x0 + 0.5)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Walks whose latents are their pixels: (WalkLatents, what it shows, what its past shows)."""
    parts = {"parameters": lambda: iter([torch.zeros(1)]), "encode": torch.clone}
    vae = SimpleNamespace(mean=torch.zeros(1), **parts)
    walks, folder = sample_walks(100, 2, generator()), os.getcwd()
    os.chdir(tmp_path_factory.mktemp("walks"))
    try:
        data, again = WalkLatents(vae, walks), WalkLatents(vae, walks)
        kept = os.listdir("runs/latents")
    finally:
        os.chdir(folder)
    shown, past = recover(data.latents.float()), recover(data.drifted.float())
    return SimpleNamespace(data=data, again=again, kept=kept, shown=shown, past=past)


def test_walks_are_encoded_as_they_are(latents):
    assert (latents.shown.radius - RADIUS).abs().max() < 0.3


def test_a_past_that_has_drifted_shows_shapes_of_other_sizes(latents):
    off = latents.past.radius.mean(1) - RADIUS
    assert -1.8 < off.min() < -1.3
    assert 1.3 < off.max() < 1.8


def test_a_past_that_has_drifted_shows_the_same_places(latents):
    smaller = latents.past.radius.mean(1) < RADIUS  # what is larger a wall may cut
    for axis in ("x", "y"):
        moved = getattr(latents.past, axis) - getattr(latents.shown, axis)
        assert moved[smaller].abs().max() < 0.2


def test_walks_and_their_past_are_kept_in_two_files(latents):
    assert len(latents.kept) == 2


def test_a_drifted_past_is_the_same_every_time(latents):
    assert torch.equal(latents.again.drifted, latents.data.drifted)


# ------------------------------------------------------------------------------------------- times
@pytest.fixture(scope="module")
def times():
    """Times of 8000 walks by their kind: (every other frame, blocks of 8, single frames)."""
    t = draw_walk_times(8000, 24, Schedule(shift=12.0), generator())
    assert t.shape == (8000, 24)
    return t[1::2], t[2::4], t[::4]


@pytest.mark.parametrize(("kind", "median"), [(0, 12 / 13), (1, 12 / 13), (2, 3 / 4)])
def test_single_frames_have_a_quarter_of_the_shift(times, kind, median):
    t = times[kind]
    assert abs(t[t > 0].median() - median) < 0.01


def test_in_half_of_the_walks_every_other_frame_is_clean(times):
    noisy = times[0] > 0
    assert not (noisy[:, 1:] & noisy[:, :-1]).any()
    assert (noisy[:, ::2].any(1) != noisy[:, 1::2].any(1)).all()
    assert (noisy.sum(1) >= 11).all()


def test_the_first_of_every_other_frame_is_clean_in_half_of_the_walks(times):
    assert abs((times[0][:, 0] > 0).float().mean() - 0.5) < 0.03


def test_a_block_of_8_frames_has_one_time(times):
    block = times[1]
    assert (block[:, 8:16] == block[:, 8:9]).all()


def test_half_of_the_blocks_are_noisy_also_after_clean_ones(times):
    block = times[1]
    assert ((block[:, 8] > 0) & (block[:, 0] == 0)).any()
    assert abs((block[:, 8] > 0).float().mean() - 0.5) < 0.05


def test_noisy_single_frames_have_times_of_their_own(times):
    single = times[2]
    assert ((single[:, 1:4] != single[:, :3]) | (single[:, :3] == 0)).all()


def test_half_of_the_single_frames_are_noisy(times):
    assert abs((times[2][:, :4] > 0).float().mean() - 0.5) < 0.03


# ------------------------------------------------------------------------- the model's own past
class World:
    """A random action model and 8 walks of so many frames, of which it makes its own past."""

    def __init__(self, window=6, frames=9):
        self.model = tiny_action_model(window=window)
        self.x0, self.text = torch.randn(8, frames, 8, 4, 4), torch.randn(8, 3, 64)
        self.actions = torch.randint(len(ACTIONS), (8, frames))

    def past(self, x0=None, actions=None, walks=slice(None), steps=2, seed=0):
        x0 = self.x0 if x0 is None else x0
        actions = self.actions if actions is None else actions
        parts = (x0[walks], steps, self.text[walks], actions[walks])
        return own_past(self.model, *parts, generator(seed))

    def changes(self, **other):
        """Which frames of the second to fourth walk another past changes, in all three."""
        return changed(self.past(), self.past(**other))[1:4].all(0).tolist()


def test_the_models_own_past_is_four_frames_after_data():
    world = World()
    kept = ~changed(world.past(), world.x0, 0)[1:4]
    assert kept.tolist() == [[True] * 3 + [False] * 4 + [True] * 2] * 3


def test_the_models_own_past_is_a_constant():
    assert not World().past().requires_grad


def test_all_frames_of_the_own_past_follow_the_data_before_them():
    world = World()
    early = world.x0.clone()
    early[:, 2] = torch.randn_like(early[:, 2])
    assert world.changes(x0=early) == [False] * 2 + [True] * 5 + [False] * 2


def test_no_frame_of_the_own_past_sees_the_data_after_it():
    world = World()
    late = world.x0.clone()
    late[:, 5] = torch.randn_like(late[:, 5])
    assert world.changes(x0=late) == [False] * 5 + [True] * 2 + [False] * 2


def test_an_action_changes_its_frame_of_the_own_past_and_later_ones():
    world = World()
    actions = world.actions.clone()
    actions[:, 4] = (actions[:, 4] + 1) % len(ACTIONS)
    assert world.changes(actions=actions) == [False] * 4 + [True] * 3 + [False] * 2


def test_a_batch_of_one_has_a_past_of_its_own_too():
    world = World()
    made = world.past(walks=slice(1))
    assert made.shape == world.x0[:1].shape
    assert not torch.equal(made, world.x0[:1])
    assert torch.equal(made[:, 7:], world.x0[:1, 7:])


def test_half_of_the_own_pasts_begin_with_data():
    world = World(window=12, frames=12)
    assert torch.equal(world.past()[1:4, :6], world.x0[1:4, :6])


def test_half_of_the_own_pasts_begin_with_four_frames_of_their_own():
    world = World(window=12, frames=12)  # 6 given frames
    own = changed(world.past(), world.x0, 1e-2)[4:, :6]
    assert own.tolist() == [[True] * 4 + [False] * 2] * 4


def test_the_first_frames_of_an_own_past_follow_one_another():
    world = World(window=12, frames=12)
    other = world.x0.clone()
    other[:, 0] = torch.randn_like(other[:, 0])
    assert (
        changed(world.past(), world.past(x0=other))[4:, :6].tolist()
        == [[True] * 4 + [False] * 2] * 4
    )


@pytest.fixture(scope="module")
def starting_times():
    """The times at which 32 own pasts begin: of the later runs, and of the first ones [32]."""
    torch.manual_seed(0)
    world, later, first = World(), [], []
    torch.nn.init.zeros_(world.model.head.head.weight)  # v = 0: a frame stays as noisy as it begins
    for seed in range(32):
        made = world.past(steps=1, seed=seed)
        eps = torch.randn(world.x0.shape, generator=generator(seed))
        for times, piece in (
            (later, (slice(1, None), slice(3, 7))),
            (first, (slice(4, None), slice(0, 3))),
        ):
            x0, noise = world.x0[piece], eps[piece]
            t = ((made[piece] - x0) / (noise - x0)).median()
            # x_t = (1 - t) x0 + t eps
            assert torch.allclose(made[piece], (1 - t) * x0 + t * noise, atol=1e-4)
            times.append(t)
    return torch.stack(later), torch.stack(first)


def test_an_own_past_begins_with_data_noised_to_a_random_time(starting_times):
    later, _ = starting_times
    assert 0.2 < later.min() < 0.3
    assert 0.5 < later.max() < 0.6


def test_the_first_run_of_an_own_past_begins_with_more_noise(starting_times):
    later, first = starting_times
    assert torch.allclose(first, later + 0.3, atol=1e-4)


def test_in_every_eighth_walk_the_past_is_lost():
    world, none = World(), torch.zeros(1, 1, dtype=torch.long)
    made, noise = world.past()[:1], torch.randn(world.x0.shape, generator=generator())
    for f in range(9):  # x0 = eps - v: a guess without a past
        eps = noise[:1, f : f + 1]
        v = world.model(eps, torch.ones(1, 1), (world.text[:1], none), chunk=1)
        assert torch.allclose(made[:, f : f + 1], eps - v, atol=1e-5)
