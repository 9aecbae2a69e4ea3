import torch
from torch.nn import functional as F

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


def test_positions_stay_in_the_window():
    cache = small_cache()
    assert [cache.frames for _ in put_chunks(cache, 6)] == [0, 2, 4, 4, 4, 4]
    assert cache.frames == 4
