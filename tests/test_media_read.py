import os
import subprocess

import imageio.v2 as iio
import numpy as np
import pytest
import torch

import media
from media import FrameWriter, fit, read_image, read_prompts, read_video
from weights import UserError


# ----------------------------------------------------------------------------- pictures and videos
def picture(height, width, channels, dtype):
    """Left half bright, right half dark; opaque if there is alpha."""
    top = 65535 if dtype == "uint16" else 255
    image = np.zeros((height, width, channels), dtype)
    image[:, : width // 2] = top
    if channels in (2, 4):
        image[..., -1] = top
    return image.squeeze(-1) if channels == 1 else image


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((64, 64, 3), "uint8"),
        ((65, 91, 3), "uint8"),
        ((200, 64, 4), "uint8"),
        ((33, 80, 1), "uint8"),
        ((70, 70, 1), "uint16"),
        ((9, 7, 3), "uint8"),
    ],
)
def test_any_picture_is_read(tmp_path, shape, dtype):
    path = str(tmp_path / "a.png")
    iio.imwrite(path, picture(*shape, dtype))
    image = read_image(path)
    assert image.shape == (1, 3, 64, 64)
    assert image.min() >= -1
    assert image.max() <= 1
    assert (image[..., :20] > 0.95).all()
    assert (image[..., -20:] < -0.95).all()


def test_what_is_transparent_becomes_black():
    image = np.full((64, 64, 4), 255, "uint8")
    image[:32, :, 3] = 0
    assert (fit(image, (64, 64))[:, :32] == -1).all()
    assert (fit(image, (64, 64))[:, 32:] == 1).all()


@pytest.fixture
def odd_video(tmp_path):
    """Two seconds of 75 x 51 at 30 frames/s."""
    path = str(tmp_path / "a.mp4")
    options = {"macro_block_size": 1, "codec": "libx264", "output_params": ["-pix_fmt", "yuv444p"]}
    iio.mimwrite(path, [picture(51, 75, 3, "uint8")] * 60, fps=30, **options)
    return path


def test_a_video_is_read_at_16_frames_a_second(odd_video):
    frames, about = read_video(odd_video)
    assert about == len(list(frames)) == 32


def test_a_video_of_any_size_is_fitted(odd_video):
    frames = torch.stack(list(read_video(odd_video)[0]))
    assert frames.shape[1:] == (3, 64, 64)
    assert frames[..., :20].min() > 0.8
    assert frames[..., -20:].max() < -0.8


def test_a_video_that_is_fitted_is_named_with_its_size_and_rate(odd_video, capsys):
    read_video(odd_video)
    assert "75 x 51 at 30" in capsys.readouterr().out


@pytest.mark.parametrize("read", [read_image, read_video])
@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n broken", None])
def test_what_cannot_be_read_is_named(tmp_path, read, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png") as raised:
        read(str(path))
    assert "\n" not in str(raised.value)


def test_a_video_that_is_cut_short_is_told(tmp_path, capsys):
    whole, cut = str(tmp_path / "whole.mkv"), tmp_path / "cut.mkv"
    with FrameWriter(str(tmp_path / "a.mp4")) as writer:
        writer.write(torch.rand(40, 3, 64, 64))
    subprocess.run([media.imageio_ffmpeg.get_ffmpeg_exe(), "-v", "0", "-i", writer.path, whole])
    read_video(whole)
    assert "cut short" not in capsys.readouterr().out
    with open(whole, "rb") as file:
        cut.write_bytes(file.read()[: os.path.getsize(whole) // 2])
    read_video(str(cut))
    assert "is cut short" in capsys.readouterr().out


def test_a_video_of_less_than_a_frame_is_told(tmp_path):
    path = str(tmp_path / "a.mp4")
    iio.mimwrite(path, [picture(64, 64, 3, "uint8")], fps=120)
    with pytest.raises(UserError, match=r"a\.mp4.*shorter than a frame of 62.5 ms"):
        read_video(path)


def test_the_name_of_a_video_does_not_make_it_damaged(tmp_path, capsys):
    with FrameWriter(str(tmp_path / "corrupt partial file.mp4")) as writer:
        writer.write(torch.rand(20, 3, 64, 64))
    read_video(writer.path)
    assert "damaged" not in capsys.readouterr().out


def test_a_truncated_video_gives_what_it_holds_or_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    iio.mimwrite(path, [picture(64, 64, 3, "uint8")] * 40, fps=16)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    frames = []
    try:
        frames = list(read_video(str(path))[0])
    except UserError as error:
        told = str(error)
    assert len(frames) <= 40
    assert frames or "a.mp4" in told


# ---------------------------------------------------------------------------------------- prompts
def test_prompts_are_read_a_line_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue star \na red circle\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a red circle", "a blue star"]


def test_the_mark_of_the_byte_order_is_in_no_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue star\n", encoding="utf-8-sig")
    assert read_prompts(str(path)) == ["a red circle", "a blue star"]


def test_prompts_of_joined_files_hold_no_mark_either(tmp_path):
    path, mark = tmp_path / "prompts.txt", "\ufeff"
    path.write_text(
        f"{mark}{mark}a red circle\n{mark}a blue star\na star{mark}\n", encoding="utf-8"
    )
    assert read_prompts(str(path)) == ["a red circle", "a blue star", "a star"]


def test_prompts_may_hold_what_the_system_allows(tmp_path):
    path, prompts = tmp_path / "prompts.txt", ['what: "this"?', "a <b> | c*", "A star", "a star"]
    path.write_text("\n".join(prompts), encoding="utf-8")
    assert read_prompts(str(path)) == prompts


@pytest.mark.parametrize("mark", '\\:*?"<>|/')
def test_prompts_that_cannot_name_a_file_of_windows_are_refused(tmp_path, monkeypatch, mark):
    monkeypatch.setattr(media, "FORBIDDEN", '/\\:*?"<>|')
    (tmp_path / "prompts.txt").write_text(f"a star\nred{mark}blue\n")
    with pytest.raises(UserError, match="line 2"):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_prompts_that_would_be_one_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "CASELESS", True)
    (tmp_path / "prompts.txt").write_text("a star\na circle\na star\nA Star\n")
    with pytest.raises(UserError, match=r"line 4: .*case"):
        read_prompts(str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize(
    ("text", "words"), [("a\nred/blue\n", "line 2"), ("x" * 300, "line 1"), ("\n \n", "no prompt")]
)
def test_prompts_that_cannot_name_a_file_are_refused(tmp_path, text, words):
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_prompts(str(path))


@pytest.mark.parametrize("name", ["prompts.txt", ".", "nowhere.txt"])
def test_prompts_that_cannot_be_read_are_named(tmp_path, name):
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the prompts"):
        read_prompts(str(tmp_path / name))
