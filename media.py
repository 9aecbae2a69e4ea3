"""Videos, images and lists of prompts from files, and videos into them; else a UserError."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from secrets import token_hex

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from data import FPS, SIZE
from weights import UserError, written

# ffmpeg's options by kind of file; a gif gets a palette of its own for each frame
PALETTE = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"
ENCODERS = {".mp4": "-c:v libx264 -crf 5 -pix_fmt yuv420p", ".gif": f"-vf {PALETTE}"}
FORBIDDEN = '/\\:*?"<>|' if os.name == "nt" else "/"  # in a file's name
CASELESS = sys.platform in ("win32", "darwin")  # names that differ only by case are one file
ENDS = [getattr(signal, end) for end in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, end)]


def fit(frame, size):
    """Resize a picture to cover size (H, W) and crop its middle: [3, H, W] in [-1, 1].
    frame: an array [H, W] or [H, W, 1 to 4], 8 or 16 bits or in [0, 1]; transparent is black."""
    white = {1: 255, 2: 65535}.get(frame.dtype.itemsize, 1)
    pixels = torch.atleast_3d(torch.from_numpy(frame.astype("float32") / white))
    if pixels.shape[-1] in (2, 4):
        pixels = pixels[..., :-1] * pixels[..., -1:]
    pixels = pixels.expand(*pixels.shape[:2], 3).permute(2, 0, 1)
    scale = max(wanted / side for wanted, side in zip(size, pixels.shape[1:], strict=True))
    shape = [max(w, round(s * scale)) for w, s in zip(size, pixels.shape[1:], strict=True)]
    pixels = torch.nn.functional.interpolate(pixels[None], shape, mode="bilinear", antialias=True)
    top, left = ((side - wanted) // 2 for wanted, side in zip(size, shape, strict=True))
    return (pixels[0, :, top : top + size[0], left : left + size[1]] * 2 - 1).clamp(-1, 1)


def read_image(path, size=(SIZE, SIZE)):
    """Read an image file, or its first page: [1, 3, H, W] in [-1, 1]. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels
            with Image.open(path) as file:
                image = _pixels(file)
    except Exception as error:  # each of Pillow's decoders has its own
        raise UserError(f"cannot read the image {path!r}: {_reason(error)}; try another") from None
    if image.shape[:2] != tuple(size):
        fitted = f"resized and cropped to {size[1]} x {size[0]}"
        print(f"{path}: {image.shape[1]} x {image.shape[0]} {fitted}")
    return fit(image, size)[None]


