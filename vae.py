"""A causal video autoencoder: 4x smaller in time, 8x in space, streaming both ways.

Only 2-D convolutions. A block sees its own frame and what the same block made of the frame before
(the manner of TAEHV), so information flows forward in time only, and the state of a stream is one
feature map a block. The first frame alone makes the first latent frame, every four frames after it
the next one: F = 1 + 4 (T - 1).

    python vae.py       trains it on the shapes world
"""

import launch
import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import flags
import training
from dataset import next_command, training_world
from media import save_sheet
from model import ModelConfig
from optimisers import EMA, Muon, optimise


@dataclass
class VAEConfig:
    latent_dim: int = 8  # C, channels of a latent frame
    time_stride: int = 4  # video frames a latent frame
    dim: int = 96  # width at 1/8 of the resolution
    fine_dim: int = 64  # width at 1/4
    pixel_dim: int = 32  # width at 1/2, on the way up only


def norm(dim):
    """GroupNorm of each frame by itself: statistics over time would reach from future to past."""
    return nn.GroupNorm(dim // 16, dim)


def conv(dim, out, stride=1):
    return nn.Conv2d(dim, out, 3, stride, padding=1)


class MemoryBlock(nn.Module):
    """Residual block on frames [N, C, H, W] that remembers the frame before. One convolution makes
    both halves; what goes to the next frame is shifted by one frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.conv1 = norm(dim), conv(dim, 2 * dim)
        self.norm2, self.conv2 = norm(dim), conv(dim, dim)
        nn.init.zeros_(self.conv2.weight)  # a block starts as the identity

    def forward(self, x, clips, state):
        """x [clips * F, C, H, W]; state: dict with each block's message to the next frame, or None
        for a whole clip."""
        now, message = self.conv1(F.silu(self.norm1(x))).chunk(2, dim=1)
        # x + conv(act(norm(conv(x_t) + past(x_{t-1}))))
        now = now + self.before(message, clips, state)
        return x + self.conv2(F.silu(self.norm2(now)))

    def before(self, message, clips, state):
        """Give each frame the message of the frame before it, the first that of the stream."""
        message = message.unflatten(0, (clips, -1))  # [B, F, C, H, W]
        past = torch.zeros_like(message[:, :1])
        if state is not None:
            past = state.get(self, past)
            state[self] = message[:, -1:]
        return torch.cat([past, message[:, :-1]], dim=1).flatten(0, 1)


class Down(nn.Module):
    """Merge `frames` neighbouring frames into one, and space by `stride`, in one convolution."""

    def __init__(self, dim, out, frames, stride):
        super().__init__()
        self.frames, self.conv = frames, conv(frames * dim, out, stride)

    def forward(self, x):
        return self.conv(x.reshape(-1, self.frames * x.shape[1], *x.shape[2:]))


class Up(nn.Module):
    """One convolution whose channels unfold into `frames` frames and `scale` x `scale` pixels."""

    def __init__(self, dim, out, frames, scale):
        super().__init__()
        self.frames, self.scale = frames, scale
        self.conv = conv(dim, frames * scale * scale * out)

    def forward(self, x):
        x = self.conv(x)
        return F.pixel_shuffle(x.reshape(-1, x.shape[1] // self.frames, *x.shape[2:]), self.scale)


class VAE(nn.Module):
    """Video [B, F, 3, H, W] in [-1, 1] <-> latents [B, T, C, h, w], h = H / 8; each channel of the
    latents has mean 0 and variance 1 over the shapes world."""

    Config = VAEConfig
    space_stride = 8
    ahead = 0  # frames after its own that a latent frame is made of

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or VAEConfig()
        stages = [nn.PixelUnshuffle(4), conv(48, c.fine_dim), MemoryBlock(c.fine_dim)]
        stages += [Down(c.fine_dim, c.dim, 1, 2), MemoryBlock(c.dim)]
        stages += [Down(c.dim, c.dim, c.time_stride, 1), MemoryBlock(c.dim)]
        self.encoder = nn.ModuleList(
            [*stages, norm(c.dim), nn.SiLU(), conv(c.dim, 2 * c.latent_dim)]
        )
        stages = [conv(c.latent_dim, c.dim), Up(c.dim, c.dim, c.time_stride, 1)]
        stages += [MemoryBlock(c.dim), MemoryBlock(c.dim), Up(c.dim, c.fine_dim, 1, 2)]
        stages += [MemoryBlock(c.fine_dim), Up(c.fine_dim, c.pixel_dim, 1, 2)]
        stages += [MemoryBlock(c.pixel_dim), norm(c.pixel_dim), nn.SiLU(), Up(c.pixel_dim, 3, 1, 2)]
        self.decoder = nn.ModuleList(stages)
        zeros = [module.conv2 for module in self.modules() if isinstance(module, MemoryBlock)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in zeros:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        self.encoder[-1].weight.data[c.latent_dim :] *= 0.1
        self.encoder[-1].bias.data[c.latent_dim :] = -6.0  # log variance: next to no noise at first
        self.register_buffer("mean", torch.zeros(c.latent_dim))  # of the raw latents: `normalise`
        self.register_buffer("std", torch.ones(c.latent_dim))
        self.to(memory_format=torch.channels_last)

    def latent_shape(self, frames, height, width):
        """The shape (T, C, h, w) of the latents of a clip; frames beyond T's last are cut."""
        c, s = self.config, self.space_stride
        return 1 + -(-(frames - 1) // c.time_stride), c.latent_dim, height // s, width // s

    def _run(self, layers, x, state):
        """Run layers over x [B, F, C, H, W], frames in the batch: -> [B, F', C', H', W']."""
        B = len(x)
        x = x.flatten(0, 1).to(self.mean.dtype).contiguous(memory_format=torch.channels_last)
        for layer in layers:
            x = layer(x, B, state) if isinstance(layer, MemoryBlock) else layer(x)
        return x.unflatten(0, (B, -1))

    def moments(self, video, state=None):
        """Compute mean and log variance of the raw latents, each [B, T, C, h, w]: see `encode`."""
        stride = self.config.time_stride
        if state:
            if video.shape[1] % stride:
                raise ValueError(f"a stream goes on with {stride} n frames, not {video.shape[1]}")
        else:  # the first frame alone fills the first group
            if (video.shape[1] - 1) % stride:
                raise ValueError(f"a clip must have 1 + {stride} n frames, not {video.shape[1]}")
            video = torch.cat([video[:, :1].expand(-1, stride - 1, -1, -1, -1), video], dim=1)
        return self._run(self.encoder, video, state).chunk(2, dim=2)

    def encode(self, video, state=None):
        """Encode video [B, F, 3, H, W] as the normalised posterior mean [B, T, C, h, w].

        To encode a stream, pass the same dict (empty at the start) with every chunk: 1 + 4 n frames
        first, then 4 n each. Raises ValueError for another number of frames.
        """
        mean = self.moments(video, state)[0]
        return (mean - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, latents, state=None):
        """Decode latents [B, T, C, h, w] to video [B, F, 3, H, W], nearly within [-1, 1]; a stream
        with the same dict (empty at the start) for every chunk."""
        return self.decode_raw(latents * self.std[:, None, None] + self.mean[:, None, None], state)

    def decode_raw(self, latents, state=None):
        hidden = 0 if state else self.config.time_stride - 1  # the first latent frame shows one
        return self._run(self.decoder, latents, state)[:, hidden:]

    @torch.no_grad()
    def normalise(self, video):
        """Set `mean` and `std` so that the latents of `video` have mean 0, variance 1 a channel."""
        raw = self.moments(video)[0]
        self.mean.copy_(raw.mean((0, 1, 3, 4)))
        self.std.copy_(raw.std((0, 1, 3, 4)))


# -------------------------------------------------------------------------------------- training
def psnr(a, b):
    """Peak signal-to-noise ratio in dB of videos in [-1, 1], of the error over everything."""
    return -10 * torch.log10(((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean())


@torch.no_grad()
def mean_psnr(vae, clips):
    """Mean PSNR in dB of clips, each [F, 3, H, W], reconstructed from the posterior mean."""
    return torch.stack([psnr(vae.decode(vae.encode(x[None]))[0], x) for x in clips]).mean().item()


def vae_loss(vae, video, generator, kl_weight=1e-4):
    """Reconstruct video [B, F, 3, H, W] from noisy latents: (loss, squared error)."""
    mean, logvar = vae.moments(video)
    eps = torch.randn(mean.shape, generator=generator).to(video.device)
    error = F.mse_loss(vae.decode_raw(mean + (0.5 * logvar).exp() * eps).float(), video)
    # KL(N(mean, var) || N(0, 1)) = (mean^2 + var - 1 - log var) / 2
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    return error + kl_weight * kl, error


def clip_shape(progress, batch_size):
    """Choose (clips, frames of each) at a share of the training, 0 to 1: shapes and colours are
    learnt on many single frames, then motion on short clips, and last what to remember."""
    if progress < 0.28:
        return 2 * batch_size, 1
    if progress < 0.6:
        return batch_size, 5
    return -(-2 * batch_size // 3), 9


def train_vae(run, name, vae, world, begin=0.0):
    """Train a VAE on a world of `dataset`, normalise its latents, and write OUT/NAME.safetensors.
    begin: the progress of `clip_shape` that the run begins at."""
    averaged, ema = copy.deepcopy(vae).eval(), EMA(vae, 0.998)
    optimizer = Muon(vae.parameters(), vae.parameters(), run.lr)

    def step(i, generator):
        count, frames = clip_shape(begin + (1 - begin) * i / run.steps, run.batch_size)
        video = world.video(count, frames, generator, run.device)
        with run.autocast():
            total, error = vae_loss(vae, video, generator)
        norm = optimise(optimizer, total)
        ema.update(vae, i)
        return {"psnr": 6.0206 - 10 * torch.log10(error), "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        video = world.watched(4, 1, run.device)[:, :33]
        pairs = torch.stack([video, averaged.decode(averaged.encode(video))], dim=1)
        save_sheet(pairs.flatten(0, 1), path)  # each clip above its reconstruction
        return {}

    state = {"vae": vae, "ema": ema, "optimizer": optimizer}
    seconds = training.train(run, state, step, sheet, [averaged])
    if seconds is not None:
        averaged.load_state_dict(ema.shadow)
        shape = (-(-(2**18) // (world.size[0] * world.size[1])), min(33, world.frames))
        averaged.normalise(world.video(*shape, torch.Generator().manual_seed(2), run.device))
        watched = mean_psnr(averaged, world.watched(8, 1234, run.device))
        origin = world.origin | {"quality": f"PSNR {watched:.2f} dB"}
        print(origin["quality"])
        script = "teacher.py" if vae.config.time_stride > 1 else "nfd_teacher.py"
        parts = (averaged.state_dict(), vae.config, seconds, next_command(world, script, "--vae"))
        training.write_trained(run, name, *parts, **origin)


def main():
    parser = flags.training_parser("Train the causal video autoencoder.", 5000, 8, 1e-2, "runs/vae")
    flags.data_flags(parser)
    args = parser.parse_args()
    world = training_world(args)
    run = training.start_run(args)
    vae = VAE().to(run.device)
    world.prepare(vae, ModelConfig().patch_size)
    train_vae(run, "vae", vae, world)


if __name__ == "__main__":
    launch.run_main(main)
