"""Damage weights files in every way, and see that each loader refuses them or loads them right.

    python tests/fuzz_weights.py --count 5000       prints a table of kinds and outcomes

Each damaged file is loaded in a process of its own, whose memory may grow by a little, whatever the
file claims. What counts:
- refused: a UserError of one line;
- whole: every tensor and the config are those of the undamaged file;
- as written: every tensor is finite, and is what another reader finds under its name in the damaged
  file (safetensors: its header and numpy; .pt: torch.load), in the sizes that the config says. A
  bit that flips in a tensor of a safetensors file or of a mapped .pt file makes another number, and
  neither has a checksum that is read; a checkpoint and kept latents have one, and are refused.
All else is a failure: another exception, a warning, other numbers, a crash, half a minute, more
memory, or a trace of the code that some files hold. The same seed gives the same files.
"""

import argparse
import collections
import contextlib
import gc
import json
import math
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import warnings
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from damage import mutate
from safetensors.torch import save_file

import dataset
import training
import wan
from model import DiT, ModelConfig
from optimisers import EMA, Muon, optimise
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import UserError, check_role, file_hash, load_model, made_with, save_weights

GROWTH = 64  # MiB that a loader may need beyond what it has, for files of less than one
SECONDS = 30
HASH = file_hash(__file__)  # of what the transformer says it was made with
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


# --------------------------------------------------------------------------------- undamaged files
def network(kind, **fields):
    """A tiny network whose numbers all count."""
    torch.manual_seed(0)
    if kind is DiT:
        sizes = {"dim": 16, "ffn_dim": 8, "freq_dim": 8, "num_heads": 1, "num_layers": 2}
        made = DiT(ModelConfig(**sizes | fields))
    elif kind is VAE:
        made = VAE(VAEConfig(dim=16, fine_dim=16, pixel_dim=16))
    elif kind is TextEncoder:
        made = TextEncoder(TextConfig(text_dim=4, words=3))
    else:
        made = wan.TinyVAE(4, 6, (10, 8, 6, 5))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def tensors_of(made):
    return {name: tensor.contiguous().clone() for name, tensor in made.state_dict().items()}


