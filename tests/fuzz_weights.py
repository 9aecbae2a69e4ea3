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
import copy
import json
import math
import os
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
from io import BytesIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from safetensors.torch import save_file

import dataset
import training
import wan
from model import DiT, ModelConfig
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import UserError, check_role, file_hash, load_model, made_with, save_weights

GROWTH = 64  # MiB that a loader may need beyond what it has, for files of less than one
SECONDS = 30
ODD = [None, True, -1, 0, 1, 3, 0.5, 1e308, math.nan, 2**31, 2**63, 2**70, 10**400, "", "x", [], {}]
ODD += ["a\n\x1b[31mb", "\ud800", [[[]]], [1, 2], {"a": {"b": 1}}, "../../x", "9" * 5000]
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
    optimizer = training.Muon(net.parameters(), net.parameters(), 0.1)
    training.optimise(optimizer, net(torch.ones(1, 4)).square().mean())
    return {"net": net, "ema": training.EMA(net), "optimizer": optimizer}


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
        found = torch.load(path, weights_only=True, mmap=mapped)
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


# -------------------------------------------------------------------------------- the mutations
def changed_bytes(data, rng):
    """Damage bytes: -> (kind, data)."""
    data, size = bytearray(data), len(data)
    kind = rng.choice(["bits", "bits", "bytes", "header bytes", "truncation", "span", "more"])
    place = rng.randrange(size)
    if kind == "bits":
        for _ in range(rng.choice([1, 1, 1, 8])):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(rng.choice([1, 4, 64])):
            data[rng.randrange(size)] = rng.randrange(256)
    elif kind == "header bytes":
        data[rng.randrange(min(size, rng.choice([9, 64, 2048])))] = rng.randrange(256)
        if rng.random() < 0.5:
            data[size - 1 - rng.randrange(min(size, 200))] = rng.randrange(256)
    elif kind == "truncation":
        del data[rng.choice([0, 1, 4, 8, 9, place, place, size - 1, size - rng.randrange(1, 99)]) :]
    elif kind == "span":
        end = min(size, place + rng.choice([1, 8, 300]))
        other = rng.randrange(size)
        data[place:end] = rng.choice(
            [b"", bytes(end - place), rng.randbytes(end - place), data[other : other + 99]]
        )
    else:
        data += rng.choice([b"\0", rng.randbytes(9), bytes(4096), bytes(data[:place])])
    return kind, bytes(data)


def odd_json(text, rng):
    """Change one value of a JSON text, or the text."""
    if rng.random() < 0.15:
        broken = [text[: rng.randrange(len(text))], "[" * 10**5, "{}", "null", "[]", '"x"', ""]
        return rng.choice([*broken, text + "}", "\ufeff" + text])
    found = json.loads(text)
    place = found
    while True:
        key = rng.choice([*place, "extra"])
        if not isinstance(place.get(key), dict) or not place[key] or rng.random() < 0.1:
            break
        place = place[key]
    if rng.random() < 0.2:
        place.pop(key, None)
    elif isinstance(place.get(key), list) and place[key] and rng.random() < 0.5:
        place[key][rng.randrange(len(place[key]))] = rng.choice(ODD)
    else:
        place[key] = rng.choice(ODD)
    return json.dumps(found)


