import pytest
import torch
from conftest import generator

from optimisers import (
    EMA,
    Muon,
    adamw,
    optimise,
    orthogonal,
)


def test_average_moves_slowly_to_the_weights():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA(net, decay=0.9)
    net.weight.data.fill_(1.0)
    for i in range(1000, 1010):
        ema.update(net, i)
    assert ema.shadow["weight"].item() == pytest.approx(1 - 0.9**10, rel=1e-4)


def in_singular_vectors(shape):
    """(`orthogonal` of matrices in their own singular vectors, their singular values)."""
    x = torch.randn(3, *shape, generator=generator())
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u.mT @ orthogonal(x) @ vh.mT, s


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonal_keeps_the_singular_vectors(shape):
    out, _ = in_singular_vectors(shape)
    assert (out - torch.diag_embed(out.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonal_evens_out_the_singular_values(shape):
    out, s = in_singular_vectors(shape)
    large = s / s.amax(1, keepdim=True) > 0.05
    assert (out.diagonal(dim1=1, dim2=2)[large] - 0.95).abs().max() < 0.3


@pytest.fixture
def twins():
    """Equal layers after a step of Muon and one of AdamW, and the weight before: (a, b, weight)."""
    layers = [torch.nn.Linear(24, 8) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    before, x = layers[0].weight.detach().clone(), torch.ones(2, 24)
    x = x + torch.randn(2, 24, generator=generator(1))
    muon = Muon(layers[0].parameters(), layers[0].parameters(), 0.1)
    for layer, optimizer in zip(layers, (muon, adamw(layers[1].parameters(), 0.1)), strict=True):
        optimise(optimizer, layer(x).square().sum())
    return *layers, before


def test_muon_moves_what_is_no_matrix_as_adamw_does(twins):
    muon, adam, _ = twins
    assert torch.equal(muon.bias, adam.bias)


def test_muon_moves_a_matrix_otherwise_than_adamw(twins):
    muon, adam, _ = twins
    assert not torch.allclose(muon.weight, adam.weight)


def test_muon_moves_no_direction_farther_than_the_others(twins):
    muon, _, before = twins
    moved = (before - muon.weight.detach()) / (0.1 * 0.2 * 24**0.5)
    assert torch.linalg.matrix_norm(moved, 2) < 1.3
