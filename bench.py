"""Speed, side by side and in one run: the many-step teacher, the streaming student, and where the student's time goes.

    python bench.py                       the shipped small models, in some five minutes
    python bench.py --size wan-1.3b       a large one with random weights, for a GPU
    python bench.py --play                the action world: the teacher, the player, and speculative sampling

Every time is the median of several, taken in turns, so that what else a machine does falls on all rows alike.
"""

import argparse
import functools
import itertools
import statistics
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import FRAMES, SIZE
from diffusion import TEACHER_STEPS, noise_source, solve_ode
from model import DiT, ModelConfig
from nfd_world import ACTIONS
from play import LOOKS, PROMPT, Player
from sample import denoise_chunk, remember_chunk, stream
from text import TextConfig, TextEncoder
from training import write_results
from vae import VAE, VAEConfig
from weights import (
    UserError,
    choose_device,
    choose_dtype,
    device_flags,
    hardware,
    load_model,
    run_main,
    shipped,
)

# transformer, height and width of the video
SIZES = {
    "small": (None, SIZE, SIZE),
    "nfd-310m": (
        ModelConfig(
            dim=1024,
            ffn_dim=4096,
            freq_dim=256,
            num_heads=16,
            num_layers=18,
            in_dim=16,
            out_dim=16,
            chunk=1,
            window=16,
        ),
        224,
        384,
    ),
    "wan-1.3b": (
        ModelConfig(
            dim=1536,
            ffn_dim=8960,
            freq_dim=256,
            num_heads=12,
            num_layers=30,
            in_dim=16,
            out_dim=16,
            text_dim=4096,
        ),
        480,
        832,
    ),
}


def build(size, device, dtype, play=False):
    """(teacher, student, VAE, text encoder, height, width): the shipped ones for "small", else random ones of that size, where teacher
    and student are one. play: those of the action world."""
    config, height, width = SIZES[size]
    if config is None:
        names = ("action_teacher", "player", "vae_frame") if play else ("teacher", "student", "vae")
        teacher, student, vae = (shipped(name) for name in names)
        teacher, student = (load_model(DiT, path, device).to(dtype) for path in (teacher, student))
        return (
            teacher,
            student,
            load_model(VAE, vae, device).to(dtype),
            load_model(TextEncoder, shipped("text_encoder"), device),
            height,
            width,
        )
    torch.manual_seed(0)
    config, stride = (
        (replace(config, chunk=1, num_actions=len(ACTIONS)), 1) if play else (config, 4)
    )
    with torch.device(device):
        model, vae = (
            DiT(config).to(dtype).eval(),
            VAE(VAEConfig(latent_dim=config.in_dim, time_stride=stride)).to(dtype).eval(),
        )
        encoder = TextEncoder(TextConfig(text_dim=config.text_dim))
    return model, model, vae, encoder, height, width


def many_steps(model, vae, text, generator, latent_shape):
    """The teacher's video, decoded chunk by chunk like the student's."""
    state, chunk = {}, model.config.chunk
    x0 = solve_ode(model, noise_source(generator, text.device)(latent_shape), text, TEACHER_STEPS)[
        -1
    ]
    for part in x0.split(chunk, dim=1):
        yield vae.decode(part, state)


def without_cache(model, vae, text, generator, latent_shape, steps=4):
    """The student's stream, to the same latents, if every pass went over all chunks so far again."""
    c, schedule, state = model.config, model.schedule, {}
    keys, times, past = (
        model.text_keys(text),
        schedule.timesteps(steps),
        torch.zeros(len(text), 0, *latent_shape[2:], device=text.device),
    )
    noise = noise_source(generator, text.device)
    while True:
        x = noise((len(text), c.chunk, *latent_shape[2:]))
        for t, r in itertools.pairwise(times):
            at = torch.cat(
                [torch.zeros(past.shape[:2]), torch.full(x.shape[:2], float(t))], dim=1
            ).to(text.device)
            x = schedule.x0(
                x,
                model(torch.cat([past, x], dim=1), at, keys, chunk=c.chunk, window=c.window)[
                    :, -c.chunk :
                ],
                t,
            )
            x = schedule.add_noise(x, noise(x.shape), r) if r > 0 else x
        yield vae.decode(x, state)
        past = torch.cat([past, x], dim=1)


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(chunks, frames, device):
    """Take `frames` frames from a stream: (seconds to the first chunk, seconds to the last)."""
    started, first, count = now(device), None, 0
    for video in chunks:
        count += video.shape[1]
        first = first or now(device) - started
        if count >= frames:
            return first, now(device) - started


