"""From pixels to truth: what a video of the shapes world shows, recovered from its pixels alone.

`recover` finds colour, background, shape and place in every frame by drawing the best match;
`fit_motions` finds the motion by fitting the law of each to the track.
"""

import math
from dataclasses import dataclass

import torch

import data
from data import FPS, REACH, SHAPES, SIZE

PALETTE = data.palette(data.COLOURS)  # [8, 3]
BACKDROPS = data.palette(data.BACKGROUNDS)  # [4, 3]
# of a star of radius 1: n inner sin(pi / n) times the square of its outer radius
AREA = torch.tensor([n * i * math.sin(math.pi / n) * o**2 for n, o, i, _ in SHAPES.values()])
SMALLEST = 4.0  # pixels: a smaller radius is no shape (the data's smallest is 6.5)


@dataclass
class Recovered:
    """Hold what B clips of F frames show: indices into the tables of data.py, pixels, radians."""

    colour: torch.Tensor  # [B, F], of each frame by itself
    shape: torch.Tensor  # [B, F]
    background: torch.Tensor  # [B, F]
    x: torch.Tensor  # [B, F]
    y: torch.Tensor  # [B, F]
    radius: torch.Tensor  # [B, F]
    angle: torch.Tensor  # [B, F], within one sector of the shape
    video: torch.Tensor  # [B, F, 3, H, W], drawn from the above


def mode(index, count):
    """Find the most frequent value of index [B, F] in 0 .. count - 1: [B]."""
    return torch.nn.functional.one_hot(index, count).sum(1).argmax(1)


def _wrap(angle, points):
    """Take an angle modulo 2 pi / points, the turn that leaves a star as it is, around 0."""
    return (angle + math.pi / points) % (2 * math.pi / points) - math.pi / points


def _cover(rest, axis):
    """Find how much of each pixel a colour covers: [N, H, W] in [0, 1], by least squares.
    rest [N, 3, H, W]: frame - background = cover * axis; axis [N, 3, 1, 1]: colour - background."""
    return ((rest * axis).sum(1) / axis.square().sum(1)).clamp(0, 1)


def _colour(rest, back):
    """Find the colour [N] that explains frames best; rest [N, 3, H, W]: frame - background."""
    errors = []
    for front in PALETTE:
        axis = front[:, None, None] - back
        errors.append((rest - _cover(rest, axis)[:, None] * axis).square().sum((1, 2, 3)))
    return torch.stack(errors).argmin(0)


@torch.no_grad()
def recover(video):
    """Recover what each frame of video [B, F, 3, 64, 64] in [-1, 1] shows, by drawing it again."""
    frames = video.flatten(0, 1).float().cpu()  # [N, 3, H, W]
    sides = [frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]]
    border = torch.cat(sides, dim=-1).median(-1).values  # [N, 3]
    background = torch.cdist(border, BACKDROPS).argmin(1)
    back = BACKDROPS[background][:, :, None, None]
    colour = _colour((frames - back)[..., ::2, ::2], back)  # a quarter of the pixels tells
    cover = _cover(frames - back, PALETTE[colour][:, :, None, None] - back)
    cover = ((cover - 0.1) / 0.8).clamp(0, 1)  # a faint error of the background is no shape
    area = cover.sum((1, 2)).clamp(min=1)
    grid = torch.arange(SIZE) + 0.5
    x, y = (cover * grid).sum((1, 2)) / area, (cover * grid[:, None]).sum((1, 2)) / area
    dx, dy = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    rho, a = (dx * dx + dy * dy).sqrt(), torch.atan2(dx, -dy)

    candidates = []
    for index, (n, outer, _, turn) in enumerate(SHAPES.values()):
        radius = (area / AREA[index]).sqrt()
        # the n-th moment of the cover points to its tips
        moment = cover * (rho / radius[:, None, None]).clamp(max=2 * outer) ** min(n, 6)
        sine = (moment * torch.sin(n * a)).sum((1, 2))
        cosine = (moment * torch.cos(n * a)).sum((1, 2))
        angle = torch.zeros_like(x) if index == 0 else torch.atan2(sine, cosine) / n + turn
        angle = _wrap(angle, n)
        track = (v[:, None] for v in (x, y, radius, angle))
        drawn = data.draw(colour, torch.full_like(colour, index), background, *track)[:, 0]
        error = (drawn - frames).square().sum((1, 2, 3))
        candidates.append((error, radius, angle, drawn))
    errors, *drawings = (torch.stack(c) for c in zip(*candidates, strict=True))
    best = errors.argmin(0)  # [N]
    radius, angle, drawn = (v[best, torch.arange(len(frames))] for v in drawings)
    found = (colour, best, background, x, y, radius, angle, drawn)
    return Recovered(*(v.unflatten(0, video.shape[:2]) for v in found))


# ---------------------------------------------------------------------------------- laws of motion
def _variance(v):
    """Compute the mean squared deviation of v [B, F] from its mean over the frames: [B]."""
    return (v - v.mean(1, keepdim=True)).square().mean(1)


