import copy
import functools
import itertools

import pytest
import torch
from conftest import generator, tiny_model, tiny_run, tiny_vae

from diffusion import Schedule, noise_source
from dmd import Distillation, clip_times, dmd_loss, rollout, rollout_x0, student_x0
from optimisers import adamw, optimise
from sample import denoise_chunk, stream

MEAN, STD = 1.5, 0.6  # of the data


# ---------------------------------------------------------------------------------------- the loss
def posterior_mean(mean, std, t):
    """E[x0 | x_t] of data N(mean, std^2)."""

    def x0(x_t):
        sigma = t.reshape(*t.shape, *[1] * (x_t.ndim - t.ndim))
        alpha = 1 - sigma
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)

    return x0


@pytest.mark.parametrize("time", [0.3, 0.7, 0.95])
def test_gradient_is_that_of_the_kl_up_to_the_documented_weight(time):
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.2, 0.4))
    z, eps = torch.randn(2, 1, 1, 1, 1, 400_000, generator=generator(), dtype=torch.float64)
    t = torch.full((1, 1), time, dtype=torch.float64)
    real, fake = posterior_mean(MEAN, STD, t), posterior_mean(b.item(), a.item(), t)
    loss, distance = dmd_loss(a * z + b, real, fake, Schedule(), t, eps)
    alpha, sigma = 1 - time, torch.tensor(time, dtype=torch.float64)

    def noised(mean, std):
        return torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt())

    kl = torch.distributions.kl_divergence(noised(b, a), noised(MEAN, torch.tensor(STD)))
    # s_fake - s_real to x0 is sigma^2 / alpha, d x_t / d x0_hat is alpha
    weight = sigma**2 / alpha**2 / distance
    expected, measured = torch.autograd.grad(kl, (a, b)), torch.autograd.grad(loss, (a, b))
    for e, m in zip(expected, measured, strict=True):
        assert m.item() == pytest.approx((weight * e).item(), rel=0.02, abs=2e-3)


def test_training_brings_mean_and_variance_to_the_data():
    """A linear generator, and a fake score that is trained online on its outputs, 5 to 1."""
    schedule = Schedule()
    a, b = (torch.nn.Parameter(torch.tensor(x)) for x in (1.5, -1.0))
    fake_mean, fake_log_std = (torch.nn.Parameter(torch.tensor(x)) for x in (-1.0, 0.4))
    student_optimizer = adamw([a, b], 0.03, betas=(0.0, 0.99))
    fake_optimizer = adamw([fake_mean, fake_log_std], 0.05, betas=(0.0, 0.99))
    for i in range(2500):
        x0_hat = a * torch.randn(64, 1, 1, 1, 64) + b
        t = 0.02 + 0.96 * torch.rand(64, 1)
        real = posterior_mean(MEAN, STD, t)
        fake = posterior_mean(fake_mean, fake_log_std.exp(), t)
        if i % 5 == 0:
            eps = torch.randn_like(x0_hat)
            optimise(student_optimizer, dmd_loss(x0_hat, real, fake, schedule, t, eps)[0])
        x0 = x0_hat.detach()
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
        optimise(fake_optimizer, (fake(x_t) - x0).square().mean())
    assert b.item() == pytest.approx(MEAN, abs=0.1)
    assert abs(a.item()) == pytest.approx(STD, abs=0.1)


# --------------------------------------------------------------------------- what the student makes
def random_text(count):
    return torch.randn(count, 16, 64)


def test_each_clip_has_one_time_for_all_of_its_frames():
    t = clip_times(50, 6, Schedule(shift=3.0), generator())
    assert t.shape == (50, 6)
    assert (t == t[:, :1]).all()


def test_times_of_clips_differ_and_are_never_0_or_1():
    t = clip_times(50, 6, Schedule(shift=3.0), generator())
    assert t.std() > 0.1
    assert t.min() > 0
    assert t.max() < 1


