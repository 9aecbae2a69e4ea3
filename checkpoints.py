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
import shutil
from launch import RANK, WORLD

import torch

import distributed
from untrusted import load_pickled
from weights import UserError, file_hash, reason, written

NAMES = "checkpoint.pt", "checkpoint.before.pt"


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
        import shards  # half as much to import as torch is

        saved["shards"] = shards.save_shards(run.out, f"shards-{progress['step']}", state)
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


def read_shards(path):
    """Read which files of shards a checkpoint names: {name: hash}. Raises UserError."""
    shards = read_saved(path, "meta").get("shards", {})
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards):
        raise UserError(f"{path} is damaged: it does not name its shards; delete it to begin again")
    return shards


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
    for name, value in read_shards(path).items():
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
            import shards

            shards.load_shards(os.path.join(run.out, f"shards-{saved['step']}"), state)
        else:
            for name, part in state.items():
                load_part(part, saved["state"][name])
        generator.set_state(saved["generator"].cpu())
        return saved["step"], saved["seconds"]
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit this run ({reason(error)})") from None


def load_part(part, saved):
    """Load the whole state of a network, average or optimiser, of which many processes each take
    their shards."""
    if WORLD > 1 and isinstance(part, torch.optim.Optimizer):
        for index, p in enumerate(distributed.parameters_of(part)):
            for name, v in saved["state"][index].items():
                saved["state"][index][name] = distributed.like(p, v) if v.shape == p.shape else v
    elif WORLD > 1:
        own = part.state_dict()
        saved = {name: distributed.like(own[name], v) for name, v in saved.items()}
    part.load_state_dict(saved)


def forget_shards(out):
    """Remove the folders of shards that no checkpoint names."""
    named = set()
    for path in (os.path.join(out, name) for name in NAMES):
        if os.path.exists(path):
            named |= {os.path.dirname(name) for name in read_shards(path)}
    for folder in glob.glob(os.path.join(glob.escape(out), "shards-*")):
        if os.path.basename(folder) not in named:
            shutil.rmtree(folder, ignore_errors=True)
