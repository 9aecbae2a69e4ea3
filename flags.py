"""Command lines: flags that scripts share, the values they take, device and dtype."""

import argparse
import functools
import math
import os
import re
import time
import warnings

import torch
from torch.nn import functional as F

from data import BACKGROUNDS, COLOURS, FPS, FRAMES, MOTIONS, SHAPES, WORDINGS
from diffusion import TEACHER_STEPS
from media import check_out, read_prompts
from text import split
from weights import UserError, is_public, own_clips, shipped


# -------------------------------------------------------------------------------------- the parser
class Help(argparse.HelpFormatter):
    """Help that ends with a flag's default, where it has one that its text does not tell."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or isinstance(default, bool) or default in (argparse.SUPPRESS, []):
            return action.help
        if "(" in action.help:
            return action.help
        if isinstance(default, str) and os.path.isabs(default):
            default = os.path.relpath(default)
        return f"{action.help} ({str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help shows every default."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


class Once(argparse.Action):
    """Take a flag's value; of two, one would be lost."""

    def __call__(self, parser, args, value, flag=None):
        if getattr(args, self.dest) is not None:
            parser.error(f"{flag} is there twice")
        setattr(args, self.dest, value)


def whole(low=1, high=10**9):
    """Make a flag's type: a whole number from low to high."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie between {low:,} and {high:,}, not {text}")
        return value

    return parse


def real(low, high=math.inf, above=False):
    """Make a flag's type: a finite number from low, or above it, to high."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            bound = f"must be {'greater than' if above else 'at least'} {low:g}"
            bound += f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{bound}, and finite: not {text}")
        return value

    return parse


def words(text):
    """A flag's type: text that is not empty."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def source(text):
    """A flag's type: a file that can be read."""
    if not words(text) or not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    if not os.access(text, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be read")
    return text


def parts(text):
    """A flag's type: a file that can be read, or a folder with the files of a public network."""
    return text if os.path.isdir(words(text)) else source(text)


def folder(text):
    """A flag's type: a folder that can be read."""
    if not os.path.isdir(words(text)) or not os.access(text, os.R_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} is not a folder that can be read")
    return text


def picture(text):
    """A flag's type: a .png file in a folder that can be written to."""
    folder = os.path.dirname(words(text)) or "."
    name = os.path.basename(text)
    if not name.lower()[1:].endswith(".png") or len(os.fsencode(name)) > 240 or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} must be a file that ends in .png")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{folder} is not a folder that can be written to")
    return text


def results(text):
    """A flag's type: FILE, for FILE.json and FILE.md in a folder that can be written to."""
    folder, name = os.path.split(words(text))
    while folder and not os.path.exists(folder):  # it will be made
        folder = os.path.dirname(folder)
    if not name or len(os.fsencode(name)) > 240 or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} must name files, not a folder")
    if not os.path.isdir(folder or ".") or not os.access(folder or ".", os.W_OK):
        raise argparse.ArgumentTypeError(f"{folder} is not a folder that can be written to")
    return text


SEED = whole(0, 2**63 - 1)


# ------------------------------------------------------------------------------ flags in common
def device_flags(parser):
    """Add the flags --device, --dtype and --threads to a command line."""
    add = parser.add_argument
    add("--device", default="auto", type=words, help="auto, cpu, cuda, cuda:1, mps ...")
    told = "of the networks; auto: bfloat16 where the hardware is fast in it"
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help=told)
    told = "of the processor (measured: one, where other programs keep the processor busy)"
    add("--threads", type=whole(1, os.cpu_count() or 1), help=told)


def codec_flags(parser):
    """Add the flags --vae and --text-encoder: the frozen networks that a transformer goes with."""
    for flag, name in (("--vae", "autoencoder"), ("--text-encoder", "text encoder")):
        told = f"weights of the {name} (those beside the transformer's, else the shipped)"
        parser.add_argument(flag, type=parts, help=told)


