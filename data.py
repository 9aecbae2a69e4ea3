"""The shapes world: an endless supply of captioned video whose truth is known.

64 x 64 pixels, 16 frames/s. One soft-edged shape moves on a plain background, and the prompt says
which: "a red circle bouncing on a black background". All is drawn in torch, on any device.

    python data.py          draws a sheet of samples to shapes.png
"""

import launch
import math
from dataclasses import dataclass, fields

import torch

SIZE, FPS, FRAMES = 64, 16, 81
PROMPT = "a red circle bouncing on a black background"

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

# Every shape is a star: its number n of points, outer radius (in units of the clip's radius), inner
# radius over outer radius, and a turn. A regular n-gon is the star whose inner radius is cos(pi/n).
SHAPES = {
    "circle": (64, 1.0, math.cos(math.pi / 64), 0.0),
    "square": (4, 1.15, math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, 1.2, 0.5, 0.0),
    "star": (5, 1.2, 0.45, 0.0),
}
REACH = 1.2  # the largest outer radius above: how far a shape reaches from its centre

OTHER_WORDINGS = {
    "standing still": "not moving",
    "sliding left and right": "moving left and right",
    "rising and falling": "moving up and down",
    "bouncing": "bouncing off the walls",
    "circling clockwise": "moving in a circle clockwise",
    "circling counterclockwise": "moving in a circle counterclockwise",
    "spinning": "turning around itself",
    "pulsing": "growing and shrinking",
}
MOTIONS = {name: (name, other) for name, other in OTHER_WORDINGS.items()}
WORDINGS = (
    "a {colour} {shape} {motion} on a {background} background",
    "a {colour} {shape} is {motion} in front of a {background} background",
    "{colour} {shape}, {motion}, {background} background",
    "on a {background} background, a {colour} {shape} {motion}",
    "a {shape} {motion}, {colour} on {background}",
)

STILL, SLIDE, RISE, BOUNCE, CLOCKWISE, COUNTER, SPIN, PULSE = range(8)


def combinations(split):
    """List a split's attribute combinations: [N, 4] indices (colour, shape, motion, background).
    "held-out" is one tenth, by a fixed rule that keeps every pair of attributes in "train"."""
    sizes = (len(COLOURS), len(SHAPES), len(MOTIONS), len(BACKGROUNDS))
    every = torch.cartesian_prod(*map(torch.arange, sizes))
    every = every[(every[:, 1] != 0) | (every[:, 2] != SPIN)]  # a circle does not spin
    held_out = (every * torch.tensor([1, 3, 7, 5])).sum(1) % 10 == 3
    return {"train": every[~held_out], "held-out": every[held_out], "all": every}[split]


