"""The diffusion schedule, the flow-matching loss, guidance, and the many-step ODE solver."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x0 + sigma_t eps, and every conversion between v, x0, eps and score. Times broadcast: t [B, T].

    kind "flow" (flow matching, Wan's and the default): alpha = 1 - t, sigma = t, v = eps - x0.
    kind "cosine" (variance preserving, CausVid's notation): alpha = cos(pi t / 2), sigma = sin(pi t / 2), v = alpha eps - sigma x0.
    """

    kind: str = "flow"
    shift: float = 1.0

    def shifted(self, u):
        """The timestep shift: u in [0, 1] -> t = s u / (1 + (s - 1) u); s > 1 spends more of the time at high noise."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def timesteps(self, steps, start=1.0):
        """Times of an ODE solver or a few-step student, from 1 to 0, both included: [steps + 1], shifted. With a start below 1: that,
        and those of them that come after it."""
        times = self.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        return torch.cat([times.new_tensor([start]), times[times < start]])

    def _coefficients(self, t, like):
        """alpha, sigma and their slopes (a, s), with v = a x0 + s eps and alpha s - sigma a = 1, shaped to multiply `like`."""
        t = torch.as_tensor(t, device=like.device).to(
            torch.promote_types(like.dtype, torch.float32)
        )
        t = t.reshape(t.shape + (1,) * (like.ndim - t.ndim))
        if self.kind == "flow":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return alpha, sigma, -sigma, alpha

    def add_noise(self, x0, eps, t):
        alpha, sigma, _, _ = self._coefficients(t, x0)
        return alpha * x0 + sigma * eps  # x_t = alpha_t x0 + sigma_t eps

    def v(self, x0, eps, t):
        _, _, a, s = self._coefficients(t, x0)
        return a * x0 + s * eps

    def x0(self, x_t, v, t):
        _, sigma, _, s = self._coefficients(t, x_t)
        return s * x_t - sigma * v  # the inverse of (x0, eps) -> (x_t, v), whose determinant is 1

    def eps(self, x_t, v, t):
        alpha, _, a, _ = self._coefficients(t, x_t)
        return alpha * v - a * x_t

    def v_from_x0(self, x_t, x0, t):
        _, sigma, _, s = self._coefficients(t, x_t)
        return (s * x_t - x0) / sigma

    def score(self, x_t, v, t):
        _, sigma, _, _ = self._coefficients(t, x_t)
        return -self.eps(x_t, v, t) / sigma  # grad log p(x_t) = -eps / sigma_t; sigma must not be 0

    def step(self, x_t, v, t, r):
        """One step of the probability-flow ODE from t to r, x_r = alpha_r x0 + sigma_r eps: DDIM, for flow matching Euler."""
        return self.add_noise(self.x0(x_t, v, t), self.eps(x_t, v, t), r)


TEACHER_STEPS, GUIDANCE = (
    32,
    2.0,
)  # the paper's: 50 and 3.5; in this small world 2 makes cleaner shapes


def normal(shape, generator):
    """Noise [B, ...] from a generator on the CPU: a seed gives the same on every device. A list of B of them: one for each video,
    which is then what it would be alone."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])
    return torch.randn(shape, generator=generator)


# ---------------------------------------------------------------------------------------- training
def draw_times(count, schedule, generator):
    """Diffusion times [count]: logit-normal, where the network learns most, and then shifted."""
    return schedule.shifted(torch.sigmoid(torch.randn(count, generator=generator)))


def flow_matching_loss(model, x0, t, text, generator, **attention):
    """E || v(x_t, t, text) - (eps - x0) ||^2 for x0 [B, T, C, h, w] and t [B, T] (flow matching, the denoising loss), over frames with t > 0:
    in a clean one nothing tells eps."""
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    v = model(model.schedule.add_noise(x0, eps, t), t, text, **attention)
    error = F.mse_loss(v.float(), model.schedule.v(x0, eps, t), reduction="none").mean((2, 3, 4))
    return torch.where(t > 0, error, 0.0).sum() / (t > 0).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------- sampling
def with_null(text):
    """Embedded prompts [B, S, text_dim] and as many null prompts, which are all zeros -> [2 B, S, text_dim]."""
    return torch.cat([text, torch.zeros_like(text)])


def guided_v(model, x_t, t, text, guidance, **attention):
    """Classifier-free guidance, two passes made as one batch. x_t [B, T, C, h, w]; text: `with_null`, or its keys."""
    v_text, v_null = model(torch.cat([x_t, x_t]), torch.cat([t, t]), text, **attention).chunk(2)
    return v_null + guidance * (v_text - v_null)  # v = v_null + g (v_text - v_null)


@torch.no_grad()
def solve_ode(model, x, text, steps=TEACHER_STEPS, guidance=GUIDANCE):
    """Solve the bidirectional teacher's guided probability-flow ODE from noise x [B, T, C, h, w] at t = 1 to t = 0.

    -> the states at schedule.timesteps(steps), [steps + 1, B, T, C, h, w], noise first, x0 last.
    """
    schedule, times, states = model.schedule, model.schedule.timesteps(steps), [x]
    keys = model.text_keys(with_null(text))
    for t, r in zip(times[:-1], times[1:]):
        v = guided_v(model, x, torch.full(x.shape[:2], float(t), device=x.device), keys, guidance)
        x = schedule.step(x, v, t, r)
        states.append(x)
    return torch.stack(states)
