"""Measures of what a model makes, in a world whose truth is known: alignment with the text, quality of frames and of motion.

Everything is recovered from the pixels alone (metrics.py).

    python evaluate.py      samples the shipped teacher and student with held-out prompts and prints a table
"""

import argparse
import itertools
import os
import subprocess
import sys
from dataclasses import fields

import torch
from tqdm import tqdm

from data import FPS, FRAMES, SIZE, sample_clips
from diffusion import GUIDANCE, TEACHER_STEPS, solve_ode
from metrics import Recovered, diversity, frame_quality, measure, recover
from model import DiT
from nfd_world import actions_obeyed, sample_walks
from play import Player
from sample import stream
from text import TextEncoder
from training import write_results
from vae import VAE
from weights import ROOT, UserError, choose_device, load_model, run_main, shipped


# ------------------------------------------------------------------------------------------------------------- sampling
def make_videos(kind, model, vae, text, generator, frames=FRAMES, steps=TEACHER_STEPS):
    """Sample `frames` frames with embedded prompts text [B, S, text_dim] -> video [B, F, 3, 64, 64].

    kind: "teacher", bidirectional in many `steps`; "causal", as many, guided, chunk by chunk; "student", 4 steps chunk by chunk.
    """
    if kind == "teacher":
        c, side = model.config, SIZE // 8
        noise = torch.randn(
            len(text),
            1 + (frames - 1) // vae.config.time_stride,
            c.in_dim,
            side,
            side,
            generator=generator,
        )
        return vae.decode(solve_ode(model, noise.to(text.device), text, steps)[-1])[:, :frames]
    source = (
        stream(model, vae, text, generator)
        if kind == "student"
        else stream(model, vae, text, generator, steps, guidance=GUIDANCE)
    )
    parts = []
    while sum(part.shape[1] for part in parts) < frames:
        parts.append(next(source)[1])
    return torch.cat(parts, dim=1)[:, :frames]


