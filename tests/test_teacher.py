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
def test_the_bidirectional_teacher_has_one_time_for_a_clip():
    t = draw_clip_times(50, 6, Schedule(shift=5.0), generator())
    assert t.shape == (50, 6)
    assert (t == t[:, :1]).all()


@pytest.mark.parametrize(("frames", "shifts"), [(1, [5.0]), (6, [1.25, 5.0, 10.0])])
def test_clips_have_three_shifts_and_images_that_of_the_schedule(frames, shifts):
    t = draw_clip_times(20_000, frames, Schedule(shift=5.0), generator())[:, 0]
    # a shifted logit-normal time: logit t = log(shift) + a normal number
    logs = torch.tensor(shifts).log()
    assert abs(t.logit().mean() - logs.mean()) < 0.03
    assert abs(t.logit().var() - (1 + logs.var(correction=0))) < 0.05


# ------------------------------------------------------------------------------------- the batches
def test_the_teacher_learns_images_first_and_then_clips():
    assert [batch_shape(i, 100, 2, 21) for i in (0, 50, 51)] == [(32, 1), (2, 21), (6, 7)]


def test_a_tenth_of_the_prompts_is_dropped():
    kept = drop_prompts(torch.ones(20_000, 2, 3), generator()).flatten(1)
    assert (kept == kept[:, :1]).all()
    assert abs((kept[:, 0] == 0).float().mean() - 0.1) < 0.01
