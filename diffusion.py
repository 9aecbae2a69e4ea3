"""The diffusion schedule, the flow-matching loss, guidance, and the many-step ODE solver."""

import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

TEACHER_STEPS = 32  # the paper: 50
GUIDANCE = 2.0  # the paper: 3.5; in the small shapes world 2 makes cleaner shapes


def per_frame(t, like):
    """Shape times t [B, T], or one time, so that they multiply latents [B, T, C, h, w]."""
    if not torch.is_tensor(t) or t.ndim == 0:
        return float(t)  # which no device has to be waited for
    t = t.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


@dataclass(frozen=True)
class Schedule:
    """x_t = (1 - t) x0 + t eps, and every conversion between x_t, v, x0, eps and the score.

    Latents [B, T, C, h, w]; times t [B, T], one for each latent frame, or one number for all."""

    shift: float = 1.0
    times: tuple = ()  # thousandths: the grid of as many steps, in place of an even one

    def shifted(self, u):
        """Apply the timestep shift to u in [0, 1]: s > 1 spends more of the time at high noise."""
        # t = s u / (1 + (s - 1) u)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def timesteps(self, steps, start=1.0):
        """The shifted times of `steps` denoising steps, from 1 to 0, both included: [steps + 1].
        start < 1: begin at `start`, and leave out the times before it."""
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if steps == len(self.times):
            u = torch.tensor([*self.times, 0], dtype=torch.float64) / 1000
        times = self.shifted(u)
        return torch.cat([times.new_tensor([start]), times[times < start]])

    def add_noise(self, x0, eps, t):
        t = per_frame(t, x0)
        # x_t = alpha_t x0 + sigma_t eps,  alpha_t = 1 - t,  sigma_t = t
        return (1 - t) * x0 + t * eps

    def v(self, x0, eps):
        # v = d x_t / dt = eps - x0
        return eps - x0

    def x0(self, x_t, v, t):
        # x0 = x_t - t v
        return x_t - per_frame(t, x_t) * v

    def eps(self, x_t, v, t):
        # eps = x_t + (1 - t) v
        return x_t + (1 - per_frame(t, x_t)) * v

    def score(self, x_t, v, t):
        """The s(x_t, t) of the papers' equations; `dmd.dmd_loss` writes it in terms of x0."""
        # grad log p(x_t) = -eps / sigma_t
        return -self.eps(x_t, v, t) / per_frame(t, x_t)

    def step(self, x_t, v, t, r):
        """Take one DDIM step of the probability-flow ODE from t to r; here it is Euler's step."""
        # x_r = alpha_r x0_hat + sigma_r eps_hat
        return self.add_noise(self.x0(x_t, v, t), self.eps(x_t, v, t), r)


def noise_source(generator, device="cpu"):
    """Make the function noise(shape) that draws from a generator on the CPU, or from a list of
    them, one for each video of the batch: a seed gives the same noise on every device."""

    def noise(shape):
        if isinstance(generator, list):
            x = torch.stack([torch.randn(shape[1:], generator=g) for g in generator])
        else:
            x = torch.randn(shape, generator=generator)
        if torch.device(device).type == "cuda":  # which goes on while it is on its way
            return x.pin_memory().to(device, non_blocking=True)
        return x.to(device)

    return noise


# ---------------------------------------------------------------------------------------- training
def draw_times(count, schedule, generator):
    """Draw diffusion times [count] from a logit-normal distribution, and shift them."""
    return schedule.shifted(torch.sigmoid(torch.randn(count, generator=generator)))


def flow_matching_loss(model, x0, t, text, generator, **attention):
    """Compute the denoising loss for x0 [B, T, C, h, w] at times t [B, T] (flow matching). The mean
    is over frames with t > 0: a clean frame holds no noise to predict."""
    schedule = model.schedule
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    v = model(schedule.add_noise(x0, eps, t), t, text, **attention)
    # E || v(x_t, t, text) - (eps - x0) ||^2
    error = F.mse_loss(v.float(), schedule.v(x0, eps), reduction="none").mean((2, 3, 4))  # [B, T]
    return torch.where(t > 0, error, 0.0).sum() / (t > 0).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------- sampling
def with_null(text, null=None):
    """Append as many null prompts to text [B, S, text_dim]: [2 B, S, text_dim].
    null [1, S, text_dim]: what they are, if not zeros."""
    return torch.cat([text, torch.zeros_like(text) if null is None else null.expand_as(text)])


def guided_v(model, x_t, t, text, guidance, **attention):
    """Predict v under classifier-free guidance, two passes made as one batch. x_t [B, T, C, h, w];
    t [B, T]; text: what `with_null` made, or `DiT.text_keys` of that."""
    v_text, v_null = model(torch.cat([x_t, x_t]), torch.cat([t, t]), text, **attention).chunk(2)
    # v = v_null + g (v_text - v_null)
    return v_null + guidance * (v_text - v_null)


@torch.no_grad()
def solve_ode(velocity, x, times, schedule):
    """Solve the probability-flow ODE dx/dt = v from x [B, T, C, h, w] at times[0] to times[-1].
    velocity(x_t, t [B, T]) -> v. Returns the states at all of the times [N + 1, B, T, C, h, w]."""
    states = [x]
    for t, r in itertools.pairwise(times):
        v = velocity(x, torch.full(x.shape[:2], float(t), device=x.device))
        x = schedule.step(x, v, t, r)
        states.append(x)
    return torch.stack(states)


@torch.no_grad()
def solve_teacher(model, x, text, steps=TEACHER_STEPS, guidance=GUIDANCE, null=None):
    """Solve the bidirectional teacher's guided ODE from noise x [B, T, C, h, w]: its states at
    schedule.timesteps(steps), [steps + 1, B, T, C, h, w], noise first, x0 last."""
    keys = model.text_keys(with_null(text, null))

    def velocity(x_t, t):
        return guided_v(model, x_t, t, keys, guidance)

    return solve_ode(velocity, x, model.schedule.timesteps(steps), model.schedule)
