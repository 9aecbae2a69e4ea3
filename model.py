"""The diffusion transformer and the diffusion schedule.

`DiT` is the text-to-video transformer of Wan 2.1 with the parameter names of its release. Two things are added, neither of
which adds a parameter: each latent frame has its own diffusion time, and attention can be block-causal, with a cache.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from attention import CrossAttention, KVCache, SelfAttention, rope_angles, rope_table
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
    num_actions: int = 0  # actions that lead from frame to frame (NFD); 0: a text-to-video model

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size)  # JSON has lists alone


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last modulated by the frame's diffusion time."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, 1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(c.dim, c.num_heads)
        self.norm3 = nn.LayerNorm(c.dim, 1e-6)
        self.cross_attn = CrossAttention(c.dim, c.num_heads)
        self.norm2 = nn.LayerNorm(c.dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(self, x, time, keys, **attention):
        """x [B, L, D], time [B, T, 6, D], keys: the prompt's for this layer; attention: arguments of SelfAttention."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (self.modulation + time).unsqueeze(3).unbind(2)
        )  # each [B, T, 1, D]
        frames = lambda y: y.unflatten(1, (time.shape[1], -1))  # [B, T, hw, D]
        modulate = lambda y, shift, scale: torch.addcmul(shift, frames(y), 1 + scale).flatten(1, 2)
        gated = lambda x, y, gate: torch.addcmul(frames(x), frames(y), gate).flatten(
            1, 2
        )  # x + gate y
        x = gated(x, self.self_attn(modulate(self.norm1(x), shift1, scale1), **attention), gate1)
        x = x + self.cross_attn(self.norm3(x), keys)
        return gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)


class Head(nn.Module):
    """Tokens back to patches, modulated by the time embedding."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(c.patch_size) * c.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)

    def forward(self, x, time):
        """x [B, L, D], time [B, T, D] -> [B, L, patch * out_dim]."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        y = self.norm(x).unflatten(1, (time.shape[1], -1))
        return self.head((y * (1 + scale) + shift).flatten(1, 2))


def sinusoidal_embedding(t, dim):
    """[cos, sin] of t [...] at dim / 2 frequencies from 1 to 1/10000 -> [..., dim], computed in float64 as Wan does."""
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module):
    """v(x_t, t, text): the network of every stage. Teacher: chunk=None. Student: chunk=k, with a cache when it samples."""

    Config = ModelConfig

    def __init__(self, config=ModelConfig()):
        super().__init__()
        self.config, c = config, config
        if c.dim % c.num_heads or (c.dim // c.num_heads) % 2:
            raise ValueError(f"dim {c.dim} must split into {c.num_heads} heads of even width")
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        if c.num_actions:
            self.action_embedding = nn.Embedding(c.num_actions, c.dim)
            nn.init.normal_(self.action_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.head.weight)

    @property
    def schedule(self):
        return Schedule(shift=self.config.shift)

    def text_keys(self, text):
        """Prompt embeddings [B, S, text_dim] -> every layer's cross-attention keys and values: once per prompt, not per step."""
        text = self.text_embedding(text.to(self.text_embedding[0].weight.dtype))
        return [block.cross_attn.keys(text) for block in self.blocks]

    def new_cache(self, batch, height, width, chunk=None, window=None, ahead=1):
        """An empty KVCache for latents of height x width; chunk and window default to the config's. ahead: see there."""
        c, weight = self.config, self.patch_embedding.weight
        return KVCache(
            c.num_layers,
            batch,
            chunk or c.chunk,
            window or c.window,
            height // c.patch_size[1],
            width // c.patch_size[2],
            c.num_heads,
            c.dim // c.num_heads,
            ahead=ahead,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(self, x_t, t, text, *, chunk=None, window=None, cache=None, actions=None):
        """Predict v for noisy latents.

        x_t [B, T, C, h, w]; t [B, T] in [0, 1], one per latent frame; text [B, S, text_dim], or what `text_keys` made of it.
        chunk=None: bidirectional over all that is given. chunk=k: block-causal, chunks of k latent frames, of which each
        sees itself and the window - 1 before it (None: all). cache: the new chunks come after the cache's past, whose keys they see.
        actions [B, T]: the action that leads to each frame, for a model that has actions.
        -> v, shaped as x_t. Raises ValueError for latents that do not split into patches, and for actions where there are none.
        """
        B, T, C, h, w = x_t.shape
        (pt, ph, pw), c = self.config.patch_size, self.config
        if c.in_dim != C or T % pt or h % ph or w % pw:
            raise ValueError(
                f"latents {tuple(x_t.shape)} need {c.in_dim} channels and sides divisible by the patch {c.patch_size}"
            )
        if (actions is None) != (c.num_actions == 0):
            raise ValueError(
                f"a model with {c.num_actions} actions needs "
                + ("actions" if c.num_actions else "none")
            )
        grid = (T // pt, h // ph, w // pw)
        # patches, flattened as the convolution's weight is: one matrix product
        x = (
            x_t.reshape(B, grid[0], pt, C, grid[1], ph, grid[2], pw)
            .permute(0, 1, 4, 6, 3, 2, 5, 7)
            .reshape(B, math.prod(grid), -1)
        )
        x = nn.functional.linear(
            x.to(self.patch_embedding.weight.dtype),
            self.patch_embedding.weight.flatten(1),
            self.patch_embedding.bias,
        )

        time = self.time_embedding(
            sinusoidal_embedding(t[:, ::pt] * 1000, c.freq_dim).to(x.dtype)
        )  # [B, T, D]
        if actions is not None:
            time = time + self.action_embedding(
                actions[:, ::pt]
            )  # NFD: the action that leads to the frame
        modulation = self.time_projection(time).unflatten(-1, (6, c.dim))  # [B, T, 6, D]
        keys = self.text_keys(text) if torch.is_tensor(text) else text
        start = cache.frames if cache is not None else 0
        table = rope_table(rope_angles(c.dim // c.num_heads, *grid, start, x.device), x.dtype)
        tokens = chunk * grid[1] * grid[2] if chunk is not None else None
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                modulation,
                keys[layer],
                table=table,
                chunk=tokens,
                window=window,
                cache=cache,
                layer=layer,
            )

        x = self.head(x, time).unflatten(-1, (pt, ph, pw, c.out_dim)).unflatten(1, grid)
        return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(B, T, c.out_dim, h, w).to(x_t.dtype)
