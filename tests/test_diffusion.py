import pytest
import torch
from conftest import generator, tiny_model, tiny_text

from diffusion import Schedule, draw_times, flow_matching_loss, solve_ode, solve_teacher

both_schedules = pytest.mark.parametrize("schedule", [Schedule(), Schedule(shift=3.0)])


# ---------------------------------------------------------------------------------- the schedule
@both_schedules
def test_conversions_are_inverse_to_each_other(schedule):
    x0, eps = torch.randn(2, 3, 4, 2, 5, 5, dtype=torch.float64)
    t = 0.01 + 0.98 * torch.rand(3, 4, dtype=torch.float64)
    x_t, v = schedule.add_noise(x0, eps, t), schedule.v(x0, eps)
    assert torch.allclose(schedule.x0(x_t, v, t), x0)
    assert torch.allclose(schedule.eps(x_t, v, t), eps)
    assert torch.allclose(x_t, x0 + t[:, :, None, None, None] * v)


def gaussian_v(schedule, mean, std, x, t):
    """The exact v for data N(mean, std^2): from E[x0 | x_t]."""
    alpha, sigma = 1 - t, t
    x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
    return schedule.v(x0, (x - alpha * x0) / sigma)


@both_schedules
def test_the_solver_finds_the_closed_form_of_a_gaussian(schedule):
    mean, std = 1.5, 0.5
    start = torch.randn(1000, 1, dtype=torch.float64)  # at t = 1 the marginal is N(0, 1)

    def velocity(x, t):
        return gaussian_v(schedule, mean, std, x, t)

    x = solve_ode(velocity, start, schedule.timesteps(500), schedule)[-1]
    assert (x - (mean + std * start)).abs().max() < 0.02


@both_schedules
def test_score_is_the_gradient_of_the_log_density(schedule):
    mean, std = -0.7, 1.3
    for t in (0.1, 0.5, 0.9):
        x = torch.linspace(-3, 3, 11, dtype=torch.float64, requires_grad=True)
        alpha, sigma = 1 - t, t
        density = torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2) ** 0.5)
        (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        assert torch.allclose(schedule.score(x, gaussian_v(schedule, mean, std, x, t), t), gradient)


@pytest.mark.parametrize(
    ("shift", "times"), [(3.0, [1, 0.9, 0.75, 0.5, 0]), (1.0, [1, 0.75, 0.5, 0.25, 0])]
)
def test_shift_moves_the_times_between_the_ends(shift, times):
    expected = torch.tensor(times, dtype=torch.float64)
    assert torch.allclose(Schedule(shift).timesteps(4), expected)


@pytest.mark.parametrize(
    ("start", "times"),
    [(0.8, [0.8, 0.75, 0.5, 0]), (0.75, [0.75, 0.5, 0]), (0.2, [0.2, 0]), (0, [0])],
)
def test_a_later_start_leaves_out_the_times_before_it(start, times):
    expected = torch.tensor(times, dtype=torch.float64)
    assert torch.allclose(Schedule(shift=3.0).timesteps(4, start), expected)


# -------------------------------------------------------------------------------------- training
def test_times_are_shifted_towards_noise():
    t = draw_times(20_000, Schedule(shift=5.0), generator())
    assert t.min() > 0
    assert t.max() < 1
    assert abs(t.median() - 5 / 6) < 0.01


def test_each_clip_can_have_a_shift_of_its_own():
    shifts = 5.0 * (1 + torch.arange(20_000) % 2)
    t = draw_times(20_000, Schedule(shift=shifts), generator())
    assert abs(t[::2].median() - 5 / 6) < 0.01
    assert abs(t[1::2].median() - 10 / 11) < 0.01


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    x0, t = torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3)

    def model(x_t, t, text):
        at = t[..., None, None, None]
        return (x_t - (1 - at) * x0) / at - x0

    model.schedule = Schedule()
    assert flow_matching_loss(model, x0, t, "prompt", generator()) < 1e-6


def test_flow_matching_passes_prompt_and_attention_on():
    seen = []

    def model(x_t, t, text, **attention):
        seen.append((text, attention))
        return x_t

    model.schedule = Schedule()
    x0, t = torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3)
    flow_matching_loss(model, x0, t, "prompt", generator(), chunk=3)
    assert seen == [("prompt", {"chunk": 3})]


def test_clean_frames_do_not_count_in_the_flow_matching_loss():
    x0, t = torch.randn(2, 3, 4, 2, 2), torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.5, 0.0]])

    def model(x_t, t, text):
        return torch.where(t[..., None, None, None] == 0, 1e3, 0.0).expand_as(x_t)

    model.schedule = Schedule()
    loss = flow_matching_loss(model, x0, t, "prompt", generator())
    eps = torch.randn(x0.shape, generator=generator())
    assert abs(loss - (eps - x0).square().mean((2, 3, 4))[t > 0].mean()) < 1e-6


# ------------------------------------------------------------------------------ the guided solver
@pytest.fixture
def world():
    """A teacher, noise and a prompt."""
    return tiny_model(num_layers=2).requires_grad_(False), torch.randn(1, 3, 8, 8, 8), tiny_text()


def test_the_solver_keeps_every_state_from_the_noise_on(world):
    model, noise, text = world
    states = solve_teacher(model, noise, text, steps=4, guidance=1.0)
    assert len(states) == 5
    assert torch.equal(states[0], noise)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_guidance_goes_from_the_null_prompt_past_the_prompt(world, guidance):
    model, noise, text = world
    x = solve_teacher(model, noise, text, steps=4, guidance=guidance)[1]
    prompted, null = (model(noise, torch.ones(1, 3), each) for each in (text, 0 * text))
    v = null + guidance * (prompted - null)
    expected = model.schedule.step(noise, v, 1.0, model.schedule.timesteps(4)[1])
    assert torch.allclose(x, expected, atol=1e-5)


def test_guidance_changes_nothing_of_the_null_prompt(world):
    model, noise, text = world
    plain, guided = (solve_teacher(model, noise, 0 * text, steps=4, guidance=g) for g in (1.0, 5.0))
    assert torch.allclose(plain, guided, atol=1e-5)
