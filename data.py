"""The shapes world: an endless supply of captioned video whose truth is known.

64 x 64 pixels, 16 frames/s. One soft-edged shape moves on a plain background, and the prompt says which:
"a red circle bouncing on a black background". In the action world, at the end, a player moves it. Everything is drawn in torch,
in a batch, on any device.

    python data.py          draws a sheet of samples to shapes.png
"""

import argparse
import math
from dataclasses import dataclass, fields

import torch

SIZE, FPS, FRAMES = 64, 16, 81

COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 180, 75),
    "blue": (38, 110, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 130, 40),
    "cyan": (60, 200, 210),
    "white": (240, 240, 240),
}
BACKGROUNDS = {
    "black": (12, 12, 16),
    "gray": (110, 110, 115),
    "navy": (20, 30, 80),
    "brown": (90, 60, 35),
}

# Every shape is a star with n points: outer radius (in units of the clip's radius), inner radius over outer radius,
# and a turn. A regular n-gon is the star whose inner radius is cos(pi/n); the circle is the 64-gon.
SHAPES = {
    "circle": (64, 1.0, math.cos(math.pi / 64), 0.0),
    "square": (4, 1.15, math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, 1.2, 0.5, 0.0),
    "star": (5, 1.2, 0.45, 0.0),
}
REACH = 1.2  # the largest outer radius above: how far a shape reaches from its centre

# Each motion with its wordings; the first is the name.
MOTIONS = {
    "standing still": ("standing still", "not moving"),
    "sliding left and right": ("sliding left and right", "moving left and right"),
    "rising and falling": ("rising and falling", "moving up and down"),
    "bouncing": ("bouncing", "bouncing off the walls"),
    "circling clockwise": ("circling clockwise", "moving in a circle clockwise"),
    "circling counterclockwise": (
        "circling counterclockwise",
        "moving in a circle counterclockwise",
    ),
    "spinning": ("spinning", "turning around itself"),
    "pulsing": ("pulsing", "growing and shrinking"),
}
WORDINGS = (
    "a {colour} {shape} {motion} on a {background} background",
    "a {colour} {shape} is {motion} in front of a {background} background",
    "{colour} {shape}, {motion}, {background} background",
    "on a {background} background, a {colour} {shape} {motion}",
    "a {shape} {motion}, {colour} on {background}",
)

STILL, SLIDE, RISE, BOUNCE, CLOCKWISE, COUNTER, SPIN, PULSE = range(8)


