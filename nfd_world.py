"""The action world of Next-Frame Diffusion: walks, in which actions move the shape."""

from dataclasses import dataclass

import torch

from data import BACKGROUNDS, COLOURS, FPS, REACH, SHAPES, SIZE, Batch, draw, with_article
from metrics import SMALLEST, frame_quality, recover

ACTIONS = {"none": (0, 0), "up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
MOVES = torch.tensor(list(ACTIONS.values()))
STEP = 2.0  # pixels that an action moves the shape by
RADIUS = 12.5  # pixels, of each shape: neither prompt nor action says it, and walls depend on it


@dataclass
class Walks(Batch):
    """B walks by their truth: looks and start [B], actions [B, F].
    Action f leads to frame f; it moves the shape by STEP, and the walls stop it."""

    colour: torch.Tensor  # index into COLOURS
    shape: torch.Tensor  # index into SHAPES
    background: torch.Tensor  # index into BACKGROUNDS
    x: torch.Tensor  # pixels, before the first action
    y: torch.Tensor
    actions: torch.Tensor  # index into ACTIONS
    radius: torch.Tensor  # pixels, as drawn; the walls stop a shape of RADIUS

    def prompts(self):
        """Say what the walks look like: "a red circle on a black background"."""
        names = [list(table) for table in (COLOURS, SHAPES, BACKGROUNDS)]
        rows = torch.stack([self.colour, self.shape, self.background], dim=1).tolist()
        looks = "a {} {} on a {} background"
        return [
            with_article(looks.format(names[0][c], names[1][s], names[2][b])) for c, s, b in rows
        ]

    def track(self):
        """Where the shape is: x, y [B, F] in pixels."""
        wall = RADIUS * REACH + 1
        at, places = torch.stack([self.x, self.y], dim=-1), []
        moves = (STEP * MOVES.to(at))[self.actions]  # [B, F, 2]
        for move in moves.unbind(1):
            at = (at + move).clamp(wall, SIZE - wall)
            places.append(at)
        return torch.stack(places, dim=1).unbind(-1)

    def render(self):
        """Draw the walks: video [B, F, 3, 64, 64] in [-1, 1]."""
        x, y = self.track()
        radius = self.radius[:, None].expand_as(x)
        looks = (self.colour, self.shape, self.background)
        return draw(*looks, x, y, radius, angle=torch.zeros_like(x))


def sample_walks(count, frames, generator):
    """Draw `count` random walks of `frames` frames.

    An action is held for a while: each walk has a rate of its own, from a new draw at every frame
    to one in 32. The first action is none: nothing comes before the first frame.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    def pick(table, *more):
        return torch.randint(len(table), (count, *more), generator=generator)

    room = SIZE / 2 - REACH * RADIUS - 1
    change = torch.rand(count, frames, generator=generator) < 2 ** uniform(-5, 0)[:, None]
    # the frame at which each frame's action was drawn
    held = torch.where(change, torch.arange(frames), 0).cummax(dim=1).values
    actions = pick(ACTIONS, frames).gather(1, held)
    actions[:, 0] = 0
    looks = [pick(table) for table in (COLOURS, SHAPES, BACKGROUNDS)]
    start = [SIZE / 2 + room * uniform(-1, 1) for _ in range(2)]
    return Walks(*looks, *start, actions, torch.full((count,), RADIUS))


def actions_obeyed(found, actions):
    """Tell which frames after the first show what their action says: bool [B, F - 1].

    found: what `recover` made of the walks; actions [B, F]. A shape must be within half a step of
    where the action takes it from its place in the frame before; a wall stops a shape of the
    walk's median size.
    """
    wall = found.radius.median(1, keepdim=True).values * REACH + 1
    moves = STEP * MOVES[actions[:, 1:]]  # [B, F - 1, 2]
    right = found.radius[:, 1:] >= SMALLEST
    for at, move in zip((found.x, found.y), moves.unbind(-1), strict=True):
        goal = torch.minimum(torch.maximum(at[:, :-1] + move, wall), SIZE - wall)
        right = right & ((at[:, 1:] - goal).abs() < STEP / 2)
    return right


def measure_walks(video, walks):
    """Measure video [B, F, 3, 64, 64] of walks: name -> 0 .. 100, also of the last 10 seconds.

    Action accuracy (`actions_obeyed`), frame quality, and looks: the share of frames with the
    prompt's colour, shape and background.
    """
    found, looks = recover(video), torch.ones(video.shape[:2], dtype=torch.bool)
    for name in ("colour", "shape", "background"):
        looks = looks & (getattr(found, name) == getattr(walks, name)[:, None])
    measured = {"action accuracy": actions_obeyed(found, walks.actions)}
    measured |= {"frame quality": frame_quality(video, found), "looks": looks}
    spans = {"": slice(None), ", last 10 s": slice(-10 * FPS, None)}
    return {
        name + part: 100 * value.float()[:, span].mean().item()
        for part, span in spans.items()
        for name, value in measured.items()
    }
