import os
from types import SimpleNamespace

import pytest
import torch
from conftest import generator

from data import MOTIONS, sample_clips
from dataset import SHARES, LatentClips, draw_pieces, encode_clips, kept_in
from nfd_world import sample_walks


# ---------------------------------------------------------------------------------------- batches
@pytest.fixture(scope="module")
def drawn():
    """(data of 2000 clips, x0, prompts) of 20,000 pieces that are whole clips."""
    data = LatentClips.__new__(LatentClips)  # without a VAE: the draw is what is tested
    data.clips, data.latents = sample_clips(2000, generator()), torch.zeros(2000, 21, 1, 1, 1)
    return data, *data.batch(20_000, 21, generator(), "cpu")


def test_a_batch_has_latents_and_prompts(drawn):
    data, x0, prompts = drawn
    assert data.frames == 21
    assert x0.shape == (20_000, 21, 1, 1, 1)
    assert len(prompts) == 20_000


@pytest.mark.parametrize("motion", ["bouncing", "spinning"])
def test_motions_that_are_hard_to_learn_are_drawn_more_often(drawn, motion):
    data, _, prompts = drawn
    words, weights = MOTIONS[motion], SHARES[data.clips.motion]
    expected = weights[data.clips.motion == list(MOTIONS).index(motion)].sum() / weights.sum()
    share = sum(any(word in prompt for word in words) for prompt in prompts) / len(prompts)
    assert abs(share - expected) < 0.02


@pytest.fixture(scope="module")
def pieces():
    """(clip [4000, 1], frame [4000, 24]) of pieces out of 48 frames of 8 clips."""
    return draw_pieces(torch.ones(8), 48, 4000, 24, generator())


def test_a_piece_is_of_neighbouring_frames(pieces):
    _, frame = pieces
    assert frame.shape == (4000, 24)
    assert (frame.diff(dim=1) == 1).all()
    assert frame.min() == 0
    assert frame.max() == 47


def test_half_of_the_pieces_begin_with_the_clip(pieces):
    _, frame = pieces
    assert abs((frame[:, 0] == 0).float().mean() - 0.52) < 0.03


def test_every_clip_is_drawn(pieces):
    assert set(pieces[0].flatten().tolist()) == set(range(8))


# --------------------------------------------------------------------------------- kept in a file
class FakeVAE:
    """Gives the video back as its own latents, and counts the calls."""

    def __init__(self, weight=0.0):
        self.encoder = [None, SimpleNamespace(weight=torch.full((1,), weight))]
        self.mean, self.calls = torch.zeros(1), 0

    def encode(self, video):
        self.calls += 1
        return video


@pytest.fixture
def walks(tmp_path, monkeypatch):
    """Short clips, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return sample_walks(20, 2, generator())


def test_clips_are_encoded_in_their_order(walks):
    assert torch.equal(encode_clips(FakeVAE(), walks), walks.render().bfloat16())


def test_clips_are_encoded_once_and_kept(walks):
    vae = FakeVAE()
    first, calls = encode_clips(vae, walks), vae.calls
    assert torch.equal(encode_clips(vae, walks), first)
    assert vae.calls == calls > 0


def test_latents_of_another_vae_are_kept_in_another_file(walks):
    for weight in (0.0, 1.0):
        encode_clips(FakeVAE(weight), walks)
    assert len(os.listdir("runs/latents")) == 2


def test_latents_of_other_clips_are_kept_in_another_file(walks):
    for clips in (walks, walks[:19], walks[torch.arange(20).roll(1)]):
        encode_clips(FakeVAE(), clips)
    assert len(os.listdir("runs/latents")) == 3


def test_what_is_kept_is_made_only_once(tmp_path):
    path, made = str(tmp_path / "folder" / "x.pt"), []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    for _ in range(2):
        assert torch.equal(kept_in(path, make)["x"], torch.ones(2))
    assert made == [1]
    assert os.listdir(tmp_path / "folder") == ["x.pt"]
