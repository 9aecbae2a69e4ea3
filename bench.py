"""Speed, side by side and in one run: the many-step teacher, the streaming student, its stages.

    python bench.py                       the shipped small models, in some five minutes
    python bench.py --size wan-1.3b       a large one with random weights, for a GPU
    python bench.py --size wan-1.3b --count       its operations and bytes, without a GPU or weights

Every time is the median of several, taken in turns, so that what else a machine does falls on all
rows alike.
"""

import launch
import itertools
import os
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import flags
from data import FRAMES, SIZE
from diffusion import TEACHER_STEPS, noise_source, solve_teacher
from evaluate import write_results
from model import DiT, ModelConfig
from sample import PROMPT, denoise_chunk, remember_chunk, text_to_video
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import hardware, load_model, make_folder, shipped

PAPER = {"first frame": 168, "clip": 15.7}  # times as fast as the teacher (CausVid, Table 3)
LARGE = {"freq_dim": 256, "in_dim": 16, "out_dim": 16}
WAN_STEPS = 50  # of its teacher
WAN = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "text_dim": 4096}
SIZES = {  # fields of the transformer's config, or None for the shipped one; height, width
    "small": (None, SIZE, SIZE),
    "nfd-310m": (
        LARGE | {"dim": 1024, "ffn_dim": 4096, "num_heads": 16, "num_layers": 18},
        224,
        384,
    ),
    "wan-1.3b": (LARGE | WAN | {"window": 7}, 480, 832),
}


# ------------------------------------------------------------------------------------- the models
def shipped_parts(network, names, device, dtype):
    """Load (teacher, student, VAE, text encoder) by the names of their shipped weights."""
    teacher, student = (load_model(network, shipped(name), device).to(dtype) for name in names[:2])
    vae = load_model(VAE, shipped(names[2]), device).to(dtype)
    return teacher, student, vae, load_model(TextEncoder, shipped("text_encoder"), device)


def random_parts(network, config, stride, device, dtype):
    """Make random (teacher, student, VAE, text encoder); teacher and student are one. Wan's has its
    own tiny VAE and prompts of 512 tokens."""
    torch.manual_seed(0)
    words, wan = TextConfig().words, None
    if config.text_dim == WAN["text_dim"]:
        import wan  # stands on the last shelf

        words = wan.WORDS
    with torch.device(device):
        model = network(config).to(dtype).eval()
        vae = VAE(VAEConfig(latent_dim=config.in_dim, time_stride=stride))
        vae = wan.TinyVAE(config.in_dim) if wan else vae
        encoder = TextEncoder(TextConfig(text_dim=config.text_dim, words=words))
    return model, model, vae.to(dtype).eval(), encoder


# -------------------------------------------------------------------------------------- the rows
def many_steps(model, vae, text, generator, latent_shape, steps):
    """Make the teacher's video, decoded chunk by chunk like the student's."""
    noise, state = noise_source(generator, text.device)(latent_shape), {}
    x0 = solve_teacher(model, noise, text, steps)[-1]
    for part in x0.split(model.config.chunk, dim=1):
        yield vae.decode(part, state)


def without_cache(model, vae, text, generator, latent_shape):
    """Make the student's stream, to the same latents, with every pass over all chunks so far."""
    c, schedule, state = model.config, model.schedule, {}
    keys, times = model.text_keys(text), schedule.timesteps(c.steps)
    noise = noise_source(generator, text.device)
    past = torch.zeros(len(text), 0, *latent_shape[2:], device=text.device)
    while True:
        x = noise((len(text), c.chunk, *latent_shape[2:]))
        for t, r in itertools.pairwise(times):
            at = torch.zeros(len(text), past.shape[1] + c.chunk, device=text.device)
            at[:, -c.chunk :] = t
            v = model(torch.cat([past, x], dim=1), at, keys, chunk=c.chunk, window=c.window)
            x = schedule.x0(x, v[:, -c.chunk :], t)
            if r > 0:
                x = schedule.add_noise(x, noise(x.shape), r)
        yield vae.decode(x, state)
        past = torch.cat([past, x], dim=1)


def student_video(model, vae, text, generator, size):
    """Make the student's stream."""
    for _, video in text_to_video(model, vae, text, generator, size=size):
        yield video


# ------------------------------------------------------------------------------------- measuring
def now(device):
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(chunks, frames, device):
    """Take `frames` frames from a stream: (seconds to the first chunk, seconds to the last)."""
    started, first, made = now(device), None, 0
    for video in chunks:
        made += video.shape[1]
        first = first or now(device) - started
        if made >= frames:
            break
    return first, now(device) - started


