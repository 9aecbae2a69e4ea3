import pytest
import torch
from conftest import generator

from diffusion import Schedule
from teacher import batch_shape, draw_chunk_times, draw_clip_times, drop_prompts


# -------------------------------------------------------------------------------- times of chunks
@pytest.fixture
def times():
    """Times [2000, 8] of clips in chunks of 3, the last of 2."""
    return draw_chunk_times(2000, 8, 3, Schedule(), generator())


def test_the_frames_of_a_chunk_have_one_time(times):
    assert times.shape == (2000, 8)
    assert (times[:, 0] == times[:, 2]).all()
    assert (times[:, 6] == times[:, 7]).all()


def test_each_noisy_chunk_has_a_time_of_its_own(times):
    assert ((times[:, 0] != times[:, 3]) | (times[:, 0] == 0)).all()


def test_half_of_the_chunks_are_clean(times):
    assert abs((times[:, ::3] == 0).float().mean() - 0.5) < 0.03


def test_each_clip_has_a_share_of_clean_chunks_of_its_own(times):
    clean = (times[:, ::3] == 0).float().mean(1)
    # half of the clips are of one kind; a quarter would be if all had the same share
    assert ((clean == 0) | (clean == 1)).float().mean() > 0.4


# --------------------------------------------------------------------------------- times of clips
def drawn(frames, seed=0):
    """(times [20000, frames], which clips have one time for all frames)."""
    t = draw_clip_times(20_000, frames, Schedule(shift=5.0), generator(seed))
    return t, (t == t[:, :1]).all(1)


def test_half_of_the_clips_have_one_time():
    t, alike = drawn(21)
    assert t.shape == (20_000, 21)
    assert abs(alike.float().mean() - 0.5) < 0.02


def test_one_time_for_a_clip_is_spread_as_in_sampling():
    t, alike = drawn(21)
    u = t[alike, 0] / (5 - 4 * t[alike, 0])  # the shift undone
    assert (u.sort().values - torch.linspace(0, 1, len(u))).abs().max() < 0.03


def test_own_times_are_uniform_and_of_runs_of_one_to_four_frames():
    lengths = set()
    for seed in range(20):
        t, alike = drawn(21, seed)
        changes = t[~alike].diff(dim=1) != 0
        length = changes.any(0).int().argmax().item() + 1
        assert changes.all(0).nonzero().flatten().tolist() == list(range(length - 1, 20, length))
        lengths.add(length)
    assert lengths == {1, 2, 3, 4}
    assert (t[~alike, 0].sort().values - torch.linspace(0, 1, (~alike).sum())).abs().max() < 0.03


def test_the_times_of_images_are_uniform():
    t = drawn(1)[0].flatten().sort().values
    assert (t - torch.linspace(0, 1, len(t))).abs().max() < 0.03


# ------------------------------------------------------------------------------------- the batches
def test_the_teacher_learns_images_first_and_then_clips():
    assert [batch_shape(i, 100, 2, 21) for i in (0, 50, 51)] == [(32, 1), (2, 21), (6, 7)]


def test_a_tenth_of_the_prompts_is_dropped():
    kept = drop_prompts(torch.ones(20_000, 2, 3), generator()).flatten(1)
    assert (kept == kept[:, :1]).all()
    assert abs((kept[:, 0] == 0).float().mean() - 0.1) < 0.01
