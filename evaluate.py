"""Quality tables: what models make of held-out prompts, the ablation, and quality over time.

Everything is measured from the pixels alone (metrics.py).

    python evaluate.py      samples the shipped teacher and student with held-out prompts
    python evaluate.py --data DIR --student FILE    measures on held-out clips of one's own
"""

import launch
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import torch
from tqdm import tqdm

import flags
import sample
import weights
from clip_metrics import drift, loss_by_time
from data import FPS, FRAMES, MOTIONS, SIZE, sample_clips
from dataset import own_world
from diffusion import TEACHER_STEPS, noise_source, with_null
from media import save_sheet
from metrics import Recovered, diversity, fixed_set, health, measure, recover
from model import DiT
from text import TextEncoder
from vae import VAE, mean_psnr
from weights import ROOT, UserError, check_fit, load_model, provenance, replace_file, shipped

SPAN = 5 * FPS  # frames of a window of `over_time`
# how a model is sampled -> the stage that its weights name
ROLES = {"teacher": "teacher", "causal": "causal teacher", "student": "student"}


# ------------------------------------------------------------------------------- results and docs
def write_results(out, result, text):
    """Print a table; write OUT.json, OUT.md and the table between its markers in docs/RESULTS.md.
    The markers are <!-- OUT.json --> and <!-- end -->. Raises UserError if it cannot write."""
    print(text)
    replace_file(out + ".json", json.dumps(provenance() | result, indent=1) + "\n")
    replace_file(out + ".md", text + "\n")
    print(f"wrote {out}.json and {out}.md")
    path = os.path.join(ROOT, "docs", "RESULTS.md")
    marker = re.escape(f"<!-- {os.path.relpath(out, ROOT)}.json -->")
    with open(path, encoding="utf-8") as file:
        before = file.read()

    def filled(match):
        return f"{match[1]}{text}\n{match[2]}"

    after = re.sub(rf"({marker}\n).*?(<!-- end -->)", filled, before, flags=re.S)
    if after != before:
        replace_file(path, after)


# -------------------------------------------------------------------------------------- sampling
def stream_guided(model, vae, text, generator, steps, size=(SIZE, SIZE)):
    """Stream the causal many-step model's videos, guided: see `sample.stream`."""
    noise, keys = noise_source(generator, text.device), model.text_keys(with_null(text))
    shape = sample.chunk_shape(model, vae, len(text), size)
    starts = sample.from_noise(noise, shape, model.schedule.timesteps(steps))
    cache = model.new_cache(2 * len(text), *shape[-2:])
    denoise = functools.partial(sample.solve_chunk, model)
    return sample.stream(model, vae, sample.prompt_at([(0, keys)]), starts, cache, denoise)


def stream_of(kind, model, vae, text, generator, steps=TEACHER_STEPS, size=(SIZE, SIZE)):
    """Stream the videos of a model of the kind "causal" or "student": see `make_videos`."""
    if kind == "causal":
        return stream_guided(model, vae, text, generator, steps, size)
    return sample.text_to_video(model, vae, text, generator, size=size)


@torch.no_grad()
def make_videos(
    kind, model, vae, text, generator, frames=FRAMES, steps=TEACHER_STEPS, size=(SIZE, SIZE)
):
    """Sample videos [B, frames, 3, H, W] of embedded prompts text [B, S, text_dim].

    kind: "teacher", bidirectional in many `steps`; "causal", as many, guided, chunk by chunk;
    "student", in few steps, chunk by chunk.
    """
    if kind == "teacher":
        return sample.sample_teacher(model, vae, text, generator, frames, steps, size)[1]
    source, parts = stream_of(kind, model, vae, text, generator, steps, size), []
    while sum(part.shape[1] for part in parts) < frames:
        parts.append(next(source)[1])
    return torch.cat(parts, dim=1)[:, :frames]


@torch.no_grad()
def fixed_sheet(kind, model, vae, encoder, path, world, steps=TEACHER_STEPS):
    """Draw a sheet of `metrics.fixed_set` as a model makes it; -> its `health`.
    Of one's own clips it shows some of the captions, and there is nothing to measure."""
    clips, noise = fixed_set()
    if world.own:
        how = {"frames": world.frames, "steps": steps, "size": world.size}
        text = encoder(world.some_captions(8))
        save_sheet(make_videos(kind, model, vae, text, noise, **how), path)
        return {}
    video = make_videos(kind, model, vae, encoder(clips.prompts()), noise, steps=steps)
    save_sheet(video, path)
    return health(video, clips)