class Batch:
    """Give a dataclass whose fields are tensors [B, ...] a length, indexing and `to(device)`."""

    def __len__(self):
        return len(self.colour)

    def __getitem__(self, index):
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device):
        return type(self)(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass
class Clips(Batch):
    """Hold the truth of B clips, each field [B]. y points down, angles turn clockwise."""

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
        colours, shapes, backgrounds = list(COLOURS), list(SHAPES), list(BACKGROUNDS)
        motions = list(MOTIONS.values())
        rows = torch.stack([self.colour, self.shape, self.motion, self.background], dim=1)
        prompts = []
        for c, s, m, b in rows.tolist():
            words = {"colour": colours[c], "shape": shapes[s], "background": backgrounds[b]}
            wording = _pick(WORDINGS, generator)
            prompt = wording.format(motion=_pick(motions[m], generator), **words)
            prompts.append(with_article(prompt))
        return prompts

    def track(self, seconds):
        """Locate the shape at `seconds` [F]: x, y, radius and angle, each [B, F]."""
        c = self[:, None]  # each field [B, 1]
        run = c.rate * seconds  # [B, F]
        turn = c.phase + run
        circle = (c.motion == CLOCKWISE) | (c.motion == COUNTER)
        sense = torch.where(c.motion == COUNTER, -1.0, 1.0)
        # circling: (cos, sin) turns clockwise because y points down
        swing_x = torch.where((c.motion == SLIDE) | circle, torch.cos(turn), 0.0)
        swing_y = torch.where(circle, sense * torch.sin(turn), 0.0)
        swing_y = torch.where(c.motion == RISE, torch.cos(turn), swing_y)
        x, y = c.x + c.reach * swing_x, c.y + c.reach * swing_y
        bounce = c.motion == BOUNCE
        wall = c.radius * REACH + 1
        x = torch.where(bounce, reflect(x + run * torch.cos(c.phase) - wall, wall), x)
        y = torch.where(bounce, reflect(y + run * torch.sin(c.phase) - wall, wall), y)
        radius = c.radius * torch.where(c.motion == PULSE, 1 + 0.35 * torch.sin(turn), 1.0)
        angle = torch.where(c.motion == SPIN, turn, 0.0)
        return x, y, radius, angle

    def render(self, start=0, frames=FRAMES):
        """Draw frames start .. start + frames - 1: video [B, frames, 3, 64, 64] in [-1, 1]."""
        seconds = (start + torch.arange(frames, device=self.x.device)) / FPS
        return draw(self.colour, self.shape, self.background, *self.track(seconds))


def _pick(options, generator):
    """Take the first option, or a random one with a generator."""
    if generator is None:
        return options[0]
    return options[torch.randint(len(options), (), generator=generator).item()]


def reflect(way, wall):
    """Fold straight motion back at `wall` and SIZE - wall; way: pixels past the first wall."""
    span = SIZE - 2 * wall
    return wall + span - (way % (2 * span) - span).abs()


def with_article(prompt):
    """Mend the article of a prompt before "orange"."""
    return prompt.replace("a orange", "an orange")


def palette(table, device=None):
    """Convert a table of sRGB colours to pixels [N, 3] in [-1, 1]."""
    return torch.tensor(list(table.values()), device=device) / 127.5 - 1


def draw(colour, shape, background, x, y, radius, angle):
    """Draw shapes (attributes [B], track [B, F]): video [B, F, 3, 64, 64] in [-1, 1]."""
    device = x.device
    stars = torch.tensor(list(SHAPES.values()), device=device)[shape]  # [B, 4]
    points, outer, inner, turn = stars.T[..., None, None, None]  # [B, 1, 1, 1] each
    grid = torch.arange(SIZE, device=device) + 0.5
    dx, dy = grid - x[..., None, None], grid[:, None] - y[..., None, None]
    # by symmetry half a point is enough: a is the angle from its tip, between 0 and pi / points
    sector = 2 * math.pi / points
    a = torch.atan2(dx, -dy) - angle[..., None, None] + turn  # [B, F, 64, 64]
    a = ((a + sector / 2) % sector - sector / 2).abs()
    rho = (dx * dx + dy * dy).sqrt()
    # signed distance to the line with normal (nx, ny) from the tip (R, 0) to the notch beside it
    R = radius[..., None, None] * outer
    nx, ny = inner * torch.sin(sector / 2), 1 - inner * torch.cos(sector / 2)
    norm = (nx * nx + ny * ny).sqrt()
    distance = (nx * (rho * torch.cos(a) - R) + ny * rho * torch.sin(a)) / norm
    cover = (0.5 - distance / 2).clamp(0, 1)[:, :, None]  # edges two pixels soft
    front = palette(COLOURS, device)[colour][:, None, :, None, None]
    back = palette(BACKGROUNDS, device)[background][:, None, :, None, None]
    return back + (front - back) * cover


def sample_clips(count, generator, split="train", shares=None):
    """Draw `count` random clips of a split ("train", "held-out" or "all").
    shares: how often each of MOTIONS is drawn (None: all combinations alike)."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    rows = combinations(split)
    if shares is None:
        chosen = rows[torch.randint(len(rows), (count,), generator=generator)]
    else:
        chosen = rows[torch.multinomial(shares[rows[:, 2]], count, True, generator=generator)]
    colour, shape, motion, background = chosen.T
    radius = torch.where(motion == PULSE, uniform(10, 13), uniform(10, 15))
    largest = torch.where(motion == PULSE, 1.35 * radius, radius)
    room = SIZE / 2 - REACH * largest - 1  # from the middle to the wall
    reach = room * uniform(0.7, 1.0)
    # the centre of a motion lies where its reach, on each axis, leaves room
    circle = (motion == CLOCKWISE) | (motion == COUNTER)
    free_x = torch.where((motion == SLIDE) | circle, room - reach, room)
    free_y = torch.where((motion == RISE) | circle, room - reach, room)
    x = SIZE / 2 + free_x * uniform(-1, 1)
    y = SIZE / 2 + free_y * uniform(-1, 1)
    phase = uniform(0, 2 * math.pi)
    sign = torch.sign(uniform(-1, 1))
    # a bounce keeps 25 degrees off both axes, so that it is neither sliding nor rising
    slant = torch.deg2rad(uniform(25, 65))
    slant += math.pi / 2 * torch.randint(4, (count,), generator=generator)
    phase = torch.where(motion == BOUNCE, slant, phase)
    period = torch.where(motion == SPIN, uniform(2.5, 4.0), uniform(1.8, 3.0))
    rate = 2 * math.pi / period * torch.where(motion == SPIN, sign, 1.0)
    rate = torch.where(motion == BOUNCE, uniform(18, 30), rate)
    return Clips(colour, shape, motion, background, radius, x, y, reach, phase, rate)


def main():
    import flags
    import media

    parser = flags.Parser("Draw a sheet of samples of the shapes world.")
    parser.add_argument("--seed", type=flags.SEED, default=0, help="of the clips")
    parser.add_argument("--out", type=flags.picture, default="shapes.png", help="FILE.png")
    args = parser.parse_args()
    clips = sample_clips(12, torch.Generator().manual_seed(args.seed))
    media.save_sheet(clips.render(), args.out)
    print("\n".join(clips.prompts()), f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    launch.run_main(main)