def with_header(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


HEADER = [
    "header length",
    "metadata",
    "metadata",
    "config",
    "config",
    "dtypes",
    "shapes",
    "offsets",
]
HEADER += ["missing keys", "extra keys", "renamed keys", "terabytes", "odd header"]


def changed_header(data, rng):
    """Damage the header of a safetensors file: -> (kind, data)."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[name], rng.choice(HEADER)
    metadata = header.setdefault("__metadata__", {})
    if kind == "header length":
        length = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data)])
        return kind, struct.pack("<Q", length) + data[8:]
    if kind == "metadata":
        if rng.random() < 0.3:
            header["__metadata__"] = rng.choice(ODD)
        else:
            metadata[rng.choice(["config", "stage", "vae", "text_encoder", "new"])] = rng.choice(
                ODD
            )
    elif kind == "config":
        metadata["config"] = odd_json(metadata.get("config", '{"dim": 16}'), rng)
    elif kind == "dtypes":
        names = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4"]
        entry["dtype"] = rng.choice([*names, "C64", "x", *ODD])
    elif kind == "shapes":
        shape = entry["shape"]
        other = [shape[::-1], [*shape, 1], [math.prod(shape)], shape[1:], [0], [2**62, 4], [-1]]
        entry["shape"] = rng.choice([*other, *ODD])
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        other = [[end, begin], [begin, end + 4], [begin - 4, end], [0, len(body)], [0, 0]]
        entry["data_offsets"] = rng.choice([*other, [2**62, 2**63], *ODD])
    elif kind == "missing keys":
        del header[name]
    elif kind == "extra keys":
        for number in range(rng.choice([1, 1, 1000])):
            header[rng.choice([f"more.{number}", f"{name}\n{number}", ""])] = dict(entry)
    elif kind == "renamed keys":
        other = ["x" * 10**5, name + "\n", "\ud800", "decoder.0", "generator", name + "\x1b[31m"]
        header[rng.choice(other)] = header.pop(name)
    elif kind == "terabytes":
        entry["shape"] = rng.choice([[2**40], [*entry["shape"][:-1], 2**40]])
        entry["dtype"] = rng.choice(["F32", "BF16", "U8"])
        begin = entry["data_offsets"][0]
        entry["data_offsets"] = [begin, begin + 2**42] if rng.random() < 0.7 else [begin, len(body)]
    else:
        odd = [b"{}", b"null", b"[" * 10**5, b"{" * 10**4, b'{"a":', rng.randbytes(64), b" " * 99]
        return kind, with_header(rng.choice(odd), body)
    return kind, with_header(header, body)


def other_tensor(tensor, rng):
    """Change a tensor as a whole: -> (kind, what is in its place)."""
    kind = rng.choice(["dtypes", "shapes", "shapes", "not finite", "no tensor", "odd tensor"])
    if kind == "dtypes":
        names = ["float64", "float16", "int8", "int64", "bool", "complex64", "float8_e4m3fn"]
        return kind, tensor.to(getattr(torch, rng.choice(names)))
    if kind == "shapes":
        small = tensor.flatten()[:1].clone()
        made = [tensor.flatten(), tensor[None], tensor[:0], small, small[0], tensor.flatten()[1:]]
        if tensor.ndim > 1:
            made += [torch.cat([tensor, tensor]), tensor.mT.clone().mT]
        return kind, rng.choice(made)
    if kind == "not finite":
        odd = tensor.clone()
        if odd.is_floating_point():
            odd.view(-1)[rng.randrange(max(1, odd.numel()))] = rng.choice([math.nan, math.inf])
        return kind, odd
    if kind == "no tensor":
        return kind, rng.choice([value for value in ODD if value != 10**400])
    dense = tensor.float()
    odd = [dense.flatten()[:1].expand(10 ** rng.choice([3, 9, 12])), dense.to_sparse()]
    odd += [
        torch.empty(tensor.shape, device="meta"),
        torch.nn.Parameter(dense),
        [dense],
        {"a": dense},
    ]
    odd += [
        torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([dense]),
    ]
    return kind, rng.choice(odd)


class Code:
    """What a pickle would run."""

    def __init__(self, canary, way):
        self.canary, self.way = canary, way

    def __reduce__(self):
        ways = [
            (os.system, (f"touch {self.canary}",)),
            (os.mkdir, (self.canary,)),
            (exec, (f"open({self.canary!r}, 'w')",)),
            (eval, (f"open({self.canary!r}, 'w')",)),
            (open, (self.canary, "w")),
            (__import__, ("this",)),
        ]
        return ways[self.way % len(ways)]


def packed(content, rng, old=None):
    """What torch.save writes, in the format that is given or, at times, the old one."""
    file = BytesIO()
    old = rng.random() < 0.3 if old is None else old
    try:
        torch.save(content, file, _use_new_zipfile_serialization=not old)
    except (RuntimeError, NotImplementedError, AttributeError):  # not every tensor fits the old one
        return packed(content, rng, False) if old else b""
    return file.getvalue()


def changed_content(content, rng, canary):
    """Change what a .pt file holds: -> (kind, data)."""
    content = copy.deepcopy(content)
    places = [(content, key) for key in content]
    for value in content.values():
        places += [(value, key) for key in value] if isinstance(value, dict) else []
    holder, key = rng.choice(places)
    kind = rng.choice(["code", "missing keys", "extra keys", "renamed keys"] + 3 * ["tensor"])
    if kind == "code":
        code = Code(canary, rng.randrange(6))
        if rng.random() < 0.3:
            return kind, pickle.dumps(code, rng.choice([0, 2, 4]))
        if rng.random() < 0.5:
            holder[key] = code
        else:
            content = code
    elif kind == "missing keys":
        del holder[key]
    elif kind == "extra keys":
        holder[rng.choice([0, "more", "a\nb", None, ("a",)])] = rng.choice([torch.ones(2), 3, "x"])
    elif kind == "renamed keys":
        holder[rng.choice([0, f"{key}x", f"model.{key}", "x" * 10**5, None])] = holder.pop(key)
    elif torch.is_tensor(holder[key]):
        kind, holder[key] = other_tensor(holder[key], rng)
    else:
        kind = "no tensor"
        holder[key] = rng.choice([value for value in ODD if value != 10**400])
    return kind, packed(content, rng)


def changed_pickle(data, rng):
    """Change the pickle of a .pt file, or how it is packed: -> (kind, data)."""
    with zipfile.ZipFile(BytesIO(data)) as parts:
        contents = {name: parts.read(name) for name in parts.namelist()}
    name = next(name for name in contents if name.endswith("data.pkl"))
    compression, kind = zipfile.ZIP_STORED, rng.choice(["pickle", "pickle", "terabytes", "zip"])
    if kind == "zip":
        compression = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
        other = rng.choice(list(contents))
        if compression == zipfile.ZIP_STORED:
            contents[other] = contents[other][:-1] + rng.choice([b"", b"xx"])
        elif rng.random() < 0.2:
            contents[other] += bytes(2**28)  # which is compressed to next to nothing
    else:
        operations = list(pickletools.genops(contents[name]))
        numbers = [op for op in operations if op[0].name in ("BININT1", "BININT2", "BININT")]
        _, value, place = rng.choice(numbers if kind == "terabytes" else operations)
        end = next((after for *_, after in operations if after > place), len(contents[name]))
        if kind == "terabytes":
            number = rng.choice([2**40, 2**62, 2**31, -1, -(2**40), value + 1])
            made = b"\x8a\x08" + number.to_bytes(8, "little", signed=True)
        else:
            swapped = rng.choice(operations)[2]
            made = rng.choice([b"", contents[name][swapped : swapped + 2], rng.randbytes(2), b"N"])
        contents[name] = contents[name][:place] + made + contents[name][end:]
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as parts:
        for part, content in contents.items():
            parts.writestr(part, content)
    return kind, file.getvalue()


def mutate(name, data, content, rng, canary):
    """Damage the file of a loader: -> (kind, data)."""
    if name in ("index", "config"):
        if rng.random() < 0.5:
            return changed_bytes(data, rng)
        text = odd_json(data.decode(), rng)
        return "json", text.encode("utf-8", "surrogatepass")
    ways = [changed_bytes]
    if content is None:
        ways += [changed_header, changed_header]
    else:
        ways += [lambda data, rng: changed_content(content, rng, canary)] * 2
        ways += [changed_pickle] if data[:2] == b"PK" else []
    return rng.choice(ways)(data, rng)


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