def _pixels(image):
    """Decode a Pillow image, upright, for `fit`: more than 8 bits by the range that holds them."""
    # of a PNG of 2, 4 or 48 bits Pillow makes 8 a channel, but not of its transparent colour
    stored = image.tile[0][3] if image.format == "PNG" and image.tile else None
    scale = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(stored)
    tags = image.tag_v2 if image.format == "TIFF" else {339: 2}
    unsigned, depth = tags.get(339) != 2, tags.get(258, (16,))[0]
    image.load()
    key = image.info.get("transparency")
    if scale and key is not None:
        scaled = np.multiply(key, scale).astype(int).tolist()
        image.info["transparency"] = tuple(scaled) if isinstance(key, tuple) else scaled
    image = ImageOps.exif_transpose(image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode[0] not in "IF":
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    values = np.asarray(image)
    values = values.view("uint32") if unsigned and image.mode == "I" else values
    grey = np.nan_to_num(values, posinf=0, neginf=0)
    bits = {"float32": (1, 8, 16), "uint16": (depth,)}.get(values.dtype.name, (8, 16, 31))
    white = next((2**n - 1 for n in bits if grey.max() < 2**n), 2**32 - 1)
    grey = (grey / white).clip(0, 1)
    grey = 1 - grey if tags.get(262) == 0 else grey  # white is zero
    return grey if key is None else np.stack([grey, values != key], axis=-1)


def read_video(path, size=(SIZE, SIZE)):
    """Stream a video: (frames [3, H, W] in [-1, 1] at 16 a second, about how many or None)"""
    try:
        found, seconds, _, whole = _look(path)
        frames = decode(path, size)
        first = next(frames)
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(f"cannot read a video from {path!r}: {_reason(error)}") from None
    if not whole:
        print(f"{path} is cut short or damaged; it is used as far as it can be read")
    fitted = f"{size[1]} x {size[0]}"
    if found != f"{fitted} at {FPS} frames/s":
        print(f"{path}: {found} resized and cropped to {fitted}, at {FPS}")
    return itertools.chain([first], frames), seconds and max(1, round(seconds * FPS))


def pieces(frames, chunk, stride, ahead=0):
    """Group a video's frames, an iterator of [3, H, W], into the frames of each chunk:
    [1, F, 3, H, W] with F = 1 + stride (k - 1), then stride k; the last has what is left.
    ahead: as many more in the first, for an encoder that looks ahead, and as many after the end."""
    frames, size = lengthened(frames, ahead), 1 + stride * (chunk - 1) + ahead
    while piece := list(itertools.islice(frames, size)):
        yield torch.stack(piece)[None]
        size = stride * chunk


def lengthened(frames, count):
    """Pass on frames, then the last of them `count` times."""
    last = []
    for frame in frames:
        last = [frame]
        yield frame
    yield from last * count


def _look(path):
    """Go through a video undecoded: (size and rate in words, seconds if it tells, frames, whether
    it is whole)."""
    command = ["-i", f"file:{path}", "-map", "0:V:0", "-c", "copy", "-f", "framecrc", "-"]
    with _ffmpeg(command) as process:
        packets, told = (text.decode(errors="replace") for text in process.communicate())
    # a line for each frame: stream, time to decode, time to show, duration ...
    times = re.findall(r"^0, *(-?\d+), *-?\d+, *(\d+),", packets, re.MULTILINE)
    if not times:
        failed = process.returncode != 0 and "matches no streams" not in told
        raise OSError(told.strip().rpartition(": ")[2] if failed else "it holds no video")
    (over, under), (width, height) = re.findall(r"^#(?:tb|dim\w+) 0: (\d+)[/x](\d+)", packets, re.M)
    rate = re.search(r"([\d.]+) fps|$", told.rpartition("Output #0")[2])[1] or "unknown"
    seconds = (int(times[-1][0]) - int(times[0][0]) + int(times[-1][1])) * int(over) / int(under)
    seconds = None if "Duration: N/A" in told else seconds
    # messages begin with a bracket; what is told of the file, its name with it, does not
    damaged = re.search(r"^\[[^]]*\] .*(partial file|prematurely|corrupt)", told, re.MULTILINE)
    return f"{width} x {height} at {rate} frames/s", seconds, len(times), not damaged


def decode(path, size):
    """Decode a video to frames [3, H, W], which ffmpeg turns upright, scales and crops."""
    height, width = size
    cover = f"scale='max({width},round({height}*dar))':'max({height},round({width}/dar))'"
    exact = "flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"
    steps = f"setpts=PTS-STARTPTS,fps={FPS},{cover}:{exact},format=rgba,crop={width}:{height}"
    command = ["-i", f"file:{path}", "-map", "0:V:0", "-vf", steps, "-f", "rawvideo", "-"]
    with _ffmpeg(["-v", "quiet", *command]) as process:
        whole = 4 * height * width
        while len(frame := process.stdout.read(whole)) == whole:
            yield fit(np.frombuffer(frame, "uint8").reshape(height, width, 4), size)


def _ffmpeg(command, stdin=subprocess.DEVNULL):
    """Start ffmpeg, out of reach of Ctrl-C and of the terminal's end. Raises UserError."""
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # what Windows has for a session
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *command]
        return subprocess.Popen(command, start_new_session=True, creationflags=group, **pipes)
    except (OSError, RuntimeError) as error:
        remedy = "pip install imageio-ffmpeg, and set no other by IMAGEIO_FFMPEG_EXE"
        raise UserError(f"cannot start ffmpeg ({_reason(error)}); {remedy}") from None


def _reason(error):
    """Say in one line what an exception is about."""
    lines = str(error).strip().splitlines() or [f"it is shorter than a frame of {1000 / FPS:g} ms"]
    return getattr(error, "strerror", None) or re.sub(r"^\[.*?\] ", "", lines[0])  # [mp4 @ 0x12]


