"""The sampler: video chunk by chunk from a KV cache (CausVid, Algorithm 2), and the many-step ODE solver to compare it with.

    python sample.py --prompt "a red circle bouncing on a black background"          writes sample.mp4

The same stream goes on for as long as one likes, starts from an image, follows another video, and takes new prompts on the way.
"""

import argparse
import contextlib
import itertools
import math
import os
import signal
import time

import torch
from tqdm import tqdm

from data import FPS, FRAMES, SIZE
from diffusion import TEACHER_STEPS, guided_v, noise_source, solve_ode, with_null
from media import FrameWriter, read_image, read_prompts, read_video
from model import DiT
from text import TextEncoder
from vae import VAE
from weights import (
    UserError,
    choose_device,
    choose_dtype,
    device_flags,
    load_model,
    run_main,
    shipped,
)


# -------------------------------------------------------------------------------- chunk by chunk
def predict_x0(model, x_t, t, keys, cache, actions=None):
    """Predict a chunk's x0 from its state x_t [B, k, C, h, w] at time t, conditioned on the cache."""
    at = torch.full(x_t.shape[:2], float(t), device=x_t.device)
    attention = {"chunk": cache.chunk, "window": cache.window, "cache": cache, "actions": actions}
    return model.schedule.x0(x_t, model(x_t, at, keys, **attention), t)


def denoise_chunk(model, x, times, keys, cache, noise, actions=None):
    """Denoise one chunk in few steps (Algorithm 2): from x [B, k, C, h, w] at times[0] to its state
    at times[-1], which is x0 where the times end in 0.

    keys: the prompt's; noise(shape): draws the noise between the steps; actions: see `DiT.forward`.
    """
    for t, r in itertools.pairwise(times):
        x = predict_x0(model, x, t, keys, cache, actions)
        if r > 0:
            x = model.schedule.add_noise(x, noise(x.shape), r)  # re-noise to the next time
    return x


def solve_chunk(model, x, times, keys, cache, guidance, actions=None):
    """Denoise one chunk along the guided ODE: the causal many-step model, which was not distilled.

    keys and cache are for 2 B, the prompts and as many null prompts; at guidance 1 for B.
    """
    attention = {"chunk": cache.chunk, "window": cache.window, "cache": cache, "actions": actions}
    for t, r in itertools.pairwise(times):
        at = torch.full(x.shape[:2], float(t), device=x.device)
        if guidance == 1:
            v = model(x, at, keys, **attention)
        else:
            v = guided_v(model, x, at, keys, guidance, **attention)
        x = model.schedule.step(x, v, t, r)
    return x


@torch.no_grad()
def remember_chunk(model, x0, keys, cache, actions=None):
    """The end of Algorithm 2's loop: a finished chunk passes once more, clean, at t = 0, and leaves its keys and values in the cache."""
    x0 = x0.repeat(
        cache.k.shape[1] // len(x0), 1, 1, 1, 1
    )  # under guidance the cache has the null prompts' half too
    clean = torch.zeros(x0.shape[:2], device=x0.device)
    model(x0, clean, keys, chunk=cache.chunk, window=cache.window, cache=cache, actions=actions)
    cache.commit(x0.shape[1])


