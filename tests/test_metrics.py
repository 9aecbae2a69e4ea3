import pytest
import torch
from conftest import generator

from data import FPS, FRAMES, sample_clips
from metrics import fit_motions, frame_quality, recover


@pytest.fixture(scope="module")
def drawn():
    """(clips, their video, what was recovered of it)."""
    clips = sample_clips(48, generator(3), "all")
    video = clips.render()
    return clips, video, recover(video)


@pytest.mark.parametrize("name", ["colour", "shape", "background"])
def test_recovery_finds_the_looks_of_every_frame(drawn, name):
    clips, _, found = drawn
    assert (getattr(found, name) == getattr(clips, name)[:, None]).all()


@pytest.mark.parametrize(("name", "pixels"), [("x", 0.1), ("y", 0.1), ("radius", 0.2)])
def test_recovery_finds_the_track(drawn, name, pixels):
    clips, _, found = drawn
    x, y, radius, _ = clips.track(torch.arange(FRAMES) / FPS)
    true = {"x": x, "y": y, "radius": radius}[name]
    assert (getattr(found, name) - true).abs().max() < pixels


def test_recovery_draws_the_video_again(drawn):
    _, video, found = drawn
    assert (found.video - video).abs().mean() < 0.003


def test_frame_quality_of_drawn_clips_is_full(drawn):
    _, video, found = drawn
    assert frame_quality(video, found).mean() > 0.98


def test_noise_lowers_the_frame_quality(drawn):
    _, video, found = drawn
    assert frame_quality(video + 0.3 * torch.randn_like(video), found).mean() < 0.7


@pytest.fixture(scope="module")
def fitted(drawn):
    """(clips, how far each is from the law of each motion)."""
    clips, _, found = drawn
    return clips, fit_motions(found, clips.shape)


def test_the_law_of_the_right_motion_fits_best(fitted):
    clips, error = fitted
    assert (error.argmin(1) == clips.motion).all()


def test_the_law_of_the_right_motion_fits_within_a_pixel(fitted):
    _, error = fitted
    assert error.amin(1).sqrt().max() < 1
