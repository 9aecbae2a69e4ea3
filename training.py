"""What every training script shares: flags, set-up, averaged weights, checkpoints, resume, log, safetensors files.

A script builds its networks and optimisers, then calls `train` with a function that makes one step. All that a run needs to
go on lies in OUT/checkpoint.pt: networks, optimisers, averages, step and random state. A run stopped at any moment and
resumed ends in the same weights, bit for bit (float32, CPU), as one that was never stopped.
"""

import argparse
import json
import math
import os
import pickle
import re
import signal
import time

import torch
from tqdm import tqdm

from weights import ROOT, UserError, choose_device, choose_dtype, device_flags, provenance


def write_results(out, result, text):
    """Print a table; write OUT.json, OUT.md and the table between its markers in docs/RESULTS.md.

    The markers are <!-- OUT.json --> and <!-- end -->. Raises UserError if a file cannot be written.
    """
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


# ------------------------------------------------------------------------------------------------------------ training
def training_parser(description, steps, batch_size, lr, out):
    """The flags that every training script has."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=steps,
        help="length of the run; the learning rate falls to 0 over it",
    )
    add("--batch-size", type=int, default=batch_size)
    add("--lr", type=float, default=lr)
    add("--seed", type=int, default=0)
    add("--out", default=out, help="folder for checkpoint, log, sheets and the trained weights")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--save-every", type=int, default=200, help="steps between two checkpoints")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after so many minutes; --resume goes on",
    )
    device_flags(parser)
    add(
        "--compile",
        action="store_true",
        help="fuse the networks with torch.compile (needs a C++ compiler, takes a minute)",
    )
    return parser


def check_training(args):
    """Raise UserError for flag values that no run can have; make the output folder; choose device and dtype in place."""
    for flag in ("steps", "batch_size", "save_every", "minutes", "lr"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} must be greater than 0")
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None
    checkpoint = os.path.exists(os.path.join(args.out, "checkpoint.pt"))
    if args.resume and not checkpoint:
        raise UserError(f"nothing to resume: {args.out} has no checkpoint.pt")
    if checkpoint and not args.resume:
        raise UserError(
            f"{args.out} holds a run already: add --resume to go on with it, or choose another --out"
        )


class EMA:
    """Exponential moving average of a network's weights: what is sampled from and shipped."""

    def __init__(self, module, decay=0.999):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module, step):
        # a short run must not remember its start: the memory grows with the run up to 1 / (1 - decay) steps
        decay = min(self.decay, (1 + step) / (10 + step))
        for k, v in module.state_dict().items():
            self.shadow[k].lerp_(v, 1 - decay)

    def state_dict(self):
        return self.shadow

    def load_state_dict(self, state):
        for k, v in state.items():
            self.shadow[k].copy_(v)


def autocast(args):
    """bf16 autocast where the run's dtype is bf16; master weights and optimiser stay in float32."""
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32)


