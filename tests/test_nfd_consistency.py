from dataclasses import replace

import torch
from torch import nn

from diffusion import Schedule
from model import DiT
from nfd_consistency import consistency_loss
from weights import load_model, shipped

MU, S, N = 0.7, 0.5, 48
SCHEDULE = Schedule(shift=2.0)
TIMES = SCHEDULE.timesteps(N)


def column(t):
    return t[..., None, None, None]


def teacher(x_t, t, text):
    """v of data N(MU, S^2), known in closed form."""
    alpha, sigma = 1 - column(t), column(t)
    variance = alpha**2 * S**2 + sigma**2
    return (x_t - alpha * MU) * (sigma - alpha * S**2) / variance - MU


class Affine(nn.Module):
    """v = a x + b, with a and b of its own for each time of the grid: enough for any map of a Gaussian to a Gaussian."""

    schedule = SCHEDULE

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(N + 1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x, t, text):
        level = (TIMES - t[..., None]).abs().argmin(-1)
        return column(self.a[level]) * x + column(self.b[level])


def loss_of(student, target, x0, level, seed):
    return consistency_loss(
        student, target, teacher, x0, level, TIMES, None, torch.Generator().manual_seed(seed)
    )


def test_the_distilled_function_is_the_closed_form_one_on_a_gaussian():
    student, target, g = Affine(), Affine(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    for i in range(3000):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - i / 3000)
        x0 = MU + S * torch.randn(64, 3, 1, 1, 1, generator=g, dtype=torch.float64)
        loss = loss_of(student, target, x0, torch.randint(N + 1, (64, 3), generator=g), i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.load_state_dict(student.state_dict())
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    for level in (0, N // 2, N - 1):
        t = TIMES[level].expand(9, 1)
        made, end = SCHEDULE.x0(x, student(x, t, None), t), x
        for u, r in zip(TIMES[level:-1], TIMES[level + 1 :]):  # the solver's own end
            end = SCHEDULE.step(
                end, teacher(end, u.expand(9, 1), None), u.expand(9, 1), r.expand(9, 1)
            )
        alpha, sigma = 1 - TIMES[level], TIMES[level]
        closed = MU + S * (x - alpha * MU) / (alpha**2 * S**2 + sigma**2).sqrt()
        assert (made - end).abs().max() < 0.01
        assert (made - closed).abs().max() < 0.1


def test_at_time_0_the_function_is_the_identity_whatever_the_network():
    x0 = torch.randn(4, 3, 2, 2, 2, dtype=torch.float64)
    student, target = Affine(), Affine()
    nn.init.normal_(student.a)
    nn.init.normal_(target.a)
    assert loss_of(student, target, x0, torch.full((4, 3), N), 0) < 1e-12
    assert loss_of(student, target, x0, torch.full((4, 3), N - 1), 0) > 1e-3


def test_gradients_reach_the_student_alone_and_each_frame_has_its_own_time():
    student, target, seen = Affine(), Affine(), []
    nn.init.normal_(target.a)
    student.register_forward_hook(lambda m, inputs, _: seen.append(inputs[1]))
    level = torch.tensor([[0, 5, N], [3, 3, 1]])
    loss_of(student, target, torch.randn(2, 3, 1, 1, 1, dtype=torch.float64), level, 0).backward()
    assert torch.equal(seen[0], TIMES[level])
    assert target.a.grad is None
    assert student.a.grad[[0, 1, 3, 5]].abs().min() > 0
    assert student.a.grad[[2, 4]].abs().max() == 0


def test_the_shipped_player_is_its_teacher_with_a_quarter_of_the_shift():
    teacher, player = (load_model(DiT, shipped(name)) for name in ("action_teacher", "player"))
    assert player.config == replace(teacher.config, shift=teacher.config.shift / 4)