def stages(model, vae, encoder, latent_shape, device):
    """Seconds of each stage of a chunk behind a full window: name -> seconds."""
    c, generator, clock = model.config, torch.Generator().manual_seed(0), [now(device)]
    lap = lambda: clock.append(now(device)) or clock[-1] - clock[-2]
    text = encoder([PROMPT])
    keys = model.text_keys(text)
    spent = {"text, once a prompt": lap()}
    cache, times, state = (
        model.new_cache(len(text), *latent_shape[-2:]),
        model.schedule.timesteps(4),
        {},
    )
    shape = (len(text), c.chunk, *latent_shape[2:])
    noise = noise_source(generator, device)
    for _ in range(c.window):  # the last of these has all the window before it
        x = noise(shape)
        lap()
        x0 = denoise_chunk(model, x, times, keys, cache, noise)
        spent["denoise, 4 passes"] = lap()
        remember_chunk(model, x0, keys, cache)
        spent["clean pass into the cache"] = lap()
        vae.decode(x0, state)
        spent["decode"] = lap()
    return spent


def endless(model, vae, text, generator, size, chunks, pairs=25):
    """What chunk number `chunks` of a stream costs against the first ones behind a full window: two streams take turns, so that the
    machine is the same for both, and the median of the ratios of their times is what counts."""
    long, short = (
        stream(model, vae, text, g, size=size)
        for g in (generator, torch.Generator().manual_seed(0))
    )
    for chunk, name in ((long, "to the late chunk"), (short, "to a full window")):
        for _ in tqdm(
            range(chunks if chunk is long else model.config.window), desc=name, unit="chunk"
        ):
            next(chunk)
    ratios = []
    for _ in range(pairs):
        clock = [now(text.device)]
        for chunk in (long, short):
            next(chunk)
            clock.append(now(text.device))
        ratios.append((clock[1] - clock[0]) / (clock[2] - clock[1]))
    return statistics.median(ratios)


def held_actions(frames, every, seed=0):
    """A script of actions that changes every so many frames on average: [frames]."""
    g = torch.Generator().manual_seed(seed)
    turns = torch.randint(1, len(ACTIONS), (frames,), generator=g) * (
        torch.rand(frames, generator=g) < 1 / every
    )
    return (turns.cumsum(0) % len(ACTIONS)).tolist()


