"""What every training script shares: flags, the loop, resume, log.

A script builds its networks and optimisers, then calls `train` with a function that makes one
step. All that a run needs to go on lies in OUT/checkpoint.pt: networks, optimisers, averages, step
and random state. A run stopped at any moment and resumed ends in the same weights, bit for bit
(float32, CPU), as one that was never stopped.
"""

import functools
import glob
import json
import math
import os
import shlex
import shutil
import signal
import time
import warnings
from launch import RANK, WORLD
from dataclasses import dataclass, field, fields, replace

import torch
from tqdm import tqdm

import checkpoints
import distributed
import flags
import memory
import weights
from checkpoints import load_checkpoint, read_saved, save_checkpoint
from model import ModelConfig
from rows import every
from weights import UserError, command_line, reason, replace_file


# -------------------------------------------------------------------------------- flags and a run
@dataclass
class Run:
    """How long a training runs, where it writes, and on what: the flags of every script."""

    steps: int
    batch_size: int
    lr: float
    seed: int
    out: str
    resume: bool
    save_every: int
    minutes: float
    device: torch.device
    dtype: torch.dtype
    compile: bool
    accumulate: int = 1  # parts of a batch, whose gradients add up; batch_size is that of a part
    recompute: bool = False
    dry_run: int | None = None  # processes of a run of which only the memory is counted
    settings: dict = field(default_factory=dict)  # all flags, as a checkpoint keeps them

    def autocast(self):
        """bf16 autocast where the run's dtype is bf16; weights and optimiser stay in float32."""
        if self.dry_run:
            return memory.Planning.on.autocast()
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=on)


# what --resume may change; a run that changed anything else would be a mixture of two
CHANGEABLE = (
    "steps",
    "lr",
    "save_every",
    "minutes",
    "device",
    "dtype",
    "threads",
    "compile",
    "recompute",
)


def read_settings(args):
    """All flags but --out and --resume, as a checkpoint keeps them: a file by its contents."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "dry_run")}
    for name, value in settings.items():
        if isinstance(value, str) and (os.path.isfile(value) or name == "data"):
            settings[name] = f"with contents {weights.file_hash(value)}"
    return settings


def compare_settings(out, before, now):
    """Say which settings a resumed run changes. Raises UserError for those that cannot change."""
    if not isinstance(before, dict):
        raise UserError(f"{out}/checkpoint.pt is damaged; delete it to begin again")
    changed = [name for name in before if name in now and now[name] != before[name]]
    fixed = [name for name in changed if name not in CHANGEABLE]
    told = "; ".join(
        f"--{name.replace('_', '-')} {now[name]}, not {before[name]}" for name in fixed or changed
    )
    if fixed:
        raise UserError(f"{out} cannot go on with {told}: give what it was, or another --out")
    if changed:
        print(f"{out} goes on with {told}")


@functools.cache  # this process holds the lock until it ends
def lock(out):
    """Keep other processes from training into the folder `out`. Raises UserError if one does."""
    if RANK:
        return
    try:
        import fcntl

        fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        told = f"another training writes to {out}: wait for its end, or choose another --out"
        raise UserError(told) from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        return


def check_split(args):
    """Raise UserError for a batch that does not split over the processes and parts of it."""
    processes = args.dry_run or WORLD
    if args.batch_size % (processes * args.accumulate):
        over = f"{processes} processes and --accumulate {args.accumulate}"
        raise UserError(f"--batch-size {args.batch_size} does not split over {over}")
    if WORLD > 1 and args.compile:
        raise UserError("--compile works in one process only")
    if args.dry_run and (WORLD > 1 or args.compile or args.resume):
        raise UserError("--dry-run goes without torchrun, --compile and --resume")


def plan_run(args):
    """Begin a dry run, which writes nothing: a `Run` of a process's share of the batch."""
    dtype = {"bfloat16": torch.bfloat16}.get(args.dtype, torch.float32)
    values = vars(args) | {"device": torch.device("meta"), "dtype": dtype, "settings": {}}
    values["batch_size"] //= args.accumulate * args.dry_run
    memory.plan(dtype)
    return Run(**{field.name: values[field.name] for field in fields(Run)})


