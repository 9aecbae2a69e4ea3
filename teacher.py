"""Stage 0: the many-step bidirectional teacher, by flow matching, and the text encoder with it.

    python teacher.py               trains both on latents of the shapes world
    python teacher.py --causal      makes a causal many-step teacher of the shipped one, to compare with
"""
import hashlib
import os
from dataclasses import asdict, fields, replace

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data import Clips, sample_clips, save_sheet
from evaluate import fixed_set, health, make_videos
from model import DiT, ModelConfig, load_model, save_model
from text import TextEncoder, load_text_encoder
from training import (EMA, WEIGHTS, Muon, autocast, check_training, optimise, run_main, save_weights, train, training_parser)
from vae import load_vae


# how often a motion is drawn, in the order of data.MOTIONS: a bounce and a spin take far longer to learn than standing still
SHARES = torch.tensor([1.0, 2, 2, 4, 2, 2, 4, 1])


class LatentClips:
    """Clips of the shapes world as latents, encoded once and kept in a file beside the runs."""

    def __init__(self, vae, count, folder="runs/latents"):
        key = hashlib.sha256(vae.encoder[1].weight.detach().cpu().numpy().tobytes()).hexdigest()[:8]
        path = os.path.join(folder, f"{key}-{count}.pt")
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            saved = self._encode(vae, count)
            torch.save(saved, path + ".tmp")
            os.replace(path + ".tmp", path)
        saved = torch.load(path, weights_only=True)
        self.latents, self.clips = saved["latents"], Clips(**saved["clips"])

    @staticmethod
    @torch.no_grad()
    def _encode(vae, count, batch=16):
        clips, device = sample_clips(count, torch.Generator().manual_seed(0)), vae.mean.device
        latents = [vae.encode(clips[i:i + batch].to(device).render()).to("cpu", torch.bfloat16)
                   for i in tqdm(range(0, count, batch), desc="encoding clips", unit="batch")]
        return {"latents": torch.cat(latents), "clips": {f.name: getattr(clips, f.name) for f in fields(Clips)}}

    def batch(self, count, frames, generator, device):
        """`count` random pieces of `frames` latent frames: (x0 [B, T, C, h, w], prompts). Half of them begin with the clip."""
        index, total = torch.multinomial(SHARES[self.clips.motion], count, True, generator=generator), self.latents.shape[1]
        start = torch.randint(total - frames + 1, (count,), generator=generator)
        start = start * torch.randint(2, (count,), generator=generator)
        x0 = self.latents[index[:, None], start[:, None] + torch.arange(frames)]
        return x0.to(device, torch.float32), self.clips[index].prompts(generator)


def draw_times(count, schedule, generator):
    """Diffusion times [count]: logit-normal, where the network learns most, and then shifted."""
    return schedule.shifted(torch.sigmoid(torch.randn(count, generator=generator)))


def draw_chunk_times(count, frames, chunk, schedule, generator):
    """Diffusion Forcing: a time of its own for each chunk [count, frames]. One chunk in four is clean, at t = 0, as context is."""
    chunks = -(-frames // chunk)
    noisy = torch.rand(count, chunks, generator=generator) > 0.25
    return (draw_times(count * chunks, schedule, generator).view(count, chunks) * noisy).repeat_interleave(chunk, dim=1)[:, :frames]


def flow_matching_loss(model, x0, t, text, generator, **attention):
    """E || v(x_t, t, text) - (eps - x0) ||^2 for x0 [B, T, C, h, w] and t [B, T] (flow matching, the denoising loss)."""
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    v = model(model.schedule.add_noise(x0, eps, t), t, text, **attention)
    return F.mse_loss(v.float(), model.schedule.v(x0, eps, t))


def main():
    parser = training_parser("Train the bidirectional teacher and the text encoder.", 1600, 16, 2e-3, "runs/teacher")
    parser.add_argument("--clips", type=int, default=3072, help="clips in the training set")
    parser.add_argument("--causal", action="store_true", help="block-causal attention and a time for each chunk, from the shipped teacher on")
    args = parser.parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    vae = load_vae(device=args.device)
    data = LatentClips(vae, args.clips)
    model, encoder = DiT(ModelConfig()).to(args.device), TextEncoder().to(args.device)
    if args.causal:
        model = load_model(os.path.join(WEIGHTS, "teacher.safetensors"), args.device).train()
        encoder = load_text_encoder(device=args.device).requires_grad_(False)
    attention = dict(chunk=model.config.chunk, window=model.config.window) if args.causal else {}
    both = nn.ModuleList([model, encoder])
    averaged = nn.ModuleList([DiT(model.config), TextEncoder()]).to(args.device)
    ema, optimizer = EMA(both), Muon(model.blocks.parameters(), both.parameters(), args.lr)

    if args.compile:
        model.compile(dynamic=False)                                   # a graph for images, a graph for clips

    def step(i, generator):
        # images first: geometry and colours are cheap to learn on single latent frames, sixteen times as many of them
        images = i < 0.16 * args.steps and not args.causal
        count, frames = (16 * args.batch_size, 1) if images else (args.batch_size, data.latents.shape[1])
        x0, prompts = data.batch(count, frames, generator, args.device)
        keep = (torch.rand(count, generator=generator) > 0.1).to(args.device)                # 10% learn the null prompt
        if args.causal:
            t = draw_chunk_times(count, frames, model.config.chunk, model.schedule, generator)
        else:
            # the more latents agree on a thing, the more noise it takes to hide it: a clip's track is decided nearer to t = 1 than a
            # frame, so half of the clips get times of twice the shift
            doubled = 1 if images else 1 + torch.randint(2, (count,), generator=generator)
            t = draw_times(count, replace(model.schedule, shift=model.config.shift * doubled), generator)[:, None].expand(-1, frames)
        with autocast(args):
            loss = flow_matching_loss(model, x0, t.to(args.device), encoder(prompts) * keep[:, None, None], generator, **attention)
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        clips, noise = fixed_set()
        video = make_videos("causal" if args.causal else "teacher", averaged[0], vae, averaged[1](clips.prompts()), noise, steps=8)
        save_sheet(video, path)
        return health(video, clips)

    if train(args, {"model": both, "ema": ema, "optimizer": optimizer}, step, sheet):
        averaged.load_state_dict(ema.shadow)
        name = "causal_teacher" if args.causal else "teacher"
        origin = dict(stage=name.replace("_", " "), steps=args.steps, seconds=round(args.seconds))
        save_model(os.path.join(args.out, name + ".safetensors"), averaged[0].state_dict(), model.config, **origin)
        if not args.causal:
            save_weights(os.path.join(args.out, "text_encoder.safetensors"), averaged[1].state_dict(), asdict(encoder.config), **origin)
        print(f"wrote {args.out}/{name}.safetensors" + ("" if args.causal else " and text_encoder.safetensors"))


if __name__ == "__main__":
    run_main(main)
