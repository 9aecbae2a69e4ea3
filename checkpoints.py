"""Checkpoints: all that a run needs to go on, kept twice, in case that one is damaged.

OUT/checkpoint.pt is the last one, OUT/checkpoint.before.pt the one before it; each ends in the
SHA-256 of its contents. Many processes write their shards side by side into a folder
OUT/shards-STEP, by torch.distributed.checkpoint. checkpoint.pt, which is written when they are
whole, names them with their hashes. Any number of processes goes on from either kind.
"""

import contextlib
import glob
import hashlib
import os
import pickle
import shutil
import warnings
from launch import RANK, WORLD

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import distributed
from weights import UserError, file_hash, load_pickled, reason, written

NAMES = "checkpoint.pt", "checkpoint.before.pt"
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


# -------------------------------------------------------------------------------------- one file
class Hashing:
    """Write to a file, and hash what is written."""

    def __init__(self, file):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data):
        self.hash.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save_checkpoint(path, run, state, generator, **progress):
    """Write all that a run needs to go on, and keep the checkpoint that was there as the one
    before. Raises UserError if the disk is full; then both are what they were."""
    saved = {"generator": generator.get_state(), "settings": run.settings, **progress}
    if WORLD > 1:
        saved["shards"] = save_shards(run.out, f"shards-{progress['step']}", state)
    else:
        saved["state"] = {name: part.state_dict() for name, part in state.items()}
    with written(path, os.path.join(run.out, NAMES[1])) as file:
        hashing = Hashing(file)
        torch.save(saved, hashing)
        file.write(hashing.hash.hexdigest().encode())
    if RANK == 0:
        forget_shards(run.out)


def read_saved(path, device="cpu"):
    """Read the dict that torch.save wrote to `path`. Raises UserError for anything else."""
    try:
        saved = load_pickled(path, device)
        if not isinstance(saved, dict):
            raise ValueError("it does not hold what this version writes")
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; delete it to begin again") from None
    return saved


def check_hash(path):
    """Raise UserError for a checkpoint whose contents or shards are not what was written. One of
    an older version, without a hash, passes."""
    with open(path, "rb") as file:
        size = max(0, os.path.getsize(path) - 64)
        file.seek(size)
        told, found = file.read(), hashlib.sha256()
        file.seek(0)
        while size and (part := file.read(min(2**24, size))):
            found.update(part)
            size -= len(part)
    if all(byte in b"0123456789abcdef" for byte in told) and told != found.hexdigest().encode():
        raise UserError(f"{path} is damaged, its checksum does not fit; delete it to begin again")
    for name, value in read_saved(path, "meta").get("shards", {}).items():
        shard = os.path.join(os.path.dirname(path), name)
        if not os.path.isfile(shard) or file_hash(shard) != value:
            raise UserError(f"{path} is damaged: {shard} is not what was written")


def mend(out):
    """If the last checkpoint is damaged, put the one before it in its place, and say so."""
    last, before = (os.path.join(out, name) for name in NAMES)
    if RANK or not os.path.exists(before):
        return
    try:
        check_hash(last)
    except (UserError, OSError) as error:
        with contextlib.suppress(UserError):
            check_hash(before)
            step = read_saved(before, "meta").get("step")
            told = reason(error).split(";")[0]
            print(f"{told}: {out} goes on from the one before it, of step {step}")
            os.replace(before, last)


def load_checkpoint(path, run, state, generator):
    """Load what `save_checkpoint` wrote into the parts of `state`: (step, seconds).
    Raises UserError for a checkpoint that is damaged, of other parts or beyond the run's end."""
    saved = read_saved(path, run.device)
    check_hash(path)
    try:
        if not (isinstance(saved["step"], int) and saved["step"] >= 0 and saved["seconds"] >= 0):
            raise ValueError("its step or its seconds are no such numbers")
        if saved["step"] > run.steps:
            raise ValueError(f"{saved['step']} steps are done, more than --steps {run.steps}")
        if "shards" in saved:
            load_shards(os.path.join(run.out, f"shards-{saved['step']}"), state)
        else:
            for name, part in state.items():
                load_part(part, saved["state"][name])
        generator.set_state(saved["generator"].cpu())
        return saved["step"], saved["seconds"]
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit this run ({reason(error)})") from None


def parameters_of(optimizer):
    """An optimiser's parameters, in the order in which its state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def load_part(part, saved):
    """Load the whole state of a network, average or optimiser, of which many processes each take
    their shards."""
    if WORLD > 1 and isinstance(part, torch.optim.Optimizer):
        for index, p in enumerate(parameters_of(part)):
            for name, v in saved["state"][index].items():
                saved["state"][index][name] = distributed.like(p, v) if v.shape == p.shape else v
    elif WORLD > 1:
        own = part.state_dict()
        saved = {name: distributed.like(own[name], v) for name, v in saved.items()}
    part.load_state_dict(saved)


# ----------------------------------------------------------------------------- shards in a folder
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


def forget_shards(out):
    """Remove the folders of shards that no checkpoint names."""
    named = set()
    for path in (os.path.join(out, name) for name in NAMES):
        if os.path.exists(path):
            named |= {os.path.dirname(name) for name in read_saved(path, "meta").get("shards", {})}
    for folder in glob.glob(os.path.join(glob.escape(out), "shards-*")):
        if os.path.basename(folder) not in named:
            shutil.rmtree(folder, ignore_errors=True)


class Index(pickle.Unpickler):
    """Read the index of a folder of shards, and nothing that could run code."""

    def find_class(self, module, name):
        if name not in INDEX.get(module, "").split():
            raise ValueError(f"its index holds {module}.{name}")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Read a folder of shards, whose index is a pickle."""

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            return Index(file).load()


def load_shards(folder, state):
    """Read a folder that any number of processes wrote, each process its own shards."""
    reader, wanted = Reader(folder), tensors_of(state)
    optimizers = {k: v for k, v in state.items() if isinstance(v, torch.optim.Optimizer)}
    for name, part in optimizers.items():
        wanted |= {f"{name}/{i}": p for i, p in enumerate(parameters_of(part))}
    targets = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        like = wanted[key] if key in wanted else wanted[key.rpartition(".")[0]]
        if key not in wanted:  # of an optimiser, which has no state before its first step
            like = torch.empty_like(like) if entry.size == like.shape else torch.empty(entry.size)
        targets[key] = like
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process reads it
        group = distributed.patient() if WORLD > 1 else None
        dcp.load(targets, storage_reader=reader, process_group=group)
    for name, part in optimizers.items():
        states = {index: {} for index in range(len(parameters_of(part)))}
        for key, value in targets.items():
            owner, _, rest = key.partition("/")
            if owner == name:
                index, _, field = rest.partition(".")
                states[int(index)][field] = value.detach()
        part.load_state_dict({"state": states, "param_groups": part.state_dict()["param_groups"]})
