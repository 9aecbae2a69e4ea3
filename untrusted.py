"""Files that others wrote: pickles, shards, folders. Nothing in them is run, and none takes more
memory than its size."""

import glob
import importlib
import json
import os
import pickle
import re
import warnings
import zipfile

import torch

from weights import UserError, opened, reason


def load_pickled(path, device="cpu", mmap=False):
    """Read what torch.save wrote, in its present format or the one before; code in it is never run.
    mmap: map its tensors into memory, where the format allows that, and do not check their sums.
    Raises ValueError for all else, and UserError if there is too little memory."""
    problem = "it is damaged, cut short, or not what torch.save writes"
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
        packed, whole = begin == b"PK\x03\x04", begin[:1] == b"\x80"
        if packed:
            with zipfile.ZipFile(path) as parts:
                # torch compresses nothing, so that no file takes more memory than its size
                found = parts.infolist()
                whole = all(part.compress_type == zipfile.ZIP_STORED for part in found)
                whole = whole and sum(part.file_size for part in found) <= os.path.getsize(path)
                whole = whole and (mmap or not parts.testzip())
        if whole:
            options = {"map_location": device, "mmap": mmap and packed}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old formats, in many lines
                return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError:  # whose text says how to run what is in the file
        problem = "it is damaged, or holds more than numbers and text; nothing in it was run"
    except OSError as error:
        problem = reason(error)
    except Exception as error:  # of many kinds, and most in many lines
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise UserError(f"{path} needs more memory than there is") from None
    raise ValueError(problem)


def check_stored(path, tensors):
    """Raise UserError for tensors of a file that need more memory than what they are stored in."""
    stored = [tensor.untyped_storage() for tensor in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in stored}
    if sum(tensor.nbytes for tensor in tensors) > sum(sizes.values()):
        raise UserError(f"{path} is damaged: its tensors overlap or are larger than the file")


def read_json(path):
    """Read a JSON object. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return found


def map_shards(index):
    """Map all the files that an index names: name -> tensor. Raises UserError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is no index of shards: it has no weight_map")
    tensors = {}
    for name in sorted(set(places.values())):
        shard = os.path.join(os.path.dirname(index), os.path.basename(name))
        if not name.endswith(".safetensors") or not os.path.isfile(shard):
            raise UserError(f"{shard}, a shard that {index} names, is not there; download it again")
        tensors |= map_weights(shard, False)
    if missing := sorted(set(places) - set(tensors)):
        raise UserError(f"{missing[0]} is in none of the shards that {index} names")
    return tensors


def map_weights(path, shards=True):
    """Map a weights file into memory, so that a tensor is read when it is looked at: a dict.

    path: .safetensors, one of several shards or their index, .pt or .pth, whose code is never run,
    or a folder that holds the first or the index. Raises UserError.
    """
    if os.path.isdir(path):
        names = [f"diffusion_pytorch_model.safetensors{end}" for end in ("", ".index.json")]
        found = [p for p in (os.path.join(path, name) for name in names) if os.path.isfile(p)]
        if not found:
            raise UserError(f"the folder {path} holds neither {names[0]} nor its index")
        path = found[0]
    shard = re.fullmatch(r"(.*)-\d+-of-\d+\.safetensors", path)
    if path.endswith(".json") or (shards and shard):
        return map_shards(path if path.endswith(".json") else f"{shard[1]}.safetensors.index.json")
    if path.endswith(".safetensors"):
        with opened(path) as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    try:
        found = load_pickled(path, mmap=True)
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from None
    return found if isinstance(found, dict) else {"": found}


def from_folder(package, network, folder, **options):
    """Load a network from its folder as diffusers and transformers write it, never from the net."""
    if not glob.glob(os.path.join(glob.escape(folder), "*.json")):
        raise UserError(f"there is no {network} in the folder {folder}")
    try:
        found = getattr(importlib.import_module(package), network)
        return found.from_pretrained(folder, local_files_only=True, **options)
    except ImportError:
        raise UserError(f"to load {folder}: pip install {package} sentencepiece") from None
    except Exception as error:  # each of these libraries has its own
        raise UserError(f"cannot load a {network} from {folder}: {reason(error)}") from None