@torch.no_grad()
def stream(
    model,
    vae,
    text,
    generator,
    steps=4,
    window=None,
    size=(SIZE, SIZE),
    guidance=None,
    image=None,
    video=None,
    strength=1.0,
    actions=None,
):
    """Video in constant memory, without end: yields (latents [B, k, C, h, w], video [B, F, 3, H, W]) chunk by chunk.

    text: embedded prompts [B, S, text_dim], or a function from the number of frames made so far to them, asked before each
    chunk: a new prompt steers the video that is running. generator: see `noise_source`. window: chunks attended to, the model's own by
    default. guidance: as for `solve_chunk`.

    The first chunk has 1 + 4 (k - 1) frames, each further one 4 k. size: (H, W). image [B, 3, H, W]: the first chunk is the image alone,
    clean. video: an iterator of `pieces`, one for each chunk; each is encoded, noised to t = strength, and denoised from
    there, and the stream ends with it. Strength 0 gives the autoencoder's reconstruction, 1 the stream without video.
    actions: a function from the number of frames made so far to the actions [B, k] of the next chunk (NFD, where k = 1).
    """
    c, schedule, (h, w) = model.config, model.schedule, (side // 8 for side in size)
    prompt = text if callable(text) else lambda frames: text
    noise = noise_source(generator, model.patch_embedding.weight.device)
    times, frames, shown, encoder_state, decoder_state = (
        schedule.timesteps(steps, strength),
        0,
        None,
        {},
        {},
    )
    while True:
        now = prompt(frames)
        if now is not shown:  # text keys and values: once for each prompt
            keys, shown = model.text_keys(now if guidance in (None, 1) else with_null(now)), now
        if frames == 0:
            cache = model.new_cache(len(keys[0][0]), h, w, window=window)
        acts = actions(frames) if actions is not None else None
        if image is not None and frames == 0:
            x0 = vae.encode(image[:, None].to(now.device))
        else:
            x = noise((len(now), c.chunk, c.in_dim, h, w))
            if video is not None:
                piece = next(video, None)
                if piece is None:
                    return
                missing = (
                    -(piece.shape[1] - (frames == 0)) % vae.config.time_stride
                )  # the last piece may end within a latent frame
                source = vae.encode(
                    torch.cat([piece] + missing * [piece[:, -1:]], dim=1).to(now.device),
                    encoder_state,
                )
                x = schedule.add_noise(source, x[:, : source.shape[1]], times[0])
            if guidance is None:
                x0 = denoise_chunk(model, x, times, keys, cache, noise, acts)
            else:
                x0 = solve_chunk(model, x, times, keys, cache, guidance, acts)
        made = vae.decode(x0, decoder_state)
        yield x0, made[:, : piece.shape[1]] if video is not None else made
        remember_chunk(model, x0, keys, cache, acts)  # after the viewer has seen it
        frames += made.shape[1]


def pieces(frames, chunk, stride=4):
    """Group a video's frames, an iterator of [3, H, W], chunk by chunk as `stream` takes them: [1, f, 3, H, W],
    f = 1 + stride (k - 1) and then stride k; the last piece has what is left."""
    frames, size = iter(frames), 1 + stride * (chunk - 1)
    while piece := list(itertools.islice(frames, size)):
        yield torch.stack(piece)[None]
        size = stride * chunk


# -------------------------------------------------------------------------------------------------------- command line
def parse_args():
    parser = argparse.ArgumentParser(
        description="Make a video from a prompt, streaming it chunk by chunk."
    )
    add = parser.add_argument
    add("--prompt", help='such as "a red circle bouncing on a black background"')
    add(
        "--seconds",
        type=float,
        help="length of the video at 16 frames/s (5; with --video the video's)",
    )
    add("--seed", type=int, default=0)
    add(
        "--out",
        help="FILE.mp4, FILE.gif, or FILE.png for a sheet of frames (sample.mp4); with --prompts a folder",
    )
    add(
        "--prompt-at",
        nargs=2,
        action="append",
        default=[],
        metavar=("SECONDS", "TEXT"),
        help="change the prompt mid-stream; any number of times",
    )
    add("--image", help="begin with this image")
    add("--video", help="follow this video")
    add(
        "--strength",
        type=float,
        help="how far to leave --video, the time t that it is noised to: 0 not at all, 1 altogether (0.7)",
    )
    add(
        "--prompts",
        help="a file with a prompt in each line: videos of all into the folder --out, as VBench lays them out",
    )
    add("--samples", type=int, help="videos for each of --prompts (5)")
    add("--steps", type=int, help="denoising steps (student 4, teacher 32)")
    add("--window", type=int, help="chunks of the past and present that a chunk sees")
    add(
        "--teacher",
        action="store_true",
        help="sample the bidirectional many-step teacher, for comparison (at most 81 frames)",
    )
    add(
        "--weights",
        help="the transformer's weights (weights/student.safetensors or teacher.safetensors)",
    )
    add("--vae", default=shipped("vae"))
    add("--text-encoder", default=shipped("text_encoder"))
    device_flags(parser)
    args = parser.parse_args()

    example = 'try --prompt "a red circle bouncing on a black background"'
    if (args.prompt is None) == (args.prompts is None):
        raise UserError(f"give one of --prompt and --prompts; {example}")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError(f"the prompt is empty; {example}")
    for flag, needs in (("samples", "prompts"), ("strength", "video")):
        if getattr(args, flag) is not None and getattr(args, needs) is None:
            raise UserError(f"--{flag} goes with --{needs}")
    steering = [flag for flag in ("image", "video", "prompt_at") if getattr(args, flag)]
    for other in ("teacher", "prompts"):
        if getattr(args, other) and steering:
            raise UserError(f"--{steering[0].replace('_', '-')} does not go with --{other}")
    if args.image and args.video:
        raise UserError("give one of --image and --video")
    args.strength, args.samples = (
        0.7 if args.strength is None else args.strength,
        5 if args.samples is None else args.samples,
    )
    if not 0 <= args.strength <= 1:
        raise UserError(f"--strength must lie between 0 and 1, not {args.strength:g}")
    if args.seconds is None and not args.video:
        args.seconds = 5.0
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds must be greater than 0, not {args.seconds:g}")
    for flag in ("steps", "window", "samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1")
    args.frames = None if args.seconds is None else max(1, round(args.seconds * FPS))
    if args.teacher and args.frames > FRAMES:
        raise UserError(
            f"the teacher makes whole clips of at most {FRAMES} frames: --seconds {FRAMES / FPS:.2f} or less"
        )
    if args.prompts:
        args.prompts = read_prompts(args.prompts)
    args.changes = _changes(args)
    args.out = args.out or ("samples" if args.prompts else "sample.mp4")
    if args.prompts:
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from None
    else:
        check_out(args.out)
    args.weights = args.weights or shipped("teacher" if args.teacher else "student")
    return args


def _changes(args):
    """--prompt and every --prompt-at as [(seconds, text)] in the order of time."""
    changes, end = {0.0: args.prompt}, args.seconds or math.inf
    for seconds, text in args.prompt_at:
        try:
            at = float(seconds)
        except ValueError:
            raise UserError(
                f"--prompt-at takes a time in seconds and a text, not {seconds!r}"
            ) from None
        if not 0 < at < end:
            raise UserError(
                f"--prompt-at {seconds} must lie inside the video, after 0"
                + f" and before {end:g} seconds" * (end < math.inf)
            )
        if at in changes or not text.strip():
            raise UserError(
                f"--prompt-at {seconds} "
                + ("is there twice" if at in changes else "has an empty prompt")
            )
        changes[at] = text
    return sorted(changes.items())


def check_out(path):
    """Raises UserError if `path` is no file that a video can be written to."""
    if os.path.splitext(path)[1].lower() not in (".mp4", ".gif", ".png"):
        raise UserError(f"--out {path} must end in .mp4, .gif or .png")
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is not a folder that can be written to")


def until_interrupted(chunks):
    """The chunks of a stream until Ctrl-C, which lets the chunk in the making end."""
    stop = []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        for chunk in chunks:
            yield chunk
            if stop:
                return
    finally:
        signal.signal(signal.SIGINT, before)


def videos(args, model, vae, text, generator, **steering):
    """Chunk by chunk what --teacher, whose whole clip is one chunk, or the stream makes."""
    if not args.teacher:
        return stream(model, vae, text, generator, args.steps or 4, args.window, **steering)
    shape = (len(text), 1 + -(-(args.frames - 1) // 4), model.config.in_dim, SIZE // 8, SIZE // 8)
    x0 = solve_ode(
        model, noise_source(generator, text.device)(shape), text, args.steps or TEACHER_STEPS
    )[-1]
    return iter([(x0, vae.decode(x0))])


def write(chunks, paths, frames, total, bar):
    """Write the videos of a stream to a path each, `frames` of each or, if that is None, to the end of the stream, about `total`.

    -> (frames of each, time of the first)."""
    first = None
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(FrameWriter(path, total)) for path in paths]
        for _, video in chunks:
            video = video[:, : frames and frames - writers[0].count].float().cpu()
            first = first or time.perf_counter()
            for writer, own in zip(writers, video):
                writer.write(own)
            bar.update(len(writers) * video.shape[1])
            if writers[0].count == frames:
                break
    return writers[0].count, first


def sample_one(args, model, vae, encoder):
    """The video of --prompt, steered by --prompt-at, --image and --video, into --out."""
    steering, total = {}, args.frames
    if args.image:
        steering = {"image": read_image(args.image)}
    if args.video:
        frames, length = read_video(args.video)
        steering, total = (
            {
                "video": pieces(frames, model.config.chunk, vae.config.time_stride),
                "strength": args.strength,
            },
            min(total or length, length),
        )
    started = time.perf_counter()
    with tqdm(total=total, unit="frame", desc="teacher" if args.teacher else "streaming") as bar:
        texts = [(seconds * FPS, encoder([prompt])) for seconds, prompt in args.changes]
        text = (
            texts[0][1]
            if len(texts) == 1
            else lambda made: [text for begin, text in texts if begin <= made][-1]
        )
        generator = torch.Generator().manual_seed(args.seed)
        count, first = write(
            until_interrupted(videos(args, model, vae, text, generator, **steering)),
            [args.out],
            args.frames,
            total,
            bar,
        )
        spent = time.perf_counter() - started
    print(
        f"wrote {args.out}: {count} frames of {SIZE} x {SIZE}; first frame after {1000 * (first - started):.0f} ms, {count / spent:.1f} frames/s"
    )


def sample_many(args, model, vae, encoder, batch=8):
    """--samples videos for each of --prompts into the folder --out, named as VBench wants them; those that are there already are kept.

    Number i of a prompt is what --prompt alone makes with --seed + i."""
    jobs = [
        (prompt, index, os.path.join(args.out, f"{prompt}-{index}.mp4"))
        for prompt in args.prompts
        for index in range(args.samples)
    ]
    missing = [job for job in jobs if not os.path.exists(job[-1])]
    with tqdm(
        total=len(jobs) * args.frames,
        initial=(len(jobs) - len(missing)) * args.frames,
        unit="frame",
        desc="streaming",
    ) as bar:
        for start in range(0, len(missing), batch):
            prompts, indices, paths = zip(*missing[start : start + batch])
            generators = [torch.Generator().manual_seed(args.seed + index) for index in indices]
            write(
                videos(args, model, vae, encoder(list(prompts)), generators),
                paths,
                args.frames,
                args.frames,
                bar,
            )
    print(f"{args.out} holds all {len(jobs)} videos, {len(missing)} of them new")


@torch.no_grad()
def main():
    args = parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model = load_model(DiT, args.weights, device).to(dtype)
    vae, encoder = (
        load_model(VAE, args.vae, device).to(dtype),
        load_model(TextEncoder, args.text_encoder, device),
    )
    if (model.config.in_dim, model.config.text_dim) != (
        vae.config.latent_dim,
        encoder.config.text_dim,
    ):
        raise UserError(
            f"{args.weights} does not go with the VAE ({vae.config.latent_dim} channels, the transformer "
            f"{model.config.in_dim}) and text encoder ({encoder.config.text_dim}, {model.config.text_dim})"
        )
    (sample_many if args.prompts else sample_one)(args, model, vae, encoder)


if __name__ == "__main__":
    run_main(main)
