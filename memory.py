"""The memory that a training takes: how to take less of it, and how much it will be."""

import functools

import torch
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------- activation checkpointing
class Past:
    """A chunk's past in a cache that has moved on since, to compute the chunk a second time."""

    def __init__(self, cache):
        end = cache.frames * cache.tokens
        self.k, self.v = cache.k[:, :, :end], cache.v[:, :, :end]

    def put(self, layer, k, v):
        """`KVCache.put`, but the new keys and values are not kept: a clean pass writes them."""
        return torch.cat([self.k[layer], k], dim=1), torch.cat([self.v[layer], v], dim=1)


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