def stages(model, vae, encoder, latent_shape, device):
    """Time each stage of a chunk that has a full window before it: name -> seconds."""
    c, clock = model.config, [now(device)]

    def lap():
        clock.append(now(device))
        return clock[-1] - clock[-2]

    text = encoder([PROMPT])
    keys, state = model.text_keys(text), {}
    spent = {"text, once a prompt": lap()}
    cache, times = model.new_cache(1, *latent_shape[-2:]), model.schedule.timesteps(c.steps)
    noise = noise_source(torch.Generator().manual_seed(0), device)
    for _ in range(c.window):  # the last of these has all the window before it
        x = noise((1, c.chunk, *latent_shape[2:]))
        lap()
        x0 = denoise_chunk(model, x, times, keys, cache, noise)
        spent[f"denoise, {c.steps} passes"] = lap()
        remember_chunk(model, x0, keys, cache)
        spent["clean pass into the cache"] = lap()
        vae.decode(x0, state)
        spent["decode"] = lap()
    return spent


def endless(model, vae, text, size, chunks, pairs=25):
    """Compare the time of chunk number `chunks` of a stream with that of the first chunks which
    have a full window before them: two streams take turns, and the median of the ratios counts."""
    streams = [
        text_to_video(model, vae, text, torch.Generator().manual_seed(0), size=size)
        for _ in range(2)
    ]
    counts = {"to the late chunk": chunks, "to a full window": model.config.window}
    for chunk, (name, count) in zip(streams, counts.items(), strict=True):
        for _ in tqdm(range(count), desc=name, unit="chunk"):
            next(chunk)
    ratios = []
    for _ in range(pairs):
        clock = [now(text.device)]
        for chunk in streams:
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
        rates.append(2 * n**3 / (now(device) - started))
    return statistics.median(rates[1:])


def count(model, chunks, frames, device):
    """Count forward passes of the transformer for `frames` frames, and operations of everything."""
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    with FlopCounterMode(display=False) as counter:
        run(chunks, frames, device)
    hook.remove()
    return len(passes), counter.get_total_flops()


def stream_rows(teacher, student, vae, encoder, size, device, dtype, repeats):
    """Measure teacher and student on the same clip: (name -> columns, stages in ms, ceiling)."""
    latent_shape = (1, *vae.latent_shape(FRAMES, *size))

    def video(make, model, *more):
        return make(model, vae, encoder([PROMPT]), torch.Generator().manual_seed(0), *more)

    many, few = TEACHER_STEPS, f"student, {student.config.steps} steps"
    rows = {
        f"teacher, {many} steps, guided": (many_steps, teacher, latent_shape, many),
        f"{few}, without cache": (without_cache, student, latent_shape),
        few: (student_video, student, size),
    }
    times, laps, rates = {name: [] for name in rows}, [], []
    for turn in tqdm(range(repeats + 1), unit="turn"):
        for name, row in rows.items():
            times[name].append(run(video(*row), FRAMES, device))
        laps.append(stages(student, vae, encoder, latent_shape, device))
        rates.append(matmul_rate(device, dtype))
        if turn == 0:  # the first turn warms up
            times, laps, rates = {name: [] for name in rows}, [], []
    told, ceiling = {}, statistics.median(rates)
    for name, row in rows.items():
        first, whole = (statistics.median(column) for column in zip(*times[name], strict=True))
        passes, flops = count(row[1], video(*row), FRAMES, device)
        told[name] = {
            "first frame, ms": 1000 * first,
            "frames/s": FRAMES / whole,
            "passes": passes,
            "GFLOP": flops / 1e9,
            "share of the ceiling, %": 100 * flops / whole / ceiling,
        }
    medians = {stage: 1000 * statistics.median(lap[stage] for lap in laps) for stage in laps[0]}
    return told, medians, ceiling


# -------------------------------------------------------------------------------------- counting
@torch.no_grad()
def count_all(config, sides, teacher_steps, peak=None):
    """Count operations and bytes on the meta device, which computes nothing: JSON for `counted`.
    peak: operations a second, for the bound in frames/s that they set."""
    device = torch.device("meta")
    model, _, vae, encoder = random_parts(DiT, config, 4, device, torch.bfloat16)
    text = torch.zeros(1, encoder.config.words, config.text_dim, device=device)
    shape, noise = (1, *vae.latent_shape(FRAMES, *sides)), torch.Generator()

    def flops(make, frames, *more):
        return count(model, make(model, vae, text, noise, *more), frames, device)[1]

    teacher = [flops(many_steps, n, shape, teacher_steps) for n in (1, FRAMES)]
    student = [flops(student_video, n, sides) for n in (1, FRAMES)]
    cache, keys = model.new_cache(1, *shape[-2:]), model.text_keys(text)
    cache.frames = (config.window - 1) * config.chunk
    x = torch.zeros(1, config.chunk, *shape[2:], device=device)
    with FlopCounterMode(display=False) as counter:
        times, draw = model.schedule.timesteps(config.steps), noise_source(noise, device)
        vae.decode(denoise_chunk(model, x, times, keys, cache, draw))
        remember_chunk(model, x, keys, cache)
    full, made = counter.get_total_flops(), config.chunk * vae.config.time_stride
    tera = [{"first frame": a / 1e12, "clip": b / 1e12} for a, b in (teacher, student)]
    rows = {f"teacher, {teacher_steps} guided steps, TFLOP": tera[0]}
    rows[f"student, {config.steps} steps, TFLOP"] = tera[1]
    rows["times fewer"] = {name: tera[0][name] / tera[1][name] for name in PAPER}
    rows["times faster in the paper"] = PAPER
    told = {"rows": rows, "a chunk behind a full window, TFLOP": full / 1e12}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    told["parameters, GiB"] = parameters / 2**30
    told["cache, GiB"] = 2 * cache.k.numel() * cache.k.element_size() / 2**30
    if peak:
        told["bound at the given peak, frames/s"] = made * peak / full
    return told


