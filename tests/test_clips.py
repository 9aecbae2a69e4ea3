"""A folder of one's own clips: what is found in it, decoded, kept and told."""

import os
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from conftest import full_disk, generator, tiny_vae
from safetensors import safe_open

import clips
import dataset
from clips import find_clips, kept_pieces
from dataset import OwnClips
from weights import UserError

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
RED_TOP = "color=red:s=48x24:d={d}:r=16[a];color=blue:s=48x24:d={d}:r=16[b];[a][b]vstack"


def clip(path, seconds=0.6, source="testsrc=s=48x32:r={fps}:d={d}", fps=16, options=""):
    """A clip made by ffmpeg's own sources."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    source = source.format(d=seconds, fps=fps)
    command = [FFMPEG, "-v", "error", "-y", "-filter_complex", source, *options.split()]
    subprocess.run([*command, "-pix_fmt", "yuv420p", path], check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip of ten frames."""
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    clip(str(path))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, made):
    """A folder `own` with two clips, the present one beside it."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("own")
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(made, f"own/{name}")
    return tmp_path / "own"


def pixels(names=("a.mp4", "b.mp4"), frames=9, size=(16, 16), key="x", encode=torch.clone):
    return kept_pieces("own", names, size, frames, encode, key)


def read_all(pieces, frames=9):
    index = torch.arange(len(pieces))
    return pieces.read(index, torch.zeros_like(index), frames)


# --------------------------------------------------------------------------------------- captions
def test_a_caption_stands_in_a_text_file_beside_its_clip(folder):
    (folder / "a.txt").write_text("\ufeffa test\n picture ", encoding="utf-8")
    assert find_clips("own") == {"a.mp4": "a test picture", "b.mp4": ""}


def test_captions_stand_in_a_table(folder):
    (folder / "captions.csv").write_text('caption,file\n"one, two",b.mp4\n', encoding="utf-8-sig")
    assert find_clips("own") == {"a.mp4": "", "b.mp4": "one, two"}


def test_clips_in_folders_of_the_folder_count(folder):
    clip("own/deep/c.mov")
    (folder / "deep" / "c.txt").write_text("deep")
    assert find_clips("own")["deep/c.mov"] == "deep"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.txt", "a cat", r"c\.txt captions no clip: there is no c\.mp4 or the like"),
        ("a.txt", b"\xff\xfe\xfa", r"a\.txt: save it as UTF-8"),
        (
            "captions.csv",
            "a.mp4,a cat\n",
            r'captions\.csv must begin with a header.*"file,caption"',
        ),
        ("captions.csv", "", "must begin with a header"),
        (
            "captions.csv",
            "file,caption\nc.mp4,a cat\n",
            r"line 2: there is no clip 'c\.mp4' in own",
        ),
        ("captions.csv", "file,caption\na.mp4,x\na.mp4,y\n", r"line 3: a\.mp4 is there twice"),
        (
            "captions.csv",
            'file,caption\na.mp4,"x\n',
            r"csv is no table: .*is a quotation mark missing\?",
        ),
    ],
)
def test_captions_that_do_not_fit_are_named(folder, name, content, words):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=words) as error:
        find_clips("own")
    assert "\n" not in str(error.value)


def test_a_clip_with_two_captions_is_named(folder):
    (folder / "captions.csv").write_text("file,caption\na.mp4,one\n")
    (folder / "a.txt").write_text("two")
    with pytest.raises(UserError, match=r"a\.mp4 has a caption in captions\.csv and in .*a\.txt"):
        find_clips("own")


def test_a_folder_without_clips_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no clip in .*: put videos into it"):
        find_clips(str(tmp_path))


# ----------------------------------------------------------------------------------------- pieces
def test_a_clip_is_cut_into_pieces_one_after_the_other(folder):
    clip("own/long.mp4", 2.0)  # 32 frames
    whole, three = pixels(["long.mp4"], frames=27), pixels(["long.mp4"], frames=9)
    assert len(three) == 3
    assert torch.equal(read_all(three).flatten(0, 1), read_all(whole, 27)[0])


@pytest.mark.parametrize("fps", [8, 30])
def test_the_frame_rate_is_resampled(folder, fps):
    clip("own/c.mp4", 2.0, fps=fps)
    assert len(pixels(["c.mp4"], frames=31)) == 1
    with pytest.raises(UserError, match=r"too short, \d\d of 41 frames"):
        pixels(["c.mp4"], frames=41)


def test_a_rotated_portrait_clip_stands_upright(folder):
    turn = "-display_rotation 90 -i own/c.mp4 -c copy"
    clip("own/c.mp4", source=RED_TOP)
    subprocess.run([FFMPEG, "-v", "error", *turn.split(), "own/turned.mp4"], check=True)
    piece = read_all(pixels(["turned.mp4"]))[0, 4].float()  # [H, W, 3]
    sides = [piece[:, :6, 0].mean(), piece[:, -6:, 0].mean()]
    assert max(sides) > 200  # red is at one side now
    assert min(sides) < 60


def test_the_middle_of_a_clip_is_cropped(folder):
    clip("own/c.mp4", source="color=red:s=96x32:d={d}:r=16,drawbox=32:0:32:32:blue:fill")
    piece = read_all(pixels(["c.mp4"]))
    assert piece.shape == (1, 9, 16, 16, 3)
    assert piece[..., 1:-1, 2].float().mean() > 200
    assert piece[..., 2:-2, 0].float().mean() < 30


def test_clips_that_cannot_be_used_are_counted_and_named_once(folder, capsys):
    (folder / "bad.mp4").write_bytes(b"no video")
    clip("own/short.mp4", 0.3)
    names = ["a.mp4", "bad.mp4", "short.mp4"]
    for _ in range(2):  # also by another run, which decodes nothing any more
        clips.say_once.cache_clear()
        assert len(pixels(names)) == len(pixels(names)) == 1
        out = capsys.readouterr().out
        told = "2 of 3 clips are skipped: bad.mp4 (cannot be read), short.mp4 (too short, 5 of 9"
        assert out.count(told) == out.count("bad.mp4") == 1


def test_a_folder_of_which_no_clip_is_left_is_an_error(folder):
    with pytest.raises(UserError, match=r"no clip in own can be used: a\.mp4 \(too short, 1\d of"):
        pixels(frames=81)


def test_a_long_clip_is_decoded_as_a_stream(folder, monkeypatch):
    """Its pieces are in several shards, each written before the next is decoded."""
    monkeypatch.setattr(clips, "SHARD", 3 * 9 * 16 * 16 * 3)
    clip("own/long.mp4", 5.0)  # 80 frames, 8 pieces
    pieces = pixels(["long.mp4"])
    counts = [len(read_shard(path)) for path in sorted({path for _, path, _ in pieces.places})]
    assert counts == [3, 3, 2]


def read_shard(path):
    with safe_open(path, "pt") as file:
        return file.get_tensor("pieces")


# ----------------------------------------------------------------------------------- kept in files
class Counted:
    """Keeps pixels, and counts the pieces."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, piece):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return piece


