"""The memory that --dry-run counts, beside what a step really takes; the table of docs/MEMORY.md.

python tests/memory_check.py check [STAGE...]    on the small model, on the CPU: within 20%
python tests/memory_check.py table    Wan's 1.3B transformer at 480p on 1, 8 and 64 devices
"""

import importlib
import json
import os
import subprocess
import sys
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]

import launch  # noqa: E402, F401

import torch  # noqa: E402

import memory  # noqa: E402
from bench import SIZES  # noqa: E402
from model import DiT, ModelConfig  # noqa: E402

SMALL = {
    "vae": "",
    "teacher": "--clips 16",
    "ode_init": "--trajectories 16 --solver-steps 4",
    "dmd": "--clips 16",
    "nfd_teacher": "--clips 4",
    "nfd_consistency": "--clips 4",
}
TRANSIENT = ("gradients", "optimiser state", "activations", "cache")


def main_of(script, flags):
    """Run a script in this process."""
    with mock.patch.object(sys, "argv", [script, *flags.split()]):
        importlib.import_module(script).main()


# ------------------------------------------------------------------------------------- measuring
def resident(field):
    """A line of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def measured(script, flags):
    """Take the steps that a dry run takes, in real: print the bytes that they needed at most."""

    def train(run, state, step, sheet, others=()):
        generator, before = torch.Generator().manual_seed(0), resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        for i in (0, 1, run.steps - 1):
            step(i, generator)
        print("bytes", resident("VmHWM") - before)
        os._exit(0)

    with mock.patch("training.train", train):
        main_of(script, f"{flags} --device cpu --dtype float32 --threads 1 --out /tmp/memory_check")


def check(*scripts):
    """Print, for each stage, what was counted and what was measured; -> whether all are near."""
    near = True
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    for script in scripts or SMALL:
        flags = SMALL[script]
        found = {}
        for what in ("counted", "measured"):
            command = [sys.executable, __file__, what, script, flags]
            said = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
            found[what] = float(said.split("bytes")[-1]) / 2**20
        ratio = found["counted"] / found["measured"]
        near = near and 0.8 < ratio < 1.2
        print(
            f"{script:16} counted {found['counted']:7.0f} MiB, measured {found['measured']:7.0f}"
            f" MiB: {ratio:.2f}",
            flush=True,
        )
    return near


# --------------------------------------------------------------------------------------- the table
def counted(script, flags):
    """What a dry run counts beyond the weights: prints bytes."""
    with mock.patch("memory.report", wraps=memory.report) as report:
        kept = []
        report.side_effect = lambda *args: kept.append(inner(*args))
        main_of(script, f"{flags} --dry-run --dtype float32 --out /tmp/memory_check")
    print("bytes", sum(kept[0][name] for name in TRANSIENT))


def large(script, flags):
    """Count a stage of Wan's transformer at 480p, one clip on each of 1, 8 and 64 devices."""
    import wan

    fields, height, width = SIZES["wan-1.3b"]
    config = ModelConfig(**fields)

    def load(network, path, device, *_, **__):
        if network is DiT:
            return DiT(config)
        if network.__name__ == "VAE":
            return wan.TinyVAE(config.in_dim)
        words = {"text_dim": config.text_dim, "words": wan.WORDS}
        return network(network.Config(**words))

    shape = (21, config.in_dim, height // 8, width // 8)
    clips = torch.zeros(1, *shape, dtype=torch.bfloat16, device="meta")
    states = torch.zeros(1, 5, *shape, dtype=torch.bfloat16, device="meta")
    prompts = {"states": states, "prompts": ["a red circle"]}
    module, kept = importlib.import_module(script), []
    patches = {
        "load_model": load,
        "check_fit": lambda *_: None,
        "made_with": lambda path, *_: (path, path),
        "file_hash": lambda *_: "",
        "kept_in": lambda *_: prompts,
    }
    patches = {k: v for k, v in patches.items() if hasattr(module, k)}
    how = "--batch-size 1 --dry-run --recompute --dtype bfloat16 --steps 100"

    def report(run, state, others, step):
        counted = memory.count_step(state, others, step, run.steps)
        for processes in DEVICES:
            row = memory.per_device(counted, state, others, processes)
            kept.append(row | {"all": sum(row.values())})

    with (
        mock.patch.multiple(module, **patches),
        mock.patch("weights.check_role"),
        mock.patch("dataset.encode_clips", return_value=clips),
        mock.patch("memory.report", report),
    ):
        main_of(script, f"{flags} {how} --out /tmp/memory_check")
    return kept


def table():
    """Print the table of docs/MEMORY.md."""
    with open("/tmp/wan.json", "w") as file:
        json.dump(SIZES["wan-1.3b"][0], file)
    stages = {
        "teacher": ("teacher", "--config /tmp/wan.json --clips 4"),
        "ODE initialisation": ("ode_init", "--trajectories 1"),
        "DMD": ("dmd", "--clips 4"),
        "DMD, Self Forcing's rollout": ("dmd", "--clips 4 --rollout self"),
    }
    print("| stage | devices | " + " | ".join(COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for name, (script, flags) in stages.items():
        command = [sys.executable, __file__, "rows", script, flags]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            print(said.stderr[-2000:])
            continue
        for processes, row in zip(DEVICES, json.loads(said.stdout.splitlines()[-1]), strict=True):
            cells = " | ".join(f"{row.get(k, 0) / 2**30:.1f}" for k in COLUMNS)
            print(f"| {name} | {processes} | {cells} |", flush=True)


DEVICES = (1, 8, 64)
COLUMNS = (
    "parameters",
    "frozen and averaged",
    "gradients",
    "optimiser state",
    "activations",
    "cache",
    "layers gathered",
    "all",
)
inner = memory.report

if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "check":
        sys.exit(not check(*rest))
    elif what == "table":
        table()
    elif what == "rows":
        print(json.dumps(large(*rest)))
    else:
        {"counted": counted, "measured": measured}[what](*rest)