def counted(told):
    """Write what `count_all` found as markdown."""
    lines = ["| | to the first frame | for the clip |", "|---|---|---|"]
    for name, row in told["rows"].items():
        lines.append(f"| {name} | {cell(row['first frame'])} | {cell(row['clip'])} |")
    rest = [f"{name}: {cell(value)}" for name, value in told.items() if isinstance(value, float)]
    return "\n".join([*lines, "", "; ".join(rest)])


# ---------------------------------------------------------------------------------- command line
def bench_parser(description, out):
    """The flags of a benchmark."""
    parser = flags.Parser(description)
    add = parser.add_argument
    add("--size", choices=list(SIZES), help="of the models and the video (small)")
    add("--repeats", type=flags.whole(), help="turns, of which the median counts (5)")
    flags.device_flags(parser)
    add("--out", default=out, type=flags.results, help="FILE: writes FILE.json and FILE.md")
    return parser


def conditions(size, frames, repeats, dtype):
    """What a benchmark's numbers hold for, for its JSON."""
    _, height, width = SIZES[size]
    told = {"size": size, "frames": frames, "height": height, "width": width, "repeats": repeats}
    return told | {"dtype": str(dtype).split(".")[-1], "hardware": hardware()}


def cell(value):
    return f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.1f}"


def table(result):
    """Write the JSON of a run as markdown."""
    columns = list(next(iter(result["rows"].values())))
    lines = [
        f"{result['frames']} frames of {result['width']} x {result['height']}, {result['dtype']}, "
        f"{result['hardware']}, torch {result['torch']}; "
        f"one large matrix product runs at {result['matmul GFLOP/s']:,.0f} GFLOP/s",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | " + " | ".join(cell(v) for v in row.values()) + " |")
    if "stages, ms" in result:
        lines += ["", "| of a chunk of the student | ms |", "|---|---|"]
        lines += [f"| {stage} | {cell(v)} |" for stage, v in result["stages, ms"].items()]
        ratio = f"{result['its time over that of the first with a full window']:.2f}"
        late = f"chunk {result['late chunk']:,} takes {ratio} times as long as"
        lines += ["", f"{late} the first chunks that have a full window before them"]
    return "\n".join(lines)


@torch.no_grad()
def main():
    description = "Measure speed: teacher and student side by side, and each stage."
    parser = bench_parser(description, "runs/bench")
    told = "the chunk whose time is compared with that of the first with a full window before them"
    parser.add_argument("--late", type=flags.whole(), default=1000, help=told)
    told = "only count operations and bytes, in bfloat16, without computing"
    parser.add_argument("--count", action="store_true", help=told)
    told = "TFLOP/s of a device, with --count: the bound in frames/s that it sets (none)"
    parser.add_argument("--peak", type=flags.real(0, above=True), help=told)
    args = parser.parse_args()
    flags.check_needed(args, peak="count")
    make_folder(os.path.dirname(args.out) or ".")
    size, repeats = args.size or "small", args.repeats or 5
    fields, *sides = SIZES[size]
    if args.count:
        steps = WAN_STEPS if size == "wan-1.3b" else TEACHER_STEPS
        peak = args.peak and 1e12 * args.peak
        told = count_all(ModelConfig(**fields or {}), sides, steps, peak)
        told = conditions(size, FRAMES, 1, torch.bfloat16) | {"torch": torch.__version__} | told
        write_results(args.out, told, counted(told))
        return
    device, dtype = flags.on_device(args.device, args.dtype, args.threads)
    if fields is None:
        parts = shipped_parts(DiT, ("teacher", "student", "vae"), device, dtype)
    else:
        parts = random_parts(DiT, ModelConfig(**fields), 4, device, dtype)
    _, student, vae, encoder = parts
    result = conditions(size, FRAMES, repeats, dtype) | {"torch": torch.__version__}
    rows, laps, ceiling = stream_rows(*parts, sides, device, dtype, repeats)
    ratio = endless(student, vae, encoder([PROMPT]), sides, args.late)
    result |= {"rows": rows, "stages, ms": laps, "late chunk": args.late}
    result["its time over that of the first with a full window"] = ratio
    result["matmul GFLOP/s"] = ceiling / 1e9
    write_results(args.out, result, table(result))


if __name__ == "__main__":
    launch.run_main(main)
