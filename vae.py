"""A causal video autoencoder: 4x smaller in time, 8x in space, encoding and decoding a stream with a constant-size state.

Only 2-D convolutions. A block sees its own frame and what the same block made of the frame before (the manner of TAEHV), so
information flows forward in time only, and the state of a stream is one feature map a block. The first frame alone makes the
first latent, every four frames after it the next one: F = 1 + 4 (T - 1).

    python vae.py                   trains it on the shapes world
    python vae.py --frame-wise      makes of the shipped one that of Next-Frame Diffusion, which does not merge frames
"""

import copy
import os
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from data import FRAMES, sample_clips
from media import save_sheet
from training import EMA, adamw, autocast, check_training, optimise, train, training_parser
from weights import load_model, run_main, save_weights, shipped


@dataclass
class VAEConfig:
    latent_dim: int = 8  # C, channels of a latent frame
    time_stride: int = 4  # video frames a latent frame
    dim: int = 96  # width at 1/8 of the resolution
    fine_dim: int = 64  # width at 1/4
    pixel_dim: int = 32  # width at 1/2, on the way up only


def norm(dim):
    """GroupNorm of each frame by itself: statistics over time would carry the future into the past."""
    return nn.GroupNorm(dim // 16, dim)


class MemoryBlock(nn.Module):
    """Residual block on [N, C, H, W] frames that remembers the frame before: x + conv(act(norm(conv(x_t) + past(x_{t-1})))).

    One convolution makes both halves; the half that speaks to the next frame is shifted by one frame.
    """

    def __init__(self, dim):
        super().__init__()
        self.norm1 = norm(dim)
        self.conv1 = nn.Conv2d(dim, 2 * dim, 3, padding=1)
        self.norm2 = norm(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # a block starts as the identity

    def forward(self, x, clips, state):
        """x [clips * F, C, H, W]; state: dict that holds this block's message to the next frame, None for a whole clip."""
        now, message = self.conv1(F.silu(self.norm1(x))).chunk(2, dim=1)
        message = message.unflatten(0, (clips, -1))
        past = state.get(self) if state is not None else None
        if past is None:
            past = torch.zeros_like(message[:, :1])
        if state is not None:
            state[self] = message[:, -1:]
        now = now + torch.cat([past, message[:, :-1]], dim=1).flatten(0, 1)
        return x + self.conv2(F.silu(self.norm2(now)))


class Down(nn.Module):
    """Merge `frames` neighbouring frames into one, and space by `stride`, in one convolution."""

    def __init__(self, dim, out, frames, stride):
        super().__init__()
        self.frames, self.conv = frames, nn.Conv2d(frames * dim, out, 3, stride=stride, padding=1)

    def forward(self, x):
        return self.conv(x.reshape(-1, self.frames * x.shape[1], *x.shape[2:]))


class Up(nn.Module):
    """The way back: one convolution whose channels unfold into `frames` frames and `scale` x `scale` pixels."""

    def __init__(self, dim, out, frames, scale):
        super().__init__()
        self.frames, self.scale, self.conv = (
            frames,
            scale,
            nn.Conv2d(dim, frames * scale * scale * out, 3, padding=1),
        )

    def forward(self, x):
        x = self.conv(x)
        return F.pixel_shuffle(x.reshape(-1, x.shape[1] // self.frames, *x.shape[2:]), self.scale)


class VAE(nn.Module):
    """Video [B, F, 3, H, W] in [-1, 1] <-> latents [B, T, C, h, w] of mean 0 and variance 1 in each channel; h = H / 8."""

    Config = VAEConfig

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config, c = config, config
        self.encoder = nn.ModuleList(
            [
                nn.PixelUnshuffle(4),
                nn.Conv2d(48, c.fine_dim, 3, padding=1),
                MemoryBlock(c.fine_dim),
                Down(c.fine_dim, c.dim, 1, 2),
                MemoryBlock(c.dim),
                Down(c.dim, c.dim, c.time_stride, 1),
                MemoryBlock(c.dim),
                norm(c.dim),
                nn.SiLU(),
                nn.Conv2d(c.dim, 2 * c.latent_dim, 3, padding=1),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                nn.Conv2d(c.latent_dim, c.dim, 3, padding=1),
                Up(c.dim, c.dim, c.time_stride, 1),
                MemoryBlock(c.dim),
                MemoryBlock(c.dim),
                Up(c.dim, c.fine_dim, 1, 2),
                MemoryBlock(c.fine_dim),
                Up(c.fine_dim, c.pixel_dim, 1, 2),
                MemoryBlock(c.pixel_dim),
                norm(c.pixel_dim),
                nn.SiLU(),
                Up(c.pixel_dim, 3, 1, 2),
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.weight.any():
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        self.encoder[-1].weight.data[c.latent_dim :] *= 0.1
        self.encoder[-1].bias.data[
            c.latent_dim :
        ] = -6.0  # log variance: begin with next to no noise
        self.register_buffer(
            "mean", torch.zeros(c.latent_dim)
        )  # of the raw latents, per channel: see `normalise`
        self.register_buffer("std", torch.ones(c.latent_dim))
        self.to(memory_format=torch.channels_last)

    def _run(self, layers, x, state):
        """Run layers over x [B, F, C, H, W], frames in the batch: -> [B, F', C', H', W']."""
        B = x.shape[0]
        x = x.flatten(0, 1).to(self.mean.dtype).contiguous(memory_format=torch.channels_last)
        for layer in layers:
            x = layer(x, B, state) if isinstance(layer, MemoryBlock) else layer(x)
        return x.unflatten(0, (B, -1))

    def moments(self, video, state=None):
        """Posterior mean and log variance of the raw latents, each [B, T, C, h, w]. Arguments as for `encode`."""
        stride = self.config.time_stride
        first = 0 if state else 1
        if video.shape[1] % stride != first % stride:
            raise ValueError(
                f"a clip must have {first} + {stride} n frames, not {video.shape[1]}"
                if first
                else f"a stream goes on with {stride} n frames, not {video.shape[1]}"
            )
        if first:  # the first frame alone fills the first group
            video = torch.cat([video[:, :1].expand(-1, stride - 1, -1, -1, -1), video], dim=1)
        return self._run(self.encoder, video, state).chunk(2, dim=2)

    def encode(self, video, state=None):
        """Video [B, F, 3, H, W] -> latents [B, T, C, h, w], the posterior mean, normalised.

        To encode a stream, pass the same dict (empty at the start) with every chunk: 1 + 4 n frames first, then 4 n each.
        Raises ValueError for another number of frames.
        """
        mean = self.moments(video, state)[0]
        return (mean - self._column(self.mean)) / self._column(self.std)

    def decode(self, latents, state=None):
        """Latents [B, T, C, h, w] -> video [B, F, 3, H, W], nearly within [-1, 1].

        To decode a stream, pass the same dict (empty at the start) with every chunk.
        """
        return self.decode_raw(latents * self._column(self.std) + self._column(self.mean), state)

    def decode_raw(self, latents, state=None):
        """`decode` of latents that are not normalised."""
        first = not state
        video = self._run(self.decoder, latents, state)
        return video[:, self.config.time_stride - 1 :] if first else video

    @staticmethod
    def _column(per_channel):
        return per_channel[:, None, None]

    @torch.no_grad()
    def normalise(self, video):
        """Set `mean` and `std` so that the latents of `video` have mean 0 and variance 1 in each channel."""
        raw = self.moments(video)[0]
        self.mean.copy_(raw.mean((0, 1, 3, 4)))
        self.std.copy_(raw.std((0, 1, 3, 4)))


def frame_wise(vae):
    """A VAE of time stride 1 (NFD) from one of stride n: every frame goes its way as the first frame of a clip does, which fills its group
    with n copies of itself, and of whose n decoded frames the last one counts."""
    n, tensors, one = (
        vae.config.time_stride,
        vae.state_dict(),
        VAE(replace(vae.config, time_stride=1)),
    )
    tensors["encoder.5.conv.weight"] = tensors["encoder.5.conv.weight"].unflatten(1, (n, -1)).sum(1)
    for part in ("weight", "bias"):
        tensors[f"decoder.1.conv.{part}"] = tensors[f"decoder.1.conv.{part}"].unflatten(0, (n, -1))[
            -1
        ]
    one.load_state_dict(tensors)
    return one.to(vae.mean.device)


def psnr(a, b):
    """Peak signal-to-noise ratio of videos in [-1, 1], in dB: of the mean squared error over everything."""
    return -10 * torch.log10(((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean())


def held_out_psnr(vae, count=8, batch=8, seed=1234):
    """PSNR in dB of whole 81-frame held-out clips, reconstructed from the posterior mean (mean over clips)."""
    generator, device = torch.Generator().manual_seed(seed), vae.mean.device
    values = []
    with torch.no_grad():
        for _ in range(count // batch):
            video = sample_clips(batch, generator, "held-out").to(device).render()
            values += [psnr(a, b) for a, b in zip(vae.decode(vae.encode(video)), video)]
    return torch.stack(values).mean().item()


def main():
    parser = training_parser(
        "Train the causal video autoencoder on the shapes world.", 1500, 8, 2e-3, "runs/vae"
    )
    parser.add_argument(
        "--kl", type=float, default=1e-4, help="weight of the KL term beside the squared error"
    )
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="go on with the shipped decoder: latents, and all that was trained on them, stay as they are",
    )
    parser.add_argument(
        "--frame-wise",
        action="store_true",
        help="one latent for each frame (NFD): an action shows in the next frame",
    )
    args = parser.parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    name = "vae_frame" if args.frame_wise else "vae"
    if args.decoder_only:
        vae = load_model(VAE, shipped(name), args.device)
    else:
        vae = (
            frame_wise(load_model(VAE, shipped("vae"), args.device))
            if args.frame_wise
            else VAE().to(args.device)
        )
    averaged = copy.deepcopy(vae).eval()
    trained = vae.decoder if args.decoder_only else vae
    ema, optimizer = EMA(vae, 0.998), adamw(trained.parameters(), args.lr, betas=(0.9, 0.99))

    def step(i, generator):
        # shapes and colours are learnt on many single frames, then motion on short clips, and last what a frame may remember
        progress, B = (
            1.0 if args.decoder_only or args.frame_wise else i / args.steps,
            args.batch_size,
        )
        clips, frames = (
            (2 * B, 1) if progress < 0.28 else (B, 5) if progress < 0.6 else (-(-2 * B // 3), 9)
        )
        start = torch.randint(FRAMES - frames, (), generator=generator).item()
        video = sample_clips(clips, generator).to(args.device).render(start, frames)
        with autocast(args):
            with torch.set_grad_enabled(not args.decoder_only):
                mean, logvar = vae.moments(video)
            noise = (
                0.0
                if args.decoder_only
                else (0.5 * logvar).exp()
                * torch.randn(mean.shape, generator=generator).to(args.device)
            )
            reconstruction = vae.decode_raw(mean + noise)
        error = F.mse_loss(reconstruction.float(), video)
        kl = (
            0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
        )  # of N(mean, var) from N(0, 1)
        norm = optimise(optimizer, error + args.kl * kl)
        ema.update(vae, i)
        return {"psnr": 6.0206 - 10 * torch.log10(error), "kl": kl, "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        video = (
            sample_clips(4, torch.Generator().manual_seed(1), "held-out")
            .to(args.device)
            .render(0, 33)
        )
        pairs = torch.stack([video, averaged.decode(averaged.encode(video))], dim=1)
        save_sheet(pairs.flatten(0, 1), path)  # each clip above its reconstruction

    if train(args, {"vae": vae, "ema": ema, "optimizer": optimizer}, step, sheet):
        averaged.load_state_dict(ema.shadow)
        if not args.decoder_only:
            averaged.normalise(
                sample_clips(64, torch.Generator().manual_seed(2)).to(args.device).render(0, 33)
            )
        quality = held_out_psnr(averaged)
        path = os.path.join(args.out, f"{name}.safetensors")
        save_weights(
            path,
            averaged.state_dict(),
            averaged.config,
            steps=args.steps,
            seconds=round(args.seconds),
            quality=f"held-out PSNR {quality:.2f} dB",
        )
        print(f"held-out PSNR {quality:.2f} dB; wrote {path}")


if __name__ == "__main__":
    run_main(main)