class FrameWriter(contextlib.AbstractContextManager):
    """Write frames to .mp4, .gif or a .png sheet of 16, all or nothing: what was at `path` before
    stays until then. total: about how many, if known. Raises UserError, as on a full disk."""

    def __init__(self, path, total=None):
        self.path = path
        self.kind = os.path.splitext(path)[1].lower()
        folder, name = os.path.split(path)
        self.temporary = os.path.join(folder, f".{name[:40]}.{token_hex(4)}.part{self.kind}")
        self.encoder = None
        self.count = 0
        self.whole = False
        self.kept = {}  # for a sheet: some of the frames by their number
        self.planned = set(np.linspace(0, (total or 1) - 1, 16).round())

    def write(self, video):
        """Append video [F, 3, H, W] in [-1, 1]."""
        frames = to_uint8(video)
        self.count += len(frames)
        if self.kind == ".png":
            self._keep(frames)
        else:
            self._encode(frames)

    def _keep(self, frames):
        """Keep the planned frames and all others or, if over 256, one in 2, 4, 8 ... of them."""
        self.kept |= enumerate(map(torch.clone, frames), self.count - len(frames))
        stride = 1
        while len(self.kept) > 256:
            stride *= 2
            self.kept = {n: f for n, f in self.kept.items() if n % stride == 0 or n in self.planned}

    def _encode(self, frames):
        """Feed frames to ffmpeg one by one: the file grows as the video is made."""
        if self.encoder is None:
            size = f"{frames.shape[2]}x{frames.shape[1]}"
            source = f"-v error -f rawvideo -pix_fmt rgb24 -s {size} -r {FPS} -i -"
            command = f"{source} {ENCODERS[self.kind]}".split()
            self.encoder = _ffmpeg([*command, f"file:{self.temporary}"], stdin=subprocess.PIPE)
        try:
            for frame in frames:
                self.encoder.stdin.write(frame.numpy().tobytes())
        except OSError:  # ffmpeg is gone
            self.finish()

    def finish(self):
        """Complete the file and move it to its path; if only the move fails, keep it."""
        try:
            if self.count == 0:
                raise OSError("no frame of it was made")
            if self.kind == ".png":
                ideal = np.linspace(0, self.count - 1, 16).round()
                picked = [min(self.kept, key=lambda n: abs(n - at)) for at in ideal]
                rows = torch.stack([self.kept[n] for n in picked]).unflatten(0, (2, 8))
                sheet = draw_sheet(rows.movedim(-1, -3) / 127.5 - 1)
                Image.fromarray(sheet).save(self.temporary)
            else:
                told = self.encoder.communicate()[1].decode(errors="replace").splitlines()
                if self.encoder.returncode != 0 or _look(self.temporary)[2] != self.count:
                    raise OSError(told[-1] if told else "it was cut short; is the disk full?")
            self.whole = True
            os.replace(self.temporary, self.path)
        except OSError as error:
            kept = f"; the whole video is in {self.temporary}" if self.whole else ""
            raise UserError(f"cannot write {self.path}: {_reason(error)}{kept}") from None

    def __exit__(self, error, *_):
        try:
            if error is None and not self.whole:
                self.finish()
        finally:
            if self.encoder is not None:
                self.encoder.kill()
                self.encoder.wait()
            if not self.whole:
                with contextlib.suppress(OSError):
                    os.remove(self.temporary)


