"""Next-Frame Diffusion, stage 1: consistency distillation of the causal teacher of the action world into a few-step player.

    python nfd_consistency.py         distils weights/action_teacher.safetensors

The consistency function f(x_t, t) is where the teacher's probability-flow ODE takes x_t in the end. All points of one path have the
same end, so f must agree on neighbours, and f(x_0, 0) = x_0 ties it down. In discrete time: the path is one solver step long, on a
grid. (The continuous-time limit needs forward-mode derivatives through attention and more care to stay stable; here the grid is cheap.)
The grid is coarse, every other of the player's own times: a frame is nearly certain once the past is known, and what a finer solver adds
is the teacher's uncertainty of where the shape is, as jitter.
"""

import copy
import os
from dataclasses import replace

import torch

from dataset import LatentClips
from evaluate import play_walks
from media import save_sheet
from model import DiT
from nfd_teacher import draw_walk_times, own_past
from nfd_world import sample_walks
from text import TextEncoder
from training import EMA, Muon, autocast, check_training, optimise, train, training_parser
from vae import VAE
from weights import load_model, run_main, save_weights, shipped


def consistency_loss(student, target, teacher, x0, level, times, text, generator, **attention):
    """E || f(x_t, t) - f^-(x_r, r) ||^2, where r is the time after t and x_r is one step of the teacher's ODE from x_t.

    x0 [B, T, C, h, w]; times [N + 1]: the solver's grid, from 1 to 0; level [B, T] in 0 .. N: where each frame is on it, independently;
    level N is t = 0, clean context, at which f is the identity. f is the student, f^- its average `target`, both as x0 of the network's v:
    at t = 0 that is x itself, the boundary condition.
    """
    schedule = student.schedule
    t, r = times[level], times[(level + 1).clamp(max=len(times) - 1)]
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t)
    with torch.no_grad():
        x_r = schedule.step(x_t, teacher(x_t, t, text, **attention).float(), t, r)
        goal = schedule.x0(x_r, target(x_r, r, text, **attention).float(), r)
    x0_hat = schedule.x0(x_t, student(x_t, t, text, **attention).float(), t)
    # Pseudo-Huber: between squared and absolute error, so that the few paths that miss do not outweigh the rest
    c = 0.03
    return (((x0_hat - goal).square().mean((2, 3, 4)) + c * c).sqrt() - c).mean()


def main():
    parser = training_parser(
        "Distil the action teacher into a few-step player.", 100, 16, 3e-5, "runs/player"
    )
    parser.add_argument(
        "--teacher",
        default=shipped("action_teacher"),
        help="weights to distil",
    )
    parser.add_argument(
        "--grid",
        type=int,
        default=2,
        help="steps of the solver that the consistency function follows",
    )
    parser.add_argument("--clips", type=int, default=3072, help="walks in the training set")
    args = parser.parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    vae, encoder = (
        load_model(VAE, shipped("vae_frame"), args.device),
        load_model(TextEncoder, shipped("text_encoder"), args.device),
    )
    teacher = load_model(DiT, args.teacher, args.device).requires_grad_(False)
    with autocast(args):
        data = LatentClips(vae, sample_walks(args.clips, 96, torch.Generator().manual_seed(0)))
    student, target, averaged = (copy.deepcopy(teacher) for _ in range(3))
    student.requires_grad_(True).train()
    c = replace(
        teacher.config, shift=teacher.config.shift / 4
    )  # few steps: the last must not begin where a first frame is a blur
    student.config = target.config = averaged.config = c
    times = student.schedule.timesteps(args.grid).float().to(args.device)
    ema, slow = EMA(student, 0.95), EMA(student, 0.998)  # f^-, and what is sampled from and shipped
    optimizer = Muon(student.blocks.parameters(), student.parameters(), args.lr)

    if args.compile:
        for network in (student, target, teacher):
            network.compile(dynamic=False)

    def step(i, generator):
        # every fourth step is of images: a first frame has no context, and a walk has only one such
        count, length = (16 * args.batch_size, 1) if i % 4 == 0 else (args.batch_size, 32)
        x0, prompts, actions, past = data.batch(count, length, generator, args.device)
        level = torch.randint(args.grid, x0.shape[:2], generator=generator)
        if length > 1:  # context is where it is in the teacher's training
            level[draw_walk_times(count, length, teacher.schedule, generator) == 0] = args.grid
        level = level.to(args.device)
        target.load_state_dict(ema.shadow)
        with autocast(args):
            text = encoder(prompts).detach()
            if length > 1:  # context is what the student made, not data
                averaged.load_state_dict(slow.shadow)
                x0 = torch.where(
                    (level == args.grid)[..., None, None, None],
                    own_past(averaged, past, 4, text, actions, generator),
                    x0,
                )
            loss = consistency_loss(
                student,
                target,
                teacher,
                x0,
                level,
                times,
                text,
                generator,
                chunk=c.chunk,
                window=c.window,
                actions=actions,
            )
        norm = optimise(optimizer, loss)
        ema.update(student, i)
        slow.update(student, i)
        return {"loss": loss, "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(slow.shadow)
        video, measured = play_walks(averaged, vae, encoder, count=8, frames=33)
        save_sheet(video, path)
        return measured

    if train(
        args, {"student": student, "ema": ema, "slow": slow, "optimizer": optimizer}, step, sheet
    ):
        path = os.path.join(args.out, "player.safetensors")
        save_weights(
            path,
            slow.shadow,
            c,
            stage="few-step player",
            steps=args.steps,
            seconds=round(args.seconds),
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