def adamw(parameters, lr, **options):
    """AdamW for parameters of any shape: no weight decay, gradients are clipped by `optimise`."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True, **options)


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices among `hidden`, the hidden layers' parameters, momentum made orthogonal (Muon, K. Jordan et al., 2024).

    parameters: all that are trained, the hidden ones included. A gradient is dominated by a few singular directions; Muon sets all
    singular values of the momentum to about 1, so that a step learns in every direction. An orthogonal [m, n] matrix has entries of
    root mean square 1 / sqrt(max(m, n)); scaled to 0.2, as large as AdamW's steps are, one learning rate serves both (Moonlight, 2025).
    """

    def __init__(self, hidden, parameters, lr, momentum=0.95):
        matrices = [p for p in hidden if p.ndim == 2]
        mine = {id(p) for p in matrices}
        super().__init__(
            [p for p in parameters if id(p) not in mine],
            lr,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=True,
        )
        self.add_param_group({"params": matrices, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        group, shapes = self.param_groups[1], {}
        for p in group["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for shape, matrices in shapes.items():  # all matrices of a shape at once
            for p in matrices:
                state = self.state[p]
                if not state:
                    state.update(
                        step=torch.tensor(0.0), momentum=torch.zeros_like(p)
                    )  # loading AdamW's state asks for a step
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                p.grad.lerp_(state["momentum"], group["momentum"])  # Nesterov: look one step ahead
            update = orthogonal(torch.stack([p.grad for p in matrices])) * (0.2 * max(shape) ** 0.5)
            torch._foreach_add_(matrices, list(update), alpha=-group["lr"])
            for p in matrices:
                p.grad = None  # nothing is left for AdamW
        super().step()


def orthogonal(x):
    """Matrices [N, m, n] with about the same singular vectors, and singular values between 0.7 and 1.2: Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def optimise(optimizer, loss, clip=1.0):
    """One optimiser step on a loss; returns the norm of the gradient before it was clipped to `clip`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], clip
    )
    optimizer.step()
    return norm


def train(args, state, step, sheet, warmup=50):
    """Run `step(i, generator) -> dict of numbers to log` for i = 0 .. args.steps - 1, resuming where a run was stopped.

    state: name -> network, optimiser or EMA: everything that a checkpoint must hold. The learning rate of every optimiser rises
    over `warmup` steps and falls to 0 along a cosine. `sheet(path) -> dict of numbers to log` draws and measures samples, at every checkpoint.
    Returns False if the run was stopped (--minutes, Ctrl-C) before its last step, True when it is done. Raises UserError for a damaged checkpoint.
    """
    generator = torch.Generator().manual_seed(
        args.seed
    )  # on the CPU: the same numbers on every device
    path, first, spent = os.path.join(args.out, "checkpoint.pt"), 0, 0.0
    if args.resume:
        try:
            saved = torch.load(path, map_location=args.device, weights_only=True)
            for name, part in state.items():
                part.load_state_dict(saved["state"][name])
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} does not fit this run ({str(error).splitlines()[0]})"
            ) from None
        generator.set_state(saved["generator"].cpu())
        first, spent = saved["step"], saved["seconds"]
        _forget_after(os.path.join(args.out, "log.jsonl"), first)
    optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
    base = [
        [group["lr"] for group in o.param_groups] if not args.resume else saved["base_lr"][i]
        for i, o in enumerate(optimizers)
    ]
    stop = []  # Ctrl-C and kill let the step in progress end, then save
    handlers = {
        s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    started, bar = (
        time.time(),
        tqdm(total=args.steps, initial=first, desc=os.path.basename(args.out), mininterval=2),
    )
    shown = {}  # the latest of each number

    def save(i):
        torch.save(
            {
                "state": {k: v.state_dict() for k, v in state.items()},
                "generator": generator.get_state(),
                "step": i,
                "seconds": spent + time.time() - started,
                "base_lr": base,
            },
            path + ".tmp",
        )
        os.replace(path + ".tmp", path)

    with open(os.path.join(args.out, "log.jsonl"), "a", buffering=1) as log:

        def note(i, numbers):
            numbers = {k: round(torch.as_tensor(v).item(), 6) for k, v in numbers.items()}
            if numbers:
                log.write(
                    json.dumps(
                        {"step": i, "seconds": round(spent + time.time() - started, 1), **numbers}
                    )
                    + "\n"
                )
            shown.update({k: f"{v:.4g}" for k, v in numbers.items()})
            bar.set_postfix(shown, refresh=False)

        for i in range(first, args.steps):
            scale = min(1.0, (i + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * i / args.steps))
            for optimizer, rates in zip(optimizers, base):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * scale
            numbers = step(i, generator)
            if i % 10 == 0 or i + 1 == args.steps:
                note(i, numbers)
            bar.update()
            done, late = i + 1 == args.steps, time.time() - started > 60 * args.minutes
            if done or late or stop or (i + 1) % args.save_every == 0:
                save(i + 1)
                note(i, sheet(os.path.join(args.out, "sheet.png")) or {})
            if late or stop:
                break
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    args.seconds = spent + time.time() - started
    if first < args.steps and not done:
        print(f"stopped after step {i + 1} of {args.steps}; go on with --resume")
    return first >= args.steps or done


def _forget_after(path, step):
    """Drop the log lines of steps that a resumed run will make again (written after the checkpoint it starts from)."""
    if os.path.exists(path):
        with open(path) as file:
            kept = [
                line for line in file if line.endswith("\n") and json.loads(line)["step"] < step
            ]
        with open(path + ".tmp", "w") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)