# -------------------------------------------------------------------------------------- measuring
def evaluate(
    kind, model, vae, encoder, count=200, split="held-out", seed=0, batch=10, name="model"
):
    """Measure `count` clips sampled with prompts of a split: name -> 0 .. 100, and of each motion
    the text alignment.

    Diversity is measured on 16 clips for each of the first 4 prompts beside them, fewer prompts if
    `count` is below 64.
    """
    generator, groups = torch.Generator().manual_seed(seed), min(4, count // 16)
    clips, values, made = sample_clips(count, generator, split), [], []
    with tqdm(total=count + 16 * groups, unit="clip", desc=name) as bar:
        for start in range(0, count, batch):
            part = clips[start : start + batch]
            text = encoder(part.prompts())
            video = make_videos(kind, model, vae, text, generator)
            values.append(measure(video.float().cpu(), part))
            bar.update(len(part))
        for index in range(groups):
            text = encoder(clips[index : index + 1].prompts() * 16)
            made.append(make_videos(kind, model, vae, text, generator).float().cpu())
            bar.update(16)
    values = {key: torch.cat([v[key] for v in values]) for key in values[0]}
    result = {key: value.mean().item() for key, value in values.items()}
    if made:
        result["diversity"] = diversity(torch.stack(made), clips[:groups])
    right = {m: values["text alignment"][clips.motion == i] for i, m in enumerate(MOTIONS)}
    return result | {"motions": {m: v.mean().item() for m, v in right.items() if len(v)}}


def over_time(kind, model, vae, encoder, seconds=60, count=20, seed=0, batch=5, name="model"):
    """Measure a long stream in windows of 5 seconds, one a second: name -> [windows] (Figure 8).
    Means over `count` held-out clips."""
    generator, windows = torch.Generator().manual_seed(seed), []
    clips, frames = sample_clips(count, generator, "held-out"), seconds * FPS
    for start in tqdm(range(0, count, batch), desc=name, unit="batch"):
        part, measured = clips[start : start + batch], []
        text = encoder(part.prompts())
        video = make_videos(kind, model, vae, text, generator, frames).float().cpu()
        found = recover(video)
        for first in range(0, frames - SPAN + 1, FPS):
            span = slice(first, first + SPAN)
            cut = Recovered(*(getattr(found, f.name)[:, span] for f in fields(found)))
            measured.append(measure(video[:, span], part, cut))
        windows.append(measured)
    return {
        key: [
            torch.cat([m[key] for m in column]).mean().item()
            for column in zip(*windows, strict=True)
        ]
        for key in windows[0][0]
    }


def first_and_last(rows):
    """Average the first and the last 10 seconds of rows of `over_time`, for their table."""
    means = {}
    for name, row in rows.items():
        for part, span in (("first", slice(0, 6)), ("last", slice(-6, None))):
            means[f"{name}, {part} 10 s"] = {k: sum(v[span]) / 6 for k, v in row.items()}
    return means


def table(rows, digits=1):
    """Rows name -> measures as a markdown table, with so many digits after the point."""
    # three make up the temporal quality; of each motion there is a table of its own
    hidden = ("identity", "steadiness", "track", "motions")
    columns = dict.fromkeys(c for row in rows.values() for c in row if c not in hidden)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.{digits}f}" if c in row else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_over_time(rows, path):
    """Draw what `over_time` measured, a panel a measure and a line a model (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = ("text alignment", "frame quality", "temporal quality")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.2), sharey=True)
    for axis, key in zip(axes, panels, strict=True):
        for name, row in rows.items():
            axis.plot([5 + i for i in range(len(row[key]))], row[key], label=name)
        axis.set(title=key, xlabel="seconds", ylim=(0, 102))
    axes[1].legend(fontsize=7, loc="lower center")  # where no line runs: this measure stays high
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------- one's own clips
def evaluate_own(jobs, load, args, device):
    """Measure weights on held-out clips of one's own by `clip_metrics`: the tables of VAE, loss and
    drift, each name -> measures. load(path) -> model, VAE and text encoder."""
    tables, count = ({}, {}, {}), args.clips or 200
    for name, kind, path in jobs:
        model, vae, encoder = load(path)
        world, frames = own_world(args.data, path), (args.seconds or 60) * FPS
        data = world.latents(vae, model.config.patch_size)
        world.prepare(vae, model.config.patch_size)
        tables[0][name] = {"VAE PSNR, dB": mean_psnr(vae, world.each(count, device))}
        if kind != "student":  # which predicts x0 at its own few times alone
            c = model.config
            attention = {"chunk": c.chunk, "window": c.window} if kind == "causal" else {}
            tables[1][name] = loss_by_time(model, encoder, data, count, args.seed, **attention)
        if kind != "teacher":  # which makes clips, and no stream
            text, generator = encoder(world.some_captions(4)), torch.Generator()
            chunks = stream_of(
                kind, model, vae, text, generator.manual_seed(args.seed), size=world.size
            )
            for part, row in drift(chunks, frames, name).items():
                tables[2][f"{name}, {part}"] = row
    return [rows for rows in tables if rows]


# --------------------------------------------------------------------------------- the ablation
TEACHER, ODE_INIT = "weights/teacher.safetensors", "weights/ode_init.safetensors"
CAUSAL = "runs/causal_teacher/causal_teacher.safetensors"
DMD = {kind: f"runs/dmd_{kind}/student.safetensors" for kind in ("no_ode_init", "causal", "self")}
BIDIRECTIONAL = "runs/dmd_bidirectional/student.safetensors"
CAUSAL_DMD = f"dmd.py --causal-scores --teacher {CAUSAL}"
# Table 4 of the paper, and self-rollout: name, how it samples, its weights, and the command that
# trains them if they are not there; paths are of the project's folder
ABLATION = [
    ("many steps, bidirectional", "teacher", TEACHER, None),
    ("many steps, causal", "causal", CAUSAL, "teacher.py --causal --steps 450"),
    ("4 steps, no ODE init", "student", DMD["no_ode_init"], f"dmd.py --student {TEACHER}"),
    ("4 steps, ODE init alone", "student", ODE_INIT, None),
    ("4 steps, ODE init, causal teacher", "student", DMD["causal"], CAUSAL_DMD),
    ("4 steps, ODE init, bidirectional teacher", "student", BIDIRECTIONAL, "dmd.py"),
    ("the same with self-rollout", "student", DMD["self"], "dmd.py --rollout self"),
]


def train_missing(path, command, options):
    """Run the training script that writes the weights `path`, or resume it.
    Raises UserError if it does not get to its end."""
    out = os.path.dirname(path)
    resume = ["--resume"] if os.path.exists(os.path.join(out, "checkpoint.pt")) else []
    subprocess.run([sys.executable, *command.split(), "--out", out, *options, *resume], cwd=ROOT)
    if not os.path.exists(path):
        message = f"training stopped before {path} was written; the same command resumes it"
        raise UserError(message)


def ablation_jobs(options):
    """Train what is missing of the ablation: its jobs [(name, kind, path)]."""
    jobs = [(name, kind, os.path.join(ROOT, path)) for name, kind, path, _ in ABLATION]
    for (_, _, path), (*_, command) in zip(jobs, ABLATION, strict=True):
        if command and not os.path.exists(path):
            train_missing(path, command, options)
    return jobs


# ---------------------------------------------------------------------------------- command line
def check_data(args):
    """Raise UserError for flags that do not go with --data."""
    for flag in ("ablation", "over_time", "split"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} does not go with --data")
    if args.seconds and args.seconds < 20:
        raise UserError("--seconds must be 20 at least: the first ten and the last are compared")


def main():
    parser = flags.Parser("Measure what models make of held-out prompts.")
    add = parser.add_argument
    files = {"nargs": "*", "type": flags.source, "metavar": "FILE"}
    told = "weights to sample in many steps, bidirectionally (with no weights at all the shipped)"
    add("--teacher", help=told, **files)
    told = "weights to stream in few steps (with no weights at all the shipped)"
    add("--student", help=told, **files)
    told = "weights to stream in many guided steps (none)"
    add("--causal", help=told, **files | {"nargs": "+"})
    told = "the paper's Table 4 instead, after training what is missing"
    add("--ablation", action="store_true", help=told)
    told = 'flags for the trainings of --ablation: --train-options="--steps 600 --lr 1e-3" (none)'
    add("--train-options", help=told)
    told = "measure over a long stream, the paper's Figure 8; with matplotlib also a picture"
    add("--over-time", action="store_true", help=told)
    told = "length of the stream of --over-time or --data (60)"
    add("--seconds", type=flags.whole(15, 10**6), help=told)
    told = "a folder of held-out clips, with captions, for weights trained on one's own clips"
    add("--data", type=flags.folder, metavar="DIR", help=told)
    told = "of each model (200; with --over-time 20)"
    add("--clips", type=flags.whole(), help=told)
    told = "the prompts' combinations"
    add("--split", choices=["held-out", "train"], help=f"{told} (held-out)")
    add("--seed", type=flags.SEED, default=0, help="of clips and noise")
    flags.codec_flags(parser)
    flags.device_flags(parser)
    parser.set_defaults(dtype="float32")  # what is measured depends on no machine's fast one
    told = "FILE: writes FILE.json and FILE.md, and with --over-time FILE.png"
    add("--out", default="runs/evaluate", type=flags.results, help=told)
    args = parser.parse_args()
    flags.check_needed(args, train_options="ablation")
    if args.data:
        check_data(args)
    else:
        flags.check_needed(args, seconds="over_time")
    named = [kind for kind in ROLES if getattr(args, kind) is not None]
    if args.ablation and named:
        raise UserError(f"--{named[0]} does not go with --ablation, which has its own weights")
    if args.over_time and args.split:
        raise UserError("--split does not go with --over-time, whose prompts are held out")
    weights.make_folder(os.path.dirname(args.out) or ".")
    device, dtype = flags.on_device(args.device, args.dtype, args.threads)
    count = args.clips or (20 if args.over_time else 200)
    seconds, split = args.seconds or 60, args.split or "held-out"
    jobs = []
    for kind, role in ROLES.items():
        paths = getattr(args, kind)
        if paths == [] or (not named and kind != "causal"):
            paths = [shipped(kind)]
        for path in paths or []:
            weights.check_role(path, role)
            if not args.data and weights.own_clips(path):
                raise UserError(f"{path} was trained on one's own clips: give others by --data DIR")
            jobs.append((f"{kind} {os.path.relpath(path)}", kind, path))
    if args.ablation:
        jobs = ablation_jobs(shlex.split(args.train_options or ""))
    if args.over_time:
        for name, kind, _ in jobs:
            if kind == "teacher":
                print(f"{name} is left out: it makes clips, and no stream")
        jobs = [job for job in jobs if job[1] != "teacher"]
    if not jobs:
        raise UserError("there is nothing to measure: name --student or --causal weights")

    def load(path):
        files = weights.made_with(path, args.vae, args.text_encoder)
        networks = zip((DiT, VAE, TextEncoder), (path, *files), strict=True)
        parts = [load_model(network, file, device) for network, file in networks]
        check_fit(*parts)
        return parts[0].to(dtype), parts[1].to(dtype), parts[2]

    if args.data:
        tables = evaluate_own(jobs, load, args, device)
        told = {"data": args.data, "seed": args.seed, "dtype": str(dtype), "rows": tables}
        write_results(args.out, told, "\n\n".join(table(rows, 3) for rows in tables))
        return
    rows = {}
    for name, kind, path in jobs:
        parts = load(path)
        if args.over_time:
            rows[name] = over_time(kind, *parts, seconds, count, args.seed, name=name)
        else:
            rows[name] = evaluate(kind, *parts, count, split, args.seed, name=name)
    told = {"clips": count, "split": split, "seed": args.seed, "dtype": str(dtype), "rows": rows}
    if args.over_time:
        told, text = told | {"seconds": seconds}, table(first_and_last(rows))
    else:
        motions = {f"{name}, of each motion": row["motions"] for name, row in rows.items()}
        text = f"{table(rows)}\n\n{table(motions)}"
    write_results(args.out, told, text)
    if args.over_time:
        try:
            draw_over_time(rows, args.out + ".png")
        except ImportError:
            print("no picture without matplotlib: pip install matplotlib")


if __name__ == "__main__":
    launch.run_main(main)
