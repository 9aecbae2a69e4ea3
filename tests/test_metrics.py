import pytest
import torch
from conftest import generator

import data
from data import FPS, FRAMES, sample_clips
from metrics import fit_motions, frame_quality, measure, recover


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


# ------------------------------------------------------------- what is right is right by eye, alone
SECONDS = torch.arange(FRAMES) / FPS


def judged(motion, spoil, shape=2):
    """Whether a clip of a motion is called right once `spoil(x, y, radius, angle)` changed it."""
    every = sample_clips(2000, generator(5), "all")
    clips = every[(every.motion == motion) & (every.shape == shape)]
    clip = clips[clips.radius.argsort()[-1:]]  # the largest: its paths are the shortest
    x, y, radius, angle = clip.track(SECONDS)
    shapes = clip.shape.expand(FRAMES)
    spoiled = spoil(x, y, radius, angle) or (x, y, radius, angle)
    if len(spoiled) == 5:
        *spoiled, shapes = spoiled
    frames = (v.expand(FRAMES) for v in (clip.colour, shapes, clip.background))
    video = data.draw(*frames, *(v.view(FRAMES, 1) for v in spoiled)).movedim(1, 0)
    return measure(video, clip)["text alignment"].item() == 100


def as_it_is(x, y, radius, angle):
    return x, y, radius, angle


def jittered(x, y, radius, angle):
    g = generator(1)
    x, y = (v + 0.3 * torch.randn(v.shape, generator=g) for v in (x, y))
    return x, y, radius * (1 + 0.02 * torch.randn(x.shape, generator=g)), angle


@pytest.mark.parametrize("spoil", [as_it_is, jittered])
@pytest.mark.parametrize("motion", range(8))
def test_a_motion_is_right_also_with_a_jitter(motion, spoil):
    assert judged(motion, spoil)


def looped(x, y, radius, angle):
    """A sine from wall to wall on each axis."""
    reach = 32 - radius * data.REACH - 1
    return 32 + reach * torch.sin(1.6 * SECONDS), 32 + reach * torch.sin(2.1 * SECONDS)


def turned_early(x, y, radius, angle):
    """Turns five pixels before the walls."""
    wall = radius * data.REACH + 6
    x = data.reflect(x[:, :1] - wall + 18 * SECONDS, wall)
    return x, data.reflect(y[:, :1] - wall + 14 * SECONDS, wall)


def sped_up(x, y, radius, angle):
    """Goes half as fast for half of the clip."""
    half = torch.cat([torch.arange(40) / 2, 20 + torch.arange(41.0)]).long()
    return x[:, half], y[:, half]


@pytest.mark.parametrize("path", [looped, turned_early, sped_up])
def test_a_bounce_that_bends_is_no_bounce(path):
    def spoil(x, y, radius, angle):
        return *path(x, y, radius, angle), radius, angle

    assert not judged(data.BOUNCE, spoil)


def test_a_spin_that_becomes_another_shape_is_wrong():
    def spoil(x, y, radius, angle):
        return x, y, radius, angle, torch.where(SECONDS < 3, 2, 1)

    assert not judged(data.SPIN, spoil)


def test_a_shape_that_becomes_another_at_the_end_is_wrong():
    def spoil(x, y, radius, angle):
        return x, y, radius, angle, torch.where(SECONDS < 4, 2, 1)

    assert not judged(data.STILL, spoil)


def test_a_spin_that_stops_is_no_spin():
    def spoil(x, y, radius, angle):
        return x, y, radius, angle[:, torch.arange(FRAMES).clamp(max=40)]

    assert not judged(data.SPIN, spoil)


@pytest.mark.parametrize("motion", [data.CLOCKWISE, data.COUNTER])
def test_an_ellipse_is_no_circle(motion):
    def spoil(x, y, radius, angle):
        return x, 32 + 0.5 * (y - 32), radius, angle

    assert not judged(motion, spoil)


def test_a_slide_that_sinks_is_no_slide():
    def spoil(x, y, radius, angle):
        return x, y + 3 * SECONDS - 7, radius, angle

    assert not judged(data.SLIDE, spoil)


def test_what_pulses_in_its_place_and_drifts_is_wrong():
    def spoil(x, y, radius, angle):
        return x + 2 * SECONDS - 5, y, radius, angle

    assert not judged(data.PULSE, spoil)


def test_a_shape_that_is_read_as_a_smaller_one_counts_as_wrong():
    every = sample_clips(500, generator(5), "all")
    clip = every[(every.motion == data.STILL) & (every.shape == 3)][:1]  # a star
    found = recover(clip.render())
    found.radius[:] = 9.0
    found.shape[:, ::3], found.radius[:, ::3] = 0, 7.0  # a circle of the star's area
    assert measure(clip.render(), clip, found)["shape"].item() == 0
