import copy

import pytest
import torch

from diffusion import Schedule, flow_matching_loss
from dmd import clip_times, dmd_loss, rollout, student_x0
from model import DiT, ModelConfig
from sample import stream
from training import adamw, optimise

MEAN, STD = 1.5, 0.6  # of the data


def posterior_mean(schedule, mean, std, t):
    """E[x0 | x_t] of data N(mean, std^2)."""

    def x0(x_t):
        sigma = t.reshape(*t.shape, *[1] * (x_t.ndim - t.ndim))
        alpha = 1 - sigma
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)

    return x0


@pytest.mark.parametrize("time", [0.3, 0.7, 0.95])
def test_gradient_is_the_kl_gradient_up_to_the_documented_weighting(time):
    schedule = Schedule()
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.tensor(1.2, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
    )
    z, eps = torch.randn(2, 1, 1, 1, 1, 400_000, generator=g, dtype=torch.float64)
    t = torch.full((1, 1), time, dtype=torch.float64)
    x0_hat = a * z + b
    loss, distance = dmd_loss(
        x0_hat,
        posterior_mean(schedule, MEAN, STD, t),
        posterior_mean(schedule, b.item(), a.item(), t),
        schedule,
        t,
        eps,
    )
    alpha, sigma = 1 - time, torch.tensor(time, dtype=torch.float64)
    # KL between the noised Gaussians, N(alpha b, alpha^2 a^2 + sigma^2) and N(alpha MEAN, alpha^2 STD^2 + sigma^2)
    noised = lambda mean, std: torch.distributions.Normal(
        alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()
    )
    kl = torch.distributions.kl_divergence(noised(b, a), noised(MEAN, torch.tensor(STD)))
    expected = torch.autograd.grad(kl, (a, b))
    measured = torch.autograd.grad(loss, (a, b))
    weight = (
        sigma**2 / alpha**2 / distance
    )  # s_fake - s_real to x0 is sigma^2 / alpha, d x_t / d x0_hat is alpha
    for e, m in zip(expected, measured):
        assert m.item() == pytest.approx((weight * e).item(), rel=0.02, abs=2e-3)


def test_training_brings_mean_and_variance_to_the_data():
    """A linear generator, and a fake score that is trained online on its outputs, 5 to 1."""
    torch.manual_seed(0)
    schedule = Schedule()
    a, b = torch.nn.Parameter(torch.tensor(1.5)), torch.nn.Parameter(torch.tensor(-1.0))
    fake_mean, fake_log_std = (
        torch.nn.Parameter(torch.tensor(-1.0)),
        torch.nn.Parameter(torch.tensor(0.4)),
    )
    generator_optimizer, fake_optimizer = (
        adamw([a, b], 0.03, betas=(0.0, 0.99)),
        adamw([fake_mean, fake_log_std], 0.05, betas=(0.0, 0.99)),
    )
    for i in range(2500):
        x0_hat = a * torch.randn(64, 1, 1, 1, 64) + b
        t = 0.02 + 0.96 * torch.rand(64, 1)
        fake = posterior_mean(schedule, fake_mean, fake_log_std.exp(), t)
        if i % 5 == 0:
            loss, _ = dmd_loss(
                x0_hat,
                posterior_mean(schedule, MEAN, STD, t),
                fake,
                schedule,
                t,
                torch.randn_like(x0_hat),
            )
            optimise(generator_optimizer, loss)
        x0 = x0_hat.detach()
        optimise(
            fake_optimizer,
            (fake(schedule.add_noise(x0, torch.randn_like(x0), t)) - x0).square().mean(),
        )
    assert b.item() == pytest.approx(MEAN, abs=0.1)
    assert abs(a.item()) == pytest.approx(STD, abs=0.1)


def networks():
    torch.manual_seed(0)
    model = DiT(ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1))
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    fake = copy.deepcopy(model)
    torch.nn.init.normal_(fake.head.head.weight, std=0.1)
    return model, fake, copy.deepcopy(model)  # teacher, fake score, student


def test_gradients_reach_the_student_alone_and_the_fake_step_the_fake_score_alone():
    (teacher, fake, student), g = networks(), torch.Generator().manual_seed(0)
    x0, text, eps = torch.randn(2, 6, 8, 8, 8), torch.randn(2, 16, 64), torch.randn(2, 6, 8, 8, 8)
    t = clip_times(2, 6, student.schedule, g, "cpu")
    x0_hat = student_x0(student, x0, text, g)
    predict = lambda net: lambda x_t: net.schedule.x0(x_t, net(x_t, t, text), t)
    loss, _ = dmd_loss(x0_hat, predict(teacher), predict(fake), student.schedule, t, eps)
    loss.backward()
    assert all(p.grad is None for net in (teacher, fake) for p in net.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())

    student.zero_grad(set_to_none=True)
    before = [copy.deepcopy(net.state_dict()) for net in (teacher, student, fake)]
    optimise(adamw(fake.parameters(), 1e-3), flow_matching_loss(fake, x0_hat.detach(), t, text, g))
    same = [
        all(torch.equal(v, net.state_dict()[k]) for k, v in old.items())
        for net, old in zip((teacher, student, fake), before)
    ]
    assert same == [True, True, False]
    assert all(p.grad is None for net in (teacher, student) for p in net.parameters())


def test_one_time_per_clip_and_clean_chunks_stay_as_they_are():
    t = clip_times(50, 6, Schedule(shift=3.0), torch.Generator().manual_seed(0), "cpu")
    assert (t == t[:, :1]).all()
    assert t.std() > 0.1
    assert t.min() > 0
    assert t.max() < 1
    _, _, student = networks()
    x0 = torch.randn(40, 6, 8, 8, 8)
    x0_hat = student_x0(student, x0, torch.randn(40, 16, 64), torch.Generator().manual_seed(0))
    kept = (x0_hat == x0).flatten(2).all(2)
    assert 0.1 < kept.float().mean() < 0.3
    assert torch.equal(kept[:, 0], kept[:, 2])


def test_a_rollout_is_what_the_student_samples_where_no_chunk_stops_early(monkeypatch):
    _, _, student = networks()
    text, frames = torch.randn(2, 16, 64), 15
    noise = torch.randn(2, frames, 8, 8, 8)
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size, generator: torch.full(size, high - 1)
    )
    rolled = rollout(
        student, noise, student.schedule.timesteps(4), text, torch.Generator().manual_seed(0)
    )

    chunks, draws = iter(noise.split(3, dim=1)), iter(range(10**6))
    randn, g = (
        torch.randn,
        torch.Generator().manual_seed(0),
    )  # the stream's first draw of each chunk is the rollout's noise
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *size, generator: (
            next(chunks) if next(draws) % 4 == 0 else randn(*size, generator=g)
        ),
    )
    decoder = type("", (), {"decode": lambda self, latents, state: latents})()
    source = stream(student, decoder, text, None)
    assert torch.equal(rolled, torch.cat([next(source)[0] for _ in range(frames // 3)], dim=1))


def test_a_rollout_takes_the_gradient_through_one_step_of_each_chunk_and_not_through_its_past():
    _, _, student = networks()
    text, noise = torch.randn(1, 16, 64), torch.randn(1, 9, 8, 8, 8, requires_grad=True)
    calls = []
    student.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x0_hat = rollout(
        student, noise, student.schedule.timesteps(4), text, torch.Generator().manual_seed(0)
    )
    assert sum(calls) == 3
    assert len(calls) > 6
    x0_hat[:, 6:].square().sum().backward()
    assert not noise.grad[:, :6].any()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
