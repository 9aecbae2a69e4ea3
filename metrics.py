"""From pixels to truth: what a video of the shapes world shows, recovered from its pixels alone.

`recover` finds colour, background, shape and place in every frame by drawing the best match; `fit_motions` finds the motion by
fitting the law of each to the track.
"""

import math
from dataclasses import dataclass

import torch

from data import (
    BACKGROUNDS,
    BOUNCE,
    CLOCKWISE,
    COLOURS,
    COUNTER,
    FPS,
    MOTIONS,
    PULSE,
    REACH,
    RISE,
    SHAPES,
    SIZE,
    SLIDE,
    SPIN,
    STILL,
    draw,
    reflect,
    sample_clips,
)

PALETTE = torch.tensor(list(COLOURS.values())) / 127.5 - 1  # [8, 3]
BACKDROPS = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1  # [4, 3]
SMALLEST = 4.0  # pixels: a smaller radius is no shape (the data's smallest is 6.5)


@dataclass
class Recovered:
    """What B clips of F frames show. Indices into the tables of data.py; pixels and radians, as in `Clips.track`."""

    colour: torch.Tensor  # [B, F], of each frame by itself
    shape: torch.Tensor  # [B, F]
    background: torch.Tensor  # [B, F]
    x: torch.Tensor  # [B, F]
    y: torch.Tensor  # [B, F]
    radius: torch.Tensor  # [B, F]
    angle: torch.Tensor  # [B, F], within one sector of the shape
    video: torch.Tensor  # [B, F, 3, H, W], drawn from the above


def mode(index, count):
    """The most frequent value of index [B, F] in 0 .. count - 1: [B]."""
    return torch.nn.functional.one_hot(index, count).sum(1).argmax(1)


@torch.no_grad()
def recover(video):
    """Analysis by synthesis of each frame of video [B, F, 3, 64, 64] in [-1, 1] by itself -> Recovered."""
    B, F = video.shape[:2]
    frames = video.flatten(0, 1).float().cpu()  # [N, 3, H, W]
    border = torch.cat(
        [frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]], dim=-1
    )
    background = torch.cdist(border.median(-1).values, BACKDROPS).argmin(1)
    back = BACKDROPS[background][:, :, None, None]
    # each pixel is back + cover (front - back): for each colour the best cover of each pixel, and what it leaves unexplained
    best, colour = torch.full((len(frames),), math.inf), torch.zeros(len(frames), dtype=torch.long)
    cover = torch.zeros(len(frames), SIZE, SIZE)
    for index, front in enumerate(PALETTE):
        axis = front[:, None, None] - back
        c = (((frames - back) * axis).sum(1) / axis.square().sum(1)).clamp(0, 1)
        error = (frames - back - c[:, None] * axis).square().sum((1, 2, 3))
        better = error < best
        best, colour = torch.where(better, error, best), torch.where(better, index, colour)
        cover = torch.where(better[:, None, None], c, cover)
    cover = ((cover - 0.1) / 0.8).clamp(0, 1)  # what is faint on all the ground is not the shape
    grid, area = torch.arange(SIZE) + 0.5, cover.sum((1, 2)).clamp(min=1)
    x, y = (cover * grid).sum((1, 2)) / area, (cover * grid[:, None]).sum((1, 2)) / area
    dx, dy = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    rho, a = (dx * dx + dy * dy).sqrt(), torch.atan2(dx, -dy)

    candidates = []
    for index, (n, outer, inner, turn) in enumerate(SHAPES.values()):
        radius = (
            area / (n * inner * math.sin(math.pi / n))
        ).sqrt() / outer  # the area of a star with n points
        # its tips lie where the n-th moment of the cover points
        moment = cover * (rho / radius[:, None, None]).clamp(max=2 * outer) ** min(n, 6)
        tips = (
            torch.atan2(
                (moment * torch.sin(n * a)).sum((1, 2)), (moment * torch.cos(n * a)).sum((1, 2))
            )
            / n
        )
        angle = torch.zeros_like(x) if index == 0 else tips + turn
        angle = (angle + math.pi / n) % (2 * math.pi / n) - math.pi / n
        shape = torch.full_like(colour, index)
        drawn = draw(colour, shape, background, *(v[:, None] for v in (x, y, radius, angle)))[:, 0]
        candidates.append((((drawn - frames) ** 2).sum((1, 2, 3)), shape, radius, angle, drawn))
    errors, _shapes, radii, angles, drawings = (torch.stack(c) for c in zip(*candidates))
    best, n = errors.argmin(0), torch.arange(len(frames))
    return Recovered(
        *(
            v.unflatten(0, (B, F))
            for v in (
                colour,
                best,
                background,
                x,
                y,
                radii[best, n],
                angles[best, n],
                drawings[best, n],
            )
        )
    )


