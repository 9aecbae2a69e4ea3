import math

import pytest
import torch
from conftest import tiny_model
from torch.nn import functional as F

from attention import block_causal_mask
from model import ModelConfig

SMALL = {"dim": 24, "in_dim": 3, "out_dim": 3, "num_heads": 2, "num_layers": 3, "text_dim": 10}


def small_model(dtype=torch.float64, **fields):
    """A small model with weights that let everything through."""
    model = tiny_model(**SMALL | fields)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).requires_grad_(False)


def clip(T, dtype=torch.float64):
    """Latents, times and text of two clips of T latent frames."""
    x, t = torch.randn(2, T, 3, 4, 6, dtype=dtype), torch.rand(2, T, dtype=dtype)
    return x, t, torch.randn(2, 5, 10, dtype=dtype)


@pytest.mark.parametrize("changed", ["x", "t"])
@pytest.mark.parametrize(("T", "k", "W"), [(7, 3, None), (6, 2, 2), (4, 1, None)])
def test_future_never_reaches_the_past(T, k, W, changed):
    model, (x, t, text) = small_model(), clip(T)
    before = model(x, t, text, chunk=k, window=W)
    for start in range(0, T, k):
        own = slice(start, start + k)
        x2, t2 = x.clone(), t.clone()
        if changed == "x":
            x2[:, own] += 1
        else:
            t2[:, own] = torch.rand_like(t2[:, own])
        after = model(x2, t2, text, chunk=k, window=W)
        assert torch.equal(after[:, :start], before[:, :start])
        assert not torch.allclose(after[:, own], before[:, own])


def reaches(frame, other, chunk):
    """Whether a change of latent frame `frame` shows in what the model makes of frame `other`."""
    model, (x, t, text) = small_model(), clip(6)
    before = model(x, t, text, chunk=chunk)[:, other]
    x[:, frame] += 1
    return not torch.allclose(model(x, t, text, chunk=chunk)[:, other], before)


def test_within_a_chunk_frames_see_each_other():
    assert reaches(3, 5, chunk=3)
    assert reaches(5, 3, chunk=3)


def test_without_chunks_all_frames_see_each_other():
    assert reaches(0, 5, chunk=None)
    assert reaches(5, 0, chunk=None)


def masked_reference(model, x, t, text, chunk, window, monkeypatch):
    """The whole clip in one pass, by the mask."""
    tokens = (x.shape[3] // 2) * (x.shape[4] // 2)
    mask = block_causal_mask(x.shape[1], chunk, window)
    mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def attend(q, k, v, *_):
        heads = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr("attention.attend_chunks", attend)
        return model(x, t, text, chunk=chunk)


every_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)]
)
every_window = pytest.mark.parametrize(
    ("T", "k", "W"),
    [(6, 1, None), (6, 2, None), (7, 3, None), (8, 1, 3), (10, 2, 2), (15, 3, 3), (9, 3, 1)],
)


@every_dtype
@every_window
def test_the_full_forward_obeys_the_mask(T, k, W, dtype, tolerance, monkeypatch):
    model, (x, t, text) = small_model(dtype), clip(T, dtype)
    full = masked_reference(model, x, t, text, k, W, monkeypatch)
    assert (model(x, t, text, chunk=k, window=W) - full).abs().max() < tolerance


@every_dtype
@every_window
def test_the_cache_equals_the_full_forward(T, k, W, dtype, tolerance, monkeypatch):
    model, (x, t, text) = small_model(dtype, chunk=k), clip(T, dtype)
    full = masked_reference(model, x, t, text, k, W, monkeypatch)
    cache = model.new_cache(2, 4, 6, window=W or math.ceil(T / k))
    keys, parts = model.text_keys(text), []
    for part, time in zip(x.split(k, dim=1), t.split(k, dim=1), strict=True):
        model(part + 1, time, keys, cache=cache)  # a pass that leaves no trace
        parts.append(model(part, time, keys, cache=cache))
        cache.commit(part.shape[1])
    assert (torch.cat(parts, dim=1) - full).abs().max() < tolerance


