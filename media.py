"""Videos, images and lists of prompts from files, and videos into them.

What cannot be read or written ends in a UserError of one line; what was there before stays.
"""

import contextlib
import itertools
import os
import signal
import time

import torch
from torch.nn import functional as F

from data import FPS, SIZE
from weights import UserError

# ffmpeg's options by kind of file; a gif gets a palette of its own for each frame
PALETTE = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"
MP4 = {"codec": "libx264", "quality": 9, "macro_block_size": 2}
GIF = {"codec": "gif", "quality": None, "macro_block_size": 1, "pix_fmt_out": "pal8"}
ENCODERS = {".mp4": MP4, ".gif": GIF | {"output_params": ["-vf", PALETTE]}}


def fit(frame, size):
    """Resize a picture to cover a square and crop its middle: [3, size, size] in [-1, 1].
    frame: an array [H, W] or [H, W, 1 to 4], 8 or 16 bits. What is transparent becomes black."""
    white = {1: 255, 2: 65535}.get(frame.dtype.itemsize, 1)
    pixels = torch.atleast_3d(torch.from_numpy(frame.astype("float32") / white))
    if pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1] * pixels[..., -1:]
    pixels = pixels.expand(*pixels.shape[:2], 3).permute(2, 0, 1)
    scale = size / min(pixels.shape[1:])
    shape = [max(size, round(side * scale)) for side in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0] * 2 - 1
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[:, top : top + size, left : left + size].clamp(-1, 1)


def read_image(path, size=SIZE):
    """Read an image file: [1, 3, size, size] in [-1, 1]. Raises UserError."""
    import imageio.v3 as iio

    try:
        image = iio.imread(path, index=0)
    except Exception as error:  # each of imageio's readers has its own
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from None
    if image.shape[:2] != (size, size):
        print(f"{path}: {image.shape[1]} x {image.shape[0]} resized and cropped to {size} x {size}")
    return fit(image, size)[None]


def read_video(path, size=SIZE):
    """Stream a video: (frames [3, size, size] in [-1, 1] at 16 frames/s, about how many)."""
    import imageio.v2 as iio

    try:
        reader = iio.get_reader(path, "FFMPEG", output_params=["-vf", f"fps={FPS}"])
        source = iter(reader)
        first = next(source)
    except Exception as error:
        raise UserError(f"cannot read a video from {path}: {_reason(error)}") from None
    about = reader.get_meta_data()
    height, width = first.shape[:2]
    if (height, width, about["fps"]) != (size, size, FPS):
        found = f"{path}: {width} x {height} at {about['fps']:g} frames/s"
        print(f"{found} resized and cropped to {size} x {size}, at {FPS}")
    frames = (fit(frame, size) for frame in itertools.chain([first], source))
    return frames, max(1, round(about["duration"] * FPS))


def _reason(error):
    """Say in one line what an exception is about."""
    lines = str(error).strip().splitlines() or ["it has no frames"]
    return getattr(error, "strerror", None) or lines[0]