def read_prompts(path):
    """Read the prompts of a file, one a line and each once. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.replace("\ufeff", "").strip() for line in file]  # files may be joined
    except OSError as error:
        raise UserError(f"cannot read the prompts in {path}: {_reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read the prompts in {path}: save it as UTF-8") from None
    prompts = {}  # by the name of their file
    for number, line in enumerate(lines, 1):
        if re.search(rf"[\0-\x1f\x7f{re.escape(FORBIDDEN)}]", line) or len(os.fsencode(line)) > 230:
            problem = f"a prompt names its file: no {FORBIDDEN}, tab or the like, at most 230 bytes"
            raise UserError(f"{path}, line {number}: {problem}")
        if prompts.setdefault(line.lower() if CASELESS else line, line) != line:
            raise UserError(f"{path}, line {number}: a line above it differs only by case")
    prompts.pop("", None)
    if not prompts:
        raise UserError(f"there is no prompt in {path}")
    return list(prompts.values())


def draw_sheet(video, columns=8):
    """Draw a sheet: each clip of video [B, F, 3, H, W] in [-1, 1] is a row of `columns` frames."""
    frames = torch.linspace(0, video.shape[1] - 1, min(columns, video.shape[1])).round().long()
    rows = to_uint8(video[:, frames])  # [B, F, H, W, 3]
    B, F, H, W, _ = rows.shape
    sheet = rows.new_full((B, H + 2, F, W + 2, 3), 255)
    sheet[:, :H, :, :W] = rows.transpose(1, 2)
    return sheet.reshape(B * (H + 2), F * (W + 2), 3).numpy()


def save_sheet(video, path):
    """Write what `draw_sheet` makes of video [B, F, 3, H, W] as a .png file. Raises UserError."""
    save_picture(draw_sheet(video), path)


def save_picture(pixels, path):
    """Write pixels [H, W] or [H, W, 3] in 0 .. 255 as a .png file. Raises UserError."""
    with written(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def to_uint8(video):
    """Convert pixels [..., 3, H, W] in [-1, 1] to [..., H, W, 3] in 0 .. 255, on the CPU."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu()


def check_out(path):
    """Raise UserError if `path` is no file that a video can be written to."""
    folder, name = os.path.split(path)
    if os.path.splitext(name)[1].lower() not in (*ENCODERS, ".png"):
        raise UserError(f"--out {path} must end in .mp4, .gif or .png")
    writable = os.path.isdir(folder or ".") and os.access(folder or ".", os.W_OK)
    if not writable or os.path.isdir(path) or len(os.fsencode(name)) > 255:
        problem = "it must be a file, of 255 bytes at most, in a folder that can be written to"
        raise UserError(f"cannot write {path}: {problem}")


def until_interrupted(chunks, whole=False):
    """Pass on a stream's chunks until Ctrl-C, SIGTERM or SIGHUP; the chunk in progress is last.
    whole: a part is worth nothing, so that a KeyboardInterrupt comes then, also from close()."""
    stop, before = [], {}
    heeded = [end for end in ENDS if signal.getsignal(end) is not signal.SIG_IGN]  # but for nohup
    with contextlib.suppress(ValueError):  # outside the main thread
        before = {end: signal.signal(end, lambda *_: stop.append(True)) for end in heeded}
    try:
        for chunk in chunks:
            yield chunk
            if stop:
                break
    finally:
        for end, was in before.items():
            signal.signal(end, was)
        if stop and whole:
            raise KeyboardInterrupt


def write_videos(chunks, paths, frames, total, bar):
    """Write the videos of a stream, a generator, to a path each: `frames` of each or, if None, to
    its end, and close it. total: about how many, or None. -> (frames of each, time of the first)"""
    first = None
    with contextlib.closing(chunks), contextlib.ExitStack() as stack:
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
        for writer in writers:  # each of them, even if another fails
            stack.callback(writer.finish)
    return writers[0].count, first


def write_many(make, encoder, prompts, samples, seed, frames, out, batch=8):
    """Write `samples` videos for each prompt into the folder `out`, named as VBench wants them;
    number i is what --prompt alone makes with --seed + i. Those that are there are kept.

    make(text, generators) -> chunks.
    """
    jobs = [(p, i, os.path.join(out, f"{p}-{i}.mp4")) for p in prompts for i in range(samples)]
    missing = [job for job in jobs if not (os.path.isfile(job[-1]) and os.path.getsize(job[-1]))]
    total, done = len(jobs) * frames, (len(jobs) - len(missing)) * frames
    with tqdm(total=total, initial=done, unit="frame", desc="streaming") as bar:
        for start in range(0, len(missing), batch):
            texts, indices, paths = zip(*missing[start : start + batch], strict=True)
            generators = [torch.Generator().manual_seed(seed + index) for index in indices]
            chunks = until_interrupted(make(encoder(list(texts)), generators), whole=True)
            write_videos(chunks, paths, frames, frames, bar)
    print(f"{out} holds all {len(jobs)} videos, {len(missing)} of them new")
