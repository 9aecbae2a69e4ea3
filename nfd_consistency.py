"""Next-Frame Diffusion, stage 1: consistency distillation of the action teacher into a player.

    python nfd_consistency.py       distils weights/action_teacher.safetensors

The consistency function f(x_t, t) is where the teacher's probability-flow ODE takes x_t in the end.
All points of one path have the same end, so f must agree on neighbours, and f(x_0, 0) = x_0 ties it
down. In discrete time: the path is one solver step long, on a grid. (The continuous-time limit
needs forward-mode derivatives through attention and more care to stay stable.) The grid is coarse,
every other of the player's own times: a frame is nearly certain once the past is known, and what a
finer solver adds is the teacher's uncertainty of where the shape is, as jitter.
"""

import launch
import copy
from dataclasses import replace

import torch

import flags
import training
from nfd_teacher import WALK, ActionDiT, WalkLatents, draw_walk_times, own_past, walk_sheet
from nfd_world import sample_walks
from optimisers import EMA, Muon, optimise
from text import TextEncoder
from vae import VAE
from weights import check_fit, check_role, load_model, made_with, shipped


def consistency_loss(student, target, teacher, x0, level, times, text, generator, **attention):
    """Compare f at neighbouring times, one step of the teacher's ODE from x_t at t to x_r at r.

    x0 [B, T, C, h, w]; times [N + 1]: the solver's grid, from 1 to 0; level [B, T] in 0 .. N: where
    each frame is on it; level N is t = 0, clean context, at which f is the identity. f is the
    student, f^- its average `target`, both as x0 of the network's v: at t = 0 that is x itself, the
    boundary condition. text: whatever condition the networks take.
    """
    schedule = student.schedule
    t, r = times[level], times[(level + 1).clamp(max=len(times) - 1)]
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t)
    with torch.no_grad():
        x_r = schedule.step(x_t, teacher(x_t, t, text, **attention).float(), t, r)
        goal = schedule.x0(x_r, target(x_r, r, text, **attention).float(), r)
    x0_hat = schedule.x0(x_t, student(x_t, t, text, **attention).float(), t)
    # E || f(x_t, t) - f^-(x_r, r) ||^2, as Pseudo-Huber, between squared and absolute error, so
    # that the few paths that miss do not outweigh the rest
    c = 0.03
    return (((x0_hat - goal).square().mean((2, 3, 4)) + c * c).sqrt() - c).mean()


def main():
    description = "Distil the action teacher into a few-step player."
    parser = flags.training_parser(description, 100, 16, 3e-5, "runs/player")
    add = parser.add_argument
    add("--teacher", default=shipped("action_teacher"), type=flags.source, help="weights to distil")
    told = "steps of the solver that the consistency function follows"
    add("--grid", type=flags.whole(1, 1000), default=2, help=told)
    add("--clips", type=flags.whole(), default=3072, help="walks to train on")
    flags.codec_flags(parser)
    args = parser.parse_args()
    check_role(args.teacher, "action teacher")
    codecs = made_with(args.teacher, args.vae, args.text_encoder, "vae_frame")
    args.vae, args.text_encoder = codecs
    run = training.start_run(args)
    vae = load_model(VAE, args.vae, run.device)
    encoder = load_model(TextEncoder, args.text_encoder, run.device)
    teacher = load_model(ActionDiT, args.teacher, run.device).requires_grad_(False)
    check_fit(teacher, vae, encoder)
    with run.autocast():
        data = WalkLatents(vae, sample_walks(args.clips, WALK, torch.Generator().manual_seed(0)))
    student, target, averaged = (copy.deepcopy(teacher) for _ in range(3))
    student.requires_grad_(True).train()
    # few steps: the last must not begin where a first frame is a blur
    c = replace(teacher.config, shift=teacher.config.shift / 4)
    student.config = target.config = averaged.config = c
    times = student.schedule.timesteps(args.grid).float().to(run.device)
    ema = EMA(student, 0.95)  # f^-
    slow = EMA(student, 0.998)  # what is sampled from and shipped
    optimizer = Muon(student.blocks.parameters(), student.parameters(), run.lr)
    if run.compile:
        for network in (student, target, teacher):
            network.compile(dynamic=False)

    def image_batch(generator):
        """First frames, which have no past: a walk has only one."""
        x0, prompts, actions, _ = data.batch(16 * run.batch_size, 1, generator, run.device)
        level = torch.randint(args.grid, x0.shape[:2], generator=generator)
        return x0, level.to(run.device), (encoder(prompts).detach(), actions)

    def walk_batch(generator):
        """Walks whose clean frames are what the student made, not data."""
        frames = 2 * c.window
        x0, prompts, actions, past = data.batch(run.batch_size, frames, generator, run.device)
        level = torch.randint(args.grid, x0.shape[:2], generator=generator)
        clean = draw_walk_times(*x0.shape[:2], teacher.schedule, generator) == 0
        level = level.masked_fill(clean, args.grid).to(run.device)
        text = encoder(prompts).detach()
        averaged.load_state_dict(slow.shadow)
        own = own_past(averaged, past, c.steps, text, actions, generator)
        x0 = torch.where((level == args.grid)[..., None, None, None], own, x0)
        return x0, level, (text, actions)

    def step(i, generator):
        target.load_state_dict(ema.shadow)
        with run.autocast():
            x0, level, condition = walk_batch(generator) if i % 4 else image_batch(generator)
            parts = (student, target, teacher, x0, level, times, condition, generator)
            loss = consistency_loss(*parts, chunk=c.chunk, window=c.window)
        norm = optimise(optimizer, loss)
        ema.update(student, i)
        slow.update(student, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        averaged.load_state_dict(slow.shadow)
        return walk_sheet(averaged, vae, encoder, path)

    state = {"student": student, "ema": ema, "slow": slow, "optimizer": optimizer}
    seconds = training.train(run, state, step, sheet, [teacher, target, averaged])
    if seconds is not None:
        parts = (slow.shadow, c, seconds, codecs, "play.py --weights")
        training.write_transformer(run, "player", *parts, stage="few-step player")


if __name__ == "__main__":
    launch.run_main(main)
