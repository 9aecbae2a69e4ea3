import math

import torch

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
from nfd_world import ACTIONS, RADIUS, STEP, sample_walks


def clips(count=400, split="all", seed=0):
    return sample_clips(count, torch.Generator().manual_seed(seed), split)


def test_same_seed_same_clip():
    assert torch.equal(clips(3).render(), clips(3).render())
    assert not torch.equal(clips(3).render(0, 2), clips(3, seed=1).render(0, 2))
    assert clips(5).prompts() == clips(5).prompts()


def test_video_is_what_the_design_says():
    video = clips(2).render()
    assert video.shape == (2, 81, 3, 64, 64)
    assert video.min() >= -1
    assert video.max() <= 1
    assert torch.equal(clips(2).render(7, 3), video[:, 7:10])


def test_held_out_combinations_are_never_in_training():
    rows = lambda split: set(map(tuple, combinations(split).tolist()))
    train, held_out = rows("train"), rows("held-out")
    assert not train & held_out
    assert train | held_out == rows("all")
    assert 0.09 < len(held_out) / len(rows("all")) < 0.11
    assert not any(
        shape == 0 and motion == SPIN for _, shape, motion, _ in rows("all")
    )  # a circle does not spin
    pairs = lambda rows: {
        (i, j, row[i], row[j]) for row in rows for i in range(4) for j in range(i)
    }
    assert pairs(train) == pairs(rows("all"))  # every pair is in training
    for split, allowed in (("train", train), ("held-out", held_out)):
        c = clips(2000, split)
        assert (
            set(zip(*(field.tolist() for field in (c.colour, c.shape, c.motion, c.background))))
            <= allowed
        )


def test_every_motion_moves_as_named():
    c = clips(3000)
    x, y, radius, angle = c.track(torch.arange(FRAMES) / FPS)
    swing = lambda values: values.amax(1) - values.amin(1)
    for motion in range(len(MOTIONS)):
        own = c.motion == motion
        moves = {
            "x": swing(x)[own],
            "y": swing(y)[own],
            "radius": swing(radius)[own],
            "angle": swing(angle)[own],
        }
        named = {
            STILL: "",
            SLIDE: "x",
            RISE: "y",
            BOUNCE: "xy",
            CLOCKWISE: "xy",
            COUNTER: "xy",
            SPIN: "angle",
            PULSE: "radius",
        }[motion]
        for what, amount in moves.items():
            if what in named:
                assert amount.min() > (math.pi if what == "angle" else 5), (motion, what)
            else:
                assert amount.max() < 1e-5, (motion, what)
    # circling: the cross product of position and velocity is positive when it turns clockwise (y points down)
    dx, dy = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    turning = (dx[:, :-1] * dy.diff(dim=1) - dy[:, :-1] * dx.diff(dim=1)).mean(1)
    assert (turning[c.motion == CLOCKWISE] > 0).all()
    assert (turning[c.motion == COUNTER] < 0).all()
    # bouncing: straight lines of constant speed, which turn at walls only
    bx, by = x[c.motion == BOUNCE], y[c.motion == BOUNCE]
    speed = bx.diff(dim=1).abs()
    straight = (speed - speed.median(1, keepdim=True).values).abs() < 1e-3
    assert straight.float().mean() > 0.9
    assert (
        (bx.diff(dim=1).sign().diff(dim=1) != 0).any(1)
        | (by.diff(dim=1).sign().diff(dim=1) != 0).any(1)
    ).all()


def test_shapes_stay_inside():
    c = clips(3000)
    x, y, radius, _ = c.track(torch.arange(0, 60 * FPS, 7) / FPS)  # motions go on for ever
    for position in (x, y):
        assert (position - REACH * radius).min() > 0
        assert (position + REACH * radius).max() < SIZE


def test_pixels_show_the_colours_and_the_shape():
    c = clips(200)
    video = c.render(0, 1)[:, 0]
    x, y, _, _ = c.track(torch.zeros(1))
    for i in range(len(c)):
        centre = video[i, :, int(y[i, 0]), int(x[i, 0])] * 127.5 + 127.5
        assert torch.allclose(
            centre, torch.tensor(list(COLOURS.values())[c.colour[i]], dtype=torch.float32), atol=1
        )
    area = lambda s: (((video - video[:, :, :1, :1]).abs().sum(1) > 0.2).sum((1, 2)) / c.radius**2)[
        (c.shape == s) & (c.motion != PULSE)
    ].mean()
    assert area(0) > area(1) > area(2)
    assert len(SHAPES) == 4


def test_prompts_name_every_attribute_in_every_wording():
    c, generator = clips(200), torch.Generator().manual_seed(0)
    for prompt, colour, shape, motion in zip(c.prompts(generator), c.colour, c.shape, c.motion):
        assert list(COLOURS)[colour] in prompt
        assert list(SHAPES)[shape] in prompt
        assert any(words in prompt for words in list(MOTIONS.values())[motion])
    assert "an orange" in " ".join(c.prompts())
    assert "a orange" not in " ".join(c.prompts(generator))
    assert len({clips(1).prompts(generator)[0] for _ in range(40)}) > 5  # several wordings


# --------------------------------------------------------------------------------------------------- the action world
def test_each_action_moves_the_shape_by_a_step_and_walls_stop_it():
    walks = sample_walks(200, 60, torch.Generator().manual_seed(0))
    x, y = walks.track()
    wall = RADIUS * REACH + 1
    assert (
        (x >= wall - 1e-4)
        & (x <= SIZE - wall + 1e-4)
        & (y >= wall - 1e-4)
        & (y <= SIZE - wall + 1e-4)
    ).all()
    moves = torch.tensor(list(ACTIONS.values()))[walks.actions[:, 1:]] * STEP
    for at, move in ((x, moves[..., 0]), (y, moves[..., 1])):
        met = (at[:, :-1] + move < wall) | (at[:, :-1] + move > SIZE - wall)
        assert torch.allclose(at.diff(dim=1)[~met], move[~met], atol=1e-4)
        assert 0.02 < met.float().mean() < 0.5
    assert (walks.actions[:, 0] == 0).all()
    assert (torch.bincount(walks.actions.flatten()) > 1000).all()
    held = (walks.actions.diff(dim=1) == 0).float().mean(1)
    assert held.min() < 0.4
    assert held.max() > 0.95


def test_walks_are_drawn_as_their_prompt_says_and_the_same_for_a_seed():
    walks = sample_walks(3, 5, torch.Generator().manual_seed(1))
    video = walks.render()
    assert video.shape == (3, 5, 3, 64, 64)
    assert torch.equal(video, sample_walks(3, 5, torch.Generator().manual_seed(1)).render())
    front = torch.tensor(list(COLOURS.values()))[walks.colour] / 127.5 - 1
    x, y = (v.long() for v in walks.track())
    for b in range(3):
        assert torch.allclose(video[b, 4, :, y[b, 4], x[b, 4]], front[b], atol=1e-4)
        assert list(COLOURS)[walks.colour[b]] in walks[b : b + 1].prompts()[0]