@functools.lru_cache(1)
def fastest_threads():
    """Measure whether all threads or one multiply small matrices faster on average.

    Threads wait for each other: beside another busy program, all are several times slower.
    """
    x, w, means = torch.randn(336, 192), torch.randn(592, 192), {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        for _ in range(100):
            F.linear(x, w)
        means[threads] = time.perf_counter() - started
    return min(means, key=means.get)


def on_device(device, dtype="auto", threads=None):
    """Turn the flags of `device_flags` into a torch.device and a torch.dtype; set the threads.

    auto is CUDA or MPS where there is one, and bfloat16 where the hardware multiplies in it: on
    CUDA, and on processors with AMX. With AVX512-BF16 alone it is slower than float32.
    Raises UserError for a device that is not there.
    """
    if device == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device = next((name for name, found in there.items() if found), "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torch no longer uses
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):  # torch without CUDA raises the second
        raise UserError(f"device {device!r} is not available here; try --device auto") from None
    device = torch.device(device)
    if device.type == "cpu" and device.index:
        raise UserError(f"device '{device}' is not available here: all processors are cpu")
    told = f"on {device}"
    if device.type == "cpu":
        torch.set_num_threads(threads or fastest_threads())
        told += f" with {torch.get_num_threads()} threads"
    if dtype == "auto":
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        dtype = "bfloat16" if amx or device.type == "cuda" else "float32"
    print(f"{told}, in {dtype}")
    return device, getattr(torch, dtype)


# ---------------------------------------------------------------------------------- the sampler's
def sample_args(example):
    """Read the command line of sample.py. example: a prompt. Raises UserError."""
    parser = Parser("Make a video from a prompt, streaming it chunk by chunk.")
    add = parser.add_argument
    add("--prompt", type=words, action=Once, help=f'such as "{example}"')
    told = "length at 16 frames/s (5; with --video the video's)"
    add("--seconds", type=real(0, 10**7, above=True), help=told)
    add("--seed", type=SEED, default=0, help="of the noise")
    told = "FILE.mp4, .gif, or .png for a sheet (sample.mp4); with --prompts a folder (samples)"
    add("--out", type=words, help=told)
    where = ("SECONDS", "TEXT")
    told = "change the prompt on the way; any number of times"
    add("--prompt-at", nargs=2, action="append", default=[], metavar=where, help=told)
    add("--image", type=source, help="begin with this image")
    add("--video", type=source, help="follow this video")
    told = "the time t that --video is noised to, 0 to 1 (0.7)"
    add("--strength", type=real(0, 1), help=told)
    told = "a file of prompts, one a line: videos of all into the folder --out"
    add("--prompts", type=source, help=told)
    add("--samples", type=whole(1, 10**6), help="videos for each of --prompts (5)")
    told = f"denoising steps (the weights' own; teacher {TEACHER_STEPS})"
    add("--steps", type=whole(1, 1000), help=told)
    told = "chunks that a chunk attends to, itself included (the weights' own)"
    add("--window", type=whole(1, 1000), help=told)
    told = "sample a bidirectional many-step teacher, at most as long as its clips (the shipped)"
    teacher = {"nargs": "?", "const": shipped("teacher"), "metavar": "FILE", "type": parts}
    add("--teacher", help=told, **teacher)
    add("--weights", type=parts, default=shipped("student"), help="weights of the student")
    codec_flags(parser)
    public_flags(parser)
    device_flags(parser)
    args = parser.parse_args()
    check_combination(args, example)
    args.text_encoder = args.text_encoder or args.text_embedding
    longest = own_clips(args.teacher).get("frames", FRAMES) if args.teacher else FRAMES
    args.seconds = args.seconds or (None if args.video else min(5.0, longest / FPS))
    args.prompt = args.prompt or args.text_embedding
    args.changes = prompt_changes(args.prompt, args.prompt_at, args.seconds or math.inf)
    args.frames = args.seconds and max(1, round(args.seconds * FPS))
    if args.teacher and args.frames > longest:
        raise UserError(f"the teacher makes at most {longest} frames, {longest / FPS:.2f} seconds")
    if args.prompts:
        args.prompts = read_prompts(args.prompts)
        args.out = args.out or "samples"
    else:
        args.out = args.out or "sample.mp4"
        check_out(args.out)
    return args


def public_flags(parser):
    """Add the flags of public checkpoints and of videos of their size."""
    add = parser.add_argument
    told = "height and width of the video (64 64; of a public checkpoint 480 832)"
    add("--size", nargs=2, type=whole(16, 4096), metavar=("H", "W"), help=told)
    told = "sample a public checkpoint as this one is sampled (what its keys tell)"
    add("--preset", choices=["causvid", "self-forcing"], help=told)
    told = "use only so many layers of a public checkpoint, to try things out (all)"
    add("--layers", type=whole(1, 1000), help=told)
    told = "FILE with the embedding of a prompt, for a public checkpoint (none)"
    add("--text-embedding", type=source, help=told)
    told = "fuse the passes behind a full window with torch.compile, which takes half a minute"
    add("--compile", action="store_true", help=told)
    told = "what a teacher's guidance leads away from (the empty prompt)"
    add("--negative", type=words, help=told)


# -------------------------------------------------------------------------- prompts and steering
def check_combination(args, example):
    """Raise UserError for flags of sample.py that do not go together."""
    if args.text_embedding and (args.prompt or args.prompts or args.prompt_at or args.text_encoder):
        raise UserError("--text-embedding stands in place of every prompt and of --text-encoder")
    if not args.text_embedding and (args.prompt is None) == (args.prompts is None):
        raise UserError(f'give one of --prompt and --prompts; try --prompt "{example}"')
    check_encoder(args.text_encoder)
    if args.image and args.video:
        raise UserError("give one of --image and --video")
    if args.teacher and args.preset:
        raise UserError("--preset goes with a student, not with --teacher")
    check_needed(args, samples="prompts", strength="video", negative="teacher")
    steering = {"image": args.image, "video": args.video, "prompt-at": args.prompt_at}
    for flag, value in steering.items():
        if value and (args.teacher or args.prompts):
            other = "teacher" if args.teacher else "prompts"
            raise UserError(f"--{flag} does not go with --{other}")
    if args.teacher and args.window:
        raise UserError("--window does not go with --teacher, which attends to the whole clip")


def check_encoder(path):
    """Raise UserError for a --text-encoder that is an embedding, which no prompt would change."""
    if path and os.path.isfile(path) and is_public(path):
        raise UserError(
            f"--text-encoder {path} is no text encoder: if it is the embedding of a prompt, give "
            "it to sample.py as --text-embedding, without --prompt"
        )


def check_needed(args, **needed):
    """Raise UserError for a flag that is given without the one that it needs."""
    for flag, other in needed.items():
        if getattr(args, flag) is not None and not getattr(args, other):
            flag, other = flag.replace("_", "-"), other.replace("_", "-")
            raise UserError(f"--{flag} goes with --{other}")


def check_size(size, stride, patch):
    """Raise UserError for a height and width that do not split into latents and patches."""
    for side, cut in zip(size, patch[1:], strict=True):
        if side % (stride * cut):
            raise UserError(f"--size must be multiples of {stride * cut}, not {side}")


def check_frames(frames, stride):
    """Raise UserError for a number of frames that is not that of 3 latent frames or more."""
    least, below = 1 + 2 * stride, frames - (frames - 1) % stride
    if frames < least or frames != below:
        near = " or ".join(str(max(n, least)) for n in sorted({below, below + stride}))
        near = str(least) if frames < least else near
        told = f"--frames must be 1 + {stride} n, at least {least}"
        raise UserError(f"{told}: {near}, not {frames}")


def prompt_changes(prompt, changes, end):
    """Put --prompt and every --prompt-at in the order of time: [(seconds, text)]."""
    found = {0.0: prompt}
    for seconds, text in changes:
        try:
            at = real(0, end, above=True)(seconds)
            if at == end:
                raise argparse.ArgumentTypeError("is where the video ends")
            words(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--prompt-at {seconds} {text!r}: {error}") from None
        if at in found:
            raise UserError(f"--prompt-at {seconds} is there twice")
        found[at] = text
    return sorted(found.items())


def vocabulary():
    """List the words of all prompts."""
    names = [
        *COLOURS,
        *SHAPES,
        *BACKGROUNDS,
        *(words for pair in MOTIONS.values() for words in pair),
    ]
    wordings = re.sub(r"{\w+}", "", " ".join(WORDINGS))
    return sorted(set(re.findall(r"\w+", " ".join([*names, wordings, "an"]))))


def say_what_is_unknown(prompts, limit, path=None):
    """Print the words of prompts that no training prompt has, and prompts longer than the limit.
    path: the model's weights; those of one's own clips name the words of their captions. Raises
    UserError for a prompt without any word."""
    known = (own_clips(path) if path else {}).get("words", vocabulary())
    for prompt in dict.fromkeys(prompts):
        found = split(prompt)
        unknown = [word for word in found if word not in known]
        if not found:
            raise UserError(f"{prompt!r} has no word in it")
        if unknown:
            print(f"{prompt!r}: the text encoder takes {', '.join(unknown)} for words it knows:")
            print(", ".join(known) if len(known) <= 200 else f"the {len(known):,} of the captions")
        if len(found) > limit:
            print(f"{prompt!r}: only the first {limit} words count")


def last_chunk(frames, chunk, stride):
    """The frame at which the last chunk of a stream of `frames` frames begins."""
    return max([0, *range(1 + stride * (chunk - 1), frames, stride * chunk)])


def say_what_is_late(changes, frames, chunk, stride):
    """Print that the last of the prompts [(seconds, text)] begins after the last chunk does."""
    if frames and changes[-1][0] * FPS > last_chunk(frames, chunk, stride):
        print(f"the prompt at {changes[-1][0]:g} s comes too late to have an effect")


# ---------------------------------------------------------------------------- training scripts
def data_flags(parser):
    """Add the flags that name one's own clips in place of the shapes world."""
    add = parser.add_argument
    parser.set_defaults(clips=None)  # which the stages have that draw many of the shapes world
    told = "a folder of clips, with captions beside them, to train on (the shapes world)"
    add("--data", type=folder, metavar="DIR", help=told)
    told = "of --data's clips in pixels (those of the weights that are trained on; 64 64)"
    add("--size", nargs=2, type=whole(16, 4096), metavar=("H", "W"), help=told)
    told = "of a piece of --data's clips, at 16 a second (those of the weights; 81)"
    add("--frames", type=whole(1, 99_999), help=told)


def training_parser(description, steps, batch_size, lr, out):
    """The flags that every training script has, with its defaults."""
    parser = Parser(description)
    add = parser.add_argument
    told = "length of the run; the learning rate falls to 0 over it"
    add("--steps", type=whole(), default=steps, help=told)
    add("--batch-size", type=whole(1, 10**6), default=batch_size, help="clips a step")
    add("--lr", type=real(0, above=True), default=lr, help="the highest learning rate")
    add("--seed", type=SEED, default=0, help="of all that is random")
    told = "folder for checkpoint, log, sheets and the trained weights"
    add("--out", default=out, type=words, help=told)
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--save-every", type=whole(), default=200, help="steps between two checkpoints")
    told = "stop after so many; --resume goes on (no limit)"
    add("--minutes", type=real(0, above=True), default=math.inf, help=told)
    device_flags(parser)
    told = "fuse the networks with torch.compile, which takes a minute and a C++ compiler"
    add("--compile", action="store_true", help=told)
    told = "parts of a batch, made one after the other, whose gradients add up: less memory"
    add("--accumulate", type=whole(1, 10**6), default=1, help=told)
    told = "compute activations again in the backward pass: less memory, a third more time"
    add("--recompute", action="store_true", help=told)
    told = "print the memory that each of so many processes would take, and train nothing (1)"
    how = {"nargs": "?", "const": 1, "type": whole(1, 10**5), "metavar": "PROCESSES"}
    add("--dry-run", help=told, **how)
    return parser


def model_parser(description, steps, batch_size, lr, out):
    """`training_parser`, and the flags of the stages that train a transformer.

    --chunk, --window and --student-steps say how a causal model is used.
    """
    parser = training_parser(description, steps, batch_size, lr, out)
    add = parser.add_argument
    add("--chunk", type=whole(1, 1000), help="latent frames a chunk (the weights' own)")
    told = "chunks that a chunk attends to, itself included (the weights' own)"
    add("--window", type=whole(1, 1000), help=told)
    told = "denoising steps of the student (the weights' own)"
    add("--student-steps", type=whole(1, 1000), help=told)
    data_flags(parser)
    codec_flags(parser)
    return parser
