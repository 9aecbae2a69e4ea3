import io
import os
import shutil
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from media import read_image, read_video, to_uint8
from weights import UserError

RED, BLUE, GREEN = (220, 40, 40), (30, 60, 220), (60, 200, 70)
TRANSPOSE = Image.Transpose


def scene():
    """96 x 64 pixels: the left half red, the right half blue above green."""
    pixels = np.empty((64, 96, 3), "uint8")
    pixels[:, :48], pixels[:32, 48:], pixels[32:, 48:] = RED, BLUE, GREEN
    return pixels


def grey():
    """The red channel of the scene: 220, 30 and 60."""
    return scene()[..., 0]


def three(frame):
    """The colours of a frame [3, 64, 64] at the left, at the upper and at the lower right."""
    pixels = to_uint8(frame).int()
    return torch.stack([pixels[16, 16], pixels[16, 48], pixels[48, 48]])


def shows(frame, *colours, within=2):
    """Whether a frame [3, 64, 64] has the three colours, of RGB or grey."""
    expected = torch.tensor(colours).reshape(3, -1)
    return ((three(frame) - expected).abs() <= within).all()


@pytest.fixture
def read(tmp_path):
    """Saves a Pillow image and reads it: (image, name, **options) -> [3, 64, 64]."""

    def call(image, name, **options):
        image.save(tmp_path / name, **options)
        return read_image(str(tmp_path / name))[0]

    return call


