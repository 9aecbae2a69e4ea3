"""Damage to weights files, for `fuzz_weights.py`: bytes, headers, metadata, tensors and pickles.

`mutate` draws one of them; the same `random.Random` damages a file in the same way.
"""

import copy
import json
import math
import os
import pickle
import pickletools
import struct
import zipfile
from io import BytesIO

import torch

ODD = [None, True, -1, 0, 1, 3, 0.5, 1e308, math.nan, 2**31, 2**63, 2**70, 10**400, "", "x", [], {}]
ODD += ["a\n\x1b[31mb", "\ud800", [[[]]], [1, 2], {"a": {"b": 1}}, "../../x", "9" * 5000]


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
    except (RuntimeError, AttributeError):  # not every tensor fits the old one
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
