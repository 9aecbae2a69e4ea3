"""Weights files in and out.

Weights are safetensors files whose metadata holds the network's config as JSON and where the
weights came from. Nothing from a file is ever executed.
"""

import launch
import contextlib
import glob
import hashlib
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from secrets import token_hex

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.overrides import TorchFunctionMode

from data import SIZE

UserError = launch.UserError  # where every module looks for it
ROOT = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = os.path.join(ROOT, "weights")


def shipped(name):
    """Path of the weights that come with the project: "vae", "teacher", "student" ..."""
    return os.path.join(WEIGHTS, f"{name}.safetensors")


def make_folder(path):
    """Make the folder --out; UserError if it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {path}: {error.strerror}") from None


def hardware():
    """Name the device, for metadata."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU cores ({platform.machine()})"


# ------------------------------------------------------------------------------------ files at all
def reason(error):
    """Say in one short line what an exception is about."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (getattr(error, "strerror", None) or lines[0].strip())[:200]


def summary(tensors):
    """Say in a few words what a file holds: its first three tensors and their shapes."""
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3]]
    more = [f"{len(tensors) - 3} more"] if len(tensors) > 3 else []
    return ", ".join([*shapes, *more]) or "nothing"


@contextlib.contextmanager
def written(path, before=None):
    """Open a binary file under a temporary name that becomes `path` when all of it is written.
    After an error nothing is left of it. Raises UserError if it cannot be written.
    before: a name that the file keeps which was there. Of many processes the first one writes."""
    if launch.RANK:
        yield io.BytesIO()
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:40]}.{token_hex(4)}.tmp")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        if before and os.path.exists(path):
            keep(path, before)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the first behind the second
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path}: {reason(cause)}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def keep(path, before):
    """Give a file a second name, so that at any moment there is a file of the first."""
    link = os.path.join(os.path.dirname(path), f".{os.path.basename(before)}.{token_hex(4)}.tmp")
    try:
        os.link(path, link)
        os.replace(link, before)
    except OSError:  # a file system without links
        os.replace(path, before)


def replace_file(path, content):
    """Write a text file: all of it, or nothing and a UserError."""
    with written(path) as file:
        file.write(content.encode())


def file_hash(*paths):
    """Hash the contents of files: 8 hexadecimal digits."""
    key = hashlib.sha256()
    for path in paths:
        if os.path.isdir(path):  # of a large network: by its files' names and sizes
            sizes = [
                (p[len(path) :], os.path.getsize(p))
                for p in glob.glob(f"{glob.escape(path)}/**/*.*", recursive=True)
            ]
            key.update(repr(sorted(sizes)).encode())
            continue
        with open(path, "rb") as file:
            while part := file.read(2**24):
                key.update(part)
    return key.hexdigest()[:8]


# --------------------------------------------------------------------------------- weights files
def command_line():
    """Say what was typed to start this script, as a shell takes it."""
    start = ["python"]
    if launch.WORLD > 1:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*start, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def provenance():
    """Say where a file comes from: command, commit, hardware and version of torch."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):  # there is no git here
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "command": command_line(),
        "commit": commit or "unknown",
        "hardware": hardware(),
        "torch": torch.__version__,
    }


def save_weights(path, tensors, config, **origin):
    """Write tensors in bf16, with the config, a dataclass, and their origin in the metadata."""
    metadata = {k: str(v) for k, v in (provenance() | origin).items()}
    metadata["config"] = json.dumps(asdict(config))
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}
    with written(path) as file:  # safetensors' own save_file lets nobody else read the file
        file.write(save(tensors, metadata))


@contextlib.contextmanager
def opened(path):
    """Open a safetensors file. Raises UserError if it is missing or damaged."""
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file {path}; train it first or name another one")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({reason(error)})") from None


def read_weights(path):
    """Read a safetensors file: (tensors in float32, the config in its metadata or None).
    Raises UserError if the file is missing or damaged."""
    with opened(path) as file:
        config = json.loads((file.metadata() or {}).get("config", "null"))
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    if not all(map(is_plain, tensors.values())):
        raise UserError(f"{path} holds numbers that are not floating point, of 16 to 64 bits")
    return {name: tensor.float() for name, tensor in tensors.items()}, config


