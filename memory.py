"""The memory that a training takes: how to take less of it, and how much it will be."""

import contextlib
import functools
import warnings
import weakref

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from attention import KVCache


# ------------------------------------------------------------------------- activation checkpointing
class Past:
    """A layer's past in a cache that will have moved on when the chunk is computed again."""

    def __init__(self, cache, layer):
        end = cache.frames * cache.tokens
        self.k, self.v = cache.k[layer, :, :end].clone(), cache.v[layer, :, :end].clone()

    def put(self, layer, k, v):
        """`KVCache.put`, but the new keys and values are not kept: a clean pass writes them."""
        return torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)


def recompute_in_plan():
    """The contexts of a block's first and second computation in a dry run."""
    return contextlib.nullcontext(), Planning.on


def recompute(network):
    """Keep only the input of each block of a network's transformer, where gradients flow, and
    compute what is inside again when they arrive there (activation checkpointing)."""

    def run(forward, x, time, keys, remember=False, cache=None, **attention):
        if not torch.is_grad_enabled():
            return forward(x, time, keys, remember, cache=cache, **attention)
        past = None if cache is None else Past(cache, attention["layer"])
        how = {"use_reentrant": False, "preserve_rng_state": False}
        if Planning.on:  # autograd leaves its ways aside
            how["context_fn"] = recompute_in_plan
        return checkpoint(forward, x, time, keys, remember, cache=past, **attention, **how)

    for module in network.modules() if isinstance(network, torch.nn.Module) else ():
        for block in getattr(module, "blocks", ()):
            block.forward = functools.partial(run, block.forward)


# --------------------------------------------------------------------------------- a dry run
class Planning(TorchFunctionMode):
    """Let a script run on the meta device, which has shapes and no numbers, as it would on another:
    networks are made there, attention takes no memory for its weights, and autocast casts."""

    on = None  # the one that is at work
    products = (F.linear, F.conv1d, torch.conv1d, F.conv2d, torch.conv2d, torch.matmul)

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.casts = dtype, {}

    @contextlib.contextmanager
    def autocast(self):
        """Stand in for torch.autocast, which the meta device does not have."""
        yield
        self.casts.clear()

    def cast(self, x):
        """Cast a float32 input of a product; a weight once for all products of a forward pass."""
        if not torch.is_tensor(x) or x.dtype != torch.float32 or self.dtype == torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
            return x.to(self.dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = x.to(self.dtype)
        return self.casts[id(x)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = kwargs.get("generator") or kwargs.get("device")
        if function in (torch.empty, torch.randn) and not drawn:  # a network's parameters
            return function(*args, **kwargs | {"device": "meta"})
        if not (args and torch.is_tensor(args[0]) and args[0].is_meta):
            return function(*args, **kwargs)
        if function is torch.Tensor.cpu:
            return torch.zeros(args[0].shape)
        if function is torch.Tensor.to and "cpu" in args:
            return args[0].to(next(x for x in args if isinstance(x, torch.dtype)))
        if function is F.scaled_dot_product_attention:
            q, k, v = (self.cast(x) for x in args)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        if function in self.products:
            args = tuple(self.cast(x) for x in args)
        return function(*args, **kwargs)


class Ledger(TorchDispatchMode):
    """Count the bytes of all tensors that are made, while they live, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and tensor.is_meta:
                self.enter(tensor.untyped_storage())
        return made

    def enter(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.leave, key, storage.nbytes())

    def leave(self, key, size):
        self.known.discard(key)
        self.now -= size


def size_of(tensors):
    """The bytes of tensors."""
    return sum(v.numel() * v.element_size() for v in tensors if torch.is_tensor(v))


def plan(dtype):
    """Begin a dry run: what this process makes from now on has shapes and no numbers."""
    warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
    Planning.on = Planning(dtype)
    Planning.on.__enter__()


def count_step(state, others, step, steps):
    """Take steps of a training on the meta device: name -> bytes, as one process would need them.
    The activations are the most, over the steps, that all tensors of a step take at once."""
    networks = [part for part in state.values() if isinstance(part, torch.nn.Module)]
    optimizers = [part for part in state.values() if hasattr(part, "param_groups")]
    trained = [p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    caches, generator = [0], torch.Generator().manual_seed(0)
    made = KVCache.__init__

    def remember(cache, *args, **kwargs):
        made(cache, *args, **kwargs)
        caches.append(size_of([cache.k, cache.v]))

    KVCache.__init__ = remember
    with Ledger() as ledger:
        for i in sorted({0, 1, steps - 1}):
            step(i, generator)
    KVCache.__init__ = made
    states = [v for o in optimizers for values in o.state.values() for v in values.values()]
    counted = {
        "parameters": size_of(v for net in networks for v in net.state_dict().values()),
        "frozen and averaged": size_of(
            v
            for part in (*state.values(), *others)
            if part not in networks and part not in optimizers
            for v in part.state_dict().values()
        ),
        "gradients": size_of(trained),
        "optimiser state": size_of(states),
    }
    activations = ledger.most - counted["gradients"] - counted["optimiser state"]
    cache = max(caches)
    return counted | {"activations": max(0, activations - cache), "cache": cache}


def per_device(counted, state, others, processes):
    """What each of many processes holds: its shards, and the layers that it gathers to use them."""
    if processes == 1:
        return counted
    shards = ("parameters", "frozen and averaged", "gradients", "optimiser state")
    counted = counted | {name: counted[name] / processes for name in shards}
    gathered = [0]
    for part in (*state.values(), *others):
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            if hasattr(module, "blocks"):
                block = size_of(module.blocks[0].parameters())
                rest = size_of(module.parameters()) - len(module.blocks) * block
                gathered.append(rest + 3 * block)  # this block, its gradient and the next block
    return counted | {"layers gathered": max(gathered)}


def report(run, state, others, step):
    """Print what a training takes on each device: the end of a dry run. -> name -> bytes."""
    counted = count_step(state, others, step, run.steps)
    counted = per_device(counted, state, others, run.dry_run)
    counted["all"] = sum(counted.values())
    clips = f"{run.batch_size} clips at a time"
    print(f"on each of {run.dry_run} devices, {clips}, in GiB:")
    for name, size in counted.items():
        print(f"{name:20} {size / 2**30:9.3f}")
    return counted
