"""Next-Frame Diffusion, stage 0: the causal teacher of the action world, a frame at a time.

python nfd_teacher.py       makes it of the shipped text-to-video teacher
"""

import copy
import os
from dataclasses import replace

import torch
from torch import nn

from dataset import LatentClips
from diffusion import draw_times, flow_matching_loss
from dmd import rollout
from evaluate import play_walks
from media import save_sheet
from model import DiT
from nfd_world import ACTIONS, sample_walks
from teacher import draw_chunk_times, drop_prompts
from text import TextEncoder
from training import EMA, Muon, autocast, check_training, optimise, train, training_parser
from vae import VAE
from weights import load_model, run_main, save_weights, shipped

WALK = 96  # frames of a walk in the training set


def draw_walk_times(count, frames, schedule, generator):
    """Diffusion times [count, frames] of walks: for a quarter of them as in Diffusion Forcing. In half of them every other frame is clean: what
    sampling does most, the next frame behind a clean past. A quarter has blocks of 8 frames with one time, or all clean: what speculative
    sampling does. Behind a clean past only nearly pure noise leaves open where a frame's shape is: Diffusion Forcing gets a quarter of the shift."""
    t = draw_chunk_times(count, frames, 1, replace(schedule, shift=schedule.shift / 4), generator)
    turns, blocks = t[1::2], t[2::4]
    noisy = (torch.arange(frames) + torch.randint(2, (len(turns), 1), generator=generator)) % 2
    turns.copy_(noisy * draw_times(turns.numel(), schedule, generator).view_as(turns))
    blocks.copy_(draw_chunk_times(len(blocks), frames, 8, schedule, generator))
    return t


@torch.no_grad()
def own_past(model, x0, steps, text, actions, generator, run=4):
    """The past as the model itself leaves it, where data would be too good: of walks x0 [B, T, C, h, w] the first half window as it is, and
    then each run of 4 frames as the model makes it behind the data, from the data's own frames noised to a random t in `steps` denoising
    steps or fewer. Half of the walks also begin with such a run, behind nothing: no stream's first frames are as good as the data's.
    In every eighth walk each frame is a first guess without a past, a blur: what is lost can come back.

    Trained to make the data's frames behind it, a model mends what it did wrong; one that has only seen data builds upon it. What strays
    from where the data's shape is, in longer runs or from so much noise that its place does not show, teaches to jump there, and a jump is
    an action not obeyed: t is at most 0.6, of the first run, which begins in a blur when sampling, 0.9.
    """
    (B, T), given, device = x0.shape[:2], model.config.window // 2, x0.device
    noise = torch.randn(x0.shape, generator=generator).to(device)
    t = 0.2 + 0.4 * torch.rand(1, generator=generator).item()
    noised = lambda t: (model.schedule.add_noise(x0, noise, t), model.schedule.timesteps(steps, t))
    (x_t, times), (x_s, earlier) = noised(t), noised(t + 0.3)
    starts = range(0, T - given - run + 1, run)
    pieces = lambda y, first, last: torch.cat([y[:, s + first : s + last] for s in starts])
    first = rollout(
        model,
        x_s[B // 2 :, :run],
        earlier,
        text[B // 2 :],
        generator,
        actions=actions[B // 2 :, :run],
    )
    x0 = torch.cat([x0[: B // 2], torch.cat([first, x0[B // 2 :, run:]], dim=1)])
    made = rollout(
        model,
        pieces(x_t, given, given + run),
        times,
        text.repeat(len(starts), 1, 1),
        generator,
        pieces(x0, 0, given),
        pieces(actions, 0, given + run),
    )
    own = torch.cat([x0[:, :given], *made.split(B), x0[:, given + len(starts) * run :]], dim=1)
    lost, t = B // 8, torch.ones(B // 8, T, device=device)
    if not lost:
        return own
    v = model(
        noise[:lost], t, text[:lost], chunk=1, window=1, actions=torch.zeros_like(actions[:lost])
    )
    return torch.cat([model.schedule.x0(noise[:lost], v, t), own[lost:]])


def with_actions(teacher, layers=4):
    """The model of the action world (NFD) that begins as a text-to-video teacher, or as one of its own kind: frame by frame, with a window of
    16. Of the actions it knows no more than that one.

    It keeps `layers` of the teacher's, evenly spaced: with so few tokens in a frame, depth is what a pass takes its time for."""
    model = DiT(
        replace(
            teacher.config,
            shift=12.0,
            chunk=1,
            window=16,
            num_actions=len(ACTIONS),
            num_layers=layers,
        )
    )
    teacher = copy.deepcopy(teacher)
    teacher.blocks = nn.ModuleList(
        teacher.blocks[i]
        for i in torch.linspace(0, len(teacher.blocks) - 1, layers).round().int().tolist()
    )
    nn.init.zeros_(model.action_embedding.weight)
    model.load_state_dict(teacher.state_dict(), strict=False)
    return model.to(teacher.head.head.weight.device)


def main():
    description = "Train the causal teacher of the action world, a frame at a time."
    parser = training_parser(description, 1600, 16, 2e-3, "runs/action_teacher")
    parser.add_argument("--clips", type=int, default=3072, help="walks in the training set")
    parser.add_argument("--weights", default=shipped("teacher"), help="weights to start from")
    args = parser.parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    model = with_actions(load_model(DiT, args.weights, args.device))
    vae = load_model(VAE, shipped("vae_frame"), args.device)
    encoder = load_model(TextEncoder, shipped("text_encoder"), args.device).requires_grad_(False)
    with autocast(args):
        data = LatentClips(vae, sample_walks(args.clips, WALK, torch.Generator().manual_seed(0)))
    frames = 2 * model.config.window
    attention = {"chunk": model.config.chunk, "window": model.config.window}
    both = nn.ModuleList([model.train(), encoder])
    averaged = nn.ModuleList([DiT(model.config), TextEncoder()]).to(args.device)
    ema, optimizer = EMA(both), Muon(model.blocks.parameters(), both.parameters(), args.lr)

    if args.compile:
        model.compile(dynamic=False)  # a graph for images, one for walks

    def step(i, generator):
        # every fourth step is of images: a first frame has no context, and a walk has only one such
        images = i % 4 == 0
        count, length = (16 * args.batch_size, 1) if images else (args.batch_size, frames)
        x0, prompts, actions, past = data.batch(count, length, generator, args.device)
        with autocast(args):
            text = drop_prompts(encoder(prompts), generator)
        if images:
            schedule = replace(model.schedule, shift=0.25 * model.config.shift)
            t = draw_times(count, schedule, generator)[:, None].to(args.device)
        else:
            t = draw_walk_times(count, length, model.schedule, generator).to(args.device)
        with autocast(args):
            if not images:  # the context is what the model made, not data
                averaged.load_state_dict(ema.shadow)
                own = own_past(averaged[0], past, 2, text, actions, generator)
                x0 = torch.where((t == 0)[..., None, None, None], own, x0)
            loss = flow_matching_loss(model, x0, t, text, generator, actions=actions, **attention)
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        world = (averaged[0], vae, averaged[1])
        video, measured = play_walks(*world, count=8, frames=33, steps=8, guidance=1)
        save_sheet(video, path)
        return measured

    if train(args, {"model": both, "ema": ema, "optimizer": optimizer}, step, sheet):
        averaged.load_state_dict(ema.shadow)
        path = os.path.join(args.out, "action_teacher.safetensors")
        origin = {"stage": "action teacher", "steps": args.steps, "seconds": round(args.seconds)}
        save_weights(path, averaged[0].state_dict(), model.config, **origin)
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
