import itertools
import math

import pytest
import torch

from attention import block_causal_mask
from diffusion import Schedule
from model import DiT, ModelConfig
from weights import UserError, load_model, save_weights

SMALL = {
    "dim": 24,
    "ffn_dim": 20,
    "freq_dim": 16,
    "in_dim": 3,
    "out_dim": 3,
    "num_heads": 2,
    "num_layers": 3,
    "text_dim": 10,
}


def small_model(dtype=torch.float64, **config):
    """A small DiT with weights that let everything through, its head included."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(**SMALL | config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def clip(T, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, T, 3, 4, 6, generator=g, dtype=dtype),
        torch.rand(2, T, generator=g, dtype=dtype),
        torch.randn(2, 5, 10, generator=g, dtype=dtype),
    )


@pytest.mark.parametrize(("T", "k", "W"), [(7, 3, None), (6, 2, 2), (4, 1, None)])
def test_future_never_reaches_the_past(T, k, W):
    model, (x, t, text) = small_model(), clip(T)
    before = model(x, t, text, chunk=k, window=W)
    for c in range(math.ceil(T / k)):
        for changed in ("x", "t"):
            x2, t2 = x.clone(), t.clone()
            if changed == "x":
                x2[:, c * k : (c + 1) * k] += 1
            else:
                t2[:, c * k : (c + 1) * k] = torch.rand_like(t2[:, c * k : (c + 1) * k])
            after = model(x2, t2, text, chunk=k, window=W)
            assert torch.equal(after[:, : c * k], before[:, : c * k])
            assert not torch.allclose(after[:, c * k : (c + 1) * k], before[:, c * k : (c + 1) * k])


def test_both_directions_matter_within_a_chunk_and_everywhere_without_chunks():
    model, (x, t, text) = small_model(), clip(6)
    for frame, other, chunk in ((3, 5, 3), (5, 3, 3), (0, 5, None), (5, 0, None)):
        x2 = x.clone()
        x2[:, frame] += 1
        assert not torch.allclose(
            model(x2, t, text, chunk=chunk)[:, other], model(x, t, text, chunk=chunk)[:, other]
        )


def masked_reference(model, x, t, text, chunk, window, monkeypatch):
    """The whole clip in one pass, by the mask."""
    tokens = (x.shape[3] // 2) * (x.shape[4] // 2)
    mask = (
        block_causal_mask(x.shape[1], chunk, window)
        .repeat_interleave(tokens, 0)
        .repeat_interleave(tokens, 1)
    )

    def attend(q, k, v, *_):
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(
            1, 2
        )

    with monkeypatch.context() as patch:
        patch.setattr("attention.attend_chunks", attend)
        return model(x, t, text, chunk=chunk)


def cached(model, x, t, text, chunk, window):
    """The clip chunk by chunk, through the cache."""
    cache, keys, parts = (
        model.new_cache(2, 4, 6, chunk=chunk, window=window),
        model.text_keys(text),
        [],
    )
    for part, time in zip(x.split(chunk, dim=1), t.split(chunk, dim=1)):
        model(
            part + 1, time, keys, chunk=chunk, window=window, cache=cache
        )  # a pass that leaves no trace
        parts.append(model(part, time, keys, chunk=chunk, window=window, cache=cache))
        cache.commit(part.shape[1])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("T", "k", "W"),
    [(6, 1, None), (6, 2, None), (7, 3, None), (8, 1, 3), (10, 2, 2), (15, 3, 3), (9, 3, 1)],
)
def test_cache_equals_the_full_forward(T, k, W, dtype, tolerance, monkeypatch):
    model, (x, t, text) = small_model(dtype), clip(T, dtype)
    full = masked_reference(model, x, t, text, k, W, monkeypatch)
    assert (model(x, t, text, chunk=k, window=W) - full).abs().max() < tolerance
    assert (cached(model, x, t, text, k, W or math.ceil(T / k)) - full).abs().max() < tolerance


def test_frames_ahead_that_are_dropped_leave_no_trace_in_the_cache(monkeypatch):
    model, (x, t, text) = small_model(), clip(9)
    full = masked_reference(model, x, t, text, 1, 3, monkeypatch)
    cache, keys, start = (
        model.new_cache(2, 4, 6, chunk=1, window=3, ahead=4),
        model.text_keys(text),
        0,
    )
    for kept, dropped in ((1, 3), (2, 2), (4, 0), (1, 0), (1, 3)):
        made = torch.cat(
            [x[:, start : start + kept], torch.randn(2, dropped, *x.shape[2:], dtype=x.dtype)],
            dim=1,
        )
        times = torch.cat(
            [t[:, start : start + kept], torch.rand(2, dropped, dtype=x.dtype)], dim=1
        )
        v = model(made, times, keys, chunk=1, window=3, cache=cache)[:, :kept]
        assert (v - full[:, start : start + kept]).abs().max() < 1e-10
        cache.commit(kept)
        start += kept


def test_an_action_reaches_its_frame_and_what_comes_after():
    model, (x, t, text) = small_model(num_actions=3), clip(5)
    actions = torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 2, 2]])
    before = model(x, t, text, chunk=1, actions=actions)
    other = actions.clone()
    other[:, 2] = 1
    after = model(x, t, text, chunk=1, actions=other)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not any(torch.allclose(after[:, f], before[:, f]) for f in (2, 3, 4))
    with pytest.raises(ValueError, match="needs actions"):
        model(x, t, text, chunk=1)
    with pytest.raises(ValueError, match="needs none"):
        small_model()(x, t, text, chunk=1, actions=actions)


def test_times_are_per_frame():
    model, (x, t, text) = small_model(), clip(4)
    t2 = t.clone()
    t2[:, 2] = 0.9
    assert not torch.allclose(model(x, t, text)[:, 2], model(x, t2, text)[:, 2])


def test_latents_that_do_not_fit_are_refused():
    model, (x, t, text) = small_model(), clip(4)
    with pytest.raises(ValueError, match="channels"):
        model(x[:, :, :2], t, text)
    with pytest.raises(ValueError, match="patch"):
        model(x[..., :5], t, text)


def test_weights_file_round_trip_and_refusals(tmp_path):
    model, path = DiT(ModelConfig(**SMALL)), str(tmp_path / "w.safetensors")
    save_weights(path, model.state_dict(), model.config, stage="test")
    loaded = load_model(DiT, path)
    assert loaded.config == model.config
    assert all(
        torch.equal(a.bfloat16().float(), b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values())
    )
    save_weights(path, DiT(ModelConfig(**SMALL | {"dim": 48})).state_dict(), model.config)
    with pytest.raises(UserError, match="do not fit"):
        load_model(DiT, path)


# ------------------------------------------------------------------------------------------------------------ schedule
SCHEDULES = [Schedule(), Schedule(shift=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ode_steps_recover_the_closed_form_on_a_gaussian(schedule):
    mean, std = 1.5, 0.5
    start = torch.randn(1000, dtype=torch.float64)  # at t = 1 the marginal is N(0, 1)
    x, times = start, schedule.timesteps(500)
    for t, r in itertools.pairwise(times):
        x = schedule.step(x, gaussian_v(schedule, mean, std, x, t), t, r)
    assert (x - (mean + std * start)).abs().max() < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_is_the_gradient_of_the_log_density(schedule):
    mean, std = -0.7, 1.3
    for t in (0.1, 0.5, 0.9):
        x = torch.linspace(-3, 3, 11, dtype=torch.float64, requires_grad=True)
        alpha, sigma = 1 - t, t
        density = torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2) ** 0.5)
        (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        assert torch.allclose(schedule.score(x, gaussian_v(schedule, mean, std, x, t), t), gradient)


def test_shift_maps_the_ends_to_themselves_and_student_times():
    assert torch.allclose(
        Schedule(shift=3.0).timesteps(4), torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64)
    )
    assert torch.allclose(
        Schedule().timesteps(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    )
    for start, expected in (
        (0.8, [0.8, 0.75, 0.5, 0]),
        (0.75, [0.75, 0.5, 0]),
        (0.2, [0.2, 0]),
        (0, [0]),
    ):
        assert torch.allclose(
            Schedule(shift=3.0).timesteps(4, start), torch.tensor(expected, dtype=torch.float64)
        )