def start_run(args):
    """Check the flags of `training_parser`, make the output folder and seed torch: a `Run`.
    Raises UserError for values that no run can have, and for a folder that holds a run already."""
    check_split(args)
    if args.dry_run:
        return plan_run(args)
    distributed.start()
    device, dtype = flags.on_device(args.device, args.dtype, args.threads)
    path, settings = os.path.join(args.out, "checkpoint.pt"), read_settings(args)
    if args.resume and os.path.isdir(args.out):
        lock(os.path.realpath(args.out))
        with distributed.first_alone():
            checkpoints.mend(args.out)
    if args.resume and os.path.exists(path):
        saved = read_saved(path, "meta")  # the weights are read later
        compare_settings(args.out, saved.get("settings"), settings)
    elif args.resume:
        # all that a run leaves that was stopped before its first checkpoint
        found = os.listdir(args.out) if os.path.isdir(args.out) else ["no folder"]
        kept = ("log.jsonl", ".checkpoint.", "shards-")
        if not all(name.startswith(kept) for name in found):
            raise UserError(f"nothing to resume: {args.out} has no checkpoint.pt")
        print(f"{args.out} has no checkpoint yet: it begins, with what was prepared for it")
    elif os.path.exists(path):
        raise UserError(
            f"{args.out} holds a run already: add --resume to go on with it, "
            "or choose another --out"
        )
    weights.make_folder(args.out)
    lock(os.path.realpath(args.out))
    if RANK == 0:
        for left in glob.glob(os.path.join(glob.escape(args.out), ".checkpoint.*.tmp")):
            os.remove(left)  # of a process that was killed while it wrote
    torch.manual_seed(args.seed)
    values = vars(args) | {"device": device, "dtype": dtype, "settings": settings}
    values["batch_size"] //= args.accumulate
    return Run(**{field.name: values[field.name] for field in fields(Run)})


def read_config(path):
    """Read a `ModelConfig` from a JSON file of its fields; "small" is the default one.

    Raises UserError for a file that is not there or does not hold one.
    """
    if path == "small":
        return ModelConfig()
    try:
        with open(path, encoding="utf-8") as file:
            return ModelConfig(**json.load(file))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"--config {path} is not a model's config: {error}") from None


