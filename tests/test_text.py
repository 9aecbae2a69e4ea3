import torch

from text import TextEncoder


def test_encodes_words_and_pads_with_zeros():
    torch.manual_seed(0)
    encoder = TextEncoder()
    a, b, c, null = encoder(
        ["A red circle,  spinning", "a red circle spinning", "a red circle", ""]
    )
    assert torch.equal(a, b)  # case, punctuation and spaces do not count
    assert torch.allclose(b[:3], c[:3], atol=1e-6)
    assert not c[3:].any()
    assert not null.any()
    assert not torch.allclose(*encoder(["clockwise", "counterclockwise"])[:, 0])


def test_long_and_strange_prompts_are_cut_not_refused():
    assert TextEncoder()(["a " * 100, "é漢字 " + "x" * 300]).shape == (2, 16, 64)