def training_state():
    """Networks, averages and optimiser as a run has them after a step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    optimizer = Muon(net.parameters(), net.parameters(), 0.1)
    optimise(optimizer, net(torch.ones(1, 4)).square().mean())
    return {"net": net, "ema": EMA(net), "optimizer": optimizer}


RUN = training.Run(
    9, 1, 0.1, 0, "out", True, 2, math.inf, torch.device("cpu"), torch.float32, False
)
RUN.settings = {"steps": 9, "seed": 0, "vae": "with contents 01234567"}


def write_files(folder):
    """Write an undamaged file for each loader: name -> (path, its contents if a .pt has them)."""
    files = {}
    for name, kind in (("own_dit", DiT), ("own_vae", VAE), ("own_text", TextEncoder)):
        files[name] = os.path.join(folder, name, f"{name}.safetensors")
        made = network(kind)
        save_weights(files[name], made.state_dict(), made.config, stage=name, vae=HASH)
    public = tensors_of(network(DiT, dim=256, num_heads=2, num_layers=1, text_dim=10))
    layouts = {"release": public, "shards": public, "tiny_vae": tensors_of(network(None))}
    layouts["embedding"] = {"text": torch.randn(7, 14), "null": torch.randn(2, 14)}
    for name, tensors in layouts.items():
        os.makedirs(os.path.join(folder, name))
        files[name] = os.path.join(folder, name, "diffusion_pytorch_model.safetensors")
        save_file(tensors, files[name], {"format": "pt"})
    half, names, places = os.path.dirname(files["shards"]), list(public), {}
    os.remove(files["shards"])
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: public[name] for name in part}, os.path.join(half, shard))
        places |= dict.fromkeys(part, shard)
    files["shards"] = os.path.join(half, shard)
    files["index"] = os.path.join(half, "diffusion_pytorch_model.safetensors.index.json")
    with open(files["index"], "w") as file:
        json.dump({"metadata": {}, "weight_map": places}, file)
    os.makedirs(os.path.join(folder, "config"))
    release = os.path.join(folder, "config", "diffusion_pytorch_model.safetensors")
    save_file(public, release)
    files["config"] = os.path.join(folder, "config", "config.json")
    with open(files["config"], "w") as file:
        json.dump({"num_heads": 2, "dim": 256, "eps": 1e-6}, file)
    saved = {"generator": torch.Generator().get_state(), "settings": RUN.settings}
    saved |= {"step": 3, "seconds": 1.5}
    saved["state"] = {name: part.state_dict() for name, part in training_state().items()}
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in public.items()}
    contents = {
        "causvid": {"generator": {f"model.{name}": tensor for name, tensor in public.items()}},
        "self_forcing": {"generator_ema": wrapped, "step": 9},
        "tiny_vae_pth": layouts["tiny_vae"],
        "embedding_pt": layouts["embedding"],
        "checkpoint": saved,
        "latents": {"latents": torch.randn(3, 6, 8, 8, 8).bfloat16()},
    }
    for name, content in contents.items():
        os.makedirs(os.path.join(folder, name))
        files[name] = os.path.join(folder, name, "taew2_1.pth" if "pth" in name else "model.pt")
        torch.save(content, files[name], _use_new_zipfile_serialization=name != "self_forcing")
    return files, contents


# ---------------------------------------------------------------------------------- the loaders
NETWORKS = {"own_vae": VAE, "own_text": TextEncoder, "tiny_vae": VAE, "tiny_vae_pth": VAE}
NETWORKS |= {"embedding": TextEncoder, "embedding_pt": TextEncoder}


def load(name, path):
    """Load a file as the scripts do: (name -> tensor, all else that came of it)."""
    if name == "latents":
        return {"latents": dataset.read_kept(path, {"latents": torch.Tensor})["latents"]}, None
    if name == "checkpoint":
        saved = training.read_saved(path, "meta")
        training.compare_settings("out", saved.get("settings"), RUN.settings)
        state, generator = training_state(), torch.Generator()
        step = training.load_checkpoint(path, RUN, state, generator)
        tensors = {"generator": generator.get_state()}
        for part, network in state.items():
            tensors |= flat(network.state_dict(), part)
        return {k: v for k, v in tensors.items() if torch.is_tensor(v)}, repr(step)
    if name == "index":
        path = os.path.dirname(path)
    elif name == "config":
        path = os.path.join(os.path.dirname(path), "diffusion_pytorch_model.safetensors")
    kind = NETWORKS.get(name, DiT)
    if kind is DiT:
        check_role(path, "own_dit", "teacher", "student")
        made_with(path, __file__, __file__)
    loaded = load_model(kind, path)
    return dict(loaded.state_dict()), repr(loaded.config)


def flat(value, name=""):
    """All leaves of nested dicts and lists: path -> leaf."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value}


