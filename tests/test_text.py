import torch
from conftest import PROMPT

from text import TextEncoder


def test_case_punctuation_and_spaces_do_not_count():
    a, b = TextEncoder()(["A red circle,  spinning.", "a red circle spinning"])
    assert torch.equal(a, b)


def test_a_word_is_encoded_by_itself_and_its_place():
    a, b = TextEncoder()(["a red circle spinning", "a red circle"])
    assert torch.allclose(a[:3], b[:3], atol=1e-6)
    assert not torch.allclose(a[3], b[3])


def test_prompts_are_padded_with_zeros():
    prompt, null = TextEncoder()(["a red circle", ""])
    assert prompt[:3].any(dim=1).all()
    assert not prompt[3:].any()
    assert not null.any()


def test_words_that_share_their_end_differ():
    one, other = TextEncoder()(["clockwise", "counterclockwise"])[:, 0]
    assert not torch.allclose(one, other)


def test_long_and_strange_prompts_are_cut_not_refused():
    prompts = ["a " * 100, "\u00e9\u6f22\u5b57 " + "x" * 300, PROMPT]
    assert TextEncoder()(prompts).shape == (3, 16, 64)