def causal_config(config, chunk, window, steps, frames=None):
    """Change a model's chunk, window and student steps where they are given.
    The weights carry the result, and the sampler follows it. Raises UserError for less than 1.
    frames: latent frames of the training clips; a window of its own is no longer than they are."""
    if frames and not window:
        window = max(1, min(config.window, frames // (chunk or config.chunk)))
    given = {"chunk": chunk, "window": window, "steps": steps}
    given = {k: v for k, v in given.items() if v is not None}
    if steps and steps != config.steps:
        given["times"] = ()  # those are of as many steps as before
    try:
        return replace(config, **given)
    except ValueError as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------- the loop
def comes_before(line, step):
    """Whether a line of a log is whole and of a step before `step`."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


def forget_after(path, step):
    """Drop the lines of a log from `step` on, which a run makes again, and damaged ones."""
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                kept = [line for line in file if comes_before(line, step)]
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from None
        replace_file(path, "".join(kept))


def check_finite(run, step, numbers):
    """Raise UserError if the loss or another number of a step is NaN or infinite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            begun = os.path.exists(os.path.join(run.out, "checkpoint.pt"))
            how = "--resume its last checkpoint with" if begun else "begin again with"
            raise UserError(
                f"{run.out} failed at step {step}: {name} is {float(value)}. Nothing of it was "
                f"written; {how} a lower --lr than {run.lr:g}"
            )


def largest(state):
    """The largest absolute value of all weights and averages, NaN if one is NaN."""
    tensors = [v for part in state.values() for v in part.state_dict().values()]
    tensors = [distributed.local(v) for v in tensors if torch.is_tensor(v)]
    largest = torch.stack([v.abs().max().float() for v in tensors if v.numel()]).max()
    return every(largest[None]).max()


def add_up(step, state, parts):
    """Make a step that takes a batch in parts, so that less of it is in memory at a time: the mean
    of the parts' numbers, and of the gradient's norm that of the whole."""

    def whole_step(i, generator):
        made = []
        for number in range(parts):
            for part in state.values():
                part.part = (number, parts)
            made.append(step(i, generator))
        total = {k: sum(numbers[k] for numbers in made) for k in made[0]}
        return {k: v if k.endswith("grad") else v / parts for k, v in total.items()}

    return whole_step


def prepare(run, state, others):
    """Let networks keep fewer activations, and share them out over the processes, where asked."""
    if run.recompute:
        for part in state.values():
            memory.recompute(part)
    distributed.share_out(state, others)


def train(run, state, step, sheet, others=(), warmup=50):
    """Run `step(i, generator) -> numbers to log` for i = 0 .. run.steps - 1, or what is left of it.

    state: name -> network, optimiser or EMA, all that a checkpoint must hold. The learning rates
    rise over `warmup` steps and fall to 0 along a cosine. sheet(path) -> numbers to log: draws and
    measures samples, at every checkpoint. others: networks that are not trained, but shared out.
    Returns the seconds that the run took, or None if it was stopped before its last step
    (--minutes, Ctrl-C). Raises UserError, before anything is written, if a number is not finite:
    `step` returns each loss or the norm of its gradient.
    """
    prepare(run, state, others)
    if run.dry_run:
        memory.report(run, state, others, step)
        return None
    step = add_up(step, state, run.accumulate) if run.accumulate > 1 else step
    generator = torch.Generator().manual_seed(run.seed)  # on the CPU: the same on every device
    optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    path, log = (os.path.join(run.out, name) for name in ("checkpoint.pt", "log.jsonl"))
    first, spent = 0, 0.0
    if run.resume and os.path.exists(path):
        first, spent = load_checkpoint(path, run, state, generator)
    forget_after(log, first)
    # autocast meets weights that stay in float32, as they should
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    began, shown, stop, name = time.time(), {}, [], os.path.basename(os.path.normpath(run.out))
    bar = tqdm(total=run.steps, initial=first, desc=name, mininterval=2, disable=RANK > 0)
    signals = (signal.SIGINT, signal.SIGTERM)  # the step in progress ends, then it is saved
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in signals}
    unchecked, done, stopped = {}, first >= run.steps, False

    def seconds():
        return spent + time.time() - began

    def note(step, numbers):
        if numbers and RANK == 0:
            numbers = {k: round(torch.as_tensor(v).item(), 6) for k, v in numbers.items()}
            line = {"step": step, "seconds": round(seconds(), 1), **numbers}
            try:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {log}: {reason(error)}") from None
            shown.update({k: f"{v:.4g}" for k, v in numbers.items()})
            bar.set_postfix(shown, refresh=False)

    def checkpoint(step):
        check_finite(run, step, {"the largest weight": largest(state)})
        bar.set_description(f"{name}: saving, measuring samples")
        progress = {"step": step + 1, "seconds": seconds()}
        save_checkpoint(path, run, state, generator, **progress)
        note(step, sheet(os.path.join(run.out, "sheet.png")))
        bar.set_description(name, refresh=False)

    try:
        for i in range(first, run.steps):
            scale = min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / run.steps))
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * scale
            numbers = {k: torch.as_tensor(v).detach() for k, v in step(i, generator).items()}
            unchecked[i] = numbers
            done = i + 1 == run.steps
            stopped = distributed.any_of(stop or time.time() - began > 60 * run.minutes)
            due = done or stopped or (i + 1) % run.save_every == 0
            # to look at a number waits for the GPU, so there it is not done at each step
            if run.device.type == "cpu" or i % 10 == 0 or due:
                for past, made in unchecked.items():
                    check_finite(run, past, made)
                unchecked.clear()
            if i % 10 == 0 or done:
                note(i, numbers)
            bar.update()
            if due:
                checkpoint(i)
            if stopped:
                break
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if done:
        return seconds()
    print(f"stopped after step {i + 1} of {run.steps}; this goes on:")
    print(command_line() if run.resume else f"{command_line()} --resume")
    return None


def write_trained(run, name, tensors, config, seconds, then=None, **origin):
    """Write the weights of a finished run as OUT/NAME.safetensors, and say so: -> the path.
    then: a script that samples them or goes on with them and its flags, but for the path at their
    end; this is printed last."""
    path = os.path.join(run.out, f"{name}.safetensors")
    tensors = {name: distributed.whole(tensor.detach()).cpu() for name, tensor in tensors.items()}
    origin = {"stage": name.replace("_", " "), "steps": run.steps, **origin}
    with distributed.first_alone():
        weights.save_weights(path, tensors, config, seconds=round(seconds), **origin)
    print(f"wrote {path}")
    if then:
        print(f"next: python {then} {shlex.quote(path)}")
    return path


def write_transformer(run, name, tensors, config, seconds, codecs, then, **origin):
    """`write_trained`, and beside it the VAE and text encoder that it was trained with, which its
    metadata names, unless they are shipped. codecs: their paths."""
    for path in codecs if RANK == 0 else ():
        if os.path.isfile(path) and os.path.dirname(os.path.abspath(path)) not in (
            weights.WEIGHTS,
            os.path.abspath(run.out),
        ):
            shutil.copyfile(path, os.path.join(run.out, os.path.basename(path)))
    vae, text_encoder = (weights.file_hash(path) for path in codecs)
    hashes = {"vae": vae, "text_encoder": text_encoder}
    return write_trained(run, name, tensors, config, seconds, then, **hashes, **origin)