def test_pieces_are_made_once(folder):
    first, again = Counted(), Counted()
    assert torch.equal(read_all(pixels(encode=first)), read_all(pixels(encode=again)))
    assert (first.calls, again.calls) == (2, 0)


@pytest.mark.parametrize("damage", ["cut short", "another file"])
def test_a_half_written_shard_is_made_again(folder, damage):
    pieces = pixels()
    before, path = read_all(pieces), pieces.places[0][1]
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:-9] if damage == "cut short" else b"x" * 99)
    again = Counted()
    assert torch.equal(read_all(pixels(encode=again)), before)
    assert again.calls == 1  # the other clip's is whole


def test_decoding_that_was_stopped_goes_on(folder, capsys):
    with pytest.raises(KeyboardInterrupt):
        pixels(encode=Counted(stop_at=1))
    assert "the same command goes on" in capsys.readouterr().out
    again = Counted()
    assert len(pixels(encode=again)) == 2
    assert again.calls <= 2


@pytest.mark.parametrize("change", [{"key": "y"}, {"size": (32, 16)}, {"frames": 5}])
def test_pieces_of_other_settings_are_made_anew(folder, change):
    pixels()
    again = Counted()
    pixels(encode=again, **change)
    assert again.calls >= 2


def test_a_clip_that_was_changed_is_made_anew(folder):
    before = read_all(pixels())
    clip("own/b.mp4", source="color=red:s=48x32:r=16:d={d}")
    again = Counted()
    after = read_all(pixels(encode=again))
    assert again.calls == 1
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_a_full_disk_leaves_no_half_a_shard(folder):
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*File too large"):
        pixels()
    assert not [name for _, _, names in os.walk("runs") for name in names]