# ---------------------------------------------------------------------------------------------------- laws of motion
def _fit(z, basis, amplitude, least, most):
    """Least squares of z [B, F] by basis [K, F, P], whose first function is 1, with the swing `amplitude(c [B, K, P])` held between
    `least` and `most` [B, 1]: mean squared residual at the best of the K rates, [B]."""
    c = torch.einsum("kpf,bf->bkp", torch.linalg.pinv(basis), z)
    size = amplitude(c).clamp(min=1e-6)
    c[..., 1:] *= (size.clamp(least, most) / size)[..., None]
    swing = torch.einsum("kfp,bkp->bkf", basis[..., 1:], c[..., 1:])
    rest = z[:, None] - swing
    return (rest - rest.mean(-1, keepdim=True)).abs().square().mean(-1).amin(1)


def _fit_reflected(z, wall, seconds):
    """Fit straight motion of 6 to 29 pixels/s between walls to one axis z [B, F]: the mean squared
    residual [B]. wall [B, 1]: the first wall; the other is at SIZE - wall.

    Searches a grid of speeds and starting points, which is made finer twice around the best.
    """
    wall = wall[..., None, None]  # [B, 1, 1, 1]
    period = 2 * (SIZE - 2 * wall)
    speed = torch.full((len(z), 1), 17.5)
    start = torch.full((len(z), 1), 0.5)  # in periods
    for speeds, starts, reach in ((48, 40, 1.0), (9, 9, 1 / 24), (9, 9, 1 / 100)):
        v = speed + 11.5 * reach * torch.linspace(-1, 1, speeds)  # [B, S]
        u = start + 0.5 * reach * torch.linspace(-1, 1, starts)  # [B, U]
        way = period * u[:, None, :, None] + v[:, :, None, None] * seconds  # [B, S, U, F]
        error = (reflect(way, wall) - z[:, None, None]).square().mean(-1).flatten(1)
        best = error.argmin(1, keepdim=True)
        speed, start = v.gather(1, best // starts), u.gather(1, best % starts)
    return error.amin(1)


def fit_motions(found, shape):
    """Fit the law of each motion to the recovered track: mean squared distance from it in pixels^2, [B, 8].

    The distance is over place, radius and outline (radius times turn) together. A law's constants are free within the ranges of the
    shapes world, so that standing still is no slow slide. shape [B]: the clips', since an outline repeats every 2 pi / n.
    """
    x, y, r = found.x, found.y, found.radius
    seconds, size = torch.arange(x.shape[1]) / FPS, r.mean(1, keepdim=True)
    points = torch.tensor([n for n, *_ in SHAPES.values()])[shape][:, None]
    variance = lambda v: (v - v.mean(1, keepdim=True)).square().mean(1)
    wrap = lambda angle: (angle + math.pi / points) % (2 * math.pi / points) - math.pi / points
    outline = lambda turn: torch.where(
        shape == 0, 0.0, (size * wrap(found.angle - turn)).square().mean(1)
    )
    w = 2 * math.pi / torch.linspace(1.7, 3.2, 46)
    wave = lambda sign: torch.exp(1j * sign * w[:, None] * seconds)
    ones = torch.ones(len(w), len(seconds))
    swing = torch.stack([ones, wave(1).real, wave(1).imag], dim=-1)
    turning = lambda sign: torch.stack([ones + 0j, wave(sign)], dim=-1)
    norm = lambda c: c[..., 1:].abs().square().sum(-1).sqrt()
    room = SIZE / 2 - REACH * size - 1
    reach = {"least": 0.6 * room.clamp(min=5), "most": 1.1 * room.clamp(min=5)}
    upright = outline(torch.zeros_like(size))

    error = torch.zeros(len(x), len(MOTIONS))
    error[:, STILL] = variance(x) + variance(y) + variance(r) + upright
    error[:, SLIDE] = _fit(x, swing, norm, **reach) + variance(y) + variance(r) + upright
    error[:, RISE] = _fit(y, swing, norm, **reach) + variance(x) + variance(r) + upright
    for motion, sign in ((CLOCKWISE, 1), (COUNTER, -1)):
        error[:, motion] = _fit(x + 1j * y, turning(sign), norm, **reach) + variance(r) + upright
    wall = size * REACH + 1
    error[:, BOUNCE] = (
        _fit_reflected(x, wall, seconds) + _fit_reflected(y, wall, seconds) + variance(r) + upright
    )
    error[:, PULSE] = (
        variance(x) + variance(y) + upright + _fit(r, swing, norm, 0.25 * size, 0.45 * size)
    )
    # spinning at rate w: the phase that is left, n (angle - w t), is constant; its circular mean is the start
    rates = 2 * math.pi / torch.linspace(2.4, 4.1, 52)
    rates = torch.cat([rates, -rates])[:, None]
    start = (
        torch.exp(1j * points[..., None] * (found.angle[:, None] - rates * seconds))
        .mean(-1, keepdim=True)
        .angle()
        / points[..., None]
    )
    left = found.angle[:, None] - rates * seconds - start  # [B, rates, F]
    left = (left + math.pi / points[..., None]) % (
        2 * math.pi / points[..., None]
    ) - math.pi / points[..., None]
    error[:, SPIN] = (
        variance(x) + variance(y) + variance(r) + (size[..., None] * left).square().mean(-1).amin(1)
    )
    error[shape == 0, SPIN] = math.inf  # a circle does not spin
    return error


# ---------------------------------------------------------------------------------------- measures
ATTRIBUTES = ("colour", "shape", "background", "motion")


LOST = 3.0  # pixels: a track farther than this from every law has no motion that has a name


def contrast(found):
    """How far each drawn frame is from its background, root mean square: [B, F]."""
    return (
        (found.video - BACKDROPS[found.background][..., None, None])
        .square()
        .mean((-1, -2, -3))
        .sqrt()
        .clamp(min=1e-2)
    )


def frame_quality(video, found):
    """Of each frame, 0 to 1: 1 - |frame - drawn| / |drawn - background|, where drawn is the best match of `recover`: [B, F]."""
    rest = (video.cpu() - found.video).square().mean((-1, -2, -3)).sqrt()
    return (1 - rest / contrast(found)).clamp(min=0) * (found.radius >= SMALLEST)


def measure(video, clips, found=None):
    """Measures, 0 to 100 each, of video [B, F, 3, 64, 64] made for the prompts of `clips`: name -> [B]. found: `recover(video)`, if known.

    text alignment: 100 where colour, shape, background and motion are all what the prompt says; and each attribute on its own.
    frame quality: `frame_quality`, mean over frames.
    temporal quality: the mean of three: identity (frames that show the clip's own colour, shape and, but for a pulse, size), steadiness
    (no change from frame to frame that the drawn frames do not make) and track (how close the prompted motion's law is).
    """
    found = found or recover(video)
    shape, colour = mode(found.shape, len(SHAPES)), mode(found.colour, len(COLOURS))
    error = fit_motions(found, shape)
    motion = torch.where(error.amin(1) < LOST**2, error.argmin(1), -1)
    seen = {
        "colour": colour,
        "shape": shape,
        "background": mode(found.background, len(BACKGROUNDS)),
        "motion": motion,
    }
    visible = found.radius >= SMALLEST  # [B, F]
    right = {
        name: (seen[name] == getattr(clips, name))
        & (name == "background" or visible.float().mean(1) > 0.5)
        for name in ATTRIBUTES
    }

    typical = found.radius.median(1, keepdim=True).values
    same_size = ((found.radius / typical - 1).abs() < 0.15) | (clips.motion == PULSE)[:, None]
    identity = (
        (visible & (found.shape == shape[:, None]) & (found.colour == colour[:, None]) & same_size)
        .float()
        .mean(1)
    )
    flicker = (video.cpu() - found.video).diff(dim=1).square().mean((-1, -2, -3)).sqrt()
    steady = (1 - flicker / contrast(found)[:, 1:]).clamp(min=0).mean(1)
    track = 1 / (
        1 + error.gather(1, clips.motion[:, None])[:, 0] / 2.0**2
    )  # 50 at 2 pixels from the law
    result = {
        "text alignment": torch.stack(list(right.values())).all(0).float(),
        **{k: v.float() for k, v in right.items()},
        "frame quality": frame_quality(video, found).mean(1),
        "temporal quality": (identity + steady + track) / 3,
        "identity": identity,
        "steadiness": steady,
        "track": track,
    }
    return {k: 100 * v for k, v in result.items()}


def diversity(video, clips):
    """How much the clips made for one prompt differ, against how much the data's do: 0 to 100.

    video [P, N, F, 3, 64, 64], F > 16: N clips for each prompt of `clips`. Spread is the standard deviation, among the clips of a prompt, of
    position and radius at the start and a second later: start, size, phase and speed all show in it. What hardly varies in the data is
    left out; more spread than the data's does not count.
    """
    found = recover(video.flatten(0, 1)[:, [0, FPS]])
    made = (
        torch.stack([found.x, found.y, found.radius]).unflatten(1, video.shape[:2]).var(2)
    )  # [3, P, 2]
    world = sample_clips(4000, torch.Generator().manual_seed(0), "all")
    same = [
        world[(world.shape == s) & (world.motion == m)]
        for s, m in zip(clips.shape.cpu(), clips.motion.cpu())
    ]
    data = torch.stack(
        [torch.stack(c.track(torch.tensor([0.0, 1.0]))[:3]).var(1) for c in same], dim=1
    )  # [3, P, 2]
    made, data = (v.mean(1).sqrt() for v in (made, data))
    return 100 * (made / data)[data > 0.5].clamp(max=1).mean().item()


def fixed_set(prompts=4, copies=2):
    """A few held-out clips to watch a training run with, each prompt `copies` times over, and always the same noise for them."""
    clips = sample_clips(prompts, torch.Generator().manual_seed(1), "held-out")
    return clips[torch.arange(prompts).repeat_interleave(copies)], torch.Generator().manual_seed(2)


def health(video, clips, copies=2):
    """What tells a healthy run from one that collapses, for videos of `fixed_set`: name -> 0 .. 100."""
    measured = measure(video.cpu(), clips)
    return {
        name: measured[name].mean().item()
        for name in ("text alignment", "shape", "motion", "frame quality", "temporal quality")
    } | {"diversity": diversity(video.cpu().unflatten(0, (-1, copies)), clips[::copies])}
