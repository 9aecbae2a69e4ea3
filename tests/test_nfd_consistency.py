import itertools
from dataclasses import replace

import pytest
import torch
from conftest import generator
from torch import nn

from diffusion import Schedule
from nfd_consistency import consistency_loss
from nfd_teacher import ActionDiT
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
    """v = a x + b, with an a and b for each time of the grid: any map of a Gaussian to another."""

    schedule = SCHEDULE

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(N + 1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x, t, text):
        level = (TIMES - t[..., None]).abs().argmin(-1)
        return column(self.a[level]) * x + column(self.b[level])


def random_affine():
    network = Affine()
    nn.init.normal_(network.a)
    return network


def loss_of(student, target, x0, level, seed=0):
    parts = (student, target, teacher, x0, level, TIMES, None)
    return consistency_loss(*parts, generator(seed))


# ------------------------------------------------------------------------- what distillation finds
X = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1, 1)
LEVELS = [0, N // 2, N - 1]


@pytest.fixture(scope="module")
def distilled():
    """The distilled consistency function: x0 of X at a level."""
    student, target, g = Affine(), Affine(), generator()
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    for i in range(3000):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - i / 3000)
        x0 = MU + S * torch.randn(64, 3, 1, 1, 1, generator=g, dtype=torch.float64)
        loss = loss_of(student, target, x0, torch.randint(N + 1, (64, 3), generator=g), i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.load_state_dict(student.state_dict())

    def function(level):
        t = TIMES[level].expand(9, 1)
        return SCHEDULE.x0(X, student(X, t, None), t).detach()

    return function


@pytest.mark.parametrize("level", LEVELS)
def test_the_distilled_function_is_the_end_of_the_teachers_solver(distilled, level):
    end = X
    for t, r in itertools.pairwise(TIMES[level:]):
        end = SCHEDULE.step(end, teacher(end, t.expand(9, 1), None), t, r)
    assert (distilled(level) - end).abs().max() < 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_the_distilled_function_is_the_closed_form_one(distilled, level):
    alpha, sigma = 1 - TIMES[level], TIMES[level]
    closed = MU + S * (X - alpha * MU) / (alpha**2 * S**2 + sigma**2).sqrt()
    assert (distilled(level) - closed).abs().max() < 0.1


# ---------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize(("level", "zero"), [(N, True), (N - 1, False)])
def test_at_time_0_the_function_is_the_identity(level, zero):
    x0 = torch.randn(4, 3, 2, 2, 2, dtype=torch.float64)
    loss = loss_of(random_affine(), random_affine(), x0, torch.full((4, 3), level))
    assert loss < 1e-12 if zero else loss > 1e-3


LEVEL = torch.tensor([[0, 5, N], [3, 3, 1]])  # of each frame of two clips


@pytest.fixture
def trained():
    """(student, target, the times the student saw) after the gradients of one loss at LEVEL."""
    student, target, seen = Affine(), random_affine(), []
    student.register_forward_hook(lambda model, inputs, v: seen.append(inputs[1]))
    loss_of(student, target, torch.randn(2, 3, 1, 1, 1, dtype=torch.float64), LEVEL).backward()
    return student, target, seen


def test_each_frame_has_a_time_of_its_own(trained):
    assert torch.equal(trained[2][0], TIMES[LEVEL])


def test_gradients_reach_the_student_alone(trained):
    student, target, _ = trained
    assert target.a.grad is None
    assert student.a.grad.any()


def test_gradients_reach_the_times_of_the_frames_alone(trained):
    grad = trained[0].a.grad
    assert grad[[0, 1, 3, 5]].abs().min() > 0
    assert grad[[2, 4]].abs().max() == 0


def test_the_shipped_player_has_a_quarter_of_its_teachers_shift():
    config, player = (
        load_model(ActionDiT, shipped(name)).config for name in ("action_teacher", "player")
    )
    assert player == replace(config, shift=config.shift / 4)
