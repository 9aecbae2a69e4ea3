"""Many devices, one process each, by PyTorch's own engine: `torchrun --nproc-per-node 8 dmd.py`.

A training step is written for a batch, and every process takes it for the whole batch: it draws the
same clips, noise and times from the same generator. Only the networks split the work. Each call
runs on the process's own rows of the batch and gives back everyone's; between calls each process
holds a shard of the weights, gradients, averages and optimiser state (FSDP2).
"""

import contextlib
import functools
import os
import warnings
from launch import RANK, WORLD
from datetime import timedelta

import torch
from torch import nn

from weights import UserError


# -------------------------------------------------------------------------------- the processes
def start():
    """Join the other processes that torchrun has started, if any, each with a GPU of its own.
    A process that dies ends the others; one that does not answer does after 5 minutes."""
    if WORLD > 1 and not torch.distributed.is_initialized():
        backend, number = "gloo", int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.is_available():
            if number >= torch.cuda.device_count():
                told = f"{torch.cuda.device_count()} GPUs for process {number + 1} of this machine"
                raise UserError(f"there are only {told}: give torchrun a smaller --nproc-per-node")
            torch.cuda.set_device(number)
            backend = "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=5))


@functools.cache
def patient():
    """The processes as a group that waits for what one of them does alone, which may take days."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))


@contextlib.contextmanager
def first_alone():
    """Let the first process go through a block before the others, which find what it has left."""
    if WORLD > 1 and RANK:
        torch.distributed.barrier(patient())
    yield
    if WORLD > 1 and not RANK:
        torch.distributed.barrier(patient())


def any_of(flag):
    """Whether a flag is set in any of the processes."""
    return bool(flag) if WORLD == 1 else every(torch.tensor([float(bool(flag))])).max() > 0


# ---------------------------------------------------------------------------- rows of the batch
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
        return padded[RANK * ctx.rows : (RANK + 1) * ctx.rows], None


def by_rows(function):
    """Make a function of a batch run on this process's rows of it and return everyone's."""

    def call(batch, *rest):
        made = function(own_rows(batch), *rest)
        if torch.is_tensor(made):
            return Gather.apply(made, len(batch))
        return tuple(Gather.apply(part, len(batch)) for part in made)

    return call if WORLD > 1 else function


def split_transformer(model):
    """Let a DiT work by rows. Keys of a prompt and caches hold a process's own rows only."""
    forward, text_keys, new_cache = model.forward, model.text_keys, model.new_cache

    def split_forward(x_t, t, text, **more):
        if isinstance(text, tuple):  # with actions
            text = (text[0], own_rows(text[1]))
        made = forward(own_rows(x_t), own_rows(t), text, **more)
        return made if made is None else Gather.apply(made, len(x_t))

    def split_cache(batch, *size, **more):
        cache = new_cache(-(-batch // WORLD), *size, **more)
        cache.batch = batch
        return cache

    model.forward, model.new_cache = split_forward, split_cache
    model.text_keys = lambda text: text_keys(own_rows(text))


# ------------------------------------------------------------------------------------ the shards
def shard(network):
    """Split a network's weights over the processes, layer by layer, and its calls by rows."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # of outputs that are views; nothing here changes an output in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    network.to(memory_format=torch.contiguous_format)
    methods = []
    if hasattr(network, "blocks"):
        split_transformer(network)
        for block in network.blocks:
            fully_shard(block.cross_attn)  # a prompt's keys are computed before its block runs
            register_fsdp_forward_method(block.cross_attn, "keys")
            fully_shard(block)
        methods = ["text_keys"]
    elif hasattr(network, "moments"):
        methods = ["moments", "decode_raw"]
        for name in methods:
            setattr(network, name, by_rows(getattr(network, name)))
    fully_shard(network)
    for name in methods:
        register_fsdp_forward_method(network, name)


def share_out(state, others):
    """Shard the networks of a training, and with them their optimisers and averages."""
    if WORLD == 1:
        return
    networks = [part for part in (*state.values(), *others) if isinstance(part, nn.Module)]
    whole = [list(network.parameters()) for network in networks]  # FSDP makes new parameters
    for network in networks:
        for module in network if isinstance(network, nn.ModuleList) else [network]:
            shard(module)
    pairs = [
        (id(old), new)
        for network, before in zip(networks, whole, strict=True)
        for old, new in zip(before, network.parameters(), strict=True)
    ]
    renewed, shards = dict(pairs), [network.state_dict() for network in networks]
    for part in state.values():
        for group in getattr(part, "param_groups", []):
            group["params"] = [renewed[id(p)] for p in group["params"]]
        if hasattr(part, "shadow"):
            own = next(tensors for tensors in shards if tensors.keys() == part.shadow.keys())
            part.shadow = {name: like(own[name], v) for name, v in part.shadow.items()}


def whole(tensor):
    """The whole of a tensor of which this process may hold a shard."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    """This process's shard of a tensor that may have shards."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def like(shards, tensor):
    """This process's shard of a whole tensor, split as `shards` is, if it is split."""
    if not hasattr(shards, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    how = (shards.device_mesh, shards.placements)
    return distribute_tensor(tensor.detach().to(shards.device), *how, src_data_rank=None)
