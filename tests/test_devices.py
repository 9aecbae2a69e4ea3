"""Devices without float64, such as Apple's MPS: the meta device refuses it in their place."""

import pytest
import torch
from conftest import tiny_model, tiny_vae
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sample import denoise_chunk, remember_chunk

WIDE = (torch.float64, torch.complex128)


class RefuseDoublePrecision(TorchDispatchMode):
    """Raises for every operation that makes a tensor of double precision off the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.device.type == "meta" and tensor.dtype in WIDE:
                raise TypeError(f"{func} makes double precision")
        return out


@torch.no_grad()
def test_a_chunk_is_denoised_without_double_precision_on_the_device():
    model, vae = tiny_model(window=2).to("meta"), tiny_vae().to("meta")
    keys = model.text_keys(torch.randn(1, 16, 64, device="meta"))
    cache, state = model.new_cache(1, 8, 8), {}
    with RefuseDoublePrecision():
        for _ in range(3):  # the cache is full, and evicts
            x = torch.randn(1, 3, 8, 8, 8, device="meta")
            times = model.schedule.timesteps(4)
            noise = torch.randn(x.shape).to("meta")
            x0 = denoise_chunk(model, x, times, keys, cache, lambda shape, noise=noise: noise)
            remember_chunk(model, x0, keys, cache)
            assert vae.decode(x0, state).device.type == "meta"


def test_the_refusal_itself_works():
    with RefuseDoublePrecision(), pytest.raises(TypeError, match="double"):
        torch.zeros(1, device="meta").double()
