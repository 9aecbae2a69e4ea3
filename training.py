"""What every training script shares: flags, averaged weights, optimisers, checkpoints, resume, log.

A script builds its networks and optimisers, then calls `train` with a function that makes one
step. All that a run needs to go on lies in OUT/checkpoint.pt: networks, optimisers, averages, step
and random state. A run stopped at any moment and resumed ends in the same weights, bit for bit
(float32, CPU), as one that was never stopped.
"""

import json
import math
import os
import pickle
import re
import signal
import time
from dataclasses import dataclass, fields, replace

import torch
from tqdm import tqdm

import flags
import weights
from model import ModelConfig
from weights import ROOT, UserError, provenance


# ------------------------------------------------------------------------------- results and docs
def write_results(out, result, text):
    """Print a table; write OUT.json, OUT.md and the table between its markers in docs/RESULTS.md.
    The markers are <!-- OUT.json --> and <!-- end -->. Raises UserError if it cannot write."""
    print(text)
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        replace_file(out + ".json", json.dumps(provenance() | result, indent=1) + "\n")
        replace_file(out + ".md", text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}.json and {out}.md: {error.strerror}") from None
    print(f"wrote {out}.json and {out}.md")
    path = os.path.join(ROOT, "docs", "RESULTS.md")
    marker = re.escape(f"<!-- {os.path.relpath(out, ROOT)}.json -->")
    with open(path, encoding="utf-8") as file:
        before = file.read()

    def filled(match):
        return f"{match[1]}{text}\n{match[2]}"

    after = re.sub(rf"({marker}\n).*?(<!-- end -->)", filled, before, flags=re.S)
    if after != before:
        replace_file(path, after)


def replace_file(path, content):
    """Write a text file under a temporary name that then becomes `path`."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(content)
    os.replace(path + ".tmp", path)


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

    def autocast(self):
        """bf16 autocast where the run's dtype is bf16; weights and optimiser stay in float32."""
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=on)


def start_run(args):
    """Check the flags of `training_parser`, make the output folder and seed torch: a `Run`.
    Raises UserError for values that no run can have, and for a folder that holds a run already."""
    device, dtype = flags.on_device(args.device, args.dtype, args.threads)
    weights.make_folder(args.out)
    checkpoint = os.path.exists(os.path.join(args.out, "checkpoint.pt"))
    if args.resume and not checkpoint:
        raise UserError(f"nothing to resume: {args.out} has no checkpoint.pt")
    if checkpoint and not args.resume:
        raise UserError(
            f"{args.out} holds a run already: add --resume to go on with it, "
            "or choose another --out"
        )
    torch.manual_seed(args.seed)
    values = {field.name: getattr(args, field.name) for field in fields(Run)}
    return Run(**values | {"device": device, "dtype": dtype})


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


def causal_config(config, chunk, window, steps):
    """Change a model's chunk, window and student steps where they are given.
    The weights carry the result, and the sampler follows it. Raises UserError for less than 1."""
    given = {"chunk": chunk, "window": window, "steps": steps}
    try:
        return replace(config, **{k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise UserError(str(error)) from None


# ------------------------------------------------------------------------- averages and optimisers
class EMA:
    """Exponential moving average of a network's weights: what is sampled from and shipped."""

    def __init__(self, module, decay=0.999):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module, step):
        # a short run must not remember its start: the memory grows up to 1 / (1 - decay) steps
        decay = min(self.decay, (1 + step) / (10 + step))
        for k, v in module.state_dict().items():
            self.shadow[k].lerp_(v, 1 - decay)

    def state_dict(self):
        return self.shadow

    def load_state_dict(self, state):
        for k, v in state.items():
            self.shadow[k].copy_(v)


def adamw(parameters, lr, betas=(0.9, 0.99)):
    """AdamW without weight decay; gradients are clipped by `optimise`."""
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)


