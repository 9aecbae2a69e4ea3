"""Weights files in and out, errors that a user can mend, device and dtype.

Weights are safetensors files whose metadata holds the network's config as JSON and where the
weights came from. Nothing from a file is ever executed.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, fields

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ROOT = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = os.path.join(ROOT, "weights")


def shipped(name):
    """Path of the weights that come with the project: "vae", "teacher", "student" ..."""
    return os.path.join(WEIGHTS, f"{name}.safetensors")


class UserError(Exception):
    """Something the user can put right: shown as one line on stderr, exit status 2."""


def run_main(main):
    """Call main() as a command line does: UserError ends with status 2, Ctrl-C with status 130."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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


# --------------------------------------------------------------------------------- weights files
def provenance():
    """Say where a file comes from: command, commit, hardware and version of torch."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit or "unknown",
        "hardware": hardware(),
        "torch": torch.__version__,
    }


def save_weights(path, tensors, config, **origin):
    """Write tensors in bf16, with the config, a dataclass, and their origin in the metadata."""
    metadata = {k: str(v) for k, v in (provenance() | origin).items()}
    metadata["config"] = json.dumps(asdict(config))
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(tensors, path + ".tmp", metadata)
    os.replace(path + ".tmp", path)


def read_weights(path):
    """Read a safetensors file: (tensors in float32, the config in its metadata or None).
    Raises UserError if the file is missing or damaged."""
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file {path}; train it first or name another one")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
            names = list(file.keys())
            return {name: file.get_tensor(name).float() for name in names}, config
    except (SafetensorError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a whole safetensors file ({reason})") from None


def file_hash(*paths):
    """Hash the contents of files: 8 hexadecimal digits."""
    key = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            key.update(file.read())
    return key.hexdigest()[:8]


def load_model(network, path, device="cpu"):
    """Make a network (a class with a `Config`: DiT, VAE, TextEncoder) of its weights file.
    Raises UserError if the file is missing, damaged, or of another network."""
    tensors, config = read_weights(path)
    known = {field.name for field in fields(network.Config)}
    # a field that is 0 stands for something that this network does not have
    if not isinstance(config, dict) or any(config[k] for k in set(config) - known):
        raise UserError(f"{path} does not hold a {network.__name__}")
    try:
        model = network(network.Config(**{k: v for k, v in config.items() if k in known}))
        model.load_state_dict(tensors)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights in {path} do not fit the model: {reason}") from None
    return model.to(device).eval()


def check_fit(model, vae, encoder):
    """Raise UserError for a transformer that was not trained with this VAE and text encoder."""
    c, channels, width = model.config, vae.config.latent_dim, encoder.config.text_dim
    if hasattr(c, "num_actions") != (vae.config.time_stride == 1):
        raise UserError("a frame-wise VAE (vae_frame) goes with action models, and with no other")
    if (c.in_dim, c.text_dim) != (channels, width):
        raise UserError(
            f"the transformer, for {c.in_dim} latent channels and prompts of width {c.text_dim}, "
            f"does not go with the VAE ({channels}) and the text encoder ({width})"
        )
