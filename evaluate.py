"""Measures of what a model makes, in a world whose truth is known: alignment with the text, quality of frames and of motion.

Everything is recovered from the pixels alone. `recover` finds colour, background, shape and place in every frame by drawing
the best match; `fit_motions` finds the motion by fitting the law of each to the track.

    python evaluate.py      samples the shipped teacher and student with held-out prompts and prints a table
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

from data import (ACTIONS, BACKGROUNDS, BOUNCE, CLOCKWISE, COLOURS, COUNTER, FPS, FRAMES, MOTIONS, PULSE, REACH, RISE, SHAPES, SIZE, SLIDE, SPIN,
                  STEP, STILL, draw, sample_clips, sample_walks)
from model import load_model
from sample import GUIDANCE, TEACHER_STEPS, solve_ode, stream
from text import load_text_encoder
from training import WEIGHTS, UserError, choose_device, hardware, run_main
from vae import load_vae

PALETTE = torch.tensor(list(COLOURS.values())) / 127.5 - 1                             # [8, 3]
BACKDROPS = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1                       # [4, 3]


# ------------------------------------------------------------------------------------------------ from pixels to truth
@dataclass
class Recovered:
    """What B clips of F frames show. Indices into the tables of data.py; pixels and radians, as in `Clips.track`."""
    colour: torch.Tensor        # [B, F], of each frame by itself
    shape: torch.Tensor         # [B, F]
    background: torch.Tensor    # [B, F]
    x: torch.Tensor             # [B, F]
    y: torch.Tensor             # [B, F]
    radius: torch.Tensor        # [B, F]
    angle: torch.Tensor         # [B, F], within one sector of the shape
    video: torch.Tensor         # [B, F, 3, H, W], drawn from the above


def mode(index, count):
    """The most frequent value of index [B, F] in 0 .. count - 1: [B]."""
    return torch.nn.functional.one_hot(index, count).sum(1).argmax(1)


@torch.no_grad()
def recover(video):
    """Analysis by synthesis of each frame of video [B, F, 3, 64, 64] in [-1, 1] by itself -> Recovered."""
    B, F = video.shape[:2]
    frames = video.flatten(0, 1).float().cpu()                                                    # [N, 3, H, W]
    border = torch.cat([frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]], dim=-1)
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
    cover = ((cover - 0.1) / 0.8).clamp(0, 1)                                     # what is faint on all the ground is not the shape
    grid, area = torch.arange(SIZE) + 0.5, cover.sum((1, 2)).clamp(min=1)
    x, y = (cover * grid).sum((1, 2)) / area, (cover * grid[:, None]).sum((1, 2)) / area
    dx, dy = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    rho, a = (dx * dx + dy * dy).sqrt(), torch.atan2(dx, -dy)

    candidates = []
    for index, (n, outer, inner, turn) in enumerate(SHAPES.values()):
        radius = (area / (n * inner * math.sin(math.pi / n))).sqrt() / outer      # the area of a star with n points
        # its tips lie where the n-th moment of the cover points
        moment = cover * (rho / radius[:, None, None]).clamp(max=2 * outer) ** min(n, 6)
        tips = torch.atan2((moment * torch.sin(n * a)).sum((1, 2)), (moment * torch.cos(n * a)).sum((1, 2))) / n
        angle = torch.zeros_like(x) if index == 0 else tips + turn
        angle = (angle + math.pi / n) % (2 * math.pi / n) - math.pi / n
        shape = torch.full_like(colour, index)
        drawn = draw(colour, shape, background, *(v[:, None] for v in (x, y, radius, angle)))[:, 0]
        candidates.append((((drawn - frames) ** 2).sum((1, 2, 3)), shape, radius, angle, drawn))
    errors, shapes, radii, angles, drawings = (torch.stack(c) for c in zip(*candidates))
    best, n = errors.argmin(0), torch.arange(len(frames))
    return Recovered(*(v.unflatten(0, (B, F)) for v in (colour, best, background, x, y, radii[best, n], angles[best, n], drawings[best, n])))


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
    """Straight motion of 6 to 29 pixels/s on one axis z [B, F] between the walls wall [B, 1] and 64 - wall: mean squared residual [B].

    Searched on a grid of speeds and starting points, which is then made finer twice around the best."""
    span = SIZE - 2 * wall[..., None]                                                            # [B, 1, 1]
    fold = lambda u: wall[..., None, None] + span[..., None] - (u % (2 * span[..., None]) - span[..., None]).abs()
    speed, start = torch.full((len(z), 1), 17.5), torch.full((len(z), 1), 0.5)      # start in units of 2 spans
    for speeds, starts, reach in ((48, 40, 1.0), (9, 9, 1 / 24), (9, 9, 1 / 100)):
        v = speed + 11.5 * reach * torch.linspace(-1, 1, speeds)                                 # [B, S]
        u = start + 0.5 * reach * torch.linspace(-1, 1, starts)                                  # [B, U]
        track = fold(2 * span[..., None] * u[:, None, :, None] + v[:, :, None, None] * seconds)  # [B, S, U, F]
        error = (track - z[:, None, None]).square().mean(-1).flatten(1)
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
    outline = lambda turn: torch.where(shape == 0, 0.0, (size * wrap(found.angle - turn)).square().mean(1))
    w = 2 * math.pi / torch.linspace(1.7, 3.2, 46)
    wave = lambda sign: torch.exp(1j * sign * w[:, None] * seconds)
    ones = torch.ones(len(w), len(seconds))
    swing = torch.stack([ones, wave(1).real, wave(1).imag], dim=-1)
    turning = lambda sign: torch.stack([ones + 0j, wave(sign)], dim=-1)
    norm = lambda c: c[..., 1:].abs().square().sum(-1).sqrt()
    room = SIZE / 2 - REACH * size - 1
    reach = dict(least=0.6 * room.clamp(min=5), most=1.1 * room.clamp(min=5))
    upright = outline(torch.zeros_like(size))

    error = torch.zeros(len(x), len(MOTIONS))
    error[:, STILL] = variance(x) + variance(y) + variance(r) + upright
    error[:, SLIDE] = _fit(x, swing, norm, **reach) + variance(y) + variance(r) + upright
    error[:, RISE] = _fit(y, swing, norm, **reach) + variance(x) + variance(r) + upright
    for motion, sign in ((CLOCKWISE, 1), (COUNTER, -1)):
        error[:, motion] = _fit(x + 1j * y, turning(sign), norm, **reach) + variance(r) + upright
    wall = size * REACH + 1
    error[:, BOUNCE] = _fit_reflected(x, wall, seconds) + _fit_reflected(y, wall, seconds) + variance(r) + upright
    error[:, PULSE] = variance(x) + variance(y) + upright + _fit(r, swing, norm, 0.25 * size, 0.45 * size)
    # spinning at rate w: the phase that is left, n (angle - w t), is constant; its circular mean is the start
    rates = 2 * math.pi / torch.linspace(2.4, 4.1, 52)
    rates = torch.cat([rates, -rates])[:, None]
    start = torch.exp(1j * points[..., None] * (found.angle[:, None] - rates * seconds)).mean(-1, keepdim=True).angle() / points[..., None]
    left = (found.angle[:, None] - rates * seconds - start)                                       # [B, rates, F]
    left = (left + math.pi / points[..., None]) % (2 * math.pi / points[..., None]) - math.pi / points[..., None]
    error[:, SPIN] = variance(x) + variance(y) + variance(r) + (size[..., None] * left).square().mean(-1).amin(1)
    error[shape == 0, SPIN] = math.inf                                                            # a circle does not spin
    return error


# ------------------------------------------------------------------------------------------------------------ measures
ATTRIBUTES = ("colour", "shape", "background", "motion")
LOST = 3.0                                   # pixels: a track farther than this from every law has no motion that has a name
SMALLEST = 4.0                               # pixels: a smaller radius is no shape (the data's smallest is 6.5)


def contrast(found):
    """How far each drawn frame is from its background, root mean square: [B, F]."""
    return (found.video - BACKDROPS[found.background][..., None, None]).square().mean((-1, -2, -3)).sqrt().clamp(min=1e-2)


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
    motion = torch.where(error.amin(1) < LOST ** 2, error.argmin(1), -1)
    seen = dict(colour=colour, shape=shape, background=mode(found.background, len(BACKGROUNDS)), motion=motion)
    visible = found.radius >= SMALLEST                                                             # [B, F]
    right = {name: (seen[name] == getattr(clips, name)) & (name == "background" or visible.float().mean(1) > 0.5) for name in ATTRIBUTES}

    typical = found.radius.median(1, keepdim=True).values
    same_size = ((found.radius / typical - 1).abs() < 0.15) | (clips.motion == PULSE)[:, None]
    identity = (visible & (found.shape == shape[:, None]) & (found.colour == colour[:, None]) & same_size).float().mean(1)
    flicker = (video.cpu() - found.video).diff(dim=1).square().mean((-1, -2, -3)).sqrt()
    steady = (1 - flicker / contrast(found)[:, 1:]).clamp(min=0).mean(1)
    track = 1 / (1 + error.gather(1, clips.motion[:, None])[:, 0] / 2.0 ** 2)                      # 50 at 2 pixels from the law
    result = {"text alignment": torch.stack(list(right.values())).all(0).float(), **{k: v.float() for k, v in right.items()},
              "frame quality": frame_quality(video, found).mean(1), "temporal quality": (identity + steady + track) / 3,
              "identity": identity, "steadiness": steady, "track": track}
    return {k: 100 * v for k, v in result.items()}


def diversity(video, clips):
    """How much the clips made for one prompt differ, against how much the data's do: 0 to 100.

    video [P, N, F, 3, 64, 64], F > 16: N clips for each prompt of `clips`. Spread is the standard deviation, among the clips of a prompt, of
    position and radius at the start and a second later: start, size, phase and speed all show in it. What hardly varies in the data is
    left out; more spread than the data's does not count.
    """
    found = recover(video.flatten(0, 1)[:, [0, FPS]])
    made = torch.stack([found.x, found.y, found.radius]).unflatten(1, video.shape[:2]).var(2)                    # [3, P, 2]
    world = sample_clips(4000, torch.Generator().manual_seed(0), "all")
    same = [world[(world.shape == s) & (world.motion == m)] for s, m in zip(clips.shape.cpu(), clips.motion.cpu())]
    data = torch.stack([torch.stack(c.track(torch.tensor([0.0, 1.0]))[:3]).var(1) for c in same], dim=1)         # [3, P, 2]
    made, data = (v.mean(1).sqrt() for v in (made, data))
    return 100 * (made / data)[data > 0.5].clamp(max=1).mean().item()


def fixed_set(prompts=4, copies=2):
    """A few held-out clips to watch a training run with, each prompt `copies` times over, and always the same noise for them."""
    clips = sample_clips(prompts, torch.Generator().manual_seed(1), "held-out")
    return clips[torch.arange(prompts).repeat_interleave(copies)], torch.Generator().manual_seed(2)


def health(video, clips, copies=2):
    """What tells a healthy run from one that collapses, for videos of `fixed_set`: name -> 0 .. 100."""
    measured = measure(video.cpu(), clips)
    return {name: measured[name].mean().item() for name in ("text alignment", "shape", "motion", "frame quality", "temporal quality")} | {
        "diversity": diversity(video.cpu().unflatten(0, (-1, copies)), clips[::copies])}


# ------------------------------------------------------------------------------------------------------------- sampling
def make_videos(kind, model, vae, text, generator, frames=FRAMES, steps=TEACHER_STEPS):
    """Sample `frames` frames with embedded prompts text [B, S, text_dim] -> video [B, F, 3, 64, 64].

    kind: "teacher", bidirectional in many `steps`; "causal", as many, guided, chunk by chunk; "student", 4 steps chunk by chunk.
    """
    if kind == "teacher":
        c, side = model.config, SIZE // 8
        noise = torch.randn(len(text), 1 + (frames - 1) // vae.config.time_stride, c.in_dim, side, side, generator=generator)
        return vae.decode(solve_ode(model, noise.to(text.device), text, steps)[-1])[:, :frames]
    source = stream(model, vae, text, generator) if kind == "student" else \
        stream(model, vae, text, generator, steps, guidance=GUIDANCE)
    parts = []
    while sum(part.shape[1] for part in parts) < frames:
        parts.append(next(source)[1])
    return torch.cat(parts, dim=1)[:, :frames]


@torch.no_grad()
def evaluate(kind, model, vae, encoder, count=200, split="held-out", seed=0, batch=10, name="model"):
    """Measures of `count` clips sampled with prompts of a split: name -> 0 .. 100.

    Diversity is measured on 16 clips for each of the first 4 prompts beside them, fewer prompts if `count` is below 64."""
    generator, values, groups = torch.Generator().manual_seed(seed), [], min(4, count // 16)
    clips = sample_clips(count, generator, split)
    bar = tqdm(total=count + 16 * groups, unit="clip", desc=name)
    for start in range(0, count, batch):
        part = clips[start:start + batch]
        video = make_videos(kind, model, vae, encoder(part.prompts()), generator).cpu()
        values.append(measure(video, part))
        bar.update(len(part))
    result = {key: torch.cat([v[key] for v in values]).mean().item() for key in values[0]}
    made = []
    for index in range(groups):
        made.append(make_videos(kind, model, vae, encoder(clips[index:index + 1].prompts() * 16), generator).cpu())
        bar.update(16)
    bar.close()
    return result | ({"diversity": diversity(torch.stack(made), clips[:groups])} if groups else {})


@torch.no_grad()
def over_time(kind, model, vae, encoder, seconds=60, count=20, seed=0, batch=5, name="model"):
    """Figure 8: measures of a long stream in windows of 5 seconds, one a second: name -> [windows], means over `count` held-out clips."""
    generator, width, windows = torch.Generator().manual_seed(seed), FRAMES - 1, []
    clips = sample_clips(count, generator, "held-out")
    for start in tqdm(range(0, count, batch), desc=name, unit="batch"):
        part = clips[start:start + batch]
        video = make_videos(kind, model, vae, encoder(part.prompts()), generator, frames=seconds * FPS).cpu()
        found = recover(video)
        cut = lambda first: Recovered(*(getattr(found, f.name)[:, first:first + width] for f in fields(found)))
        windows.append([measure(video[:, first:first + width], part, cut(first)) for first in range(0, seconds * FPS - width + 1, FPS)])
    return {key: [torch.cat([w[i][key] for w in windows]).mean().item() for i in range(len(windows[0]))] for key in windows[0][0]}


# -------------------------------------------------------------------------------------------------- the action world
def actions_obeyed(found, actions):
    """Which frames after the first show what their action says, walls included: bool [B, F - 1] for actions [B, F].

    Within half a step of where the action takes the shape from where it was in the frame before."""
    wall = found.radius.median(1, keepdim=True).values * REACH + 1
    right = found.radius[:, 1:] >= SMALLEST
    for at, move in zip((found.x, found.y), (STEP * torch.tensor(list(ACTIONS.values()))[actions[:, 1:]]).unbind(-1)):
        goal = torch.minimum(torch.maximum(at[:, :-1] + move, wall), SIZE - wall)
        right = right & ((at[:, 1:] - goal).abs() < STEP / 2)
    return right


def play_walks(model, vae, encoder, count=8, frames=60 * FPS, steps=4, guidance=None, seed=1):
    """Stream random walks of the action world frame by frame -> (video [B, F, 3, 64, 64], measures name -> 0 .. 100).

    action accuracy, frame quality and looks (frames with the prompt's colour, shape and background), each also of the last 10 seconds."""
    generator = torch.Generator().manual_seed(seed)
    walks = sample_walks(count, frames, generator)
    text = encoder(walks.prompts())
    source = stream(model, vae, text, generator, steps, guidance=guidance, actions=lambda made: walks.actions[:, made:made + 1].to(text.device))
    video = torch.cat([video.cpu() for _, video in itertools.islice(source, frames)], dim=1)
    found = recover(video)
    looks = torch.stack([getattr(found, name) == getattr(walks, name)[:, None] for name in ("colour", "shape", "background")]).all(0)
    measured = {"action accuracy": actions_obeyed(found, walks.actions), "frame quality": frame_quality(video, found), "looks": looks}
    return video, {name + part: 100 * value.float()[:, span].mean().item() for part, span in
                   (("", slice(None)), (", last 10 s", slice(-10 * FPS, None))) for name, value in measured.items()}


COLUMNS = ("text alignment", *ATTRIBUTES, "frame quality", "temporal quality", "diversity")


def table(rows):
    """Rows name -> measures as a markdown table."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(f"{row[c]:.1f}" if c in row else "" for c in COLUMNS) + " |" for name, row in rows.items()])


# Table 4 of the paper, and self-rollout: name, how it samples, its weights, and the command that trains them if they are not there;
# paths are of the project's folder
ROOT = os.path.dirname(WEIGHTS)
CAUSAL = "runs/causal_teacher/causal_teacher.safetensors"
ABLATION = [
    ("many steps, bidirectional", "teacher", "weights/teacher.safetensors", None),
    ("many steps, causal", "causal", CAUSAL, "teacher.py --causal"),
    ("4 steps, no ODE init", "student", "runs/dmd_no_ode_init/student.safetensors", "dmd.py --student weights/teacher.safetensors"),
    ("4 steps, ODE init alone", "student", "weights/ode_init.safetensors", None),
    ("4 steps, ODE init, causal teacher", "student", "runs/dmd_causal/student.safetensors", f"dmd.py --causal-scores --teacher {CAUSAL}"),
    ("4 steps, ODE init, bidirectional teacher", "student", "runs/dmd_bidirectional/student.safetensors", "dmd.py"),
    ("the same with self-rollout", "student", "runs/dmd_self/student.safetensors", "dmd.py --rollout self")]


def train_missing(path, command, options):
    """Run the training script that writes the weights `path`, or go on with it. Raises UserError if it does not get to its end."""
    out = os.path.dirname(path)
    resume = ["--resume"] if os.path.exists(os.path.join(out, "checkpoint.pt")) else []
    subprocess.run([sys.executable, *command.split(), "--out", out, *options, *resume], cwd=ROOT)
    if not os.path.exists(path):
        raise UserError(f"training stopped before {path} was written; the same command goes on with it")


def draw_over_time(rows, path):
    """Draw what `over_time` measured, a panel a measure and a line a model (needs matplotlib)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = ("text alignment", "frame quality", "temporal quality")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.2), sharey=True)
    for axis, key in zip(axes, panels):
        for name, row in rows.items():
            axis.plot([5 + i for i in range(len(row[key]))], row[key], label=name)
        axis.set(title=key, xlabel="seconds", ylim=(0, 102))
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Measure what models make of held-out prompts.")
    add = parser.add_argument
    add("--teacher", nargs="*", default=[os.path.join(WEIGHTS, "teacher.safetensors")], help="weights to sample in many steps, bidirectionally")
    add("--student", nargs="*", default=[os.path.join(WEIGHTS, "student.safetensors")], help="weights to stream in 4 steps")
    add("--causal", nargs="*", default=[], help="weights to stream in many guided steps")
    add("--ablation", action="store_true", help="the paper's Table 4 instead, after training what is missing")
    add("--train-options", default="", help='options for the trainings of --ablation, such as "--steps 600 --batch-size 8"')
    add("--over-time", action="store_true", help="measure over a long stream (the paper's Figure 8); with matplotlib also a picture")
    add("--seconds", type=int, default=60, help="length of the stream of --over-time, 15 or more")
    add("--clips", type=int, default=200)
    add("--split", default="held-out", choices=["held-out", "train"])
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--out", default="runs/evaluate", help="FILE: writes FILE.json and FILE.md, and with --over-time FILE.png")
    args = parser.parse_args()
    if args.clips < 1 or args.seconds < 15:
        raise UserError("--clips must be at least 1 and --seconds at least 15")
    device = choose_device(args.device)
    jobs = [(f"{kind} {os.path.relpath(path)}", kind, path) for kind in ("teacher", "causal", "student") for path in getattr(args, kind)]
    if args.ablation:
        jobs = [(name, kind, os.path.join(ROOT, path)) for name, kind, path, _ in ABLATION]
        for (_, _, path), (*_, command) in zip(jobs, ABLATION):
            if command and not os.path.exists(path):
                train_missing(path, command, args.train_options.split())
    vae, encoder = load_vae(device=device), load_text_encoder(device=device)
    models, rows = [load_model(path, device) for _, _, path in jobs], {}
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    for (name, kind, _), model in zip(jobs, models):
        if args.over_time and kind != "teacher":
            rows[name] = over_time(kind, model, vae, encoder, args.seconds, count=min(args.clips, 20), seed=args.seed, name=name)
        elif not args.over_time:
            rows[name] = evaluate(kind, model, vae, encoder, args.clips, args.split, args.seed, name=name)
    text = table({f"{name}, {part} 10 s": {k: sum(v[span]) / len(v[span]) for k, v in row.items()} for name, row in rows.items()
                  for part, span in (("first", slice(0, 6)), ("last", slice(-6, None)))} if args.over_time else rows)
    origin = {"clips": args.clips, "split": args.split, "seed": args.seed, "hardware": hardware(), "torch": torch.__version__}
    for suffix, content in ((".json", json.dumps(origin | {"rows": rows}, indent=1)), (".md", text)):
        with open(args.out + suffix + ".tmp", "w") as file:
            file.write(content + "\n")
        os.replace(args.out + suffix + ".tmp", args.out + suffix)
    if args.over_time:
        try:
            draw_over_time(rows, args.out + ".png")
        except ImportError:
            print("no picture without matplotlib: pip install matplotlib")
    print(text, f"wrote {args.out}.json and {args.out}.md", sep="\n")


if __name__ == "__main__":
    run_main(main)
