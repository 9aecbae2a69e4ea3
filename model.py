"""The diffusion transformer.

`DiT` is the text-to-video transformer of Wan 2.1 with the parameter names of its release. Two
things are added, neither of which adds a parameter: each latent frame has its own diffusion time,
and attention can be block-causal, with a cache.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from attention import CrossAttention, KVCache, SelfAttention, rope
from diffusion import Schedule


@dataclass
class ModelConfig:
    """Field names of Wan 2.1's release; the defaults are the small model for the shapes world."""

    dim: int = 192
    ffn_dim: int = 592
    freq_dim: int = 128
    in_dim: int = 8
    out_dim: int = 8
    num_heads: int = 3
    num_layers: int = 7
    text_dim: int = 64
    patch_size: tuple = (1, 2, 2)
    shift: float = 5.0  # timestep shift that the model was trained with and samples with
    chunk: int = 3  # k, latent frames a chunk when used causally
    window: int = 4  # W, chunks that a chunk sees when used causally, itself included
    steps: int = 4  # N, denoising steps of a distilled student
    times: tuple = ()  # their times in thousandths, before the shift, if not evenly spaced

    def __post_init__(self):
        self.patch_size, self.times = tuple(self.patch_size), tuple(self.times)  # JSON has lists
        for name, value in vars(self).items():
            kind = (int, float) if name == "shift" else int
            sizes = value if name in ("patch_size", "times") else (value,)
            right = (isinstance(size, kind) and size is not True for size in sizes)
            if not all(right) or not all(1 <= size < 10**6 for size in sizes):
                raise ValueError(f"{name} must be a number from 1 to 999,999, not {value!r}")
        if len(self.patch_size) != 3 or self.in_dim != self.out_dim or self.freq_dim % 2:
            raise ValueError(
                "patch_size needs 3 numbers, out_dim to be in_dim, freq_dim to be even"
            )
        if self.times and [*self.times] != sorted({1000, *self.times}, reverse=True):
            raise ValueError(f"times must fall from 1000, not be {self.times}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must split into {self.num_heads} heads of even width")


def frames_of(x, time):
    """View tokens x [B, L, D] by the latent frames of time [B, T, ...]: [B, T, L / T, D]."""
    return x.unflatten(1, (time.shape[1], -1))


def modulate(x, shift, scale):
    """Shift and scale tokens x [B, L, D] by vectors of their frame, each [B, T, 1, D]."""
    # x (1 + scale) + shift
    return torch.addcmul(shift, frames_of(x, shift), 1 + scale).flatten(1, 2)


def add_gated(x, y, gate):
    """Add y to tokens x, both [B, L, D], through a gate of their frame [B, T, 1, D]."""
    # x + gate y
    return torch.addcmul(frames_of(x, gate), frames_of(y, gate), gate).flatten(1, 2)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; six vectors of each latent frame's diffusion
    time modulate the first and the last (Wan 2.1, DiT's adaLN)."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, 1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(c.dim, c.num_heads)
        self.norm3 = nn.LayerNorm(c.dim, 1e-6)
        self.cross_attn = CrossAttention(c.dim, c.num_heads)
        self.norm2 = nn.LayerNorm(c.dim, 1e-6, elementwise_affine=False)
        up, down = nn.Linear(c.dim, c.ffn_dim), nn.Linear(c.ffn_dim, c.dim)
        self.ffn = nn.Sequential(up, nn.GELU(approximate="tanh"), down)
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(self, x, time, keys, remember=False, **attention):
        """x [B, L, D]; time [B, T, 6, D]; keys: the prompt's; attention: see `SelfAttention`."""
        vectors = (self.modulation + time).unsqueeze(3).unbind(2)  # six of [B, T, 1, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        y = modulate(self.norm1(x), shift1, scale1)
        y = self.self_attn(y, remember=remember, **attention)
        if remember:
            return None
        x = add_gated(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x), keys)
        y = self.ffn(modulate(self.norm2(x), shift2, scale2))
        return add_gated(x, y, gate2)


class Head(nn.Module):
    """Tokens back to patches, modulated by the time embedding."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(c.patch_size) * c.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)

    def forward(self, x, time):
        """x [B, L, D]; time [B, T, D] -> [B, L, patch * out_dim]."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


