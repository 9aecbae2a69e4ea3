"""The memory that a training takes: how to take less of it, and how much it will be."""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from weights import UserError


# ------------------------------------------------------------------------- activation checkpointing
class Past:
    """A chunk's past in a cache that has moved on since, to compute the chunk a second time."""

    def __init__(self, cache):
        self.cache, self.evicted = cache, cache.evicted
        self.end = cache.frames * cache.tokens

    def put(self, layer, k, v):
        """`KVCache.put`, but the new keys and values are not kept: a clean pass writes them."""
        if self.cache.evicted != self.evicted:
            raise UserError("--recompute needs a --window that holds a whole clip")
        past = (kept[layer, :, : self.end] for kept in (self.cache.k, self.cache.v))
        return tuple(torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))


def recompute(network):
    """Keep only the input of each block of a network's transformer, where gradients flow, and
    compute what is inside again when they arrive there (activation checkpointing)."""

    def run(forward, x, time, keys, remember=False, cache=None, **attention):
        if not torch.is_grad_enabled():
            return forward(x, time, keys, remember, cache=cache, **attention)
        past = None if cache is None else Past(cache)
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(forward, x, time, keys, remember, cache=past, **attention, **how)

    for module in network.modules() if isinstance(network, torch.nn.Module) else ():
        for block in getattr(module, "blocks", ()):
            block.forward = functools.partial(run, block.forward)
