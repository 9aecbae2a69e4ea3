"""Block-causal attention, rotary positions in three dimensions, and the key-value cache (CausVid,
"Autoregressive architecture" and "Efficient inference with KV caching").

Training on a whole clip and sampling with a cache are one computation: `attend_chunks` attends
each chunk's queries to all keys up to the end of that chunk. In training the keys are the clip's
own; in sampling those of past chunks come from the cache.

    python attention.py     draws the block-causal mask to mask.png
"""

import launch
import functools

import torch
from torch import nn
from torch.nn import functional as F


def block_causal_mask(frames, chunk, window=None):
    """Make the mask that the rest of this file obeys but never materialises: bool [frames, frames],
    True where latent frame i may attend to latent frame j (CausVid, "Autoregressive architecture").

    With a window of W chunks also floor(i / k) - floor(j / k) < W: itself and the W - 1 before it.
    """
    # M[i, j] = 1 where floor(j / k) <= floor(i / k), else 0
    block = torch.arange(frames) // chunk
    distance = block[:, None] - block[None, :]
    return (distance >= 0) & (distance < (window or frames))


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over q [B, Lq, H, d] and k, v [B, Lk, H, d] -> [B, Lq, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_chunks(q, k, v, chunk, window=None):
    """Attend block-causally without a mask: each chunk of queries to all keys up to its own end.

    q [B, Lq, H, d]: new tokens. k, v [B, Lk, H, d]: those of the past, if any, then the new ones.
    chunk: tokens in a chunk, the first one beginning at the first query; window: how many chunks a
    chunk sees, itself included (None: all).
    """
    past = k.shape[1] - q.shape[1]
    outputs = []
    for start in range(0, q.shape[1], chunk):
        end = past + min(start + chunk, q.shape[1])
        first = 0 if window is None else max(0, past + start - (window - 1) * chunk)
        outputs.append(attend(q[:, start : start + chunk], k[:, first:end], v[:, first:end]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


# ------------------------------------------------------------------------------ rotary positions
def rope_angles(head_dim, frames, height, width, start=0):
    """Compute the angles of 3-D RoPE: [frames * height * width, head_dim / 2], in float64.

    The channel pairs of a head are shared out over (time, height, width) as in Wan 2.1: of
    head_dim channels 2 floor(head_dim / 6) go to height, as many to width and the rest to time
    (44/42/42 of 128). Time begins at `start`.
    """
    share = 2 * (head_dim // 6)
    axes = ((frames, head_dim - 2 * share, start), (height, share, 0), (width, share, 0))
    grids = []
    for axis, (size, channels, first) in enumerate(axes):
        position = torch.arange(first, first + size, dtype=torch.float64)
        pair = torch.arange(0, channels, 2, dtype=torch.float64)
        # the angle of channel pair i at position p on an axis of n channels: p 10000^(-2 i / n)
        angles = torch.outer(position, 10000.0 ** -(pair / channels))  # [size, channels / 2]
        shape = [1, 1, 1, -1]
        shape[axis] = size
        grids.append(angles.view(shape).expand(frames, height, width, -1))
    return torch.cat(grids, dim=-1).flatten(0, 2)


@functools.lru_cache(16)
def rope(head_dim, frames, height, width, start, dtype, device):
    """Make (cos, sin) [L, 1, head_dim / 2, 2] of `rope_angles`, once: on the CPU, since not every
    device has float64; in double precision for float64 inputs."""
    if start and frames * height * width > 1:  # all tokens turn alike: only one angle is sent
        tables = rope(head_dim, frames, height, width, 0, dtype, device)
        back = rope(head_dim, 1, 1, 1, start, dtype, device)
        return torch.view_as_real(torch.view_as_complex(tables) * torch.view_as_complex(back))
    angles = rope_angles(head_dim, frames, height, width, start)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]
    return table.to(torch.promote_types(dtype, torch.float32)).to(device)


def rotate(x, table):
    """Apply RoPE: turn each channel pair of x [B, L, H, d] by the angle of its token in `table`."""
    # (x_2i + i x_2i+1) e^(i angle)
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # complex numbers are not fused with what is around them
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
        turned = torch.view_as_real(turned)
    return turned.flatten(-2).to(x.dtype)


# ----------------------------------------------------------------------------------------- cache
class KVCache:
    """Keys and values of the last W - 1 chunks, in every layer, and of the chunk being denoised.

    `put` writes the new chunk's keys and values after those of the past and returns both; the
    next `put` overwrites them. `commit` makes what was put last part of the past (Algorithm 2).
    When the window is full, `commit` evicts the oldest frames and moves the rest forward in memory.
    Keys keep the time that they were rotated to. RoPE is relative: what a chunk reads lies at most
    (W - 1 + ahead) k frames before it, however long the stream, and angles are made in float64.
    """

    def __init__(
        self, layers, batch, chunk, window, height, width, heads, head_dim, ahead=1, **tensor
    ):
        """chunk: latent frames in a chunk; window: chunks attended to, the new one included;
        height, width: tokens; ahead: chunks that are denoised at once; tensor: device, dtype."""
        self.chunk, self.window = chunk, window
        self.batch = batch  # videos; of many processes each holds the keys of its own
        self.tokens = height * width  # of a latent frame
        self.frames = 0  # latent frames of the past that are kept
        self.evicted = 0  # and that are not
        self.times = {}  # what `DiT.embed_time` made of a time that comes in every chunk
        size = (window - 1 + ahead) * chunk * self.tokens
        self.k = torch.zeros(layers, batch, size, heads, head_dim, **tensor)
        self.v = torch.zeros_like(self.k)

    def is_full(self, frames):
        """Whether so many new frames come behind all the past that a chunk may see."""
        return self.frames == (self.window - 1) * self.chunk and frames == self.chunk

    def put(self, layer, k, v):
        """Write k, v [B, L, H, d] of new tokens -> the layer's keys and values [B, past + L, H, d].
        Gradients flow through the new tokens; the past is a constant."""
        past = self.frames * self.tokens
        end = past + k.shape[1]
        self.k[layer, :, past:end] = k.detach()
        self.v[layer, :, past:end] = v.detach()
        if k.requires_grad:
            k = torch.cat([self.k[layer, :, :past], k], dim=1)
            return k, torch.cat([self.v[layer, :, :past], v], dim=1)
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def commit(self, frames):
        """Make the first `frames` frames that were put part of the past; evict the oldest."""
        self.frames += frames
        evicted = self.frames - (self.window - 1) * self.chunk
        if evicted > 0:
            old, new = evicted * self.tokens, self.frames * self.tokens
            for kept in (*self.k, *self.v):  # one layer needs little more memory than none
                kept[:, : new - old] = kept[:, old:new].clone()
            self.frames -= evicted
            self.evicted += evicted


# ---------------------------------------------------------------------------------------- layers
class Projections(nn.Module):
    """The weights of Wan 2.1's attention layers: q and k are RMS-normed over the full width."""

    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1))  # [B, L, H, d]


class SelfAttention(Projections):
    """Self-attention of the video's tokens: bidirectional, or block-causal with a cached past."""

    def forward(self, x, table, chunk=None, window=None, cache=None, layer=0, remember=False):
        """x [B, L, D]; table: RoPE of the L tokens; chunk in tokens (None: attend both ways over
        all tokens), window in chunks; remember: only leave the keys and values in the cache, and
        return None -> [B, L, D]."""
        k = rotate(self.heads(self.norm_k(self.k(x))), table)
        v = self.heads(self.v(x))
        if cache is not None:
            k, v = cache.put(layer, k, v)
        if remember:
            return None
        q = rotate(self.heads(self.norm_q(self.q(x))), table)
        y = attend(q, k, v) if chunk is None else attend_chunks(q, k, v, chunk, window)
        return self.o(y.flatten(2))


class CrossAttention(Projections):
    """Attention from the video's tokens to the prompt's."""

    def keys(self, text):
        """Compute an embedded prompt's [B, S, D] keys and values, each [B, S, H, d]: once."""
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))

    def forward(self, x, keys):
        """x [B, L, D]; keys: what `keys` returned -> [B, L, D]."""
        q = self.heads(self.norm_q(self.q(x)))
        return self.o(attend(q, *keys).flatten(2))


def main():
    import flags
    import media

    parser = flags.Parser("Draw the block-causal mask.")
    parser.add_argument("out", nargs="?", default="mask.png", type=flags.picture, help="FILE.png")
    args = parser.parse_args()
    # light gray: seen without a window; white: seen through a window of 4 chunks
    mask = block_causal_mask(frames=21, chunk=3).byte() * 170 + 60
    mask += 25 * block_causal_mask(frames=21, chunk=3, window=4).byte()
    picture = mask.repeat_interleave(12, 0).repeat_interleave(12, 1).numpy()
    media.save_picture(picture, args.out)


if __name__ == "__main__":
    launch.run_main(main)
