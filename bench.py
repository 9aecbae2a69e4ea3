"""Speed, side by side and in one run: the many-step teacher, the streaming student, and where the student's time goes.

    python bench.py                       the shipped small models, in some five minutes
    python bench.py --size wan-1.3b       a large one with random weights, for a GPU

Every time is the median of several, taken in turns, so that what else a machine does falls on all rows alike.
"""
import argparse
import itertools
import json
import os
import platform
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import FRAMES, SIZE
from model import DiT, ModelConfig, load_model
from sample import TEACHER_STEPS, denoise_chunk, normal, remember_chunk, solve_ode, stream
from text import TextConfig, TextEncoder, load_text_encoder
from training import WEIGHTS, UserError, choose_device, choose_dtype, hardware, run_main
from vae import VAE, VAEConfig, load_vae

# transformer, height and width of the video
SIZES = {"small": (None, SIZE, SIZE),
         "nfd-310m": (ModelConfig(dim=1024, ffn_dim=4096, freq_dim=256, num_heads=16, num_layers=18, in_dim=16, out_dim=16, chunk=1, window=16), 224, 384),
         "wan-1.3b": (ModelConfig(dim=1536, ffn_dim=8960, freq_dim=256, num_heads=12, num_layers=30, in_dim=16, out_dim=16, text_dim=4096), 480, 832)}
PROMPT = "a red circle bouncing on a black background"


def build(size, device, dtype):
    """(teacher, student, VAE, embedded prompt, height, width): the shipped ones for "small", else random ones of that size, where teacher
    and student are one."""
    config, height, width = SIZES[size]
    if config is None:
        teacher, student = (load_model(os.path.join(WEIGHTS, f"{name}.safetensors"), device).to(dtype) for name in ("teacher", "student"))
        return teacher, student, load_vae(device=device).to(dtype), load_text_encoder(device=device), height, width
    torch.manual_seed(0)
    with torch.device(device):
        model, vae, encoder = DiT(config).to(dtype).eval(), VAE(VAEConfig(latent_dim=config.in_dim)).to(dtype).eval(), TextEncoder(TextConfig(text_dim=config.text_dim))
    return model, model, vae, encoder, height, width


def many_steps(model, vae, text, generator, latent_shape):
    """The teacher's video, decoded chunk by chunk like the student's."""
    state, chunk = {}, model.config.chunk
    x0 = solve_ode(model, normal(latent_shape, generator).to(text.device), text, TEACHER_STEPS)[-1]
    for part in x0.split(chunk, dim=1):
        yield vae.decode(part, state)


def without_cache(model, vae, text, generator, latent_shape, steps=4):
    """The student's stream, to the same latents, if every pass went over all chunks so far again."""
    c, schedule, state = model.config, model.schedule, {}
    keys, times, past = model.text_keys(text), schedule.timesteps(steps), torch.zeros(len(text), 0, *latent_shape[2:], device=text.device)
    while True:
        x = normal((len(text), c.chunk, *latent_shape[2:]), generator).to(text.device)
        for t, r in zip(times[:-1], times[1:]):
            at = torch.cat([torch.zeros(past.shape[:2]), torch.full(x.shape[:2], float(t))], dim=1).to(text.device)
            x = schedule.x0(x, model(torch.cat([past, x], dim=1), at, keys, chunk=c.chunk, window=c.window)[:, -c.chunk:], t)
            x = schedule.add_noise(x, normal(x.shape, generator).to(text.device), r) if r > 0 else x
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
    cache, times, state = model.new_cache(len(text), *latent_shape[-2:]), model.schedule.timesteps(4), {}
    shape = (len(text), c.chunk, *latent_shape[2:])
    for _ in range(c.window):                                             # the last of these has all the window before it
        x = normal(shape, generator).to(device)
        lap()
        x0 = denoise_chunk(model, x, times, keys, cache, lambda shape: normal(shape, generator).to(device))
        spent["denoise, 4 passes"] = lap()
        remember_chunk(model, x0, keys, cache)
        spent["clean pass into the cache"] = lap()
        vae.decode(x0, state)
        spent["decode"] = lap()
    return spent


def endless(model, vae, text, generator, size, chunks, pairs=25):
    """What chunk number `chunks` of a stream costs against the first ones behind a full window: two streams take turns, so that the
    machine is the same for both, and the median of the ratios of their times is what counts."""
    long, short = (stream(model, vae, text, g, size=size) for g in (generator, torch.Generator().manual_seed(0)))
    for chunk, name in ((long, "to the late chunk"), (short, "to a full window")):
        for _ in tqdm(range(chunks if chunk is long else model.config.window), desc=name, unit="chunk"):
            next(chunk)
    ratios = []
    for _ in range(pairs):
        clock = [now(text.device)]
        for chunk in (long, short):
            next(chunk)
            clock.append(now(text.device))
        ratios.append((clock[1] - clock[0]) / (clock[2] - clock[1]))
    return statistics.median(ratios)


