"""Block-causal attention, rotary positions in three dimensions, and the key-value cache.

CausVid's "Autoregressive architecture" and "Efficient inference with KV caching".

Training on a whole clip and sampling with a cache are one computation: `attend_chunks` attends each chunk's queries to all keys
up to the end of that chunk. In training the keys are the clip's own; in sampling those of past chunks come from the cache.
"""

import torch
from torch import nn
from torch.nn import functional as F


def block_causal_mask(frames, chunk, window=None):
    """The mask that everything here computes without ever making it: bool [frames, frames], True where i may see j.

    M[i, j] = 1 where floor(j / k) <= floor(i / k), else 0                               (CausVid, "Autoregressive architecture")
    With a window of W chunks also floor(i / k) - floor(j / k) < W: a chunk sees itself and the W - 1 before it.
    """
    block = torch.arange(frames) // chunk
    distance = block[:, None] - block[None, :]
    return (distance >= 0) & (distance < (window or frames))


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over q [B, Lq, H, d] and k, v [B, Lk, H, d] -> [B, Lq, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_chunks(q, k, v, chunk, window=None):
    """Block-causal attention without a mask: each chunk of queries attends to all keys up to its own end.

    q [B, Lq, H, d]: new tokens. k, v [B, Lk, H, d]: those of the past, if any, and then those of the new tokens (Lk >= Lq).
    chunk: tokens a chunk, the first one starting with the first query; window: chunks that a chunk sees, itself included.
    """
    past, outputs = k.shape[1] - q.shape[1], []
    for start in range(0, q.shape[1], chunk):
        end = past + min(start + chunk, q.shape[1])
        gone = (
            0 if window is None else max(0, past + start - (window - 1) * chunk)
        )  # tokens that have left the window
        outputs.append(attend(q[:, start : start + chunk], k[:, gone:end], v[:, gone:end]))
    return torch.cat(outputs, dim=1)


# --------------------------------------------------------------------------------------------------- rotary positions
def rope_angles(head_dim, frames, height, width, start=0, device=None):
    """Angles of 3-D RoPE for a grid of tokens [frames * height * width, head_dim / 2], in float64.

    The channel pairs of a head are shared out over (time, height, width) as Wan 2.1 does it: of head_dim channels
    2 floor(head_dim / 6) go to height, as many to width and the rest to time (44/42/42 of 128). Time begins at `start`.
    """
    share = 2 * (head_dim // 6)
    axes = ((frames, head_dim - 2 * share, start), (height, share, 0), (width, share, 0))
    # angle of pair i at position p on an axis of n channels: p * 10000^(-2 i / n)
    angles = [
        torch.outer(
            torch.arange(first, first + size, dtype=torch.float64, device=device),
            10000.0 ** -(torch.arange(0, n, 2, dtype=torch.float64, device=device) / n),
        )
        for size, n, first in axes
    ]
    t, y, x = (
        a.view([size if i == axis else 1 for i in range(3)] + [-1]).expand(
            frames, height, width, -1
        )
        for axis, (a, size) in enumerate(zip(angles, (frames, height, width)))
    )
    return torch.cat([t, y, x], dim=-1).flatten(0, 2)


def rope_table(angles, dtype):
    """Unit complex numbers e^(i angle) of angles [L, d/2] as [L, 1, d/2], of double precision for float64 activations."""
    return torch.polar(torch.ones_like(angles), angles).to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )[:, None]


def rotate(x, table):
    """RoPE: turn each channel pair of x [B, L, H, d], as a complex number x_2i + i x_2i+1, by the angles of `table`. Keeps the dtype of x."""
    pairs = torch.view_as_complex(x.to(table.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- cache
class KVCache:
    """Keys and values of the last W - 1 chunks, for every layer, with room for the chunk in the making (Algorithm 2).

    `put` writes the keys and values of the chunk in the making behind those of the past and returns both together; doing so
    again overwrites them. `commit` makes the last ones written part of the past. When the window is full, `commit` drops the
    oldest chunk and moves the rest forward, in memory and in time: RoPE is relative, so turning the kept keys back
    by as many frames as they move changes no attention weight, and positions never leave 0 .. W k - 1, however long
    the stream is.
    """

    def __init__(
        self,
        layers,
        batch,
        chunk,
        window,
        height,
        width,
        heads,
        head_dim,
        device=None,
        dtype=torch.float32,
        ahead=1,
    ):
        """chunk: latent frames a chunk; window: chunks attended to, the chunk in the making included; height, width: tokens.
        ahead: how many chunks can be in the making at once (speculative sampling)."""
        self.chunk, self.window, self.tokens, self.head_dim = (
            chunk,
            window,
            height * width,
            head_dim,
        )
        self.frames = 0  # latent frames of the past held now
        shape = (layers, batch, (window - 1 + ahead) * chunk * self.tokens, heads, head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def put(self, layer, k, v):
        """Write k, v [B, L, H, d] of the chunk in the making; -> the layer's k, v [B, past + L, H, d], a view.

        Where gradients are taken they flow through the chunk in the making; the past is a constant.
        """
        past, end = self.frames * self.tokens, self.frames * self.tokens + k.shape[1]
        self.k[layer, :, past:end], self.v[layer, :, past:end] = k.detach(), v.detach()
        if k.requires_grad:
            return torch.cat([self.k[layer, :, :past], k], dim=1), torch.cat(
                [self.v[layer, :, :past], v], dim=1
            )
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def commit(self, frames):
        """Keep the last `frames` latent frames that were put; slide the window if it is full."""
        self.frames += frames
        drop = self.frames - (self.window - 1) * self.chunk
        if drop > 0:
            old, new = drop * self.tokens, self.frames * self.tokens
            shift = rope_angles(self.head_dim, 1, 1, 1, start=-drop, device=self.k.device)
            self.k[:, :, : new - old] = rotate(
                self.k[:, :, old:new], rope_table(shift, self.k.dtype)
            )
            self.v[:, :, : new - old] = self.v[:, :, old:new].clone()
            self.frames -= drop


# ---------------------------------------------------------------------------------------------------------- the layers
class SelfAttention(nn.Module):
    """Wan 2.1's self-attention: q and k RMS-normed over the full width, 3-D RoPE, and then one of two patterns:
    chunk=None attends both ways over the whole clip, otherwise block-causally, with the cache's past in front if there is one.
    """

    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(self, x, table, chunk=None, window=None, cache=None, layer=0):
        """x [B, L, D]; table: RoPE of the L tokens; chunk in tokens, window in chunks -> [B, L, D]."""
        heads = lambda y: y.unflatten(-1, (self.num_heads, -1))
        q = rotate(heads(self.norm_q(self.q(x))), table)
        k = rotate(heads(self.norm_k(self.k(x))), table)
        v = heads(self.v(x))
        if cache is not None:
            k, v = cache.put(layer, k, v)
        y = attend(q, k, v) if chunk is None else attend_chunks(q, k, v, chunk, window)
        return self.o(y.flatten(2))


class CrossAttention(nn.Module):
    """Attention from the video's tokens to the prompt's. Keys and values depend on the prompt alone: `keys` makes them once."""

    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def keys(self, text):
        """Embedded prompt [B, S, D] -> (k, v), each [B, S, H, d]."""
        heads = lambda y: y.unflatten(-1, (self.num_heads, -1))
        return heads(self.norm_k(self.k(text))), heads(self.v(text))

    def forward(self, x, keys):
        """x [B, L, D], keys from `keys` -> [B, L, D]."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        return self.o(attend(q, *keys).flatten(2))


if __name__ == "__main__":  # draw the README's picture of the mask
    import sys

    import imageio.v3 as iio

    mask = block_causal_mask(frames=21, chunk=3).byte() * 170 + 60
    mask += 25 * block_causal_mask(frames=21, chunk=3, window=4).byte()
    iio.imwrite(
        sys.argv[1] if len(sys.argv) > 1 else "mask.png",
        mask.repeat_interleave(12, 0).repeat_interleave(12, 1).numpy(),
    )
