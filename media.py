"""Videos, images and lists of prompts from files, and videos into them.

What cannot be read or written ends in a UserError, one line that says why; what was there before stays.
"""

import contextlib
import os

import torch
from torch.nn import functional as F

from data import FPS, SIZE
from weights import UserError


def fit(frame, size):
    """Any picture as an array [H, W], [H, W, 1], 3 or 4 channels, 8 or 16 bits -> [3, size, size] in [-1, 1]: resized so that it
    covers the square, and cropped at the middle. What is transparent becomes black."""
    pixels = torch.from_numpy(
        frame.astype("float32")
        / (65535 if frame.dtype.itemsize == 2 else 255 if frame.dtype.itemsize == 1 else 1)
    )
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1] * pixels[..., -1:]
    pixels = pixels.expand(*pixels.shape[:2], 3).permute(2, 0, 1)
    scale = size / min(pixels.shape[1:])
    shape = [max(size, round(side * scale)) for side in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0] * 2 - 1
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[:, top : top + size, left : left + size].clamp(-1, 1)


def read_image(path, size=SIZE):
    """An image file -> [1, 3, size, size] in [-1, 1]. Raises UserError if imageio cannot read it."""
    import imageio.v3 as iio

    try:
        image = iio.imread(path, index=0)
    except Exception as error:  # each of imageio's readers has its own
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from None
    if image.shape[:2] != (size, size):
        print(f"{path}: {image.shape[1]} x {image.shape[0]} resized and cropped to {size} x {size}")
    return fit(image, size)[None]


def read_video(path, size=SIZE):
    """A video file as a stream: (its frames at 16 frames/s, one at a time, [3, size, size] in [-1, 1]; about how many they are).

    Raises UserError if it cannot be read or has no frame."""
    import imageio.v2 as iio

    try:
        reader = iio.get_reader(path, "FFMPEG", output_params=["-vf", f"fps={FPS}"])
        source = iter(reader)
        first = next(source)
    except Exception as error:
        raise UserError(f"cannot read a video from {path}: {_reason(error)}") from None
    about = reader.get_meta_data()
    if (*first.shape[:2], about["fps"]) != (size, size, FPS):
        print(
            f"{path}: {first.shape[1]} x {first.shape[0]} at {about['fps']:g} frames/s resized and cropped to {size} x {size}, at {FPS}"
        )

    def frames():
        yield fit(first, size)
        for frame in source:
            yield fit(frame, size)

    return frames(), max(1, round(about["duration"] * FPS))


def _reason(error):
    return (
        getattr(error, "strerror", None)
        or (str(error).strip().splitlines() or ["it has no frames"])[0]
    )


class FrameWriter:
    """Writes frames to .mp4, .gif or a .png sheet of 16, under a temporary name that becomes `path` when all went well.

    Raises UserError if they cannot be written, on a full disk for example; what was at `path` before is then still there."""

    def __init__(self, path, total):
        self.path, self.kind = path, os.path.splitext(path)[1].lower()
        self.temporary = os.path.join(
            os.path.dirname(path), f".{os.path.basename(path)}.part{self.kind}"
        )
        self.picked = (
            {round(i * (total - 1) / 15) for i in range(16)} if self.kind == ".png" else None
        )
        self.count, self.sheet, self.writer = 0, [], None

    def __enter__(self):
        return self

    def _open(self, height, width):
        """ffmpeg, fed frame by frame: the file grows as the video is made, whatever its length."""
        import imageio_ffmpeg

        options = {
            ".mp4": {"codec": "libx264", "quality": 9, "macro_block_size": 2},
            ".gif": {
                "codec": "gif",
                "quality": None,
                "macro_block_size": 1,
                "pix_fmt_out": "pal8",  # a palette of its own for each frame
                "output_params": [
                    "-vf",
                    "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none",
                ],
            },
        }
        self.writer = imageio_ffmpeg.write_frames(
            self.temporary, (width, height), fps=FPS, ffmpeg_log_level="quiet", **options[self.kind]
        )
        self.writer.send(None)

    def write(self, video):
        """Append video [F, 3, H, W] in [-1, 1]."""
        for index, frame in enumerate(to_uint8(video), self.count):
            if self.picked is None:
                try:
                    if self.writer is None:
                        self._open(*frame.shape[:2])
                    self.writer.send(frame.numpy().tobytes())
                except OSError:  # ffmpeg is gone
                    raise UserError(
                        f"cannot write {self.path}: the video's encoder gave up; is the disk full?"
                    ) from None
            elif index in self.picked:
                self.sheet.append(video[index - self.count].cpu())
        self.count += len(video)

    def __exit__(self, error, *_):
        try:
            if self.writer is not None:
                self.writer.close()
            if error is None and self.picked is None:
                self._check()
            elif error is None:
                rows = torch.stack(self.sheet)
                save_sheet(
                    rows.unflatten(0, (-1, 8)) if len(rows) % 8 == 0 else rows[None],
                    self.temporary,
                    columns=16,
                )
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
        """ffmpeg does not say when it could not finish a file: count what it holds."""
        import imageio_ffmpeg

        try:
            whole = imageio_ffmpeg.count_frames_and_secs(self.temporary)[0] == self.count
        except RuntimeError:
            whole = False
        if not whole:
            raise OSError("the file was cut short; is the disk full?")


def read_prompts(path):
    """The prompts of a file, one a line; blank lines and repeated prompts count once. Raises UserError for what no file name can hold."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {_reason(error)}") from None
    for number, line in enumerate(lines, 1):
        if set(line) & set("/\0") or len(os.fsencode(line)) > 230:
            raise UserError(
                f"{path}, line {number}: a prompt names its file, which cannot hold a / or more than 230 bytes"
            )
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise UserError(f"there is no prompt in {path}")
    return prompts


def save_sheet(video, path, columns=8):
    """Write a sheet of frames: each clip of video [B, F, 3, H, W] in [-1, 1] is a row of `columns` frames, evenly spaced."""
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
    """Pixels [..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in 0 .. 255, on the CPU."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu()