def test_decoding_draws_nothing_from_the_global_random_state(folder):
    before = torch.get_rng_state()
    pixels()
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------- what is trained on
@pytest.fixture
def own(folder):
    """Two clips of 9 frames of 16 x 16, the first with a caption."""
    (folder / "a.txt").write_text("a test picture")
    return OwnClips("own", (16, 16), 9)


def latents(own, weight=0.0):
    vae = tiny_vae()
    vae.mean += weight
    return vae, own.latents(vae, (1, 2, 2))


def test_latents_are_those_of_the_vae(own):
    vae, data = latents(own)
    own.prepare(vae, (1, 2, 2))
    expected = torch.cat([vae.encode(video[None]) for video in own.each(9, "cpu")])
    x0, prompts = data.batch(16, 3, generator(), "cpu")
    which = [["a test picture", ""].index(prompt) for prompt in prompts]
    assert set(which) == {0, 1}
    assert torch.equal(x0, expected[which].bfloat16().float())


def test_latents_of_another_vae_are_not_read(own):
    (_, first), (_, other) = latents(own), latents(own, weight=1.0)
    drawn = [data.batch(8, 3, generator(), "cpu")[0] for data in (first, other)]
    assert not torch.allclose(*drawn)


def test_the_same_generator_draws_the_same_pieces(own):
    _, data = latents(own)
    one, two = (data.batch(8, 2, generator(3), "cpu") for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]


def test_pixels_are_drawn_as_the_vae_takes_them(own):
    own.prepare(tiny_vae(), (1, 2, 2))
    video = own.video(3, 5, generator())
    assert video.shape == (3, 5, 3, 16, 16)
    assert -1 <= video.min() < -0.5 < 0.5 < video.max() <= 1


def test_a_clip_without_a_caption_is_named_and_has_the_empty_prompt(own, capsys):
    clips.say_once.cache_clear()
    _, data = latents(own)
    told = "1 of 2 clips have no caption and are trained with the empty prompt: b.mp4"
    assert told in capsys.readouterr().out
    assert set(data.prompts(20, generator())) == {"a test picture", ""}


def test_a_folder_without_any_caption_is_an_error(folder):
    with pytest.raises(UserError, match=r"no clip in own has a caption: put NAME\.txt beside"):
        latents(OwnClips("own", (16, 16), 9))


@pytest.mark.parametrize(
    ("size", "frames", "words"),
    [
        ((16, 40), 9, "--size must be multiples of 16, not 40"),
        ((16, 16), 12, "--frames must be 1 + 4 n, at least 9: 9 or 13, not 12"),
        ((16, 16), 5, "--frames must be 1 + 4 n, at least 9: 9, not 5"),
    ],
)
def test_sizes_that_do_not_divide_are_told(folder, size, frames, words):
    with pytest.raises(UserError) as error:
        OwnClips("own", size, frames).prepare(tiny_vae(), (1, 2, 2))
    assert str(error.value) == words


def test_long_captions_have_room_in_the_encoder(folder):
    (folder / "a.txt").write_text("word " * 40)
    (folder / "b.txt").write_text("word " * 400)
    assert OwnClips("own", (16, 16), 9).words == 64
    assert dataset.Shapes.words == 16
