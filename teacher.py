"""Stage 0: the many-step bidirectional teacher, by flow matching, and the text encoder with it.

    python teacher.py       trains both on latents of the shapes world
"""
import hashlib
import os
from dataclasses import asdict, fields

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data import Clips, sample_clips, save_sheet
from model import DiT, ModelConfig, save_model
from sample import solve_ode
from text import TextEncoder
from training import (EMA, WEIGHTS, Muon, autocast, check_training, optimise, run_main, save_weights, train, training_parser)
from vae import load_vae


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
        index, total = torch.randint(len(self.clips), (count,), generator=generator), self.latents.shape[1]
        start = torch.randint(total - frames + 1, (count,), generator=generator)
        start = start * torch.randint(2, (count,), generator=generator)
        x0 = self.latents[index[:, None], start[:, None] + torch.arange(frames)]
        return x0.to(device, torch.float32), self.clips[index].prompts(generator)


def draw_times(count, schedule, generator):
    """Diffusion times [count]: logit-normal, where the network learns most, and then shifted."""
    return schedule.shifted(torch.sigmoid(torch.randn(count, generator=generator)))


def flow_matching_loss(model, x0, t, text, generator, **attention):
    """E || v(x_t, t, text) - (eps - x0) ||^2 for x0 [B, T, C, h, w] and t [B, T] (flow matching, the denoising loss)."""
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    v = model(model.schedule.add_noise(x0, eps, t), t, text, **attention)
    return F.mse_loss(v.float(), model.schedule.v(x0, eps, t))


SHEET_PROMPTS = ["a red circle bouncing on a black background", "a blue star spinning on a gray background",
                 "a yellow square sliding left and right on a navy background", "a green triangle pulsing on a brown background",
                 "a white circle circling clockwise on a navy background", "a purple star rising and falling on a black background"]


def main():
    parser = training_parser("Train the bidirectional teacher and the text encoder.", 1600, 16, 2e-3, "runs/teacher")
    parser.add_argument("--clips", type=int, default=3072, help="clips in the training set")
    args = parser.parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    vae = load_vae(os.path.join(WEIGHTS, "vae.safetensors"), args.device)
    data = LatentClips(vae, args.clips)
    model, encoder = (DiT(ModelConfig()).to(args.device), TextEncoder().to(args.device))
    both = nn.ModuleList([model, encoder])
    averaged = nn.ModuleList([DiT(model.config), TextEncoder()]).to(args.device)
    ema, optimizer = EMA(both), Muon(model.blocks.parameters(), both.parameters(), args.lr)

    if args.compile:
        model.compile(dynamic=False)                                   # a graph for images, a graph for clips

    def step(i, generator):
        # images first: geometry and colours are cheap to learn on single latent frames, sixteen times as many of them
        images = i < 0.16 * args.steps
        count, frames = (16 * args.batch_size, 1) if images else (args.batch_size, data.latents.shape[1])
        x0, prompts = data.batch(count, frames, generator, args.device)
        keep = (torch.rand(count, generator=generator) > 0.1).to(args.device)                # 10% learn the null prompt
        t = draw_times(count, model.schedule, generator)[:, None].expand(-1, frames).to(args.device)
        with autocast(args):
            loss = flow_matching_loss(model, x0, t, encoder(prompts) * keep[:, None, None], generator)
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        noise = torch.randn(len(SHEET_PROMPTS), 21, 8, 8, 8, generator=torch.Generator().manual_seed(1)).to(args.device)
        with torch.no_grad():
            save_sheet(vae.decode(solve_ode(averaged[0], noise, averaged[1](SHEET_PROMPTS), 16)[-1]), path)

    if train(args, {"model": both, "ema": ema, "optimizer": optimizer}, step, sheet):
        averaged.load_state_dict(ema.shadow)
        origin = dict(stage="teacher", steps=args.steps, seconds=round(args.seconds))
        save_model(os.path.join(args.out, "teacher.safetensors"), averaged[0].state_dict(), model.config, **origin)
        save_weights(os.path.join(args.out, "text_encoder.safetensors"), averaged[1].state_dict(), asdict(encoder.config), **origin)
        print(f"wrote {args.out}/teacher.safetensors and text_encoder.safetensors")


if __name__ == "__main__":
    run_main(main)