def sinusoidal_embedding(t, dim):
    """Embed t [...] as [cos, sin] at dim / 2 frequencies from 1 to 1/10000: [..., dim], float64."""
    double = torch.float64 if t.device.type in ("cpu", "cuda") else torch.float32  # MPS has none
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=double, device=t.device) / half)
    angles = t.to(double)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module):
    """v(x_t, t, text), the network of every stage: the teacher's without a chunk, the student's
    with chunk=k and, to sample, with a cache."""

    Config = ModelConfig

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or ModelConfig()
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        self.compiled = None  # see `compile_stream`
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.head.weight)

    @property
    def schedule(self):
        return Schedule(self.config.shift, self.config.times)

    def text_keys(self, text):
        """Compute every layer's cross-attention keys and values of text [B, S, text_dim]: once for
        a prompt, not at every step."""
        text = self.text_embedding(text.to(self.text_embedding[0].weight.dtype))
        return [block.cross_attn.keys(text) for block in self.blocks]

    def new_cache(self, batch, height, width, window=None, ahead=1):
        """Make an empty KVCache for latents of height x width; window: the config's by default."""
        c, weight = self.config, self.patch_embedding.weight
        _, ph, pw = c.patch_size
        chunks, heads = (c.chunk, window or c.window), (c.num_heads, c.dim // c.num_heads)
        size = (c.num_layers, batch, *chunks, height // ph, width // pw, *heads)
        return KVCache(*size, ahead=ahead, device=weight.device, dtype=weight.dtype)

    def patches(self, x_t, grid):
        """Cut latents [B, T, C, h, w] into a grid of patches and embed them: [B, L, D]."""
        pt, ph, pw = self.config.patch_size
        x = (
            x_t.unflatten(1, (grid[0], pt))
            .unflatten(-2, (grid[1], ph))
            .unflatten(-1, (grid[2], pw))
        )
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # as the kernel is flattened
        weight = self.patch_embedding.weight
        return F.linear(x.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def embed_time(self, t, frame=None, cache=None):
        """Embed times t [B, T]: [B, T, D], and the modulation of it [B, T, 6, D]. One number for
        all frames is embedded once, if there is a cache that can keep it.
        frame [B, T, D]: a further condition on each frame."""
        kept = {} if cache is None or frame is not None or torch.is_grad_enabled() else cache.times
        if not torch.is_tensor(t) or t.ndim == 0:
            if float(t) not in kept:
                each = torch.full((1, 1), float(t), device=self.head.head.weight.device)
                kept[float(t)] = self.embed_time(each, frame)
            return kept[float(t)]
        weight, pt = self.time_embedding[0].weight, self.config.patch_size[0]
        sinusoids = sinusoidal_embedding(t[:, ::pt] * 1000, self.config.freq_dim)
        time = self.time_embedding(sinusoids.to(weight.dtype))
        if frame is not None:
            time = time + frame[:, ::pt]
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def run_blocks(self, x, modulation, keys, remember, attention):
        """Pass tokens x [B, L, D] through the blocks; to remember, the last only leaves its keys
        and values in the cache, and None is returned."""
        for layer, block in enumerate(self.blocks):
            enough = remember and layer == len(self.blocks) - 1
            x = block(x, modulation, keys[layer], enough, layer=layer, **attention)
        return x

    def compile_stream(self):
        """Compile the passes of a stream whose window is full, so that shapes no longer change."""
        self.compiled = torch.compile(self.run_blocks, dynamic=False)

    def forward(
        self, x_t, t, text, *, chunk=None, window=None, cache=None, frame=None, remember=False
    ):
        """Predict v for noisy latents.

        x_t [B, T, C, h, w]; t [B, T], or a number for all frames; text [B, S, text_dim], or what
        `text_keys` made of it.
        chunk=None: bidirectional. chunk=k: block-causal, in chunks of k latent frames, each seeing
        itself and the window - 1 before it (None: all). cache: the frames come after its past,
        and chunk and window are the cache's. frame [B, T, D]: a further condition on each frame.
        -> v, shaped as x_t; None with remember=True, which stops when the cache has every layer's
        keys and values. Raises ValueError for latents that do not split into patches.
        """
        c = self.config
        T, C, h, w = x_t.shape[1:]
        pt, ph, pw = c.patch_size
        if c.in_dim != C or T % pt or h % ph or w % pw:
            raise ValueError(
                f"latents {tuple(x_t.shape)} need {c.in_dim} channels "
                f"and sides divisible by the patch {c.patch_size}"
            )
        grid = (T // pt, h // ph, w // pw)
        x = self.patches(x_t, grid)  # [B, L, D]
        time, modulation = self.embed_time(t, frame, cache)
        keys = self.text_keys(text) if torch.is_tensor(text) else text
        start, run = 0, self.run_blocks
        if cache is not None:
            start, chunk, window = cache.evicted + cache.frames, cache.chunk, cache.window
            run = self.compiled if self.compiled and cache.is_full(T // pt) else run
        table = rope(c.dim // c.num_heads, *grid, start, x.dtype, x.device)
        tokens = None if chunk is None else chunk * grid[1] * grid[2]
        attention = {"table": table, "chunk": tokens, "window": window, "cache": cache}
        x = run(x, modulation, keys, remember, attention)
        if remember:
            return None
        x = self.head(x, time).unflatten(-1, (pt, ph, pw, c.out_dim)).unflatten(1, grid)
        x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)  # [B, T / pt, pt, C, h / ph, ph, w / pw, pw]
        return x.flatten(1, 2).flatten(3, 4).flatten(4, 5).to(x_t.dtype)
