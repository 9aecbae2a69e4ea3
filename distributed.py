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

from rows import every, split_calls
from weights import UserError


# -------------------------------------------------------------------------------- the processes
def start():
    """Join the other processes that torchrun has started, if any, each with a GPU of its own.
    A process that dies ends the others; one that does not answer does after 5 minutes."""
    if WORLD == 1 or torch.distributed.is_initialized():
        return
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if 0 < gpus <= number:
        raise UserError(f"there are only {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
    if gpus:
        torch.cuda.set_device(number)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=5))


@functools.cache
def patient():
    """The processes as a group that waits for what one of them does alone, which may take days."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))


@contextlib.contextmanager
def first_alone():
    """Let the first process go through a block before the others, which find what it has left."""
    if RANK > 0:
        torch.distributed.barrier(patient())
    yield
    if RANK == 0 and WORLD > 1:
        torch.distributed.barrier(patient())


def any_of(flag):
    """Whether a flag is set in any of the processes."""
    return every(torch.tensor([float(bool(flag))])).max().item() > 0


# ------------------------------------------------------------------------------------ the shards
def shard(network):
    """Split a network's weights over the processes, layer by layer, and its calls by rows."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    network.to(memory_format=torch.contiguous_format)
    split_calls(network)
    for block in getattr(network, "blocks", ()):
        fully_shard(block.cross_attn)  # a prompt's keys are computed before its block runs
        register_fsdp_forward_method(block.cross_attn, "keys")
        fully_shard(block)
    fully_shard(network)
    for name in ("text_keys", "moments", "decode_raw"):
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)


def share_out(state, others):
    """Shard the networks of a training, and with them their optimisers and averages."""
    if WORLD == 1:
        return
    # of outputs that are views; nothing here changes an output in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    networks = [part for part in (*state.values(), *others) if isinstance(part, nn.Module)]
    before = [p for network in networks for p in network.parameters()]
    for network in networks:
        for module in network if isinstance(network, nn.ModuleList) else [network]:
            shard(module)
    after = [p for network in networks for p in network.parameters()]  # FSDP has made new ones
    renewed = {id(old): new for old, new in zip(before, after, strict=True)}
    for part in state.values():
        for group in getattr(part, "param_groups", []):
            group["params"] = [renewed[id(p)] for p in group["params"]]
        if hasattr(part, "shadow"):
            tensors = [network.state_dict() for network in networks]
            own = next(named for named in tensors if named.keys() == part.shadow.keys())
            part.shadow = {name: like(own[name], v) for name, v in part.shadow.items()}


def local(tensor):
    """This process's shard of a tensor that may have shards."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def parameters_of(optimizer):
    """An optimiser's parameters, in the order in which its state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def whole(tensor):
    """The whole of a tensor of which this process may hold a shard."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(shards, tensor):
    """This process's shard of a whole tensor, split as `shards` is, if it is split."""
    if not hasattr(shards, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    how = (shards.device_mesh, shards.placements)
    return distribute_tensor(tensor.detach().to(shards.device), *how, src_data_rank=None)