class Muon(torch.optim.AdamW):
    """Muon for the matrices among the `hidden` layers' parameters, AdamW for all others.

    A gradient is dominated by a few singular directions. Muon (K. Jordan et al., 2024) sets all
    singular values of the momentum to about 1, so that a step learns in every direction. An
    orthogonal [m, n] matrix has entries of root mean square 1 / sqrt(max(m, n)); scaled to 0.2, as
    large as AdamW's steps are, one learning rate serves both (Moonlight, 2025).
    """

    def __init__(self, hidden, parameters, lr, momentum=0.95):
        matrices = [p for p in hidden if p.ndim == 2]
        mine = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in mine]
        super().__init__(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.add_param_group({"params": matrices, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        group, shapes = self.param_groups[1], {}
        for p in group["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for shape, matrices in shapes.items():  # all matrices of a shape at once
            for p in matrices:
                state = self.state[p]
                if not state:  # AdamW's load_state_dict asks for a step
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                p.grad.lerp_(state["momentum"], group["momentum"])  # Nesterov: look one step ahead
            update = orthogonal(torch.stack([p.grad for p in matrices])) * (0.2 * max(shape) ** 0.5)
            torch._foreach_add_(matrices, list(update), alpha=-group["lr"])
            for p in matrices:
                p.grad = None  # nothing is left for AdamW
        super().step()


def orthogonal(x):
    """Even out the singular values of matrices [N, m, n] to 0.7 .. 1.2: Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def optimise(optimizer, loss, clip=1.0):
    """Take one optimiser step on a loss; -> the norm of the gradient before clipping to `clip`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm


# --------------------------------------------------------------------------------------- the loop
def load_checkpoint(path, device, state, generator):
    """Load what `train` saved into the parts of `state`: (step, seconds, learning rates).
    Raises UserError for a checkpoint that is damaged or of other parts."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
        generator.set_state(saved["generator"].cpu())
        return saved["step"], saved["seconds"], saved["base_lr"]
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not fit this run ({reason})") from None


def forget_after(path, step):
    """Drop the lines of a log from `step` on: a resumed run makes these steps again."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
        replace_file(path, "".join(line for line in lines if json.loads(line)["step"] < step))


def train(run, state, step, sheet, warmup=50):
    """Run `step(i, generator) -> numbers to log` for i = 0 .. run.steps - 1, or what is left of it.

    state: name -> network, optimiser or EMA, all that a checkpoint must hold. The learning rates
    rise over `warmup` steps and fall to 0 along a cosine. sheet(path) -> numbers to log: draws and
    measures samples, at every checkpoint. Returns the seconds that the run took, or None if it was
    stopped before its last step (--minutes, Ctrl-C).
    """
    generator = torch.Generator().manual_seed(run.seed)  # on the CPU: the same on every device
    optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    path, log = (os.path.join(run.out, name) for name in ("checkpoint.pt", "log.jsonl"))
    first, spent = 0, 0.0
    if run.resume:
        first, spent, rates = load_checkpoint(path, run.device, state, generator)
        forget_after(log, first)
    began, shown, stop, name = time.time(), {}, [], os.path.basename(os.path.normpath(run.out))
    bar = tqdm(total=run.steps, initial=first, desc=name, mininterval=2)
    signals = (signal.SIGINT, signal.SIGTERM)  # the step in progress ends, then it is saved
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in signals}

    def seconds():
        return spent + time.time() - began

    def save(step):
        saved = {"state": {k: v.state_dict() for k, v in state.items()}, "step": step}
        saved |= {"generator": generator.get_state(), "seconds": seconds(), "base_lr": rates}
        torch.save(saved, path + ".tmp")
        os.replace(path + ".tmp", path)

    def note(step, numbers):
        if numbers:
            numbers = {k: round(torch.as_tensor(v).item(), 6) for k, v in numbers.items()}
            with open(log, "a", encoding="utf-8") as file:
                line = {"step": step, "seconds": round(seconds(), 1), **numbers}
                file.write(json.dumps(line) + "\n")
            shown.update({k: f"{v:.4g}" for k, v in numbers.items()})
            bar.set_postfix(shown, refresh=False)

    for i in range(first, run.steps):
        scale = min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / run.steps))
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * scale
        numbers, done = step(i, generator), i + 1 == run.steps
        if i % 10 == 0 or done:
            note(i, numbers)
        bar.update()
        stopped = bool(stop) or time.time() - began > 60 * run.minutes
        if done or stopped or (i + 1) % run.save_every == 0:
            save(i + 1)
            note(i, sheet(os.path.join(run.out, "sheet.png")))
        if stopped and not done:
            print(f"stopped after step {i + 1} of {run.steps}; go on with --resume")
            break
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return seconds() if first >= run.steps or done else None


def write_trained(run, name, tensors, config, seconds, **origin):
    """Write the weights of a finished run as OUT/NAME.safetensors, and say so."""
    path = os.path.join(run.out, f"{name}.safetensors")
    origin = {"stage": name.replace("_", " "), "steps": run.steps, **origin}
    weights.save_weights(path, tensors, config, seconds=round(seconds), **origin)
    print(f"wrote {path}")