# ------------------------------------------------------------------------ whose weights they are
def is_public(path):
    """Whether a path names weights as other projects write them, without our metadata."""
    if os.path.isdir(path) or path.endswith((".pt", ".pth", ".json")):
        return True
    if not path.endswith(".safetensors"):
        return False
    with opened(path) as file:
        return not {"config", "stage"} & set(file.metadata() or {})


def own_size(path):
    """The height and width of the video that a transformer was trained for."""
    if is_public(path):
        import wan

        return wan.SIZE
    return own_clips(path).get("size", (SIZE, SIZE))


def own_clips(path):
    """Read from a file's metadata what it was trained on: the size (H, W) and frames of a piece
    and the words of all captions, or {} of the shapes world. Raises UserError."""
    if is_public(path):
        return {}
    with opened(path) as file:
        told = file.metadata() or {}
    if "frames" not in told:
        return {}
    numbers = f"{told.get('size')} {told['frames']}"
    if not re.fullmatch(r"[1-9]\d{0,4} [1-9]\d{0,4} [1-9]\d{0,4}", numbers, re.ASCII):
        raise UserError(f"{path} was trained on clips of no size: {numbers[:40]!r}")
    height, width, frames = map(int, numbers.split())
    return {"size": (height, width), "frames": frames, "words": told.get("words", "").split()}


# -------------------------------------------------------------------------------------- networks
def check_config(config, tensors):
    """Raise ValueError for a field that is no number that a model of so many tensors can have."""
    for field in fields(config):
        value = getattr(config, field.name)
        kind = (int, float) if field.type is float else int
        sizes = value if field.type is tuple else (value,)
        limit = tensors if field.name == "num_layers" else 1_000_000
        if not all(isinstance(size, kind) and 0 < size <= limit for size in sizes):
            raise ValueError(f"{field.name} cannot be {value!r:.40}")


class Room(TorchFunctionMode):
    """Refuse to build a network of more than so many elements, before their memory is touched.
    (Shapes on the meta device would do too, but to import its arithmetic takes two seconds.)"""

    def __init__(self, elements):
        super().__init__()
        self.left = elements

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.empty:
            self.left -= made.numel()
            if self.left < 0:
                raise ValueError("a network of this config is larger than the file")
        return made


def sides(tensors, name, count):
    """The sides of a tensor that must have so many. Raises ValueError."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    shape = tuple(tensors[name].shape)
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{name} is {shape}, which should be {count} sides")
    return shape


def is_plain(value):
    """Whether a value from a file is a dense tensor of floating-point numbers, there on the CPU."""
    numbers = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    dense = torch.is_tensor(value) and value.layout == torch.strided and not value.is_nested
    return dense and value.dtype in numbers and value.device.type == "cpu"


def check_shapes(expected, tensors):
    """Raise ValueError for tensors of other names or shapes than the expected ones."""
    if expected.keys() != tensors.keys():
        odd = min(expected.keys() ^ tensors.keys())
        raise ValueError(f"{odd} is {'missing' if odd in expected else 'none of its parameters'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")


def check_numbers(tensors):
    """Raise ValueError for tensors that are not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite, as a run that failed leaves it")


def load_model(network, path, device="cpu", dtype=torch.float32, **options):
    """Make a network (a class with a `Config`: DiT, VAE, TextEncoder) of its weights file, or of a
    public one, which takes options: see `wan.load_transformer`.
    Raises UserError if the file is missing, damaged, or of another network."""
    if is_public(path):
        import wan  # stands on the last shelf, which none of our own weights need

        return wan.load(network, path, device, dtype, **options)
    if given := [name for name, value in options.items() if value and name != "steps"]:
        raise UserError(f"--{given[0]} goes with public checkpoints, which {path} is not")
    tensors, config = read_weights(path)
    known = {field.name for field in fields(network.Config)}
    # a field that is 0 stands for something that this network does not have
    if not isinstance(config, dict) or any(config[k] for k in set(config) - known):
        raise UserError(f"{path} does not hold a {network.__name__}{way_out(stage_of(path))}")
    try:
        config = network.Config(**{k: v for k, v in config.items() if k in known})
        check_config(config, len(tensors))
        with Room(sum(tensor.numel() for tensor in tensors.values())):
            model = network(config)
        check_shapes(model.state_dict(), tensors)
        check_numbers(tensors)
        model.load_state_dict(tensors)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"the weights in {path} do not fit the model: {reason(error)}") from None
    return model.to(device, dtype).eval()