def matmul_rate(device, dtype):
    """FLOP/s of one large square matrix product: the ceiling of this machine."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        started = now(device)
        a @ b
        rates.append(2 * n ** 3 / (now(device) - started))
    return statistics.median(rates[1:])


def count(model, chunks, frames, device):
    """Forward passes of the transformer for the first `frames` frames, and floating-point operations of everything."""
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    with FlopCounterMode(display=False) as counter:
        run(chunks, frames, device)
    hook.remove()
    return len(passes), counter.get_total_flops()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Measure speed: teacher and student side by side, and each stage.")
    add = parser.add_argument
    add("--size", default="small", choices=list(SIZES))
    add("--repeats", type=int, default=5)
    add("--late", type=int, default=1000, help="the chunk whose time is compared with that of the first behind a full window")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--out", default="runs/bench.json")
    args = parser.parse_args()
    if min(args.repeats, args.late) < 1:
        raise UserError("--repeats and --late must be at least 1")
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    teacher, student, vae, encoder, height, width = build(args.size, device, dtype)
    latent_shape = (1, 1 + (FRAMES - 1) // vae.config.time_stride, student.config.in_dim, height // 8, width // 8)
    text, seed = encoder([PROMPT]), lambda: torch.Generator().manual_seed(0)
    rows = {f"teacher, {TEACHER_STEPS} steps, guided": (teacher, lambda: many_steps(teacher, vae, encoder([PROMPT]), seed(), latent_shape)),
            "student, 4 steps, without cache": (student, lambda: without_cache(student, vae, encoder([PROMPT]), seed(), latent_shape)),
            "student, 4 steps": (student, lambda: (video for _, video in stream(student, vae, encoder([PROMPT]), seed(), size=(height, width))))}
    times, laps, rates = {name: [] for name in rows}, [], []
    for turn in tqdm(range(args.repeats + 1), unit="turn"):               # the first turn warms up
        for name, (_, chunks) in rows.items():
            measured = run(chunks(), FRAMES, device)
            times[name] += [measured] if turn else []
        laps += [stages(student, vae, encoder, latent_shape, device)] if turn else []
        rates += [matmul_rate(device, dtype)] if turn else []
    ceiling = statistics.median(rates)
    result = {"size": args.size, "frames": FRAMES, "height": height, "width": width, "repeats": args.repeats, "dtype": str(dtype).split(".")[-1],
              "hardware": hardware(), "processor": platform.processor(), "torch": torch.__version__, "matmul GFLOP/s": ceiling / 1e9, "rows": {}}
    for name, (model, chunks) in rows.items():
        first, whole = (statistics.median(column) for column in zip(*times[name]))
        passes, flops = count(model, chunks(), FRAMES, device)
        result["rows"][name] = {"first frame, ms": 1000 * first, "frames/s": FRAMES / whole, "passes": passes, "GFLOP": flops / 1e9,
                                "share of the ceiling, %": 100 * flops / whole / ceiling}
    result["stages, ms"] = {stage: 1000 * statistics.median(lap[stage] for lap in laps) for stage in laps[0]}
    result["late chunk"] = args.late
    result["its time over that of the first behind a full window"] = endless(student, vae, text, seed(), (height, width), args.late)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".tmp", "w") as file:
        json.dump(result, file, indent=1)
    os.replace(args.out + ".tmp", args.out)
    print(table(result), f"wrote {args.out}", sep="\n")


def table(result):
    """The JSON of a run as markdown."""
    columns = list(next(iter(result["rows"].values())))
    cell = lambda v: f"{v:,.0f}" if v >= 100 or isinstance(v, int) else f"{v:.1f}"
    lines = [f"{result['frames']} frames of {result['width']} x {result['height']}, {result['dtype']}, {result['hardware']}, torch {result['torch']}; "
             f"one large matrix product runs at {result['matmul GFLOP/s']:,.0f} GFLOP/s", "",
             "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(v) for v in row.values()) + " |" for name, row in result["rows"].items()]
    lines += ["", "| of a chunk of the student | ms |", "|---|---|"]
    lines += [f"| {stage} | {cell(v)} |" for stage, v in result["stages, ms"].items()]
    ratio = result["its time over that of the first behind a full window"]
    return "\n".join(lines + ["", f"chunk {result['late chunk']:,} costs {ratio:.2f} times what the first chunks behind a full window cost"])


if __name__ == "__main__":
    run_main(main)