@torch.no_grad()
def evaluate(
    kind, model, vae, encoder, count=200, split="held-out", seed=0, batch=10, name="model"
):
    """Measures of `count` clips sampled with prompts of a split: name -> 0 .. 100.

    Diversity is measured on 16 clips for each of the first 4 prompts beside them, fewer prompts if `count` is below 64."""
    generator, values, groups = torch.Generator().manual_seed(seed), [], min(4, count // 16)
    clips = sample_clips(count, generator, split)
    bar = tqdm(total=count + 16 * groups, unit="clip", desc=name)
    for start in range(0, count, batch):
        part = clips[start : start + batch]
        video = make_videos(kind, model, vae, encoder(part.prompts()), generator).cpu()
        values.append(measure(video, part))
        bar.update(len(part))
    result = {key: torch.cat([v[key] for v in values]).mean().item() for key in values[0]}
    made = []
    for index in range(groups):
        made.append(
            make_videos(
                kind, model, vae, encoder(clips[index : index + 1].prompts() * 16), generator
            ).cpu()
        )
        bar.update(16)
    bar.close()
    return result | ({"diversity": diversity(torch.stack(made), clips[:groups])} if groups else {})


@torch.no_grad()
def over_time(kind, model, vae, encoder, seconds=60, count=20, seed=0, batch=5, name="model"):
    """Figure 8: measures of a long stream in windows of 5 seconds, one a second: name -> [windows], means over `count` held-out clips."""
    generator, width, windows = torch.Generator().manual_seed(seed), FRAMES - 1, []
    clips = sample_clips(count, generator, "held-out")
    for start in tqdm(range(0, count, batch), desc=name, unit="batch"):
        part = clips[start : start + batch]
        video = make_videos(
            kind, model, vae, encoder(part.prompts()), generator, frames=seconds * FPS
        ).cpu()
        found = recover(video)
        cut = lambda first: Recovered(
            *(getattr(found, f.name)[:, first : first + width] for f in fields(found))
        )
        windows.append(
            [
                measure(video[:, first : first + width], part, cut(first))
                for first in range(0, seconds * FPS - width + 1, FPS)
            ]
        )
    return {
        key: [torch.cat([w[i][key] for w in windows]).mean().item() for i in range(len(windows[0]))]
        for key in windows[0][0]
    }


def play_walks(
    model,
    vae,
    encoder,
    count=8,
    frames=60 * FPS,
    steps=4,
    guidance=None,
    seed=1,
    name=None,
    ahead=None,
):
    """Stream random walks of the action world (NFD) frame by frame -> (video [B, F, 3, 64, 64], measures name -> 0 .. 100).

    action accuracy (`actions_obeyed`), frame quality and looks (frames with the prompt's colour,
    shape and background), each also of the last 10 seconds.
    ahead: as play.py plays them instead, one after the other, with speculative sampling of at most so many frames."""
    generator = torch.Generator().manual_seed(seed)
    walks = sample_walks(count, frames, generator)
    text = encoder(walks.prompts())
    bar = lambda made, total: tqdm(made, total=total, unit="frame", desc=name, disable=name is None)
    if ahead:
        worlds = [
            Player(model, vae, text[i : i + 1], generator, steps, ahead) for i in range(count)
        ]
        plays = ((worlds[i], action) for i in range(count) for action in walks.actions[i].tolist())
        video = torch.stack(
            [world.step(action).cpu() for world, action in bar(plays, count * frames)]
        ).unflatten(0, (count, frames))
    else:
        source = stream(
            model,
            vae,
            text,
            generator,
            steps,
            guidance=guidance,
            actions=lambda made: walks.actions[:, made : made + 1].to(text.device),
        )
        video = torch.cat(
            [video.cpu() for _, video in bar(itertools.islice(source, frames), frames)], dim=1
        )
    found = recover(video)
    looks = torch.stack(
        [
            getattr(found, name) == getattr(walks, name)[:, None]
            for name in ("colour", "shape", "background")
        ]
    ).all(0)
    measured = {
        "action accuracy": actions_obeyed(found, walks.actions),
        "frame quality": frame_quality(video, found),
        "looks": looks,
    }
    return video, {
        name + part: 100 * value.float()[:, span].mean().item()
        for part, span in (("", slice(None)), (", last 10 s", slice(-10 * FPS, None)))
        for name, value in measured.items()
    }


def table(rows):
    """Rows name -> measures as a markdown table."""
    hidden = ("identity", "steadiness", "track")  # they make up the temporal quality
    columns = list(
        dict.fromkeys(column for row in rows.values() for column in row if column not in hidden)
    )
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(
        lines
        + [
            f"| {name} | " + " | ".join(f"{row[c]:.1f}" if c in row else "" for c in columns) + " |"
            for name, row in rows.items()
        ]
    )


# Table 4 of the paper, and self-rollout: name, how it samples, its weights, and the command that trains them if they are not there;
# paths are of the project's folder
CAUSAL = "runs/causal_teacher/causal_teacher.safetensors"
ABLATION = [
    ("many steps, bidirectional", "teacher", "weights/teacher.safetensors", None),
    ("many steps, causal", "causal", CAUSAL, "teacher.py --causal --steps 450"),
    (
        "4 steps, no ODE init",
        "student",
        "runs/dmd_no_ode_init/student.safetensors",
        "dmd.py --student weights/teacher.safetensors",
    ),
    ("4 steps, ODE init alone", "student", "weights/ode_init.safetensors", None),
    (
        "4 steps, ODE init, causal teacher",
        "student",
        "runs/dmd_causal/student.safetensors",
        f"dmd.py --causal-scores --teacher {CAUSAL}",
    ),
    (
        "4 steps, ODE init, bidirectional teacher",
        "student",
        "runs/dmd_bidirectional/student.safetensors",
        "dmd.py",
    ),
    (
        "the same with self-rollout",
        "student",
        "runs/dmd_self/student.safetensors",
        "dmd.py --rollout self",
    ),
]


def train_missing(path, command, options):
    """Run the training script that writes the weights `path`, or go on with it. Raises UserError if it does not get to its end."""
    out = os.path.dirname(path)
    resume = ["--resume"] if os.path.exists(os.path.join(out, "checkpoint.pt")) else []
    subprocess.run([sys.executable, *command.split(), "--out", out, *options, *resume], cwd=ROOT)
    if not os.path.exists(path):
        raise UserError(
            f"training stopped before {path} was written; the same command goes on with it"
        )


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
    axes[1].legend(fontsize=7, loc="lower center")  # where no line runs: this measure stays high
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Measure what models make of held-out prompts.")
    add = parser.add_argument
    add(
        "--teacher",
        nargs="*",
        default=[shipped("teacher")],
        help="weights to sample in many steps, bidirectionally",
    )
    add(
        "--student",
        nargs="*",
        default=[shipped("student")],
        help="weights to stream in 4 steps",
    )
    add("--causal", nargs="*", default=[], help="weights to stream in many guided steps")
    add(
        "--ablation",
        action="store_true",
        help="the paper's Table 4 instead, after training what is missing",
    )
    add(
        "--train-options",
        default="",
        help='options for the trainings of --ablation, such as "--steps 600 --batch-size 8" (but =--compile for a single one)',
    )
    add(
        "--over-time",
        action="store_true",
        help="measure over a long stream (the paper's Figure 8); with matplotlib also a picture",
    )
    add(
        "--play",
        action="store_true",
        help="the action world instead: the action teacher in 16 steps of its ODE and in the player's 4, and the player, over long streams of at most 20 walks",
    )
    add(
        "--seconds",
        type=int,
        default=60,
        help="length of the streams of --over-time and --play, 15 or more",
    )
    add("--clips", type=int, default=200)
    add("--split", default="held-out", choices=["held-out", "train"])
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add(
        "--out",
        default="runs/evaluate",
        help="FILE: writes FILE.json and FILE.md, and with --over-time FILE.png",
    )
    args = parser.parse_args()
    if args.clips < 1 or args.seconds < 15:
        raise UserError("--clips must be at least 1 and --seconds at least 15")
    device = choose_device(args.device)
    jobs = [
        (f"{kind} {os.path.relpath(path)}", kind, path)
        for kind in ("teacher", "causal", "student")
        for path in getattr(args, kind)
    ]
    if args.ablation:
        jobs = [(name, kind, os.path.join(ROOT, path)) for name, kind, path, _ in ABLATION]
        for (_, _, path), (*_, command) in zip(jobs, ABLATION):
            if command and not os.path.exists(path):
                train_missing(path, command, args.train_options.split())
    encoder, rows = load_model(TextEncoder, shipped("text_encoder"), device), {}
    if args.play:
        vae, jobs = load_model(VAE, shipped("vae_frame"), device), []
        for name, file, steps, guidance, ahead in (
            ("action teacher, 16 steps", "action_teacher", 16, 1, None),
            ("action teacher, 4 steps", "action_teacher", 4, None, None),
            ("player, 4 steps", "player", 4, None, None),
            ("player, 4 steps, speculative", "player", 4, None, 8),
        ):
            model, count = (
                load_model(DiT, shipped(file), device),
                min(args.clips, 20),
            )
            rows[name] = play_walks(
                model,
                vae,
                encoder,
                count,
                args.seconds * FPS,
                steps,
                guidance,
                args.seed,
                name,
                ahead,
            )[1]
    vae, models = (
        load_model(VAE, shipped("vae"), device),
        [load_model(DiT, path, device) for _, _, path in jobs],
    )
    for (name, kind, _), model in zip(jobs, models):
        if args.over_time and kind != "teacher":
            rows[name] = over_time(
                kind,
                model,
                vae,
                encoder,
                args.seconds,
                count=min(args.clips, 20),
                seed=args.seed,
                name=name,
            )
        elif not args.over_time:
            rows[name] = evaluate(
                kind, model, vae, encoder, args.clips, args.split, args.seed, name=name
            )
    text = table(
        {
            f"{name}, {part} 10 s": {k: sum(v[span]) / len(v[span]) for k, v in row.items()}
            for name, row in rows.items()
            for part, span in (("first", slice(0, 6)), ("last", slice(-6, None)))
        }
        if args.over_time
        else rows
    )
    write_results(
        args.out, {"clips": args.clips, "split": args.split, "seed": args.seed, "rows": rows}, text
    )
    if args.over_time:
        try:
            draw_over_time(rows, args.out + ".png")
        except ImportError:
            print("no picture without matplotlib: pip install matplotlib")


if __name__ == "__main__":
    run_main(main)
