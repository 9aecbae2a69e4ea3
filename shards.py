"""Shards of a training's state in a folder, by torch.distributed.checkpoint.

Each of many processes writes what it holds; any number of processes reads it.
"""

import os
import pickle
import shutil
import warnings
from launch import RANK, WORLD

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import distributed
from weights import UserError, file_hash, reason

# what torch writes into the index of a folder of shards
INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING ChunkStorageMetadata"
        " MetadataIndex StorageMeta"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size float32 float64 bfloat16 float16 int64 uint8",
    "pathlib": "Path PosixPath WindowsPath",
}


def tensors_of(state):
    """All tensors of networks, averages and optimisers: "part/name" or "part/3.momentum" -> v."""
    found = {}
    for part, thing in state.items():
        entries = thing.state_dict()
        if "param_groups" in entries:  # the rates and betas come from the script
            states = entries["state"].items()
            entries = {f"{i}.{name}": v for i, values in states for name, v in values.items()}
        found |= {f"{part}/{name}": v for name, v in entries.items()}
    return found


def save_shards(out, name, state):
    """Write each process's shards to the folder OUT/NAME: {file: hash}. Raises UserError."""
    folder = os.path.join(out, name)
    with distributed.first_alone():
        if RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        dcp.save(tensors_of(state), checkpoint_id=folder, process_group=distributed.patient())
        mine = sorted(os.listdir(folder))[RANK::WORLD]
        hashes = {f"{name}/{file}": file_hash(os.path.join(folder, file)) for file in mine}
    except (CheckpointException, OSError) as error:
        failures = getattr(error, "failures", {0: (error,)})
        shutil.rmtree(folder, ignore_errors=True)
        told = reason(next(iter(failures.values()))[0])
        raise UserError(f"cannot write {folder}: {told}") from None
    every = [None] * WORLD
    torch.distributed.all_gather_object(every, hashes, distributed.patient())
    return {file: value for part in every for file, value in part.items()}


class Index(pickle.Unpickler):
    """Read the index of a folder of shards, and nothing that could run code."""

    def find_class(self, module, name):
        if name not in INDEX.get(module, "").split():
            raise ValueError(f"its index holds {module}.{name}")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Read a folder of shards, whose index is a pickle."""

    def read_metadata(self, *args, **kwargs):
        try:
            with open(os.path.join(self.path, ".metadata"), "rb") as file:
                return Index(file).load()
        except Exception as error:  # of many kinds, from what is no pickle
            raise ValueError(f"its index cannot be read: {reason(error)}") from None


def load_shards(folder, state):
    """Read a folder that any number of processes wrote, each process its own shards."""
    reader, wanted = Reader(folder), tensors_of(state)
    optimizers = {k: v for k, v in state.items() if isinstance(v, torch.optim.Optimizer)}
    for name, part in optimizers.items():
        wanted |= {f"{name}/{i}": p for i, p in enumerate(distributed.parameters_of(part))}
    index, targets = reader.read_metadata().state_dict_metadata, {}
    if missing := tensors_of(state).keys() - index.keys():
        raise LookupError(f"its shards do not hold {min(missing)}")
    for key, entry in index.items():
        like = wanted[key] if key in wanted else wanted[key.rpartition(".")[0]]
        if key not in wanted:  # of an optimiser, which has no state before its first step
            like = torch.empty_like(like) if entry.size == like.shape else torch.empty(entry.size)
        targets[key] = like
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process reads it
        group = distributed.patient() if WORLD > 1 else None
        dcp.load(targets, storage_reader=reader, process_group=group)
    for name, part in optimizers.items():
        states = {index: {} for index in range(len(distributed.parameters_of(part)))}
        for key, value in targets.items():
            owner, _, rest = key.partition("/")
            if owner == name:
                index, _, field = rest.partition(".")
                states[int(index)][field] = value.detach()
        part.load_state_dict({"state": states, "param_groups": part.state_dict()["param_groups"]})
