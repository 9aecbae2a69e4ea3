import contextlib
import gc
import os
import signal
import stat
import threading

import imageio.v2 as iio
import numpy as np
import pytest
import torch
from conftest import generator
from PIL import Image

from data import sample_clips
from media import FrameWriter, check_out, read_video, to_uint8, until_interrupted, write_videos
from weights import UserError


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
    resource = pytest.importorskip("resource")  # Windows has none
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


@pytest.fixture
def ffmpeg(tmp_path_factory, monkeypatch):
    """Puts a shell script in the place of ffmpeg."""

    def replace(script):
        path = tmp_path_factory.mktemp("bin") / "ffmpeg"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return replace


def lacking(path):
    """Write a video whose file lacks a frame."""
    with FrameWriter(path) as out:
        out.write(torch.zeros(16, 3, 64, 64))
        out.count += 1


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_video_that_lacks_frames_is_noticed(there_before, name):
    with pytest.raises(UserError, match=rf"{name}.*cut short.*disk full"):
        lacking(there_before(name))


def test_a_video_that_ffmpeg_did_not_finish_is_noticed(there_before, ffmpeg):
    ffmpeg("cat > /dev/null")
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4"):
        write(there_before("a.mp4"), torch.zeros(1, 16, 3, 64, 64))


@pytest.mark.parametrize("frames", [1, 200])
def test_what_ffmpeg_says_went_wrong_is_told(there_before, ffmpeg, frames):
    ffmpeg("echo Unknown encoder libx264 >&2; exit 1")
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4: Unknown encoder libx264"):
        write(there_before("a.mp4"), torch.zeros(1, frames, 3, 64, 64))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_missing_ffmpeg_is_not_taken_for_a_full_disk(there_before, monkeypatch, name):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(UserError, match=r"cannot start ffmpeg.*pip install") as raised:
        write(there_before(name), torch.zeros(1, 16, 3, 64, 64))
    assert "disk" not in str(raised.value)


def test_a_video_of_no_frames_is_named(there_before):
    with pytest.raises(UserError, match="no frame of it was made"):
        write(there_before("a.mp4"), [])


NAMES = ["a:b", "-a", "http:a", "a%03d", "a b'", "n" * 251, "\N{SNOWMAN}" * 83]


