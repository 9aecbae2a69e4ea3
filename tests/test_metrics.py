import torch

from data import REACH, SIZE, draw, sample_clips
from metrics import fit_motions, frame_quality, recover
from nfd_world import ACTIONS, actions_obeyed, sample_walks


def test_recovery_finds_what_was_drawn():
    clips = sample_clips(16, torch.Generator().manual_seed(0), "all")
    video = clips.render()
    found, (x, y, radius, _) = recover(video), clips.track(torch.arange(81) / 16)
    for name in ("colour", "shape", "background"):
        assert (getattr(found, name) == getattr(clips, name)[:, None]).all()
    assert (found.x - x).abs().max() < 0.1
    assert (found.y - y).abs().max() < 0.1
    assert (found.radius - radius).abs().max() < 0.2
    assert (found.video - video).abs().mean() < 0.003


def test_the_law_of_the_right_motion_fits_best():
    clips = sample_clips(48, torch.Generator().manual_seed(3), "all")
    found = recover(clips.render())
    error = fit_motions(found, clips.shape)
    assert (error.argmin(1) == clips.motion).all()
    assert error.amin(1).sqrt().max() < 1


def test_real_walks_obey_their_actions_and_others_do_not():
    walks = sample_walks(12, 60, torch.Generator().manual_seed(0))
    video = walks.render()
    found = recover(video)
    assert actions_obeyed(found, walks.actions).float().mean() > 0.99
    others = actions_obeyed(found, walks.actions.roll(1, 0)).float().mean()
    assert 0.1 < others < 0.5  # one in five, and more where neither moves
    late = actions_obeyed(
        found, walks.actions.roll(1, 1)
    )  # a delay of one frame shows where actions change
    assert late.float().mean() < 0.9
    assert frame_quality(video, found).mean() > 0.98
    assert frame_quality(video + 0.3 * torch.randn_like(video), found).mean() < 0.7


def held_to_the_right(x, radius):
    """The share of frames that obey "right" in a walk drawn at x [1, F] with radius [1, F]."""
    red_circle, still = torch.zeros(3, 1, dtype=torch.long), torch.zeros_like(x)
    found = recover(draw(*red_circle, x, torch.full_like(x, 32), radius, still))
    right = torch.full(x.shape, list(ACTIONS).index("right"))
    return actions_obeyed(found, right).float().mean()


def test_a_wall_stops_a_shape_of_the_walks_own_size():
    radius = torch.full((1, 120), 13.0)
    wall = SIZE - REACH * radius - 1
    assert held_to_the_right(wall, radius) == 1
    assert held_to_the_right(wall + 3, radius) == 0  # 3 pixels beyond it
    growing = torch.linspace(10, 15, 120)[None]
    assert held_to_the_right(SIZE - REACH * growing - 1, growing) < 0.5
