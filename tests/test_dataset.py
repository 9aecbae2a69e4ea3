import os

import pytest
import torch
from conftest import full_disk, generator

import data
from data import sample_clips
from dataset import SHARES, LatentClips, draw_pieces, encode_clips, kept_in, training_clips
from nfd_world import sample_walks
from weights import UserError


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


def test_motions_are_drawn_for_training_by_their_shares():
    clips, combinations = training_clips(20_000), data.combinations("train")
    expected = SHARES * combinations[:, 2].bincount()
    drawn = clips.motion.bincount() / len(clips)
    assert (drawn - expected / expected.sum()).abs().max() < 0.01


@pytest.mark.parametrize(
    "kept",
    [
        {"a": 1},
        {"states": torch.ones(2), "prompts": ["a"]},
        {"states": torch.ones(1), "prompts": [3]},
        {"states": ["a"], "prompts": ["a"]},
        {"states": torch.tensor([float("nan")]), "prompts": ["a"]},
        {"states": torch.ones(1, dtype=torch.int8), "prompts": ["a"]},
    ],
)
def test_a_kept_file_that_holds_something_else_is_named(tmp_path, kept):
    torch.save(kept, tmp_path / "x.pt")
    kinds = {"states": torch.Tensor, "prompts": list}
    with pytest.raises(UserError, match=r"x\.pt does not hold states and prompts; delete it"):
        kept_in(str(tmp_path / "x.pt"), kinds, "", 1, None)


@pytest.fixture(scope="module")
def pieces():
    """(clip [4000, 1], frame [4000, 24]) of pieces out of 48 frames of 8 clips."""
    return draw_pieces(8, 48, 4000, 24, generator())


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
        self.weight = torch.full((1,), weight)
        self.mean, self.calls = torch.zeros(1), 0

    def parameters(self):
        yield self.weight

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


def numbers(first, stop_at=None):
    """Parts `first` .. 3 of a tensor and of a list; stop_at: Ctrl-C while that part is made."""
    for number in range(first, 4):
        if number == stop_at:
            raise KeyboardInterrupt
        yield {"x": torch.full((2, 3), float(number)), "names": 2 * [f"{number}"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "x.pt"


def keep(path, **how):
    """`kept_in` of `numbers`: (what is kept, the number of the first part that was made)."""
    made = []

    def make(first):
        made.append(first)
        return numbers(first, **how)

    return kept_in(str(path), {"x": torch.Tensor, "names": list}, "counting", 4, make), made


def test_parts_are_joined_in_their_order(path):
    kept, _ = keep(path)
    assert torch.equal(kept["x"], torch.arange(4.0).repeat_interleave(2)[:, None].expand(-1, 3))
    assert kept["names"] == list("00112233")


def test_what_is_kept_is_made_only_once(path):
    first, _ = keep(path)
    again, made = keep(path)
    assert torch.equal(again["x"], first["x"])
    assert made == []


def test_of_the_parts_one_file_is_left(path):
    keep(path)
    assert os.listdir(path.parent) == ["x.pt"]


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_what_was_stopped_goes_on_where_it_was(path, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        keep(path, stop_at=stop_at)
    kept, made = keep(path)
    assert made == [stop_at]
    assert torch.equal(kept["x"], keep(tmp_path / "whole.pt")[0]["x"])


def test_what_is_stopped_says_so(path, capsys):
    with pytest.raises(KeyboardInterrupt):
        keep(path, stop_at=1)
    assert "the same command goes on" in capsys.readouterr().out


def test_what_is_made_is_said_first(path, capsys):
    keep(path)
    assert capsys.readouterr().out.startswith("first, counting")


@pytest.mark.parametrize("damage", [b"", b"not torch's"])
def test_a_damaged_file_is_named(path, damage):
    keep(path)
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"cannot read .*x\.pt.*delete it"):
        keep(path)


def test_a_full_disk_is_named_and_leaves_whole_parts(path):
    how = ({"x": torch.Tensor}, "counting", 1, lambda first: iter([{"x": torch.zeros(9999)}]))
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*x\.pt\.0: File too large"):
        kept_in(str(path), *how)
    assert os.listdir(path.parent) == []


def test_encoding_that_was_stopped_goes_on_to_the_same_latents(walks):
    class Stopped(FakeVAE):
        def encode(self, video):
            if self.calls == 1:
                raise KeyboardInterrupt
            return super().encode(video)

    with pytest.raises(KeyboardInterrupt):
        encode_clips(Stopped(), walks, batch=8)
    vae = FakeVAE()
    assert torch.equal(encode_clips(vae, walks, batch=8), walks.render().bfloat16())
    assert vae.calls == 2  # of 3
