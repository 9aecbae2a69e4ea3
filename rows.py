"""The rows of a batch, shared out over the processes that work on it.

Each process has the whole batch, runs its own rows of it through a network, and takes everyone's
outputs for the rest of its step. The gradient that comes back is that of the whole batch; each
process passes on its own rows', and the sum over the processes is what one would have computed.
"""

from launch import RANK, WORLD

import torch


def own_rows(x):
    """Take this process's rows of a batch [B, ...]: as many for each, the last one's repeated where
    they do not suffice. One number for all rows stays."""
    if not torch.is_tensor(x) or x.ndim == 0:
        return x
    rows = -(-len(x) // WORLD)
    return x[torch.arange(RANK * rows, (RANK + 1) * rows, device=x.device).clamp(max=len(x) - 1)]


def every(mine):
    """Join what each process has: [n, ...] -> [WORLD n, ...]."""
    if WORLD == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, mine.contiguous())
    return torch.cat(parts)


class Gather(torch.autograd.Function):
    """Everyone's rows, of which `count` are a batch: [B / WORLD, ...] -> [B, ...]."""

    @staticmethod
    def forward(ctx, mine, count):
        ctx.rows = len(mine)
        return every(mine)[:count]

    @staticmethod
    def backward(ctx, gradient):
        padded = gradient.new_zeros(WORLD * ctx.rows, *gradient.shape[1:])
        padded[: len(gradient)] = gradient
        return own_rows(padded), None


def by_rows(function):
    """Make a function of a batch, and of more that is left as it is, run on this process's rows of
    the batch and return everyone's."""

    def call(batch, *rest, **more):
        made = function(own_rows(batch), *rest, **more)
        if isinstance(made, tuple):
            return tuple(Gather.apply(part, len(batch)) for part in made)
        return made if made is None else Gather.apply(made, len(batch))

    return call if WORLD > 1 else function


def split_calls(network):
    """Let a network's calls work by rows: those of a DiT, or those of a VAE."""
    if hasattr(network, "blocks"):
        split_transformer(network)
    for name in ("moments", "decode_raw"):
        if hasattr(network, name):
            setattr(network, name, by_rows(getattr(network, name)))


def split_transformer(model):
    """Let a DiT work by rows. Keys of a prompt and caches hold a process's own rows only."""
    forward, text_keys, new_cache = by_rows(model.forward), model.text_keys, model.new_cache

    def split_forward(x_t, t, text, **more):
        if isinstance(text, tuple):  # with actions
            text = (text[0], own_rows(text[1]))
        return forward(x_t, own_rows(t), text, **more)

    def split_cache(batch, *size, **more):
        cache = new_cache(-(-batch // WORLD), *size, **more)
        cache.batch = batch
        return cache

    def split_keys(text):
        return text_keys(own_rows(text))

    model.forward, model.new_cache, model.text_keys = split_forward, split_cache, split_keys
