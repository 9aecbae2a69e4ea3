import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attention import (
    KVCache,
    attend,
    attend_chunks,
    block_causal_mask,
    rope,
    rope_angles,
    rotate,
)


def test_mask_equals_the_formula():
    for T in (1, 2, 5, 7, 12, 21):
        for k in (1, 2, 3, 5, 30):
            for W in (None, 1, 2, 3):
                mask = block_causal_mask(T, k, W)
                for i in range(T):
                    for j in range(T):
                        expected = j // k <= i // k and (W is None or i // k - j // k < W)
                        assert mask[i, j] == expected, (T, k, W, i, j)


def test_chunks_equal_masked_attention():
    for T, k, W in ((7, 3, None), (7, 3, 2), (6, 1, 3), (5, 5, None), (8, 2, 1)):
        q, key, v = torch.randn(3, 2, T * 4, 2, 8, dtype=torch.float64)
        mask = block_causal_mask(T, k, W).repeat_interleave(4, 0).repeat_interleave(4, 1)
        heads = (x.transpose(1, 2) for x in (q, key, v))
        expected = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
        assert torch.allclose(attend_chunks(q, key, v, 4 * k, W), expected, atol=1e-12)


def test_rope_depends_on_distance_alone():
    q, k, v = torch.randn(3, 1, 24, 2, 22, dtype=torch.float64)
    outputs = []
    for start in (0, 5, -3):
        table = rope(22, 4, 2, 3, start, torch.float64, "cpu")
        outputs.append(attend(rotate(q, table), rotate(k, table), v))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-12)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-12)


def test_rope_shares_a_heads_channels_out_as_wan_does():
    angles = rope_angles(128, 2, 2, 2)
    assert angles.shape == (8, 64)
    assert (angles[4] != 0).sum() == 22  # pairs of time, of 44 channels
    assert (angles[2] != 0).sum() == 21  # of height


def put_chunks(cache, count):
    """Put chunks of 2 frames whose keys and values are their number: what each then sees."""
    for chunk in range(count):
        yield cache.put(0, *torch.full((2, 1, 2, 1, 6), float(chunk)))[1][0, :, 0, 0].tolist()
        cache.commit(2)


def small_cache():
    return KVCache(layers=1, batch=1, chunk=2, window=3, height=1, width=1, heads=1, head_dim=6)


def test_a_chunk_sees_itself_and_the_window_before_it():
    for chunk, seen in enumerate(put_chunks(small_cache(), 10)):
        assert seen == [c for c in range(max(0, chunk - 2), chunk + 1) for _ in range(2)]


def test_a_cache_has_constant_size():
    cache = small_cache()
    sizes = {cache.k.numel() + cache.v.numel() for _ in put_chunks(cache, 10)}
    assert sizes == {2 * 3 * 2 * 6}


def test_the_past_stays_in_the_window_and_time_goes_on():
    cache = small_cache()
    counts = [(cache.frames, cache.evicted) for _ in put_chunks(cache, 6)]
    assert counts == [(0, 0), (2, 0), (4, 0), (4, 2), (4, 4), (4, 6)]


def test_keys_that_are_kept_do_not_change():
    """bf16 keys that were turned back at each eviction lost precision."""
    cache = small_cache()
    cache.k, cache.v = cache.k.bfloat16(), cache.v.bfloat16()
    k = torch.randn(1, 4, 1, 6).bfloat16()
    for _ in range(3):
        cache.put(0, k[:, :2], k[:, 2:])
        cache.commit(2)
    assert torch.equal(cache.k[0, :, :2], k[:, :2])
    assert torch.equal(cache.k[0, :, 2:4], k[:, :2])


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest new tensor has."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if torch.is_tensor(made) and not any(x is made for x in args) and not made._is_view():
            self.count = max(self.count, made.numel())
        return made


def test_an_eviction_needs_the_memory_of_one_layer():
    cache = KVCache(layers=5, batch=1, chunk=2, window=3, height=1, width=1, heads=1, head_dim=6)
    for _ in range(2):
        cache.commit(2)
    with Largest() as largest:
        cache.commit(2)
    assert 0 < largest.count <= cache.k[0].numel()


def test_angles_far_along_a_stream_are_as_exact_as_at_its_start():
    table = rope(22, 2, 2, 3, 10**6, torch.float32, torch.device("cpu"))
    angles = rope_angles(22, 2, 2, 3, 10**6)
    assert (table[:, 0, :, 0] - angles.cos()).abs().max() < 1e-6
    assert (table[:, 0, :, 1] - angles.sin()).abs().max() < 1e-6


def test_rotation_is_the_same_in_real_numbers(monkeypatch):
    x, table = torch.randn(1, 12, 2, 22), rope(22, 2, 2, 3, 5, torch.float32, torch.device("cpu"))
    turned = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(rotate(x, table), turned, atol=1e-6)