def matmul_rate(device, dtype):
    """FLOP/s of one large square matrix product: the ceiling of this machine."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        started = now(device)
        a @ b
        rates.append(2 * n**3 / (now(device) - started))
    return statistics.median(rates[1:])


def count(model, chunks, frames, device):
    """Forward passes of the transformer for the first `frames` frames, and floating-point operations of everything."""
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    with FlopCounterMode(display=False) as counter:
        run(chunks, frames, device)
    hook.remove()
    return len(passes), counter.get_total_flops()


def play_rows(teacher, player, vae, encoder, size, device, repeats, frames):
    """Frames/s in the action world, of the teacher and of the player with and without speculative sampling: name -> columns."""
    text, generator = encoder([LOOKS]), lambda: torch.Generator().manual_seed(0)

    def many_steps():
        script = torch.tensor([held_actions(frames, 16)], device=device)
        made = stream(
            teacher,
            vae,
            text,
            generator(),
            16,
            size=size,
            guidance=1,
            actions=lambda f: script[:, f : f + 1],
        )
        count = max(1, frames // 4)  # a quarter of them tells as much
        return sum(video.shape[1] for _, video in itertools.islice(made, count)), 1.0, 0.0

    def play(every, most):
        world = Player(player, vae, text, generator(), most=most, size=size)
        for action in held_actions(frames, every):
            world.step(action)
        return frames, world.made / world.blocks, 100 * world.dropped / world.made

    rows = {"teacher, 16 steps": many_steps}
    for every in (1, 4, 16, 64):
        for how, most in (("", 1), (", speculative", 8)):
            rows[f"player, 4 steps, the action changes every {every} frames{how}"] = (
                functools.partial(play, every, most)
            )
    rates, told = {name: [] for name in rows}, {}
    for turn in tqdm(range(repeats + 1), unit="turn"):  # the first turn warms up
        for name, row in rows.items():
            started = now(device)
            told[name] = row()
            rates[name] += [told[name][0] / (now(device) - started)] if turn else []
    return {
        name: {
            "frames/s": statistics.median(rates[name]),
            "frames a block": told[name][1],
            "dropped, %": told[name][2],
        }
        for name in rows
    }


def stream_rows(teacher, student, vae, encoder, size, device, dtype, repeats):
    """First frame, frames/s and work of the teacher and the student on the same clip, name -> columns; the student's stages; the ceiling."""
    latent_shape = (
        1,
        1 + (FRAMES - 1) // vae.config.time_stride,
        student.config.in_dim,
        *(side // 8 for side in size),
    )
    seed = lambda: torch.Generator().manual_seed(0)
    rows = {
        f"teacher, {TEACHER_STEPS} steps, guided": (
            teacher,
            lambda: many_steps(teacher, vae, encoder([PROMPT]), seed(), latent_shape),
        ),
        "student, 4 steps, without cache": (
            student,
            lambda: without_cache(student, vae, encoder([PROMPT]), seed(), latent_shape),
        ),
        "student, 4 steps": (
            student,
            lambda: (
                video for _, video in stream(student, vae, encoder([PROMPT]), seed(), size=size)
            ),
        ),
    }
    times, laps, rates = {name: [] for name in rows}, [], []
    for turn in tqdm(range(repeats + 1), unit="turn"):  # the first turn warms up
        for name, (_, chunks) in rows.items():
            measured = run(chunks(), FRAMES, device)
            times[name] += [measured] if turn else []
        laps += [stages(student, vae, encoder, latent_shape, device)] if turn else []
        rates += [matmul_rate(device, dtype)] if turn else []
    told, ceiling = {}, statistics.median(rates)
    for name, (model, chunks) in rows.items():
        first, whole = (statistics.median(column) for column in zip(*times[name]))
        passes, flops = count(model, chunks(), FRAMES, device)
        told[name] = {
            "first frame, ms": 1000 * first,
            "frames/s": FRAMES / whole,
            "passes": passes,
            "GFLOP": flops / 1e9,
            "share of the ceiling, %": 100 * flops / whole / ceiling,
        }
    return (
        told,
        {stage: 1000 * statistics.median(lap[stage] for lap in laps) for stage in laps[0]},
        ceiling,
    )


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description="Measure speed: teacher and student side by side, and each stage."
    )
    add = parser.add_argument
    add("--size", default="small", choices=list(SIZES))
    add(
        "--play",
        action="store_true",
        help="the action world instead: teacher, player, and speculative sampling",
    )
    add("--repeats", type=int, default=5)
    add(
        "--late",
        type=int,
        default=1000,
        help="the chunk whose time is compared with that of the first behind a full window",
    )
    device_flags(parser)
    add("--out", default="runs/bench", help="FILE: writes FILE.json and FILE.md")
    args = parser.parse_args()
    if min(args.repeats, args.late) < 1:
        raise UserError("--repeats and --late must be at least 1")
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    teacher, student, vae, encoder, *size = build(args.size, device, dtype, args.play)
    frames = 2 * FRAMES if args.play else FRAMES
    result = {
        "size": args.size,
        "frames": frames,
        "height": size[0],
        "width": size[1],
        "repeats": args.repeats,
        "dtype": str(dtype).split(".")[-1],
        "hardware": hardware(),
        "torch": torch.__version__,
    }
    if args.play:
        result["rows"], ceiling = (
            play_rows(teacher, student, vae, encoder, size, device, args.repeats, frames),
            matmul_rate(device, dtype),
        )
    else:
        result["rows"], result["stages, ms"], ceiling = stream_rows(
            teacher, student, vae, encoder, size, device, dtype, args.repeats
        )
        result["late chunk"] = args.late
        result["its time over that of the first behind a full window"] = endless(
            student, vae, encoder([PROMPT]), torch.Generator().manual_seed(0), size, args.late
        )
    result["matmul GFLOP/s"] = ceiling / 1e9
    write_results(args.out, result, table(result))


def table(result):
    """The JSON of a run as markdown."""
    columns = list(next(iter(result["rows"].values())))
    cell = lambda v: f"{v:,.0f}" if v >= 100 or isinstance(v, int) else f"{v:.1f}"
    lines = [
        f"{result['frames']} frames of {result['width']} x {result['height']}, {result['dtype']}, {result['hardware']}, torch {result['torch']}; "
        f"one large matrix product runs at {result['matmul GFLOP/s']:,.0f} GFLOP/s",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(v) for v in row.values()) + " |"
        for name, row in result["rows"].items()
    ]
    if "stages, ms" in result:
        lines += ["", "| of a chunk of the student | ms |", "|---|---|"]
        lines += [f"| {stage} | {cell(v)} |" for stage, v in result["stages, ms"].items()]
        ratio = result["its time over that of the first behind a full window"]
        lines += [
            "",
            f"chunk {result['late chunk']:,} costs {ratio:.2f} times what the first chunks behind a full window cost",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
