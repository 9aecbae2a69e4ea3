"""Tables of Next-Frame Diffusion: what the action models make of long walks, and how fast.

python nfd_evaluate.py              quality of teacher and player, over streams of a minute
python nfd_evaluate.py --bench      frames/s, with and without speculative sampling
"""

import launch
import functools
import itertools
import os
import statistics

import torch
from tqdm import tqdm

import bench
import flags
from data import FPS, FRAMES
from evaluate import table, write_results
from nfd_teacher import ActionConfig, ActionDiT, stream_walks
from nfd_world import ACTIONS, measure_walks, sample_walks
from play import LOOKS, Player
from text import TextEncoder
from vae import VAE
from weights import UserError, load_model, make_folder, shipped

TEACHER_STEPS = 16
AHEAD = 8  # frames that the player makes ahead at most
ROWS = (  # name, weights, steps, along the ODE, frames made ahead (None: streamed as one batch)
    (f"action teacher, {TEACHER_STEPS} steps", "action_teacher", TEACHER_STEPS, True, None),
    ("action teacher, 4 steps", "action_teacher", 4, False, None),
    ("player, 4 steps", "player", 4, False, None),
    ("player, 4 steps, speculative", "player", 4, False, AHEAD),
)


# --------------------------------------------------------------------------------------- quality
def streamed(model, vae, text, actions, generator, steps, ode, name=None):
    """Stream walks for actions [B, F] as one batch -> video [B, F, 3, 64, 64]."""
    acts = actions.to(text.device)
    made = stream_walks(model, vae, text, acts, generator, steps, ode)
    made = itertools.islice(made, actions.shape[1])
    bar = tqdm(made, total=actions.shape[1], unit="frame", desc=name, disable=name is None)
    return torch.cat([video.cpu() for _, video in bar], dim=1)


def played(model, vae, text, actions, generator, steps, ahead, name=None):
    """Play walks for actions [B, F] one after the other -> video [B, F, 3, 64, 64]."""
    walks = []
    for row, own in enumerate(tqdm(actions.tolist(), unit="walk", desc=name, disable=name is None)):
        player = Player(model, vae, text[row : row + 1], generator, steps, ahead)
        walks.append(torch.stack([player.step(action).cpu() for action in own]))
    return torch.stack(walks)


@torch.no_grad()
def quality_rows(vae, encoder, device, count, frames, seed):
    """Measure teacher and player on `count` random walks: name -> measures, 0 to 100."""
    rows = {}
    for name, weights, steps, ode, ahead in ROWS:
        model = load_model(ActionDiT, shipped(weights), device)
        generator = torch.Generator().manual_seed(seed)
        walks = sample_walks(count, frames, generator)
        parts = (model, vae, encoder(walks.prompts()), walks.actions, generator, steps)
        video = played(*parts, ahead, name) if ahead else streamed(*parts, ode, name)
        rows[name] = measure_walks(video, walks)
    return rows


# ----------------------------------------------------------------------------------------- speed
def held_actions(frames, every, seed=0):
    """Draw actions [frames] that change after `every` frames on average."""
    g = torch.Generator().manual_seed(seed)
    turns = torch.randint(1, len(ACTIONS), (frames,), generator=g)
    changes = torch.rand(frames, generator=g) < 1 / every
    return ((turns * changes).cumsum(0) % len(ACTIONS)).tolist()


def speed_rows(teacher, player, vae, encoder, size, device, repeats, frames):
    """Measure frames/s of the teacher, and of the player with and without speculative sampling.
    name -> columns. The teacher makes a quarter of the frames, which tells as much."""
    text = encoder([LOOKS])

    def teach():
        actions = torch.tensor([held_actions(frames, 16)], device=device)
        generator, steps = torch.Generator().manual_seed(0), TEACHER_STEPS
        made = stream_walks(teacher, vae, text, actions, generator, steps, ode=True, size=size)
        count = sum(1 for _ in itertools.islice(made, max(1, frames // 4)))
        return count, 1.0, 0.0

    def play(every, most):
        generator = torch.Generator().manual_seed(0)
        world = Player(player, vae, text, generator, most=most, size=size)
        for action in held_actions(frames, every):
            world.step(action)
        return frames, world.made / world.blocks, 100 * world.dropped / world.made

    rows = {f"teacher, {TEACHER_STEPS} steps": teach}
    for every in (1, 4, 16, 64):
        name = f"player, {player.config.steps} steps, an action lasts {every} frames on average"
        rows[name] = functools.partial(play, every, 1)
        rows[f"{name}, speculative"] = functools.partial(play, every, AHEAD)
    rates, told = {name: [] for name in rows}, {}
    for turn in tqdm(range(repeats + 1), unit="turn"):  # the first turn warms up
        for name, row in rows.items():
            started = bench.now(device)
            made, *told[name] = row()
            if turn:
                rates[name].append(made / (bench.now(device) - started))
    columns = ("frames/s", "frames a block", "dropped, %")
    return {
        name: dict(zip(columns, (statistics.median(rates[name]), *told[name]), strict=True))
        for name in rows
    }


@torch.no_grad()
def measure_speed(size, device, dtype, repeats):
    """Make the JSON of a benchmark of the action world."""
    fields, *sides = bench.SIZES[size]
    if fields is None:
        names = ("action_teacher", "player", "vae_frame")
        parts = bench.shipped_parts(ActionDiT, names, device, dtype)
    else:
        parts = bench.random_parts(ActionDiT, ActionConfig(**fields), 1, device, dtype)
    result = bench.conditions(size, 2 * FRAMES, repeats, dtype) | {"torch": torch.__version__}
    result["rows"] = speed_rows(*parts, sides, device, repeats, 2 * FRAMES)
    return result | {"matmul GFLOP/s": bench.matmul_rate(device, dtype) / 1e9}


def main():
    description = "Measure the action models: quality over long walks, or speed."
    parser = bench.bench_parser(description, "runs/nfd_evaluate")
    add = parser.add_argument
    add("--bench", action="store_true", help="measure speed instead of quality")
    add("--clips", type=flags.whole(), help="walks (20)")
    add("--seconds", type=flags.whole(15, 10**6), help="length of the walks (60)")
    add("--seed", type=flags.SEED, help="of walks and noise (0)")
    parser.set_defaults(dtype=None)
    args = parser.parse_args()
    flags.check_needed(args, size="bench", repeats="bench", dtype="bench")
    if args.bench and any(v is not None for v in (args.clips, args.seconds, args.seed)):
        raise UserError("--clips, --seconds and --seed do not go with --bench")
    make_folder(os.path.dirname(args.out) or ".")
    dtype = args.dtype or ("auto" if args.bench else "float32")
    device, dtype = flags.on_device(args.device, dtype, args.threads)
    if args.bench:
        result = measure_speed(args.size or "small", device, dtype, args.repeats or 5)
        write_results(args.out, result, bench.table(result))
        return
    vae = load_model(VAE, shipped("vae_frame"), device)
    encoder = load_model(TextEncoder, shipped("text_encoder"), device)
    count, seconds, seed = args.clips or 20, args.seconds or 60, args.seed or 0
    rows = quality_rows(vae, encoder, device, count, seconds * FPS, seed)
    told = {"clips": count, "seconds": seconds, "seed": seed, "rows": rows}
    write_results(args.out, told, table(rows))


if __name__ == "__main__":
    launch.run_main(main)
