import gc
import os
import resource
import signal

import imageio.v2 as iio
import numpy as np
import pytest
import torch
from conftest import generator
from PIL import Image

from data import sample_clips
from media import (
    FrameWriter,
    check_out,
    fit,
    read_image,
    read_prompts,
    read_video,
    to_uint8,
    until_interrupted,
    write_videos,
)
from weights import UserError


# ------------------------------------------------------------------------------------ from files
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


# ------------------------------------------------------------------------------------ into files
@pytest.fixture
def there_before(tmp_path):
    """Make a file, and see after the test that it alone is there, as it was."""
    made = []

    def make(name):
        made.append(tmp_path / name)
        made[0].write_bytes(b"there before")
        return str(made[0])

    yield make
    assert os.listdir(tmp_path) == [made[0].name]
    assert made[0].read_bytes() == b"there before"


def write(path, parts):
    """Write a video's parts, each [F, 3, H, W], of 200 frames in all."""
    with FrameWriter(path, 200) as out:
        for part in parts:
            out.write(part)


def failing():
    """Make half of a video."""
    yield torch.zeros(16, 3, 64, 64)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_run_that_fails_midway_leaves_no_half_written_file(there_before, name):
    with pytest.raises(RuntimeError, match="out of memory"):
        write(there_before(name), failing())


@pytest.fixture
def full_disk():
    """As on a full disk, no file may become larger than 8 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.mp4", "is the disk full"), ("a.gif", "is the disk full"), ("a.png", "File too large")],
)
def test_a_full_disk_is_named_and_damages_nothing(there_before, full_disk, name, words, capfd):
    with pytest.raises(UserError, match=f"cannot write .*{name}.*{words}"):
        write(there_before(name), torch.randn(200, 3, 64, 64).split(10))
    gc.collect()  # what is left of the writer must not complain either
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_file_grows_as_it_is_made(tmp_path, name):
    sizes = []
    with FrameWriter(str(tmp_path / name), 400) as out:
        for part in torch.randn(400, 3, 64, 64).split(100):
            out.write(part)
            sizes.append(os.path.getsize(out.temporary))
    assert 0 < sizes[1] < sizes[2] < sizes[3]
    assert len(iio.mimread(tmp_path / name, memtest=False)) == 400


@pytest.fixture
def gif(tmp_path):
    """(a second of video, the gif that was written of it)."""
    video, path = sample_clips(1, generator()).render(frames=16)[0], tmp_path / "a.gif"
    write(str(path), [video])
    return video, path


def test_the_colours_of_a_gif_are_exact(gif):
    video, path = gif
    assert np.array_equal(np.stack(iio.mimread(path))[..., :3], to_uint8(video).numpy())


def test_a_gif_plays_at_16_frames_a_second(gif):
    durations = []
    with Image.open(gif[1]) as image:
        for frame in range(16):
            image.seek(frame)
            durations.append(image.info["duration"])
    assert abs(sum(durations) - 1000) <= 10


def test_a_gif_plays_for_ever(gif):
    with Image.open(gif[1]) as image:
        assert image.info["loop"] == 0


def cut_short(path):
    """Write a video whose file loses its second half as it is closed."""
    with FrameWriter(path, 32) as out:
        out.write(torch.zeros(16, 3, 64, 64))
        out.writer.close()
        os.truncate(out.temporary, os.path.getsize(out.temporary) // 2)


def test_a_video_that_ffmpeg_could_not_finish_is_noticed(tmp_path):
    with pytest.raises(UserError, match=r"a\.mp4.*cut short"):
        cut_short(str(tmp_path / "a.mp4"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "A.MP4", "a.gif", "a.png"])
def test_videos_can_be_written_to_these_files(tmp_path, name):
    check_out(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.avi", "a", "folder.mp4", "nowhere/a.mp4"])
def test_no_video_can_be_written_to_these(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=name):
        check_out(str(tmp_path / name))


# ------------------------------------------------------------------------------ a stream to files
def chunks(count, videos=1):
    """A stream's chunks: (latents, video) of 4 frames, the next ones brighter."""
    for i in range(count):
        yield None, torch.full((videos, 4, 3, 64, 64), i / 4 - 1)


class Bar:
    """A progress bar that counts."""

    n = 0

    def update(self, n):
        self.n += n


@pytest.mark.parametrize(("frames", "expected"), [(None, 12), (12, 12), (6, 6), (1, 1)])
def test_a_stream_is_written_up_to_its_end_or_the_frames_asked(tmp_path, frames, expected):
    path, bar = tmp_path / "a.gif", Bar()
    count, _ = write_videos(chunks(3), [str(path)], frames, 12, bar)
    assert count == bar.n == len(iio.mimread(path)) == expected


def test_no_more_of_a_stream_is_made_than_is_written(tmp_path):
    made = chunks(3)
    write_videos(made, [str(tmp_path / "a.gif")], 8, 8, Bar())
    assert len(list(made)) == 1


def test_each_video_of_a_stream_is_written_to_its_path(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.gif", "b.gif")]
    video = torch.linspace(-1, 1, 2)[:, None, None, None, None].expand(2, 4, 3, 64, 64)
    write_videos([(None, video)], paths, None, 4, Bar())
    assert [np.stack(iio.mimread(path))[..., :3].mean() for path in paths] == [0, 255]


def test_ctrl_c_ends_a_stream_after_the_chunk_in_progress():
    seen = []
    for chunk in until_interrupted(iter(range(9))):
        seen.append(chunk)
        if chunk == 3:
            signal.raise_signal(signal.SIGINT)
    assert seen == [0, 1, 2, 3]


def test_after_a_stream_ctrl_c_does_what_it_did_before():
    before = signal.getsignal(signal.SIGINT)
    assert list(until_interrupted(iter(range(3)))) == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------- prompts
def test_prompts_are_read_a_line_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue star \na red circle\n", encoding="utf-8")
    assert read_prompts(str(path)) == ["a red circle", "a blue star"]


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