@pytest.mark.parametrize("kind", [".mp4", ".gif", ".png"])
@pytest.mark.parametrize("name", NAMES)
def test_a_video_of_any_name_is_written(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    check_out(name + kind)
    write(name + kind, torch.zeros(1, 16, 3, 64, 64))
    assert os.listdir() == [name + kind]


def test_two_runs_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.gif"
    with FrameWriter(str(path)) as one, FrameWriter(str(path)) as two:
        for brightness in (1.0, 1.0, 1.0):
            one.write(torch.full((4, 3, 64, 64), brightness))
            two.write(torch.full((4, 3, 64, 64), -brightness))
    assert os.listdir(tmp_path) == ["a.gif"]
    assert np.stack(iio.mimread(path))[..., :3].min() == 255  # the first ends last


def test_a_new_file_can_be_read_by_others(tmp_path):
    write(str(tmp_path / "a.mp4"), torch.zeros(1, 16, 3, 64, 64))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.mp4").stat().st_mode) == 0o666 & ~mask


def becomes_a_folder(path):
    """Write a video to a path that becomes a folder meanwhile."""
    with FrameWriter(str(path)) as out:
        out.write(torch.zeros(16, 3, 64, 64))
        path.mkdir()


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_whole_video_is_kept_where_it_cannot_be_moved(tmp_path, name):
    with pytest.raises(UserError, match=r"the whole video is in .*\.part\.") as raised:
        becomes_a_folder(tmp_path / name)
    kept = str(raised.value).rpartition("is in ")[2]
    assert len(iio.mimread(kept)) == (1 if name == "a.png" else 16)


@pytest.mark.parametrize("fails", [False, True])
def test_a_video_may_be_followed_into_its_own_file(tmp_path, fails):
    path = tmp_path / "a.mp4"
    write(str(path), torch.zeros(1, 32, 3, 64, 64))
    before = path.read_bytes()
    with contextlib.suppress(RuntimeError), FrameWriter(str(path)) as out:
        for frame in read_video(str(path))[0]:
            out.write(frame[None] + 1)
            if fails:
                raise RuntimeError
    assert len(iio.mimread(path)) == 32
    assert (path.read_bytes() == before) == fails


# ------------------------------------------------------------------------------------ into sheets
def numbered(count):
    """Frames whose colours are their numbers, in chunks of 7."""
    numbers = torch.arange(count)
    colours = torch.stack([numbers // 256, numbers % 256, numbers * 0], dim=1) / 127.5 - 1
    return colours[:, :, None, None].expand(-1, 3, 64, 64).split(7)


def pictured(path):
    """The numbers of the 16 frames on a sheet."""
    pixels = iio.imread(path).astype(int)[32::66, 32::66]
    return (256 * pixels[..., 0] + pixels[..., 1]).flatten()


@pytest.mark.parametrize("total", [None, 1, 40, 80, 5000])
@pytest.mark.parametrize("count", [1, 5, 16, 40, 81, 256])
def test_a_sheet_has_16_pictures_evenly_spread(tmp_path, total, count):
    path = str(tmp_path / "a.png")
    with FrameWriter(path, total) as out:
        for chunk in numbered(count):
            out.write(chunk)
    assert pictured(path).tolist() == np.linspace(0, count - 1, 16).round().tolist()


@pytest.mark.parametrize("total", [None, 80, 3000, 10_000])
def test_a_sheet_of_a_long_stream_is_about_evenly_spread(tmp_path, total):
    path, gap = str(tmp_path / "a.png"), 2999 / 15
    with FrameWriter(path, total) as out:
        for chunk in numbered(3000):
            out.write(chunk)
    error = np.abs(pictured(path) - gap * np.arange(16)).max()
    assert error <= (0.5 if total == 3000 else 16)


def test_a_sheet_of_a_long_stream_takes_little_memory():
    out = FrameWriter("a.png", 100_000)
    for chunk in torch.zeros(1, 3, 8, 8).expand(10_000, -1, -1, -1).split(16):
        out.write(chunk)
        assert len(out.kept) <= 256 + 16
        assert all(f.untyped_storage().nbytes() == 8 * 8 * 3 for f in out.kept.values())


# ----------------------------------------------------------------------------- where to write them


@pytest.mark.parametrize("name", ["a.mp4", "A.MP4", "a.gif", "a.png"])
def test_videos_can_be_written_to_these_files(tmp_path, name):
    check_out(str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["a.avi", "a", "folder.mp4", "nowhere/a.mp4", "a.mp4/b.mp4", "n" * 252 + ".mp4"]
)
def test_no_video_can_be_written_to_these(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "a.mp4").touch()
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
    made = []

    def stream():
        for chunk in chunks(3):
            made.append(chunk)
            yield chunk

    write_videos(stream(), [str(tmp_path / "a.gif")], 8, 8, Bar())
    assert len(made) == 2


def test_each_video_of_a_stream_is_written_to_its_path(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.gif", "b.gif")]
    video = torch.linspace(-1, 1, 2)[:, None, None, None, None].expand(2, 4, 3, 64, 64)
    write_videos((chunk for chunk in [(None, video)]), paths, None, 4, Bar())
    assert [np.stack(iio.mimread(path))[..., :3].mean() for path in paths] == [0, 255]


def test_one_video_that_fails_does_not_take_the_others_with_it(tmp_path):
    paths = [tmp_path / name for name in ("a.gif", "b.gif", "c.gif")]

    def stream():
        yield from chunks(2, videos=3)
        paths[1].mkdir()

    with pytest.raises(UserError, match=r"b\.gif.*the whole video is in"):
        write_videos(stream(), [str(path) for path in paths], None, None, Bar())
    assert [len(iio.mimread(path)) for path in (paths[0], paths[2])] == [8, 8]


ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("end", ENDS)
def test_ctrl_c_and_its_like_end_a_stream_after_its_chunk(end):
    seen = []
    for chunk in until_interrupted(iter(range(9))):
        seen.append(chunk)
        if chunk == 3:
            signal.raise_signal(end)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("end", ENDS)
def test_a_stream_that_is_ended_leaves_a_whole_video(tmp_path, end):
    def stream():
        for chunk in chunks(9):
            yield chunk
            signal.raise_signal(end)

    count, _ = write_videos(until_interrupted(stream()), [str(tmp_path / "a.mp4")], 99, 99, Bar())
    assert count == len(iio.mimread(tmp_path / "a.mp4")) == 8
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("end", ENDS)
def test_after_a_stream_ctrl_c_does_what_it_did_before(end):
    before = signal.getsignal(end)
    assert list(until_interrupted(iter(range(3)))) == [0, 1, 2]
    assert signal.getsignal(end) is before


def test_a_signal_ends_what_is_worth_nothing_in_part():
    def chunks():
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        yield 2

    with pytest.raises(KeyboardInterrupt):
        list(until_interrupted(chunks(), whole=True))


@pytest.mark.parametrize("end", ENDS)
def test_a_signal_in_the_last_chunk_is_heeded_after_the_file(tmp_path, end):
    def stream():
        for chunk in chunks(9):
            signal.raise_signal(end)
            yield chunk

    before, path = signal.getsignal(end), tmp_path / "a.gif"
    with pytest.raises(KeyboardInterrupt):
        write_videos(until_interrupted(stream(), whole=True), [str(path)], 4, 4, Bar())
    assert len(iio.mimread(path)) == 4
    assert signal.getsignal(end) is before


@pytest.mark.parametrize("end", ENDS)
def test_after_a_part_of_a_stream_ctrl_c_does_what_it_did_before(tmp_path, end):
    before = signal.getsignal(end)
    write_videos(until_interrupted(chunks(9)), [str(tmp_path / "a.gif")], 8, 8, Bar())
    assert signal.getsignal(end) is before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    for _ in until_interrupted(iter(range(3))):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_stream_passes_outside_the_main_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(until_interrupted(iter(range(3)))))
    thread.start()
    thread.join()
    assert seen == [0, 1, 2]