def _fit(z, basis, least, most):
    """Fit z [B, F] by a basis [F, P] for each of K rates: the least mean squared residual [B].
    The first function of a basis is 1; the others' amplitude is held in least .. most [B, 1]."""
    c = torch.einsum("kpf,bf->bkp", torch.linalg.pinv(basis), z)
    size = c[..., 1:].abs().square().sum(-1).sqrt().clamp(min=1e-6)
    c[..., 1:] *= (size.clamp(least, most) / size)[..., None]
    swing = torch.einsum("kfp,bkp->bkf", basis[..., 1:], c[..., 1:])
    rest = z[:, None] - swing
    return (rest - rest.mean(-1, keepdim=True)).abs().square().mean(-1).amin(1)


def _fit_reflected(z, wall, seconds):
    """Fit straight motion of 6 to 29 pixels/s between walls to z [B, F]: mean squared residual [B].

    Searches a grid of speeds and starts, refined twice around the best. wall [B, 1]: the first one.
    """
    wall = wall[..., None, None]  # [B, 1, 1, 1]
    period = 2 * (SIZE - 2 * wall)
    speed = torch.full((len(z), 1), 17.5)
    start = torch.full((len(z), 1), 0.5)  # in periods
    for speeds, starts, reach in ((48, 40, 1.0), (9, 9, 1 / 24), (9, 9, 1 / 100)):
        v = speed + 11.5 * reach * torch.linspace(-1, 1, speeds)  # [B, S]
        u = start + 0.5 * reach * torch.linspace(-1, 1, starts)  # [B, U]
        way = period * u[:, None, :, None] + v[:, :, None, None] * seconds  # [B, S, U, F]
        error = (data.reflect(way, wall) - z[:, None, None]).square().mean(-1).flatten(1)
        best = error.argmin(1, keepdim=True)
        speed, start = v.gather(1, best // starts), u.gather(1, best % starts)
    return error.amin(1)


def _fit_spin(angle, size, points, seconds):
    """Fit spinning to angle [B, F]: mean squared residual in pixels^2 of the outline, [B]."""
    rates = 2 * math.pi / torch.linspace(2.4, 4.1, 52)
    rates = torch.cat([rates, -rates])[:, None]
    n = points[..., None]
    left = angle[:, None] - rates * seconds  # [B, K, F]
    start = torch.exp(1j * n * left).mean(-1, keepdim=True).angle() / n  # circular mean
    return (size[..., None] * _wrap(left - start, n)).square().mean(-1).amin(1)


def fit_motions(found, shape):
    """Fit the law of each motion to the track: mean squared distance from it in pixels^2, [B, 8].

    The distance is over place, radius and outline (radius times turn) together. A law's constants
    are free within the ranges of the shapes world, so that standing still is no slow slide.
    shape [B]: the clips', since an outline repeats every 2 pi / points.
    """
    x, y, r = found.x, found.y, found.radius
    seconds = torch.arange(x.shape[1]) / FPS
    size = r.mean(1, keepdim=True)
    points = torch.tensor([n for n, *_ in SHAPES.values()])[shape][:, None]
    room = (SIZE / 2 - REACH * size - 1).clamp(min=5)
    reach = (0.6 * room, 1.1 * room)
    rates = 2 * math.pi / torch.linspace(1.7, 3.2, 46)
    wave = torch.exp(1j * rates[:, None] * seconds)  # [K, F]
    one = torch.ones_like(wave)
    swing = torch.stack([one.real, wave.real, wave.imag], dim=-1)
    var_x, var_y, var_r = _variance(x), _variance(y), _variance(r)
    upright = (size * _wrap(found.angle, points)).square().mean(1)
    upright = torch.where(shape == 0, 0.0, upright)

    error = torch.zeros(len(x), len(data.MOTIONS))
    error[:, data.STILL] = var_x + var_y + var_r + upright
    error[:, data.SLIDE] = _fit(x, swing, *reach) + var_y + var_r + upright
    error[:, data.RISE] = _fit(y, swing, *reach) + var_x + var_r + upright
    for motion, turning in ((data.CLOCKWISE, wave), (data.COUNTER, wave.conj())):
        basis = torch.stack([one, turning], dim=-1)
        error[:, motion] = _fit(x + 1j * y, basis, *reach) + var_r + upright
    wall = size * REACH + 1
    bounce = _fit_reflected(x, wall, seconds) + _fit_reflected(y, wall, seconds)
    error[:, data.BOUNCE] = bounce + var_r + upright
    pulse = _fit(r, swing, 0.25 * size, 0.45 * size)
    error[:, data.PULSE] = var_x + var_y + upright + pulse
    spin = _fit_spin(found.angle, size, points, seconds)
    error[:, data.SPIN] = var_x + var_y + var_r + spin
    error[shape == 0, data.SPIN] = math.inf  # a circle does not spin
    return error


# ---------------------------------------------------------------------------------------- measures
# pixels: a track farther than this from its law does not show the motion. The eye knows a straight
# line, a circle and a shape that turns as a whole; of a swing it sees less how its speed changes
LOST = torch.tensor([1.5, 3.0, 3.0, 1.5, 2.0, 2.0, 1.5, 2.0])
CLEAR = 8.0  # pixels: a smaller radius need not tell its shape


def contrast(found):
    """Compute how far each drawn frame is from its background, root mean square: [B, F]."""
    rest = found.video - BACKDROPS[found.background][..., None, None]
    return rest.square().mean((-1, -2, -3)).sqrt().clamp(min=1e-2)


def frame_quality(video, found):
    """Compute 1 - |frame - drawn| / |drawn - background| of each frame, at least 0: [B, F]."""
    rest = (video.cpu() - found.video).square().mean((-1, -2, -3)).sqrt()
    return (1 - rest / contrast(found)).clamp(min=0) * (found.radius >= SMALLEST)


def measure(video, clips, found=None):
    """Measure video [B, F, 3, 64, 64] made for the prompts of `clips`: name -> [B], 0 to 100.

    Text alignment is 100 where all four attributes are as prompted: the shape in nine of ten
    frames, the motion within LOST of its law. Temporal quality is the mean of identity (frames that
    show the clip's own colour, shape and, but for a pulse, size), steadiness (no change between
    frames that the drawn ones do not make) and track (closeness to the prompted motion's law).
    found: `recover(video)`, if known.
    """
    found = found or recover(video)
    colour, shape = mode(found.colour, len(data.COLOURS)), mode(found.shape, len(SHAPES))
    background = mode(found.background, len(data.BACKGROUNDS))
    error = fit_motions(found, shape)
    least, motion = error.min(1)
    motion = torch.where(least < LOST[motion] ** 2, motion, -1)
    visible = found.radius >= SMALLEST  # [B, F]
    shown = visible.float().mean(1) > 0.5  # [B]
    # the radius that the prompted shape has in the area that was found
    size = found.radius * (AREA[found.shape] / AREA[clips.shape][:, None]).sqrt()
    clear = size >= CLEAR
    kept = ((found.shape == clips.shape[:, None]) & clear).sum(1) >= 0.9 * clear.sum(1)
    right = {
        "colour": (colour == clips.colour) & shown,
        "shape": (shape == clips.shape) & kept & shown,
        "background": background == clips.background,
        "motion": (motion == clips.motion) & shown,
    }

    typical = found.radius.median(1, keepdim=True).values
    same_size = ((found.radius / typical - 1).abs() < 0.15) | (clips.motion == data.PULSE)[:, None]
    same_looks = (found.shape == shape[:, None]) & (found.colour == colour[:, None])
    identity = (visible & same_looks & same_size).float().mean(1)
    flicker = (video.cpu() - found.video).diff(dim=1).square().mean((-1, -2, -3)).sqrt()
    steady = (1 - flicker / contrast(found)[:, 1:]).clamp(min=0).mean(1)
    prompted = error.gather(1, clips.motion[:, None])[:, 0]
    track = 1 / (1 + prompted / 2.0**2)  # 50 at 2 pixels from the law
    result = {
        "text alignment": torch.stack(list(right.values())).all(0).float(),
        **{name: value.float() for name, value in right.items()},
        "frame quality": frame_quality(video, found).mean(1),
        "temporal quality": (identity + steady + track) / 3,
        "identity": identity,
        "steadiness": steady,
        "track": track,
    }
    return {name: 100 * value for name, value in result.items()}


def diversity(video, clips):
    """Compare the spread among clips of one prompt with the data's: 0 to 100.

    video [P, N, F, 3, 64, 64], F > 16: N clips for each prompt of `clips`. Spread is the standard
    deviation of position and radius at the start and a second later. What hardly varies in the data
    is left out; more spread than the data's does not count.
    """
    found = recover(video.flatten(0, 1)[:, [0, FPS]])
    made = torch.stack([found.x, found.y, found.radius])  # [3, P * N, 2]
    made = made.unflatten(1, video.shape[:2]).var(2).mean(1).sqrt()  # [3, 2]
    world = data.sample_clips(4000, torch.Generator().manual_seed(0), "all")
    real = []
    for shape, motion in zip(clips.shape.cpu(), clips.motion.cpu(), strict=True):
        same = world[(world.shape == shape) & (world.motion == motion)]
        track = same.track(torch.tensor([0.0, 1.0]))[:3]
        real.append(torch.stack(track).var(1))  # [3, 2]
    real = torch.stack(real, dim=1).mean(1).sqrt()  # [3, 2]
    return 100 * (made / real)[real > 0.5].clamp(max=1).mean().item()


def fixed_set(prompts=4, copies=2):
    """Draw the held-out clips that training is watched with, `copies` a prompt, and their noise."""
    clips = data.sample_clips(prompts, torch.Generator().manual_seed(1), "held-out")
    return clips[torch.arange(prompts).repeat_interleave(copies)], torch.Generator().manual_seed(2)


def health(video, clips, copies=2):
    """Tell a healthy run from one that collapses, by videos of `fixed_set`: name -> 0 .. 100."""
    measured = measure(video.cpu(), clips)
    names = ("text alignment", "shape", "motion", "frame quality", "temporal quality")
    spread = diversity(video.cpu().unflatten(0, (-1, copies)), clips[::copies])
    return {name: measured[name].mean().item() for name in names} | {"diversity": spread}