# ----------------------------------------------------------------------------------------- images
TURNED = {
    2: TRANSPOSE.FLIP_LEFT_RIGHT,
    3: TRANSPOSE.ROTATE_180,
    4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE,
    6: TRANSPOSE.ROTATE_90,
    7: TRANSPOSE.TRANSVERSE,
    8: TRANSPOSE.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(read, kind, orientation):
    image, exif = Image.fromarray(scene()), Image.Exif()
    exif[0x0112] = orientation
    if orientation > 1:
        image = image.transpose(TURNED[orientation])
    frame = read(image, f"a.{kind}", exif=exif, quality=95)
    assert shows(frame, RED, BLUE, GREEN, within=4)


@pytest.mark.parametrize(
    ("mode", "name"), [("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("YCbCr", "a.tif")]
)
def test_the_colours_of_other_colour_spaces_are_right(read, mode, name):
    frame = read(Image.fromarray(scene()).convert(mode), name, quality=95)
    assert shows(frame, RED, BLUE, GREEN, within=4)


def test_the_colours_of_lab_are_right(read):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(scene()), *profiles, outputMode="LAB")
    assert shows(read(image, "a.tif"), RED, BLUE, GREEN, within=7)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.gif"])
def test_one_bit_is_black_or_white(read, name):
    image = Image.fromarray(grey() > 100).convert("1")
    assert shows(read(image, name), 255, 0, 0, within=0)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [
        ("uint16", 2**16 - 1),
        ("int32", 2**8 - 1),
        ("int32", 2**16 - 1),
        ("int32", 2**31 - 1),
        ("float32", 1),
        ("float32", 2**8 - 1),
        ("float32", 2**16 - 1),
    ],
)
def test_white_is_the_end_of_the_range(read, dtype, white):
    values = (grey() / 255 * white).round(0 if white > 1 else 9).astype(dtype)
    assert shows(read(Image.fromarray(values), "a.tif"), 220, 30, 60, within=0)


@pytest.fixture
def read_tagged(tmp_path):
    """Saves values as a .tif file, changes its tags and reads it: (values, {tag: (old, new)})."""

    def call(values, changes):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF")
        content = file.getvalue()
        for tag, (old, new) in changes.items():
            kind = 4 if tag == 256 else 3  # the width is a long
            was, becomes = (struct.pack("<HHIH", tag, kind, 1, n) for n in (old, new))
            assert was in content
            content = content.replace(was, becomes)
        (tmp_path / "a.tif").write_bytes(content)
        return read_image(str(tmp_path / "a.tif"))[0]

    return call


def test_unsigned_32_bits_are_not_taken_for_signed(read_tagged):
    values = (grey() / 255 * (2**32 - 1)).astype("uint32").view("int32")
    assert shows(read_tagged(values, {339: (2, 1)}), 220, 30, 60, within=0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_may_be_zero(read_tagged, dtype):
    values = (255 - grey()).astype(dtype)
    values = values * 257 if dtype == "uint16" else values
    assert shows(read_tagged(values, {262: (1, 0)}), 220, 30, 60, within=0)


def test_white_of_12_bits_is_the_end_of_their_range(read_tagged):
    values = (grey() / 255 * 4095).round().astype(">u2")
    bits = np.unpackbits(values.view("uint8").reshape(64, 96, 2), axis=-1)[..., 4:]
    packed = np.packbits(bits.reshape(64, -1), axis=-1)  # 144 bytes a row
    assert shows(read_tagged(packed, {256: (144, 96), 258: (8, 12)}), 220, 30, 60, within=1)


def test_many_pixels_are_no_reason_to_warn(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png")).shape == (1, 3, 64, 64)
    assert not recwarn.list


def test_sixteen_bits_keep_their_precision(read):
    frame = read(Image.fromarray(np.full((64, 64), 12345, "uint16")), "a.png")
    assert (frame - (12345 / 65535 * 2 - 1)).abs().max() < 1e-5


def test_a_dark_picture_of_16_bits_stays_dark(read):
    frame = read(Image.fromarray(np.full((64, 64), 200, "uint16")), "a.png")
    assert (to_uint8(frame) == 1).all()


def test_a_float_that_is_no_number_is_black(read):
    values = (grey() / 255).astype("float32")
    values[:32, 48:] = np.nan
    assert shows(read(Image.fromarray(values), "a.tif"), 220, 0, 60, within=0)


# ----------------------------------------------------------------------------------- transparency
@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_what_a_palette_makes_transparent_becomes_black(read, name):
    image = Image.fromarray(scene()).quantize(4)
    frame = read(image, name, transparency=image.getpixel((70, 10)))
    assert shows(frame, RED, (0, 0, 0), GREEN)


@pytest.mark.parametrize(
    ("pixels", "key", "colours"),
    [
        (scene(), BLUE, (RED, (0, 0, 0), GREEN)),
        (grey(), 30, (220, 0, 60)),
        (grey().astype("uint16") * 257, 30 * 257, (220, 0, 60)),
    ],
)
def test_what_has_the_transparent_colour_becomes_black(read, pixels, key, colours):
    assert shows(read(Image.fromarray(pixels), "a.png", transparency=key), *colours, within=0)


def png(bits, kind, rows, key):
    """A PNG of 96 x 64 as Pillow does not write it: of so many bits, with a transparent colour."""
    header = struct.pack(">IIBBBBB", 96, 64, bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    file = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"tRNS", key), (b"IDAT", data), (b"IEND", b"")):
        file += struct.pack(">I", len(body)) + name + body
        file += struct.pack(">I", zlib.crc32(name + body))
    return file


DEEP = scene().astype(">u2") * 257
FILES = {
    "2 bits": png(2, 0, [b"\xff" * 12 + b"\x55" * 12] * 64, struct.pack(">H", 1)),
    "4 bits": png(4, 0, [b"\xff" * 24 + b"\x55" * 24] * 64, struct.pack(">H", 5)),
    "48 bits": png(
        16, 2, [r.tobytes() for r in DEEP], struct.pack(">3H", *(c * 257 for c in BLUE))
    ),
}


@pytest.mark.parametrize(
    ("bits", "colours"),
    [("2 bits", (255, 0, 0)), ("4 bits", (255, 0, 0)), ("48 bits", (RED, (0, 0, 0), GREEN))],
)
def test_the_transparent_colour_has_the_bits_of_its_file(tmp_path, bits, colours):
    (tmp_path / "a.png").write_bytes(FILES[bits])
    assert shows(read_image(str(tmp_path / "a.png"))[0], *colours, within=0)


# ------------------------------------------------------------------------------ pages, and no image
@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_of_many_pages_the_first_is_read(read, name):
    pages = [Image.fromarray(scene()), Image.new("RGB", (96, 64))]
    frame = read(pages[0], name, save_all=True, append_images=pages[1:])
    assert shows(frame, RED, BLUE, GREEN, within=8)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_a_truncated_image_ends_in_one_line(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), "uint8")).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"cannot read the image .*a\.{kind}") as raised:
        read_image(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read_it", [read_image, read_video])
@pytest.mark.parametrize(("path", "words"), [("", "''"), (".", "Is a directory"), ("no.x", "no.x")])
def test_what_is_no_file_ends_in_one_line(tmp_path, monkeypatch, read_it, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        read_it(path)
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------------- videos
@pytest.fixture
def film(tmp_path, monkeypatch):
    """Calls ffmpeg in an empty folder with two seconds of the scene at 16 frames/s as its input:
    (*arguments) -> the last of them, which is the path."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene()).save("scene.png")

    def call(*arguments):
        source = ["-loop", "1", "-framerate", "16", "-t", "2", "-i", "scene.png"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source]
        subprocess.run([*command, *arguments], check=True, stdin=subprocess.DEVNULL)
        return arguments[-1]

    return call


def is_the_film(path, about=32):
    """Whether a path reads as the two seconds of the scene."""
    frames, told = read_video(path)
    frames = list(frames)
    shown = all(shows(frame, RED, BLUE, GREEN, within=3) for frame in frames)
    return shown and len(frames) == 32 and told == about


KINDS = {
    "a.ts": "-pix_fmt yuv420p -c:v libx264",
    "a.m4v": "-pix_fmt yuv420p -f mp4",
    "a.3gp": "-pix_fmt yuv420p -c:v libx264",
    "a.mkv": "-pix_fmt yuv444p",
    "a.webm": "-c:v libvpx -b:v 2M",
    "a.gif": "-filter_complex split[a][b];[a]palettegen[p];[b][p]paletteuse",
    "a": "-pix_fmt yuv444p -f mp4",
    "a.png": "-pix_fmt yuv444p -f mp4",
    "a.txt": "-pix_fmt yuv444p -f matroska",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_video_is_known_by_its_content(film, name):
    assert is_the_film(film(*KINDS[name].split(), name))


@pytest.mark.parametrize("name", ["-a.mp4", "a:b.mp4", "http:a.mp4", "a%03d.mp4", "-", "a b'.mp4"])
def test_a_video_may_have_any_name(film, name):
    shutil.move(film("-pix_fmt", "yuv444p", "whole.mp4"), name)
    assert is_the_film(name)


@pytest.mark.parametrize("codec", ["libx264", "libvpx"])
def test_how_long_a_video_is_may_be_unknown(film, codec):
    path = film("-pix_fmt", "yuv420p", "-c:v", codec, "-f", "matroska", "-live", "1", "a.webm")
    assert is_the_film(path, about=None)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mov"])
def test_sound_that_is_longer_does_not_lengthen_a_video(film, name):
    assert is_the_film(film(*["-f", "lavfi", "-t", "8", "-i", "sine", "-pix_fmt", "yuv420p"], name))


def test_sound_that_begins_earlier_does_not_lengthen_a_video(film):
    sound = ["-f", "lavfi", "-t", "8", "-i", "sine", "-pix_fmt", "yuv420p"]
    assert is_the_film(film(*sound, "-filter:v", "setpts=PTS+3/TB", "a.mkv"))


@pytest.mark.parametrize("squeeze", ["scale=48:64,setsar=2", "scale=96:32,setsar=1/2"])
def test_pixels_that_are_not_square_are_made_so(film, squeeze):
    assert is_the_film(film("-vf", squeeze, "-pix_fmt", "yuv444p", "a.mp4"))


@pytest.mark.parametrize(
    ("degrees", "turn"), [(90, "transpose=1"), (180, "hflip,vflip"), (270, "transpose=2")]
)
def test_a_turned_video_stands_upright(film, degrees, turn):
    flat = film("-vf", turn, "-pix_fmt", "yuv444p", "flat.mp4")
    turned = ["-display_rotation", str(degrees), "-i", flat, "-map", "1", "-c", "copy", "a.mp4"]
    assert is_the_film(film(*turned))


SPACES = {
    "BT.601": "-pix_fmt yuv420p",
    "BT.709": "-vf scale=out_color_matrix=bt709 -colorspace bt709 -pix_fmt yuv420p",
    "full range": "-vf scale=out_range=pc -color_range pc -pix_fmt yuvj420p",
    "ten bits": "-pix_fmt yuv420p10le",
}


@pytest.mark.parametrize("space", SPACES)
def test_the_colours_of_a_video_are_right(film, space):
    assert is_the_film(film(*SPACES[space].split(), "a.mp4"))


@pytest.mark.parametrize("rate", ["5", "24000/1001", "30", "60"])
def test_any_rate_becomes_16_frames_a_second(film, rate):
    frames, about = read_video(film("-r", rate, "-t", "2", "-pix_fmt", "yuv444p", "a.mp4"))
    assert abs(len(list(frames)) - 32) <= 1
    assert abs(about - 32) <= 1


def test_what_is_transparent_in_a_video_becomes_black(film):
    clear = "format=rgba,colorkey=0x1E3CDC:0.1:0,split[a][b];[a]palettegen[p];[b][p]paletteuse"
    frame = next(read_video(film("-filter_complex", clear, "a.gif"))[0])
    assert shows(frame, RED, (0, 0, 0), GREEN, within=4)


@pytest.mark.parametrize("cover", [[], ["-i", "scene.png", "-map", "1", "-map", "2"]])
def test_sound_without_video_is_named(film, cover):
    sound = ["-f", "lavfi", "-t", "1", "-i", "sine", *(cover or ["-map", "1"])]
    path = film(*sound, "-disposition:v", "attached_pic", "a.mp3")
    with pytest.raises(UserError, match="it holds no video"):
        read_video(path)


def test_without_ffmpeg_a_video_is_not_read(film, monkeypatch):
    path = film("-pix_fmt", "yuv444p", "a.mp4")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.path.abspath("nowhere"))
    with pytest.raises(UserError, match=r"cannot start ffmpeg.*pip install"):
        read_video(path)
