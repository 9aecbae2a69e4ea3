import math

import pytest
import torch
from conftest import generator

from data import (
    BOUNCE,
    CLOCKWISE,
    COLOURS,
    COUNTER,
    FPS,
    FRAMES,
    MOTIONS,
    PULSE,
    REACH,
    RISE,
    SHAPES,
    SIZE,
    SLIDE,
    SPIN,
    STILL,
    combinations,
    sample_clips,
)

MOVES = {
    STILL: "",
    SLIDE: "x",
    RISE: "y",
    BOUNCE: "xy",
    CLOCKWISE: "xy",
    COUNTER: "xy",
    SPIN: "angle",
    PULSE: "radius",
}


def clips(count=400, split="all", seed=0):
    return sample_clips(count, generator(seed), split)


def rows(split):
    return set(map(tuple, combinations(split).tolist()))


@pytest.fixture(scope="module")
def tracks():
    """3000 clips and their tracks (x, y, radius, angle), each [B, F]."""
    many = clips(3000)
    return many, many.track(torch.arange(FRAMES) / FPS)


# ------------------------------------------------------------------------------------------ clips
def test_the_same_seed_gives_the_same_clips():
    assert torch.equal(clips(3).render(), clips(3).render())


def test_another_seed_gives_other_clips():
    assert not torch.equal(clips(3).render(0, 2), clips(3, seed=1).render(0, 2))


def test_a_video_has_81_frames_of_64_by_64_pixels():
    assert clips(2).render().shape == (2, 81, 3, 64, 64)


def test_pixels_lie_between_minus_1_and_1():
    video = clips(2).render()
    assert video.min() >= -1
    assert video.max() <= 1


def test_a_piece_of_a_clip_is_drawn_as_in_the_whole():
    assert torch.equal(clips(2).render(7, 3), clips(2).render()[:, 7:10])


# ------------------------------------------------------------------------------------- the splits
def test_held_out_combinations_are_never_in_training():
    assert not rows("train") & rows("held-out")


def test_every_combination_is_in_training_or_held_out():
    assert rows("train") | rows("held-out") == rows("all")


def test_a_tenth_of_the_combinations_is_held_out():
    assert 0.09 < len(rows("held-out")) / len(rows("all")) < 0.11


def test_a_circle_does_not_spin():
    circle = list(SHAPES).index("circle")
    assert not any(shape == circle and motion == SPIN for _, shape, motion, _ in rows("all"))


def test_every_pair_of_attributes_is_in_training():
    def pairs(split):
        places = [(i, j) for i in range(4) for j in range(i)]
        return {(i, j, row[i], row[j]) for row in rows(split) for i, j in places}

    assert pairs("train") == pairs("all")


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_clips_show_only_combinations_of_their_split(split):
    c = clips(2000, split)
    shown = torch.stack([c.colour, c.shape, c.motion, c.background], dim=1)
    assert set(map(tuple, shown.tolist())) <= rows(split)


# ------------------------------------------------------------------------------------ the motions
@pytest.mark.parametrize(("motion", "named"), MOVES.items(), ids=list(MOTIONS))
def test_every_motion_moves_as_named_and_in_no_other_way(tracks, motion, named):
    many, track = tracks
    for what, values in zip(("x", "y", "radius", "angle"), track, strict=True):
        swing = (values.amax(1) - values.amin(1))[many.motion == motion]
        if what in named:
            assert swing.min() > (math.pi if what == "angle" else 5), what
        else:
            assert swing.max() < 1e-5, what


@pytest.mark.parametrize(("motion", "sense"), [(CLOCKWISE, 1), (COUNTER, -1)])
def test_circling_turns_in_its_named_sense(tracks, motion, sense):
    many, (x, y, _, _) = tracks
    dx, dy = (v - v.mean(1, keepdim=True) for v in (x, y))
    # the cross product of position and velocity is positive when it turns clockwise: y points down
    turning = (dx[:, :-1] * dy.diff(dim=1) - dy[:, :-1] * dx.diff(dim=1)).mean(1)
    assert (sense * turning[many.motion == motion] > 0).all()


def test_a_bounce_is_straight_and_of_constant_speed(tracks):
    many, (x, _, _, _) = tracks
    speed = x[many.motion == BOUNCE].diff(dim=1).abs()
    straight = (speed - speed.median(1, keepdim=True).values).abs() < 1e-3
    assert straight.float().mean() > 0.9


def test_every_bounce_turns_at_a_wall(tracks):
    many, (x, y, _, _) = tracks
    turns = [(v[many.motion == BOUNCE].diff(dim=1).sign().diff(dim=1) != 0) for v in (x, y)]
    assert (turns[0] | turns[1]).any(1).all()


def test_shapes_stay_inside_for_a_minute():
    c = clips(3000)
    x, y, radius, _ = c.track(torch.arange(0, 60 * FPS, 7) / FPS)  # motions go on for ever
    for position in (x, y):
        assert (position - REACH * radius).min() > 0
        assert (position + REACH * radius).max() < SIZE


# ------------------------------------------------------------------------------ pixels and prompts
def test_the_middle_of_a_shape_has_its_colour():
    c = clips(200)
    video = c.render(0, 1)[:, 0] * 127.5 + 127.5
    x, y = (v[:, 0].long() for v in c.track(torch.zeros(1))[:2])
    colours = torch.tensor(list(COLOURS.values()))[c.colour].float()
    assert torch.allclose(video[torch.arange(200), :, y, x], colours, atol=1)


def test_a_circle_covers_more_than_a_square_than_a_triangle():
    c = clips(200)
    video = c.render(0, 1)[:, 0]
    area = ((video - video[:, :, :1, :1]).abs().sum(1) > 0.2).sum((1, 2)) / c.radius**2
    circle, square, triangle = (
        area[(c.shape == shape) & (c.motion != PULSE)].mean() for shape in range(3)
    )
    assert circle > square > triangle


def test_there_are_four_shapes():
    assert len(SHAPES) == 4


def test_the_same_clips_have_the_same_prompts():
    assert clips(5).prompts() == clips(5).prompts()


def test_prompts_name_every_attribute_in_every_wording():
    c = clips(200)
    looks = zip(c.prompts(generator()), c.colour, c.shape, c.motion, strict=True)
    for prompt, colour, shape, motion in looks:
        assert list(COLOURS)[colour] in prompt
        assert list(SHAPES)[shape] in prompt
        assert any(words in prompt for words in list(MOTIONS.values())[motion])


def test_orange_has_the_article_an():
    prompts = " ".join(clips(200).prompts() + clips(200).prompts(generator()))
    assert "an orange" in prompts
    assert "a orange" not in prompts


def test_a_generator_gives_a_clip_several_wordings():
    draws = generator()
    assert len({clips(1).prompts(draws)[0] for _ in range(40)}) > 5