# ------------------------------------------------------------------------------ the other reader
def read_safetensors(path):
    """Read a safetensors file with json and numpy: name -> tensor, as float32."""
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    header, body, found = json.loads(data[8 : 8 + size]), data[8 + size :], {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        part = body[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(part, "<u2").astype("<u4") << 16
            numbers = bits.view("<f4")
        else:
            numbers = np.frombuffer(part, NUMBERS[entry["dtype"]]).astype("<f4")
        found[name] = torch.from_numpy(numbers.reshape(entry["shape"]).copy())
    return found


def written_in(name, path):
    """What another reader finds in a file, under the names that the loader gives it."""
    if name in ("index", "config"):
        folder = os.path.dirname(path)
        files = [os.path.join(folder, file) for file in os.listdir(folder)]
        found = [read_safetensors(file) for file in files if file.endswith(".safetensors")]
        return {k: v for part in found for k, v in part.items()}
    if path.endswith(".safetensors"):
        found = read_safetensors(path)
        if name == "shards":
            folder = os.path.dirname(path)
            found |= read_safetensors(
                os.path.join(folder, os.path.basename(path).replace("2-", "1-", 1))
            )
    else:
        mapped = zipfile.is_zipfile(path) and name not in ("checkpoint", "latents")
        found = torch.load(path, "cpu", weights_only=True, mmap=mapped)
    if name == "checkpoint":
        return flat(found.pop("state")) | {"generator": found["generator"]}
    if name in ("causvid", "self_forcing"):
        found = found.get("generator_ema", found.get("generator", found))
        found = {wan.released_name(key): tensor for key, tensor in found.items()}
    if "embedding" in name:
        found = {"text": found} if torch.is_tensor(found) else found
        text = next(tensor for key, tensor in found.items() if key != "null")
        null = found.get("null", torch.zeros_like(text))
        found = {"text": text.flatten(0, -2), "null": null.flatten(0, -2)}
    return found


def is_as_written(name, path, loaded):
    """Whether the loaded tensors are finite and what the other reader finds."""
    found = written_in(name, path)
    for key, tensor in loaded.items():
        theirs = found[key if key in found else f"/{key}"].float()
        if "embedding" in name:
            tensor = tensor[: len(theirs)]
        if "tiny_vae" in name:
            theirs = theirs[-len(tensor) :]
        if not (tensor.isfinite().all() and torch.equal(tensor.float(), theirs)):
            return False
    return True


# ------------------------------------------------------------------------------------ the verdict
def outcome(name, path, whole):
    """Load a file in this process and judge it: (outcome, what is told of it)."""
    try:
        with warnings.catch_warnings(record=True) as shown, contextlib.redirect_stdout(None):
            warnings.simplefilter("always")  # each would be another line
            tensors, rest = load(name, path)
        if shown:
            return "FAILED: lines", str(shown[0].message)
    except UserError as error:
        told = "\n".join([str(error), *(str(warning.message) for warning in shown)])
        return ("refused" if told.isprintable() else "FAILED: lines"), told
    except BaseException as error:
        return "FAILED: traceback", f"{type(error).__name__}: {error}"[:300]
    try:
        same = tensors.keys() == whole[0].keys() and rest == whole[1]
        if same and all(torch.equal(tensors[key], whole[0][key]) for key in tensors):
            return "whole", ""
        right = is_as_written(name, path, tensors)
    except Exception as error:
        return "FAILED: other numbers", f"{type(error).__name__}: {error}"[:300]
    return ("as written" if right else "FAILED: other numbers"), ""


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judge(name, path, whole):
    """Load a file in a process of its own: (outcome, what is told, MiB that it needed)."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            gc.disable()  # what it frees of the parent's would hide what the loader takes
            torch.set_num_threads(1)  # a fork has none of the parent's threads, and waits for them
            signal.alarm(SECONDS)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
            before = peak()
            found = outcome(name, path, whole)
            os.write(into, json.dumps([*found, peak() - before]).encode()[:60000])
        finally:  # nothing of the parent is cleaned up here
            os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    if not told:
        return "FAILED: crash or hang", f"status {status}", 0
    verdict, what, grown = json.loads(told)
    if grown > GROWTH:
        return "FAILED: memory", f"{grown:.0f} MiB, {verdict}, {what}", grown
    return verdict, what, grown


def fuzz(count, seed=0, only=None, show=print):
    """Damage and load `count` files: (counts of (loader, kind, outcome), failures, MiB at most)."""
    table, failures, most = collections.Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        files, contents = write_files(folder)
        canary = os.path.join(folder, "canary")
        whole = {name: load_quietly(name, path) for name, path in files.items()}
        names = [only] if only else list(files)
        for number in range(count):
            name = names[number % len(names)]
            rng = random.Random(f"{seed} {name} {number}")
            with open(files[name], "rb") as file:
                data = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd tensors
                kind, damaged = mutate(name, data, contents.get(name), rng, canary)
            with open(files[name], "wb") as file:
                file.write(damaged)
            verdict, told, grown = judge(name, files[name], whole[name])
            if os.path.exists(canary):
                verdict = "FAILED: executed"
            with open(files[name], "wb") as file:
                file.write(data)
            most = max(most, grown)
            table[name, kind, verdict] += 1
            if verdict.startswith("FAILED"):
                failures.append(f"{number} {name}, {kind}: {verdict}, {told}")
                show(failures[-1])
    return table, failures, most


def load_quietly(name, path):
    with contextlib.redirect_stdout(None):
        return load(name, path)


def rows(table, place):
    """Lines of a table: counts by loader (place 0) or kind (1), and by outcome."""
    verdicts = sorted({key[2] for key in table})
    lines = ["| " + " | ".join(["", *verdicts]) + " |", "|---" * (1 + len(verdicts)) + "|"]
    for name in dict.fromkeys(key[place] for key in table):
        counts = [
            sum(n for key, n in table.items() if key[place] == name and key[2] == verdict)
            for verdict in verdicts
        ]
        lines.append("| " + " | ".join([name, *map(str, counts)]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Damage weights files and load them.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one loader's name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, failures, most = fuzz(args.count, args.seed, args.only)
    for place in (0, 1):
        print(rows(table, place), end="\n\n")
    print(f"{args.count} files, {len(failures)} failures, at most {most:.1f} MiB more memory")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
