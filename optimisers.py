"""What makes a step of training: averaged weights, AdamW, Muon, and a batch taken in parts."""

from launch import WORLD

import torch

import distributed
from rows import by_rows


class EMA:
    """Exponential moving average of a network's weights: what is sampled from and shipped."""

    def __init__(self, module, decay=0.999):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module, step):
        if not is_last(self):
            return
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
    parameters = list(parameters)
    fused = not parameters[0].is_meta  # a dry run has none
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=fused)


class Muon(torch.optim.AdamW):
    """Muon for matrices and kernels among the `hidden` layers' parameters, AdamW for all others.

    A gradient is dominated by a few singular directions. Muon (K. Jordan et al., 2024) sets all
    singular values of the momentum to about 1, so that a step learns in every direction; a kernel
    counts as a matrix with a row for each channel that it makes. An orthogonal [m, n] matrix has
    entries of root mean square 1 / sqrt(max(m, n)); scaled to 0.2, as large as AdamW's steps are,
    one learning rate serves both (Moonlight, 2025).
    """

    def __init__(self, hidden, parameters, lr, momentum=0.95):
        matrices = [p for p in hidden if p.ndim > 1]
        mine = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in mine]
        fused = not others[0].is_meta  # a dry run has none
        super().__init__(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
        self.add_param_group({"params": matrices, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        group, shapes = self.param_groups[1], {}
        for p in group["params"]:
            shapes.setdefault(p.shape, []).append(p)
        for matrices in shapes.values():  # all of a shape at once
            for p in matrices:
                state = self.state[p]
                if not state:  # AdamW's load_state_dict asks for a step
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                p.grad.lerp_(state["momentum"], group["momentum"])  # Nesterov: look one step ahead
            whole = torch.stack([distributed.whole(p.grad).flatten(1) for p in matrices])
            update = by_rows(orthogonal)(whole)  # of many processes each does a part
            update = update * (0.2 * max(update.shape[1:]) ** 0.5)
            for p, change in zip(matrices, update, strict=True):
                p.sub_(distributed.like(p, change.view(p.shape)), alpha=group["lr"])
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


def is_last(part):
    """Whether an optimiser or average is at the last part of a batch, where `train` makes parts."""
    number, parts = getattr(part, "part", (0, 1))
    return number + 1 == parts


def optimise(optimizer, loss, clip=1.0):
    """Take one optimiser step on a loss; -> the norm of the gradient before clipping to `clip`.
    Of the parts of a batch the gradients add up, and the last takes the step."""
    number, parts = getattr(optimizer, "part", (0, 1))
    if number == 0:
        optimizer.zero_grad(set_to_none=True)
    # of many processes each has the gradient of its own rows; FSDP takes the mean, not the sum
    (loss * (WORLD / parts)).backward()
    if not is_last(optimizer):
        return torch.zeros(())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return distributed.whole(norm)