def check_fit(model, vae, encoder):
    """Raise UserError for a transformer that was not trained with this VAE and text encoder."""
    c, channels, width = model.config, vae.config.latent_dim, encoder.config.text_dim
    if c.patch_size[0] > 1:  # an image, and the first step of a stream, are one latent frame
        problem = f"the transformer's patches span {c.patch_size[0]} latent frames"
        raise UserError(f"{problem}; a stream needs patches of 1, as Wan 2.1 and its students have")
    if hasattr(c, "num_actions") != (vae.config.time_stride == 1):
        raise UserError("a frame-wise VAE (vae_frame) goes with action models, and with no other")
    if (c.in_dim, c.text_dim) != (channels, width):
        raise UserError(
            f"the transformer, for {c.in_dim} latent channels and prompts of width {c.text_dim}, "
            f"does not go with the VAE ({channels}) and the text encoder ({width})"
        )


def beside(path, name):
    """Path of the weights NAME in the folder of the file `path`, or of the shipped ones."""
    near = os.path.join(os.path.dirname(path), f"{name}.safetensors")
    return near if os.path.isfile(near) else shipped(name)


def made_with(path, vae, text_encoder, vae_name="vae"):
    """Choose what a transformer's file goes with: the given VAE and text encoder, else those beside
    it, else the shipped. Raises UserError if the file names others; one of before names none."""
    if is_public(path):
        near = os.path.join(os.path.dirname(path), "taew2_1.safetensors")
        vae = vae or (near if os.path.isfile(near) else None)
        text = "--text-encoder FOLDER or --text-embedding FILE"
        needed = {"--vae taew2_1.safetensors": vae, text: text_encoder}
        for flag, given in needed.items():
            if given is None:
                where = "docs/WAN.md says where it is and what to install"
                raise UserError(f"{path} needs {flag}: {where}")
        return vae, text_encoder
    chosen = {"vae": vae or beside(path, vae_name)}
    chosen["text_encoder"] = text_encoder or beside(path, "text_encoder")
    with opened(path) as file:
        metadata = file.metadata() or {}
    for name, given in chosen.items():
        if metadata.get(name, file_hash(given)) != file_hash(given):
            told = f"was made with another {name.replace('_', ' ')} than {given}: name that one"
            raise UserError(f"{path} {told} with --{name.replace('_', '-')}")
    return chosen.values()


def stage_of(path):
    """The stage that a weights file's metadata names or its config shows: "vae" ... or None."""
    with opened(path) as file:
        metadata = file.metadata() or {}
    fields = {'"time_stride"': "vae", '"words"': "text encoder"}
    shown = (stage for name, stage in fields.items() if name in metadata.get("config", ""))
    return metadata.get("stage", next(shown, None))


def way_out(stage):
    """Say which flag takes the weights of a stage, where that is known."""
    flags = {"vae": "--vae", "text encoder": "--text-encoder", "action": "--weights of play.py"}
    flags |= {"player": "--weights of play.py", "teacher": "--teacher"}
    flags |= {"student": "--weights or --student"}
    found = [flag for name, flag in flags.items() if name in (stage or "")]
    return f"; it goes with {found[0]}" if found else ""


def check_role(path, *stages):
    """Raise UserError for weights whose metadata names a stage that is none of these."""
    hint = ""
    if is_public(path):
        import wan

        kind = wan.kind_of(path, *wan.read_checkpoint(path))
        stage = "teacher" if kind == "wan" else "student"
        hint = ", or with --preset if it was distilled" if kind == "wan" else ""
    else:
        stage = stage_of(path)
    if stage and not any(name in stage for name in stages):
        raise UserError(f"{path} holds {stage!r}, not {' or '.join(stages)}{way_out(stage)}{hint}")
