"""Stage 1: the causal student starts as a regression on the teacher's ODE trajectories (CausVid,
"Student initialization").

    python ode_init.py      solves the trajectories, then trains the student on them
"""

import launch
import math
import os

import torch
from torch.nn import functional as F

import flags
import training
import weights
from dataset import kept_in, next_command, training_world
from diffusion import solve_teacher
from evaluate import fixed_sheet
from model import DiT
from optimisers import EMA, Muon, optimise
from text import TextEncoder
from vae import VAE
from weights import UserError, check_fit, file_hash, load_model, made_with, shipped


def student_grid(solver_steps, student):
    """Indices of a student's times [student.steps + 1], 0 included, on the solver's even grid.
    student: its ModelConfig. Raises UserError if the times are not on the grid."""
    full, times = student.steps, range(student.steps, -1, -1)
    if len(student.times) == student.steps:  # an uneven list
        full, times = 1000, (*student.times, 0)
    needed = full // math.gcd(full, *times)
    if solver_steps % needed:
        raise UserError(f"--solver-steps must be a multiple of {needed} to fit the student's times")
    return torch.tensor([(full - time) * solver_steps // full for time in times])


@torch.no_grad()
def make_trajectories(teacher, encoder, draw, parts, solver_steps, grid, shape, device, batch=16):
    """Solve the teacher's guided ODE from noises of `shape` [T, C, h, w] under training prompts,
    draw(batch, generator), in parts of `batch`; parts: the numbers of those that are wanted. grid:
    of `student_grid`. Yields the states at the student's times, noise first and x0 last,
    [batch, N + 1, T, C, h, w] in bf16, and the prompts."""
    generator = torch.Generator().manual_seed(0)
    for part in range(parts.stop):
        prompts = draw(batch, generator)
        noise = torch.randn(batch, *shape, generator=generator)  # drawn for all parts alike
        if part in parts:
            solved = solve_teacher(teacher, noise.to(device), encoder(prompts), solver_steps)[grid]
            states = solved.transpose(0, 1).to("cpu", torch.bfloat16)
            yield {"states": states, "prompts": prompts}


def chunk_levels(count, frames, chunk, levels, generator):
    """An independent level 0 .. levels - 1 for each chunk, the same for its frames."""
    per_chunk = torch.randint(levels, (count, -(-frames // chunk)), generator=generator)
    return per_chunk.repeat_interleave(chunk, dim=1)[:, :frames]  # [count, frames]


def regression_loss(student, states, text, generator):
    """Regress the student on trajectories [B, N + 1, T, C, h, w], whose states are at its N times
    and at 0, the target; each chunk has a time of its own."""
    c, (B, levels, T) = student.config, states.shape[:3]
    level = chunk_levels(B, T, c.chunk, levels, generator).to(states.device)  # [B, T]
    clip = torch.arange(B, device=states.device)[:, None]
    x_t = states[clip, level, torch.arange(T, device=states.device)]
    t = student.schedule.timesteps(levels - 1).float().to(states.device)[level]
    v = student(x_t, t, text, chunk=c.chunk, window=c.window)
    # L_init = E || G({x_{t^i}^i}, {t^i}) - {x_0^i} ||^2
    return F.mse_loss(student.schedule.x0(x_t, v.float(), t), states[:, -1])


def main():
    description = "Train the causal student on the teacher's ODE trajectories."
    parser = flags.model_parser(description, 500, 8, 5e-4, "runs/ode_init")
    add = parser.add_argument
    told = "weights whose ODE is solved"
    add("--teacher", default=shipped("teacher"), type=flags.parts, help=told)
    add("--trajectories", type=flags.whole(), default=448, help="how many")
    told = "steps of the ODE solver"
    add("--solver-steps", type=flags.whole(1, 1000), default=12, help=told)
    args = parser.parse_args()
    weights.check_role(args.teacher, "teacher")
    codecs = made_with(args.teacher, args.vae, args.text_encoder)
    args.vae, args.text_encoder = codecs
    world = training_world(args, args.teacher)
    run = training.start_run(args)
    vae = load_model(VAE, args.vae, run.device)
    encoder = load_model(TextEncoder, args.text_encoder, run.device)
    student = load_model(DiT, args.teacher, run.device).train()
    given = (args.chunk, args.window, args.student_steps)
    student.config = training.causal_config(student.config, *given)
    averaged = load_model(DiT, args.teacher, run.device)  # until the first sheet the teacher
    averaged.config = student.config
    check_fit(student, vae, encoder)
    grid = student_grid(args.solver_steps, student.config)
    draw = world.prompter(vae, student.config.patch_size)
    key = file_hash(args.teacher, args.text_encoder) + world.key
    count, shape = -(-args.trajectories // 16), vae.latent_shape(world.frames, *world.size)

    def make(first):
        how = (args.solver_steps, grid, shape, run.device)
        return make_trajectories(averaged, encoder, draw, range(first, count), *how)

    name = f"{key}-{args.trajectories}-{args.solver_steps}-{student.config.steps}.pt"
    kinds = {"states": torch.Tensor, "prompts": list}
    path = os.path.join("runs", "trajectories", name)
    kept = kept_in(path, kinds, f"solving {16 * count:,} ODEs", count, make)
    states, prompts = (kept[name][: args.trajectories] for name in kinds)
    ema = EMA(student)
    optimizer = Muon(student.blocks.parameters(), student.parameters(), run.lr)
    if run.compile:
        student.compile()

    def step(i, generator):
        index = torch.randint(len(states), (run.batch_size,), generator=generator)
        with torch.no_grad():
            text = encoder([prompts[n] for n in index.tolist()])
        with run.autocast():
            x = states[index].to(run.device, torch.float32)
            loss = regression_loss(student, x, text, generator)
        norm = optimise(optimizer, loss)
        ema.update(student, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        return fixed_sheet("student", averaged, vae, encoder, path, world)

    state = {"student": student, "ema": ema, "optimizer": optimizer}
    seconds = training.train(run, state, step, sheet, [averaged])
    if seconds is not None:
        then = next_command(world, "dmd.py", "--teacher", args.teacher, "--student")
        parts = (ema.shadow, student.config, seconds, codecs, then)
        origin = {"stage": "ODE-initialised student", **world.origin}
        training.write_transformer(run, "ode_init", *parts, **origin)


if __name__ == "__main__":
    launch.run_main(main)
