"""Stage 1: the causal student starts as a regression on the teacher's ODE trajectories (CausVid, "Student initialization").

python ode_init.py      makes the trajectories with the shipped teacher, then trains the student on them
"""

import hashlib
import os

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data import sample_clips
from diffusion import solve_ode
from evaluate import make_videos
from media import save_sheet
from metrics import fixed_set, health
from model import DiT
from text import TextEncoder
from training import EMA, Muon, autocast, check_training, optimise, train, training_parser
from vae import VAE
from weights import UserError, load_model, run_main, save_weights, shipped

STUDENT_STEPS = 4


def student_grid(solver_steps, student_steps=STUDENT_STEPS):
    """Indices of the student's times [student_steps + 1], 0 included, on the solver's grid. Raises UserError if they are not on it."""
    if solver_steps % student_steps:
        raise UserError(
            f"--solver-steps must be a multiple of {student_steps}, so that the student's times lie on the solver's grid"
        )
    return torch.arange(0, solver_steps + 1, solver_steps // student_steps)


@torch.no_grad()
def make_trajectories(teacher, encoder, count, solver_steps, shape, device, batch=16):
    """Solve the teacher's guided ODE from `count` noises of `shape` [T, C, h, w] under random training prompts.

    -> (states at the student's times, noise first and x0 last, [count, N + 1, T, C, h, w] in bf16; the prompts)
    """
    generator, grid, states, prompts = (
        torch.Generator().manual_seed(0),
        student_grid(solver_steps),
        [],
        [],
    )
    for _ in tqdm(range(0, count, batch), desc="solving ODEs", unit="batch"):
        prompts += sample_clips(batch, generator).prompts(generator)
        noise = torch.randn(batch, *shape, generator=generator).to(device)
        states.append(
            solve_ode(teacher, noise, encoder(prompts[-batch:]), solver_steps)[grid]
            .transpose(0, 1)
            .to("cpu", torch.bfloat16)
        )
    return torch.cat(states), prompts


def chunk_levels(count, frames, chunk, levels, generator):
    """An independent level 0 .. levels - 1 for each chunk, the same for its frames: [count, frames]."""
    per_chunk = torch.randint(levels, (count, -(-frames // chunk)), generator=generator)
    return per_chunk.repeat_interleave(chunk, dim=1)[:, :frames]


def regression_loss(student, states, text, generator):
    """L_init = E || G({x_{t^i}^i}, {t^i}) - {x_0^i} ||^2, with a time t^i of its own for each chunk i.

    states [B, N + 1, T, C, h, w]: a trajectory at the student's N times and 0. Its last state is the target.
    """
    c, (B, N, T) = student.config, states.shape[:3]
    level = chunk_levels(B, T, c.chunk, N, generator).to(states.device)
    x_t = states[
        torch.arange(B, device=states.device)[:, None], level, torch.arange(T, device=states.device)
    ]
    t = student.schedule.timesteps(N - 1).to(states.device, torch.float32)[level]
    v = student(x_t, t, text, chunk=c.chunk, window=c.window)
    return F.mse_loss(student.schedule.x0(x_t, v.float(), t), states[:, -1])


@torch.no_grad()
def student_sheet(student, vae, encoder, path):
    """Draw a sheet of what the student streams, from its cache, for the fixed set; -> its `health`."""
    clips, noise = fixed_set()
    video = make_videos("student", student, vae, encoder(clips.prompts()), noise)
    save_sheet(video, path)
    return health(video, clips)


def main():
    parser = training_parser(
        "Train the causal student on the teacher's ODE trajectories.", 500, 8, 5e-4, "runs/ode_init"
    )
    parser.add_argument(
        "--trajectories", type=int, default=448, help="number of trajectories (paper: about 1000)"
    )
    parser.add_argument(
        "--solver-steps", type=int, default=12, help="steps of the teacher's ODE solver (paper: 50)"
    )
    args = parser.parse_args()
    student_grid(args.solver_steps)
    check_training(args)
    torch.manual_seed(args.seed)
    vae, encoder = (
        load_model(VAE, shipped("vae"), args.device),
        load_model(TextEncoder, shipped("text_encoder"), args.device),
    )
    weights = shipped("teacher")
    student, averaged = (
        load_model(DiT, weights, args.device).train(),
        load_model(DiT, weights, args.device),
    )
    with open(weights, "rb") as file:
        key = hashlib.sha256(file.read()).hexdigest()[:8]
    path = f"runs/trajectories/{key}-{args.trajectories}-{args.solver_steps}.pt"
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(
            make_trajectories(
                averaged, encoder, args.trajectories, args.solver_steps, (21, 8, 8, 8), args.device
            ),
            path + ".tmp",
        )
        os.replace(path + ".tmp", path)
    states, prompts = torch.load(path, weights_only=True)
    ema, optimizer = EMA(student), Muon(student.blocks.parameters(), student.parameters(), args.lr)

    if args.compile:
        student.compile()

    def step(i, generator):
        index = torch.randint(len(states), (args.batch_size,), generator=generator)
        with torch.no_grad():
            text = encoder([prompts[n] for n in index.tolist()])
        with autocast(args):
            loss = regression_loss(
                student, states[index].to(args.device, torch.float32), text, generator
            )
        norm = optimise(optimizer, loss)
        ema.update(student, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        return student_sheet(averaged, vae, encoder, path)

    if train(args, {"student": student, "ema": ema, "optimizer": optimizer}, step, sheet):
        path = os.path.join(args.out, "ode_init.safetensors")
        save_weights(
            path,
            ema.shadow,
            student.config,
            stage="ODE-initialised student",
            steps=args.steps,
            seconds=round(args.seconds),
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