def kept_frames(**fields):
    """Which frames [40, 6] of clips the student leaves as they are."""
    x0 = torch.randn(40, 6, 8, 8, 8)
    x0_hat = student_x0(tiny_model(**fields), x0, random_text(40), generator())
    return (x0_hat == x0).flatten(2).all(2)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_share_of_the_chunks_is_clean_and_stays_as_it_is(steps):
    share = kept_frames(steps=steps).float().mean()
    assert abs(share - 1 / (steps + 1)) < 0.12


def test_a_chunk_stays_as_it_is_as_a_whole():
    kept = kept_frames(chunk=3)
    assert torch.equal(kept[:, 0], kept[:, 2])


def test_a_rollout_is_what_is_sampled_if_no_chunk_stops_early():
    student, noise = tiny_model(), torch.randn(2, 15, 8, 8, 8)
    keys = student.text_keys(random_text(2))
    times = student.schedule.timesteps(4)

    def stops(seed):
        return torch.randint(1, 5, (5,), generator=generator(seed))

    seed = next(seed for seed in itertools.count() if stops(seed).eq(4).all())
    cache = student.new_cache(2, 8, 8)
    rolled = rollout(student, noise, times, lambda frames: keys, generator(seed), cache)

    replay = generator(seed)
    torch.randint(1, 5, (5,), generator=replay)  # the rollout's first draw
    starts = ((chunk, times, None) for chunk in noise.split(3, dim=1))
    denoise = functools.partial(denoise_chunk, student, noise=noise_source(replay))
    cache = student.new_cache(2, 8, 8)
    source = stream(student, tiny_vae(), lambda frames: keys, starts, cache, denoise)
    assert torch.equal(rolled, torch.cat([x0 for x0, _ in source], dim=1))


@pytest.fixture
def rolled():
    """A rollout of 3 chunks: (student, noise, x0_hat, for each pass whether it has a gradient)."""
    student, noise = tiny_model(), torch.randn(1, 9, 8, 8, 8, requires_grad=True)
    calls = []
    student.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    keys, cache = student.text_keys(random_text(1)), student.new_cache(1, 8, 8)
    times = student.schedule.timesteps(4)
    x0_hat = rollout(student, noise, times, lambda frames: keys, generator(), cache)
    return student, noise, x0_hat, calls


def test_a_rollout_takes_the_gradient_through_one_pass_a_chunk(rolled):
    *_, calls = rolled
    assert sum(calls) == 3
    assert len(calls) > 6


def test_no_gradient_flows_from_a_chunk_into_its_past(rolled):
    _, noise, x0_hat, _ = rolled
    x0_hat[:, 6:].square().sum().backward()
    assert not noise.grad[:, :6].any()


