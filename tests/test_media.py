import os
import resource

import imageio.v2 as iio
import numpy as np
import pytest
import torch

from data import sample_clips
from media import FrameWriter, fit, read_image, read_prompts, read_video, to_uint8
from weights import UserError


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
    assert (fit(image, 64)[:, :32] == -1).all()
    assert (fit(image, 64)[:, 32:] == 1).all()


def test_a_video_of_any_size_and_rate_is_read_at_16_frames_a_second(tmp_path, capsys):
    path = str(tmp_path / "a.mp4")
    with iio.get_writer(
        path, fps=30, macro_block_size=1, codec="libx264", output_params=["-pix_fmt", "yuv444p"]
    ) as out:
        for _ in range(60):
            out.append_data(picture(51, 75, 3, "uint8"))
    frames, about = read_video(path)
    frames = list(frames)
    assert about == len(frames) == 32
    assert "75 x 51 at 30" in capsys.readouterr().out
    assert all(
        frame.shape == (3, 64, 64)
        and frame[:, :, :20].min() > 0.8
        and frame[:, :, -20:].max() < -0.8
        for frame in frames
    )


@pytest.mark.parametrize("read", [read_image, read_video])
@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n broken", None])
def test_what_cannot_be_read_is_named(tmp_path, read, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="a.png") as raised:
        read(str(path))
    assert "\n" not in str(raised.value)


def test_a_truncated_video_gives_what_it_holds_or_is_named(tmp_path):
    path = str(tmp_path / "a.mp4")
    iio.mimwrite(path, [picture(64, 64, 3, "uint8")] * 40, fps=16)
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[: len(whole) // 2])
    try:
        assert len(list(read_video(path)[0])) <= 40
    except UserError as error:
        assert "a.mp4" in str(error)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_run_that_fails_midway_leaves_no_half_written_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"there before")
    with pytest.raises(RuntimeError), FrameWriter(str(tmp_path / name), 32) as out:
        out.write(torch.zeros(16, 3, 64, 64))
        raise RuntimeError("out of memory")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"there before"


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.mp4", "is the disk full"), ("a.gif", "is the disk full"), ("a.png", "File too large")],
)
def test_a_full_disk_is_named_and_damages_nothing(tmp_path, name, words, capfd):
    (tmp_path / name).write_bytes(b"there before")
    limits, noise = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (8192, limits[1])
    )  # no file may become larger: as on a full disk
    try:
        with (
            pytest.raises(UserError, match=f"cannot write .*{name}.*{words}"),
            FrameWriter(str(tmp_path / name), 200) as out,
        ):
            for part in noise.split(10):
                out.write(part)
        del out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"there before"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_file_grows_as_it_is_made(tmp_path, name):
    sizes = []
    with FrameWriter(str(tmp_path / name), 400) as out:
        for part in torch.randn(400, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(
            100
        ):
            out.write(part)
            sizes.append(os.path.getsize(out.temporary))
    assert 0 < sizes[1] < sizes[2] < sizes[3]
    assert len(iio.mimread(tmp_path / name, memtest=False)) == 400


def test_a_gif_plays_at_16_frames_a_second_and_its_colours_are_exact(tmp_path):
    from PIL import Image

    video = sample_clips(1, torch.Generator().manual_seed(0)).render(frames=16)[0]
    with FrameWriter(str(tmp_path / "a.gif"), 16) as out:
        out.write(video)
    assert np.array_equal(
        np.stack(iio.mimread(tmp_path / "a.gif"))[..., :3], to_uint8(video).numpy()
    )
    with Image.open(tmp_path / "a.gif") as image:
        durations = [image.seek(i) or image.info["duration"] for i in range(16)]
        assert abs(sum(durations) - 1000) <= 10
        assert image.info["loop"] == 0


def test_a_video_that_ffmpeg_could_not_finish_is_noticed(tmp_path):
    with (
        pytest.raises(UserError, match="a.mp4.*cut short"),
        FrameWriter(str(tmp_path / "a.mp4"), 32) as out,
    ):
        out.write(torch.zeros(16, 3, 64, 64))
        out.writer.close()
        os.truncate(out.temporary, os.path.getsize(out.temporary) // 2)
    assert not os.listdir(tmp_path)


def test_prompts_are_read_a_line_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue star \na red circle\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a red circle", "a blue star"]
    for text, words in (("a\nred/blue\n", "line 2"), ("x" * 300, "line 1"), ("\n \n", "no prompt")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            read_prompts(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    for name in (path, tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(UserError, match="cannot read the prompts"):
            read_prompts(str(name))