def _all_combinations():
    """Every (colour, shape, motion, background) that exists as rows of indices: a circle does not spin."""
    every = torch.cartesian_prod(
        *(torch.arange(len(names)) for names in (COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
    )
    return every[~((every[:, 1] == 0) & (every[:, 2] == SPIN))]


def combinations(split):
    """The attribute combinations of a split, [N, 4] indices (colour, shape, motion, background).

    `split` is "train", "held-out" (one tenth, by a fixed rule that keeps every pair of attributes in training) or "all".
    """
    every = _all_combinations()
    held_out = (every * torch.tensor([1, 3, 7, 5])).sum(1) % 10 == 3
    return {"train": every[~held_out], "held-out": every[held_out], "all": every}[split]


class Batch:
    """A batch of truths, a dataclass whose every field is a tensor [B, ...]: its length, some of its rows, the same on a device."""

    def __len__(self):
        return len(self.colour)

    def __getitem__(self, index):
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device):
        return type(self)(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass
class Clips(Batch):
    """B clips by their truth, each field [B]. Pixels and seconds; y points down, angles turn clockwise on the screen."""

    colour: torch.Tensor  # index into COLOURS
    shape: torch.Tensor  # index into SHAPES
    motion: torch.Tensor  # index into MOTIONS
    background: torch.Tensor  # index into BACKGROUNDS
    radius: torch.Tensor  # pixels
    x: torch.Tensor  # centre of the motion, or where a bounce starts
    y: torch.Tensor
    reach: torch.Tensor  # amplitude of sliding, rising and circling, pixels
    phase: torch.Tensor  # radians
    rate: torch.Tensor  # radians/s (its sign is the sense of spinning); bouncing: pixels/s

    def prompts(self, generator=None):
        """Word the clips' prompts: in the first wording, or in random ones with a generator."""

        def pick(options):
            if generator is None:
                return options[0]
            return options[torch.randint(len(options), (), generator=generator).item()]

        names = [list(table) for table in (COLOURS, SHAPES, MOTIONS.values(), BACKGROUNDS)]
        rows = torch.stack([self.colour, self.shape, self.motion, self.background], dim=1)
        prompts = []
        for c, s, m, b in rows.tolist():
            wording = pick(WORDINGS)
            words = {"colour": names[0][c], "shape": names[1][s], "background": names[3][b]}
            prompts.append(with_article(wording.format(motion=pick(names[2][m]), **words)))
        return prompts

    def track(self, seconds):
        """Where the shape is at `seconds` [F]: x, y (pixels), radius (pixels) and angle (radians), each [B, F]."""
        motion, column = self.motion[:, None], lambda v: v[:, None]
        turn = column(self.phase) + column(self.rate) * seconds
        x, y = column(self.x).expand_as(turn), column(self.y).expand_as(turn)
        circle = (motion == CLOCKWISE) | (motion == COUNTER)
        sense = torch.where(motion == COUNTER, -1.0, 1.0)
        # circling: (cos, sin) turns clockwise because y points down
        x = x + column(self.reach) * torch.where((motion == SLIDE) | circle, torch.cos(turn), 0.0)
        y = y + column(self.reach) * torch.where(
            (motion == RISE), torch.cos(turn), torch.where(circle, sense * torch.sin(turn), 0.0)
        )
        # bouncing: straight lines, reflected at the walls by folding them into a triangle wave
        wall = column(self.radius) * REACH + 1
        run = column(self.rate) * seconds
        x = torch.where(
            motion == BOUNCE, reflect(x + run * torch.cos(column(self.phase)) - wall, wall), x
        )
        y = torch.where(
            motion == BOUNCE, reflect(y + run * torch.sin(column(self.phase)) - wall, wall), y
        )
        radius = column(self.radius) * torch.where(motion == PULSE, 1 + 0.35 * torch.sin(turn), 1.0)
        angle = torch.where(motion == SPIN, turn, 0.0)
        return x, y, radius, angle

    def render(self, start=0, frames=FRAMES):
        """Draw frames start .. start + frames - 1 at 16 frames/s: video [B, frames, 3, 64, 64] in [-1, 1]."""
        device = self.x.device
        seconds = (start + torch.arange(frames, device=device)) / FPS
        return draw(self.colour, self.shape, self.background, *self.track(seconds))


def reflect(way, wall):
    """Fold straight motion at the walls `wall` and SIZE - wall; way: from the first wall, pixels."""
    span = SIZE - 2 * wall
    return wall + span - (way % (2 * span) - span).abs()


def with_article(prompt):
    """Mend the article of a prompt before "orange"."""
    return prompt.replace("a orange", "an orange")


def draw(colour, shape, background, x, y, radius, angle):
    """Draw one shape a frame: attribute indices [B], track [B, F] -> video [B, F, 3, 64, 64] in [-1, 1]."""
    device = x.device
    points, outer, inner, turn = torch.tensor(list(SHAPES.values()), device=device)[shape].T[
        ..., None, None, None
    ]
    grid = torch.arange(SIZE, device=device) + 0.5
    dx, dy = grid - x[..., None, None], grid[:, None] - y[..., None, None]  # [B, F, 64, 64]
    # fold the plane into one half point of the star: a is the angle from its tip, between 0 and pi / points
    sector = 2 * math.pi / points
    a = torch.atan2(dx, -dy) - angle[..., None, None] + turn
    a = ((a + sector / 2) % sector - sector / 2).abs()
    rho = (dx * dx + dy * dy).sqrt()
    # signed distance to the line from the tip (R, 0) to the notch r (cos, sin)(pi / points), with outward normal n
    R = radius[..., None, None] * outer
    nx, ny = inner * torch.sin(sector / 2), 1 - inner * torch.cos(sector / 2)
    distance = (nx * (rho * torch.cos(a) - R) + ny * rho * torch.sin(a)) / (
        nx * nx + ny * ny
    ).sqrt()
    cover = (0.5 - distance / 2).clamp(0, 1)[:, :, None]  # edges two pixels soft
    palette = lambda table: torch.tensor(list(table.values()), device=device) / 127.5 - 1
    front = palette(COLOURS)[colour][:, None, :, None, None]
    back = palette(BACKGROUNDS)[background][:, None, :, None, None]
    return back + (front - back) * cover


def sample_clips(count, generator, split="train"):
    """Draw `count` random clips of a split ("train", "held-out" or "all"). Same generator state, same clips."""
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)
    rows = combinations(split)
    colour, shape, motion, background = rows[
        torch.randint(len(rows), (count,), generator=generator)
    ].T
    is_, many = lambda m: motion == m, lambda *ms: torch.isin(motion, torch.tensor(ms))
    radius = torch.where(is_(PULSE), uniform(10, 13), uniform(10, 15))  # a pulse swings by 35%
    room = (
        SIZE / 2 - REACH * torch.where(is_(PULSE), 1.35 * radius, radius) - 1
    )  # from the middle to the wall
    reach = room * uniform(0.7, 1.0)
    # what is left of the room beside the motion, on each axis, is where the motion's centre may lie
    free_x = torch.where(many(SLIDE, CLOCKWISE, COUNTER), room - reach, room)
    free_y = torch.where(many(RISE, CLOCKWISE, COUNTER), room - reach, room)
    x, y = SIZE / 2 + free_x * uniform(-1, 1), SIZE / 2 + free_y * uniform(-1, 1)
    phase, sign = uniform(0, 2 * math.pi), torch.sign(uniform(-1, 1))
    # a bounce keeps 25 degrees off both axes, so that it is neither sliding nor rising
    slant = torch.deg2rad(uniform(25, 65)) + math.pi / 2 * torch.randint(
        4, (count,), generator=generator
    )
    period = torch.where(is_(SPIN), uniform(2.5, 4.0), uniform(1.8, 3.0))
    rate = torch.where(
        is_(BOUNCE), uniform(18, 30), 2 * math.pi / period * torch.where(is_(SPIN), sign, 1.0)
    )
    return Clips(
        colour,
        shape,
        motion,
        background,
        radius,
        x,
        y,
        reach,
        torch.where(is_(BOUNCE), slant, phase),
        rate,
    )


if __name__ == "__main__":
    import media

    parser = argparse.ArgumentParser(description="Draw a sheet of samples of the shapes world.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="shapes.png")
    args = parser.parse_args()
    clips = sample_clips(12, torch.Generator().manual_seed(args.seed))
    media.save_sheet(clips.render(), args.out)
    print("\n".join(clips.prompts()), f"wrote {args.out}", sep="\n")