def test_dropped_frames_leave_no_trace_in_the_cache(monkeypatch):
    model, (x, t, text) = small_model(chunk=1), clip(9)
    full = masked_reference(model, x, t, text, 1, 3, monkeypatch)
    cache, keys = model.new_cache(2, 4, 6, window=3, ahead=4), model.text_keys(text)
    start = 0
    for kept, dropped in ((1, 3), (2, 2), (4, 0), (1, 0), (1, 3)):
        own = slice(start, start + kept)
        other, late, _ = clip(dropped)
        made, times = torch.cat([x[:, own], other], dim=1), torch.cat([t[:, own], late], dim=1)
        v = model(made, times, keys, cache=cache)[:, :kept]
        assert (v - full[:, own]).abs().max() < 1e-10
        cache.commit(kept)
        start += kept


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_stream_goes_on_behind_the_frames_that_a_table_of_wan_ends_at(dtype, tolerance):
    """The release's rotary table ends at latent frame 1,023."""
    model, (x, t, text) = small_model(dtype, chunk=1), clip(6, dtype)
    keys, made = model.text_keys(text), []
    for evicted in (0, 1020, 10**6):
        cache, parts = model.new_cache(2, 4, 6, window=3), []
        cache.evicted = evicted
        for part, time in zip(x.split(1, dim=1), t.split(1, dim=1), strict=True):
            parts.append(model(part, time, keys, cache=cache))
            cache.commit(1)
        made.append(torch.cat(parts, dim=1))
    assert (made[0] - made[1]).abs().max() < tolerance
    assert (made[0] - made[2]).abs().max() < tolerance


@torch.no_grad()
def test_to_remember_leaves_what_a_whole_pass_leaves_in_the_cache():
    model, (x, _, text) = small_model(), clip(3)
    keys, caches = model.text_keys(text), [model.new_cache(2, 4, 6) for _ in range(2)]
    model(x, 0.0, keys, cache=caches[0])
    ran = []
    model.blocks[-1].ffn.register_forward_hook(lambda *_: ran.append(1))
    assert model(x, 0.0, keys, cache=caches[1], remember=True) is None
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)
    assert not ran


def test_one_number_is_a_time_for_all_frames():
    model, (x, _, text) = small_model(), clip(4)
    each = torch.full((2, 4), 0.3, dtype=torch.float64)
    assert (model(x, 0.3, text) - model(x, each, text)).abs().max() < 1e-6  # t is in float32


@torch.no_grad()
def test_a_stream_embeds_each_of_its_times_once():
    model, (x, _, text) = small_model(), clip(3)
    cache, keys, embedded = model.new_cache(2, 4, 6), model.text_keys(text), []
    model.time_embedding.register_forward_hook(lambda *_: embedded.append(1))
    for _ in range(3):
        for t in (1.0, 0.5, 0.0):
            model(x, t, keys, cache=cache)
    assert len(embedded) == 3


def test_a_time_under_gradients_is_embedded_anew():
    model, (x, _, text) = small_model().requires_grad_(True), clip(3)
    cache = model.new_cache(2, 4, 6)
    model(x, 0.5, text, cache=cache).sum().backward()
    assert model.time_embedding[0].weight.grad is not None
    assert not cache.times


@torch.no_grad()
def test_what_is_compiled_are_the_passes_behind_a_full_window(monkeypatch):
    model, (x, _, text) = small_model(chunk=1), clip(1)
    keys, run, whole = model.text_keys(text), model.run_blocks, []

    def noted(*args):
        whole.append(cache.frames)
        return run(*args)

    monkeypatch.setattr(torch, "compile", lambda function, **_: noted)
    model.compile_stream()
    cache = model.new_cache(2, 4, 6, window=3)
    for _ in range(5):
        model(x, 0.5, keys, cache=cache)
        cache.commit(1)
    assert whole == [2, 2, 2]


def test_a_frame_embedding_reaches_its_frame_and_later_ones():
    model, (x, t, text) = small_model(), clip(5)
    frame = torch.zeros(2, 5, 24, dtype=torch.float64)
    before = model(x, t, text, chunk=1)
    assert torch.equal(model(x, t, text, chunk=1, frame=frame), before)
    frame[:, 2] = 1
    after = model(x, t, text, chunk=1, frame=frame)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not any(torch.allclose(after[:, f], before[:, f]) for f in (2, 3, 4))


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


@pytest.mark.parametrize("field", ["num_heads", "num_layers", "chunk", "window", "steps"])
def test_a_count_below_1_is_refused(field):
    with pytest.raises(ValueError, match="from 1 to"):
        ModelConfig(**{field: 0})


@pytest.mark.parametrize(("dim", "heads"), [(16, 3), (18, 6)])
def test_a_width_that_does_not_split_into_heads_is_refused(dim, heads):
    with pytest.raises(ValueError, match="heads of even width"):
        ModelConfig(dim=dim, num_heads=heads)
