"""Stage 0: the many-step bidirectional teacher, by flow matching, and the text encoder with it.

python teacher.py               trains both on latents of the shapes world
python teacher.py --causal      makes a causal many-step teacher of the shipped one (Table 4)
"""

import os
from dataclasses import replace

import torch
from torch import nn

from data import sample_clips
from dataset import LatentClips
from diffusion import draw_times, flow_matching_loss
from evaluate import make_videos
from media import save_sheet
from metrics import fixed_set, health
from model import DiT
from text import TextEncoder
from training import EMA, Muon, autocast, check_training, optimise, train, training_parser
from vae import VAE
from weights import UserError, load_model, run_main, save_weights, shipped


def draw_chunk_times(count, frames, chunk, schedule, generator):
    """Diffusion Forcing, and NFD with chunk=1: a time of its own for each chunk [count, frames]. Some are clean, at t = 0, as context is
    when sampling: in each clip a share of its own, from none to all."""
    chunks = -(-frames // chunk)
    noisy = torch.rand(count, chunks, generator=generator) > torch.rand(
        count, 1, generator=generator
    )
    return (
        draw_times(count * chunks, schedule, generator).view(count, chunks) * noisy
    ).repeat_interleave(chunk, dim=1)[:, :frames]


def batch_shape(i, steps, batch_size, frames):
    """Choose what step i of the bidirectional teacher trains on: (clips, latent frames of each).

    Images first: geometry and colours are cheap to learn on single latent frames, 16 times as many
    of them. Then whole clips and, in every other step, three times as many of a third of the
    length: what a shape does next shows in a few frames.
    """
    if i < 0.16 * steps:
        return 16 * batch_size, 1
    return (3 * batch_size, frames // 3) if i % 2 else (batch_size, frames)


def draw_clip_times(count, frames, schedule, generator):
    """Draw one time for each clip [count, frames]: for a third of the clips with a quarter of the
    timestep shift, for a third with twice the shift.

    The more latents agree on a thing, the more noise hides it: a clip's track is decided nearer to
    t = 1 than a frame's colour, and how far a shape has turned nearer to t = 0. Images, of which
    frames is 1, have the schedule's own shift.
    """
    if frames > 1:
        scale = torch.tensor([0.25, 1.0, 2.0])[torch.randint(3, (count,), generator=generator)]
        schedule = replace(schedule, shift=schedule.shift * scale)
    return draw_times(count, schedule, generator)[:, None].expand(-1, frames)


def drop_prompts(text, generator):
    """Replace a tenth of the embedded prompts [B, S, text_dim] by the null prompt, for guidance."""
    keep = torch.rand(len(text), generator=generator) > 0.1
    return text * keep.to(text.device)[:, None, None]


def main():
    description = "Train the bidirectional teacher and the text encoder."
    parser = training_parser(description, 1600, 16, 2e-3, "runs/teacher")
    parser.add_argument("--clips", type=int, default=3072, help="clips in the training set")
    parser.add_argument("--weights", help="for --causal: start from these instead of the shipped")
    parser.add_argument(
        "--causal",
        action="store_true",
        help="train a causal teacher: block-causal attention and a time for each chunk",
    )
    args = parser.parse_args()
    if args.weights and not args.causal:
        raise UserError("--weights goes with --causal: the bidirectional teacher starts anew")
    check_training(args)
    torch.manual_seed(args.seed)
    attention = {}
    if args.causal:
        model = load_model(DiT, args.weights or shipped("teacher"), args.device)
        if model.config.num_actions:
            raise UserError(f"train {args.weights} with nfd_teacher.py: its frames follow actions")
        attention = {"chunk": model.config.chunk, "window": model.config.window}
    else:
        model = DiT().to(args.device)
    vae = load_model(VAE, shipped("vae"), args.device)
    data = LatentClips(vae, sample_clips(args.clips, torch.Generator().manual_seed(0)))
    if args.causal:
        encoder = load_model(TextEncoder, shipped("text_encoder"), args.device)
        encoder.requires_grad_(False)
    else:
        encoder = TextEncoder().to(args.device)
    frames = data.latents.shape[1]
    both = nn.ModuleList([model.train(), encoder])
    averaged = nn.ModuleList([DiT(model.config), TextEncoder()]).to(args.device)
    ema, optimizer = EMA(both), Muon(model.blocks.parameters(), both.parameters(), args.lr)

    if args.compile:
        model.compile(dynamic=False)  # a graph for images, one for whole clips, one for short ones

    def step(i, generator):
        count, length = args.batch_size, frames
        if not args.causal:
            count, length = batch_shape(i, args.steps, args.batch_size, frames)
        x0, prompts = data.batch(count, length, generator, args.device)
        with autocast(args):
            text = drop_prompts(encoder(prompts), generator)
        if args.causal:
            chunk = model.config.chunk
            t = draw_chunk_times(count, length, chunk, model.schedule, generator)
        else:
            t = draw_clip_times(count, length, model.schedule, generator)
        with autocast(args):
            t = t.to(args.device)
            loss = flow_matching_loss(model, x0, t, text, generator, **attention)
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        clips, noise = fixed_set()
        kind = "causal" if args.causal else "teacher"
        text = averaged[1](clips.prompts())
        video = make_videos(kind, averaged[0], vae, text, noise, steps=8)
        save_sheet(video, path)
        return health(video, clips)

    if train(args, {"model": both, "ema": ema, "optimizer": optimizer}, step, sheet):
        averaged.load_state_dict(ema.shadow)
        name = "causal_teacher" if args.causal else "teacher"
        origin = {"stage": name.replace("_", " "), "steps": args.steps}
        origin["seconds"] = round(args.seconds)
        path = os.path.join(args.out, f"{name}.safetensors")
        save_weights(path, averaged[0].state_dict(), model.config, **origin)
        if not args.causal:
            text_path = os.path.join(args.out, "text_encoder.safetensors")
            save_weights(text_path, averaged[1].state_dict(), encoder.config, **origin)
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