def test_the_gradient_of_a_rollout_reaches_the_student(rolled):
    student, _, x0_hat, _ = rolled
    x0_hat[:, 6:].square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_rollout_goes_on_from_the_past_in_its_cache():
    student, noise = tiny_model(), torch.randn(1, 6, 8, 8, 8)
    keys, times = student.text_keys(random_text(1)), torch.tensor([1.0, 0.0])

    def roll(noise, cache):
        return rollout(student, noise, times, lambda frames: keys, generator(), cache)

    whole, cache = roll(noise, student.new_cache(1, 8, 8)), student.new_cache(1, 8, 8)
    parts = [roll(half, cache) for half in noise.split(3, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_rollout_from_noise_takes_the_steps_of_the_students_config(steps):
    student, seen = tiny_model(steps=steps), set()
    student.register_forward_hook(lambda model, inputs, v: seen.add(float(inputs[1])))
    rollout_x0(student, torch.zeros(1, 36, 8, 8, 8), random_text(1), generator())
    assert seen == set(student.schedule.timesteps(steps).tolist())


# -------------------------------------------------------------------------------------- Algorithm 1
X0, TEXT = torch.randn(2, 6, 8, 8, 8, generator=generator(1)), torch.ones(2, 16, 64)
NETWORKS = ("student", "fake", "teacher")


def distillation(causal_scores=False, generate=student_x0):
    """One that updates the student at every third step; its fake score has left the teacher."""
    parts = (tiny_model(), tiny_model(window=2), generate, tiny_run())
    distill = Distillation(*parts, 2.0, 3, causal_scores)
    torch.nn.init.normal_(distill.fake.head.head.weight, std=0.1)
    return distill


def changed_by(distill, update):
    """The names of the networks whose weights a function changes."""
    before = {name: copy.deepcopy(getattr(distill, name).state_dict()) for name in NETWORKS}
    update()
    return {
        name
        for name, old in before.items()
        if any(not torch.equal(v, old[k]) for k, v in getattr(distill, name).state_dict().items())
    }


def with_gradients(distill):
    """The names of the networks that hold gradients."""
    return {
        n for n in NETWORKS if any(p.grad is not None for p in getattr(distill, n).parameters())
    }


def updates(**options):
    """What each of 7 steps changes, where the student is due at every third."""
    distill, g = distillation(**options), generator()
    return [changed_by(distill, lambda i=i: distill.step(i, X0, TEXT, g)) for i in range(7)]


@pytest.mark.parametrize("generate", [student_x0, rollout_x0])
def test_the_student_is_updated_at_every_fake_updates_th_step(generate):
    due = ["student" in changed for changed in updates(generate=generate)]
    assert due == [True, False, False, True, False, False, True]


def test_the_fake_score_is_updated_at_every_step():
    assert all("fake" in changed for changed in updates())


def test_the_teacher_is_never_updated():
    assert not any("teacher" in changed for changed in updates())


def test_what_is_shipped_is_an_average_of_the_student():
    distill = distillation()
    before = {k: v.clone() for k, v in distill.ema.shadow.items()}
    distill.step(0, X0, TEXT, generator())
    assert any(not torch.equal(v, before[k]) for k, v in distill.ema.shadow.items())


def test_a_student_update_changes_the_student_alone():
    distill, g = distillation(), generator()
    x0_hat = student_x0(distill.student, X0, TEXT, g)
    t = clip_times(2, 6, distill.student.schedule, g)
    assert changed_by(distill, lambda: distill.update_student(x0_hat, t, TEXT, g)) == {"student"}


def test_a_student_update_leaves_gradients_in_the_student_alone():
    distill, g = distillation(), generator()
    x0_hat = student_x0(distill.student, X0, TEXT, g)
    distill.update_student(x0_hat, clip_times(2, 6, distill.student.schedule, g), TEXT, g)
    assert with_gradients(distill) == {"student"}


def test_a_fake_update_changes_the_fake_score_alone():
    distill, g = distillation(), generator()
    t = clip_times(2, 6, distill.student.schedule, g)
    assert changed_by(distill, lambda: distill.update_fake(X0, t, TEXT, g)) == {"fake"}


def test_a_fake_update_leaves_gradients_in_the_fake_score_alone():
    distill, g = distillation(), generator()
    x0_hat = student_x0(distill.student, X0, TEXT, g).detach()
    distill.update_fake(x0_hat, clip_times(2, 6, distill.student.schedule, g), TEXT, g)
    assert with_gradients(distill) == {"fake"}


def reach(causal_scores):
    """For teacher and fake score, whether each pass of a step lets frame 0 see frame 5."""
    distill, passes = distillation(causal_scores), {"teacher": [], "fake": []}

    def note(name, network, inputs, options, v):
        with torch.no_grad():
            later = inputs[0].clone()
            later[:, 5] += 1
            seen = network.forward(later, *inputs[1:], **options)
        passes[name].append(not torch.equal(seen[:, 0], v[:, 0]))

    for name in passes:
        hook = functools.partial(note, name)
        getattr(distill, name).register_forward_hook(hook, with_kwargs=True)
    distill.step(0, X0, TEXT, generator())
    return passes


@pytest.mark.parametrize("name", ["teacher", "fake"])
def test_scores_see_the_clip_bidirectionally(name):
    passes = reach(causal_scores=False)[name]
    assert passes
    assert all(passes)


@pytest.mark.parametrize("name", ["teacher", "fake"])
def test_causal_scores_do_not_see_later_chunks(name):
    passes = reach(causal_scores=True)[name]
    assert passes
    assert not any(passes)