class FrameWriter:
    """Write about `total` frames to .mp4, .gif or a .png sheet of 16, all or nothing.
    Raises UserError if that fails, on a full disk for example; what was at `path` before stays."""

    def __init__(self, path, total):
        self.path = path
        self.total = total
        self.kind = os.path.splitext(path)[1].lower()
        folder, name = os.path.split(path)
        self.temporary = os.path.join(folder, f".{name}.part{self.kind}")
        self.sheet = []
        self.count = 0
        self.writer = None

    def __enter__(self):
        return self

    def write(self, video):
        """Append video [F, 3, H, W] in [-1, 1]."""
        if self.kind == ".png":
            picked = {round(i * (self.total - 1) / 15) for i in range(16)}
            self.sheet += [v.cpu() for i, v in enumerate(video, self.count) if i in picked]
        else:
            self._encode(to_uint8(video))
        self.count += len(video)

    def _encode(self, frames):
        """Feed frames to ffmpeg one by one: the file grows as the video is made."""
        import imageio_ffmpeg

        try:
            if self.writer is None:
                size = (frames.shape[2], frames.shape[1])
                options = {"fps": FPS, "ffmpeg_log_level": "quiet", **ENCODERS[self.kind]}
                self.writer = imageio_ffmpeg.write_frames(self.temporary, size, **options)
                self.writer.send(None)
            for frame in frames:
                self.writer.send(frame.numpy().tobytes())
        except OSError:  # ffmpeg is gone
            reason = "the video's encoder gave up; is the disk full?"
            raise UserError(f"cannot write {self.path}: {reason}") from None

    def __exit__(self, error, *_):
        try:
            if self.writer is not None:
                self.writer.close()
            if error is None and self.kind == ".png":
                rows = torch.stack(self.sheet)
                rows = rows.unflatten(0, (-1, 8)) if len(rows) % 8 == 0 else rows[None]
                save_sheet(rows, self.temporary, columns=16)
            elif error is None:
                self._check()
            if error is None:
                os.replace(self.temporary, self.path)
        except OSError as failure:
            if error is None:
                raise UserError(f"cannot write {self.path}: {_reason(failure)}") from None
        finally:
            for name in (self.temporary, self.temporary + ".tmp.png"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(name)

    def _check(self):
        """Raise OSError if the file lacks frames, which ffmpeg does not report on a full disk."""
        import imageio_ffmpeg

        with contextlib.suppress(RuntimeError):
            if imageio_ffmpeg.count_frames_and_secs(self.temporary)[0] == self.count:
                return
        raise OSError("the file was cut short; is the disk full?")


def read_prompts(path):
    """Read the prompts of a file, one a line and each once. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {_reason(error)}") from None
    for number, line in enumerate(lines, 1):
        if set(line) & set("/\0") or len(os.fsencode(line)) > 230:
            reason = "a prompt names its file, which cannot hold a / or more than 230 bytes"
            raise UserError(f"{path}, line {number}: {reason}")
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise UserError(f"there is no prompt in {path}")
    return prompts


def save_sheet(video, path, columns=8):
    """Write a sheet: each clip of video [B, F, 3, H, W] in [-1, 1] is a row of `columns` frames."""
    import imageio.v3 as iio

    frames = torch.linspace(0, video.shape[1] - 1, min(columns, video.shape[1])).round().long()
    rows = to_uint8(video[:, frames])  # [B, F, H, W, 3]
    B, F, H, W, _ = rows.shape
    sheet = rows.new_full((B, H + 2, F, W + 2, 3), 255)
    sheet[:, :H, :, :W] = rows.transpose(1, 2)
    temporary = f"{path}.tmp.png"
    iio.imwrite(temporary, sheet.reshape(B * (H + 2), F * (W + 2), 3).numpy())
    os.replace(temporary, path)


def to_uint8(video):
    """Convert pixels [..., 3, H, W] in [-1, 1] to [..., H, W, 3] in 0 .. 255, on the CPU."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu()


def check_out(path):
    """Raise UserError if `path` is no file that a video can be written to."""
    if os.path.splitext(path)[1].lower() not in (".mp4", ".gif", ".png"):
        raise UserError(f"--out {path} must end in .mp4, .gif or .png")
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is not a folder that can be written to")


def until_interrupted(chunks):
    """Pass on the chunks of a stream until Ctrl-C, which lets the chunk in progress end."""
    stop = []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        for chunk in chunks:
            yield chunk
            if stop:
                return
    finally:
        signal.signal(signal.SIGINT, before)


def write_videos(chunks, paths, frames, total, bar):
    """Write the videos of a stream to a path each: `frames` of each or, if None, to its end.
    total: about how many they will be. -> (frames of each, time of the first)."""
    first = None
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(FrameWriter(path, total)) for path in paths]
        for _, video in chunks:
            left = None if frames is None else frames - writers[0].count
            video = video[:, :left].float().cpu()
            first = first or time.perf_counter()
            for writer, own in zip(writers, video, strict=True):
                writer.write(own)
            bar.update(len(writers) * video.shape[1])
            if writers[0].count == frames:
                break
    return writers[0].count, first
