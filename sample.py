"""The sampler: video chunk by chunk from a KV cache (CausVid, Algorithm 2), and its command line.

    python sample.py --prompt "a red circle bouncing on a black background"    writes sample.mp4

A stream goes on for as long as one likes, starts from an image, follows another video, and takes
new prompts on the way: `stream` is the loop, and what varies comes in from outside.
"""

import launch
import functools
import itertools
import time

import torch
from tqdm import tqdm

import flags
import weights
from data import FPS, PROMPT, SIZE
from diffusion import GUIDANCE, TEACHER_STEPS, guided_v, noise_source, solve_ode, solve_teacher
from media import pieces, read_image, read_video, until_interrupted, write_many, write_videos
from model import DiT
from text import TextEncoder
from vae import VAE
from weights import check_fit, load_model


# -------------------------------------------------------------------------------- chunk by chunk
def predict_x0(model, x_t, t, keys, cache):
    """Predict a chunk's x0 from x_t [B, k, C, h, w] at time t, conditioned on the cache."""
    return model.schedule.x0(x_t, model(x_t, t, keys, cache=cache), t)


def denoise_chunk(model, x, times, keys, cache, noise):
    """Denoise one chunk in few steps (Algorithm 2), from x [B, k, C, h, w] at times[0] to its state
    at times[-1]: x0 where the times end in 0. keys: the prompt's; noise(shape): draws noise."""
    for t, r in itertools.pairwise(times):
        x = predict_x0(model, x, t, keys, cache)
        if r > 0:
            x = model.schedule.add_noise(x, noise(x.shape), r)  # re-noise to the next time
    return x


def solve_chunk(model, x, times, keys, cache, guidance=GUIDANCE):
    """Denoise one chunk along the guided ODE: the causal many-step model, which was not distilled.
    keys and cache are for 2 B: the prompts, and as many null prompts."""

    def velocity(x_t, t):
        return guided_v(model, x_t, t, keys, guidance, cache=cache)

    return solve_ode(velocity, x, times, model.schedule)[-1]


def remember_chunk(model, x0, keys, cache):
    """Leave a finished chunk's keys and values in the cache: one more pass, clean, at t = 0 (the
    end of Algorithm 2's loop). Under guidance the null prompts' half sees the same chunk."""
    if len(x0) < cache.batch:
        x0 = torch.cat([x0, x0])
    with torch.no_grad():
        model(x0, 0.0, keys, cache=cache, remember=True)
    cache.commit(x0.shape[1])


@torch.no_grad()
def stream(model, vae, prompt, starts, cache, denoise):
    """Make video in constant memory, without end (Algorithm 2), one chunk after the other.

    prompt(frames): the keys of the prompt after so many frames; a new one takes effect with the
    next chunk. starts: for each chunk its first state, the times to denoise it at, and how many of
    its frames to show (None: all). denoise(x, times, keys, cache) -> x0.
    Yields (latents [B, k, C, h, w], video [B, F, 3, H, W]), F = 1 + 4 (k - 1) at first, then 4 k.
    """
    frames, decoder_state = 0, {}
    for x, times, shown in starts:
        keys = prompt(frames)
        x0 = denoise(x, times, keys, cache)
        video = vae.decode(x0, decoder_state)
        yield x0, video[:, :shown]
        remember_chunk(model, x0, keys, cache)  # after the viewer has seen it
        frames += video.shape[1]


# ------------------------------------------------------------------- what a stream is made of
def from_noise(noise, shape, times):
    """Start each chunk from noise [B, k, C, h, w]: text to video."""
    while True:
        yield noise(shape), times, None


def from_image(image, vae):
    """Start with one latent frame, the image [B, 3, H, W] itself, clean: image to video."""
    yield vae.encode(image[:, None]), [0.0], None


def from_video(pieces, vae, noise, shape, times, schedule):
    """Start each chunk from a piece of a video [1, F, 3, H, W], noised to times[0]; end with it.
    At times[0] = 0 the stream is the autoencoder's reconstruction, at 1 it ignores the video."""
    encoder_state = {}
    for index, piece in enumerate(pieces):
        x, frames = noise(shape), piece.shape[1] - (vae.ahead if index == 0 else 0)
        # the last piece may end within a latent frame: repeat its last frame
        missing = -(frames - (index == 0)) % vae.config.time_stride
        piece = torch.cat([piece, piece[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        x0 = vae.encode(piece.to(x.device), encoder_state)
        yield schedule.add_noise(x0, x[:, : x0.shape[1]], times[0]), times, frames


def prompt_at(changes):
    """Make the function prompt(frames) of `stream` from [(first frame, keys)], in their order."""

    def prompt(frames):
        return [keys for first, keys in changes if first <= frames][-1]

    return prompt


def chunk_shape(model, vae, count, size=(SIZE, SIZE)):
    """The shape [B, k, C, h, w] of a chunk of `count` videos of size (H, W)."""
    return (count, model.config.chunk, *vae.latent_shape(1, *size)[1:])


@torch.no_grad()
def text_to_video(model, vae, text, generator, steps=None, window=None, size=(SIZE, SIZE)):
    """Stream the student's videos for embedded prompts text [B, S, text_dim]: see `stream`.
    generator: see `noise_source`. steps, window: the model's own by default. size: (H, W)."""
    noise = noise_source(generator, text.device)
    shape = chunk_shape(model, vae, len(text), size)
    starts = from_noise(noise, shape, model.schedule.timesteps(steps or model.config.steps))
    cache = model.new_cache(len(text), *shape[-2:], window=window)
    denoise = functools.partial(denoise_chunk, model, noise=noise)
    return stream(model, vae, prompt_at([(0, model.text_keys(text))]), starts, cache, denoise)


@torch.no_grad()
def sample_teacher(
    model, vae, text, generator, frames, steps=TEACHER_STEPS, size=(SIZE, SIZE), **guidance
):
    """Sample the bidirectional teacher's clips as one chunk, (latents, video [B, frames, ...])."""
    noise, state = noise_source(generator, text.device), {}
    x = noise((len(text), *vae.latent_shape(frames, *size)))
    x0 = solve_teacher(model, x, text, steps, **guidance)[-1]
    parts = [vae.decode(part, state) for part in x0.split(model.config.chunk, dim=1)]
    return x0, torch.cat(parts, dim=1)[:, :frames]


# ---------------------------------------------------------------------------------- command line
@torch.no_grad()
def main():
    args = flags.sample_args(PROMPT)
    path = args.teacher or args.weights
    if not args.preset:
        weights.check_role(path, "teacher" if args.teacher else "student")
    vae, encoder = weights.made_with(path, args.vae, args.text_encoder)
    device, dtype = flags.on_device(args.device, args.dtype, args.threads)
    how = {"preset": args.preset, "layers": args.layers, "steps": args.steps}
    model = load_model(DiT, path, device, dtype, **how)
    vae, encoder = load_model(VAE, vae, device, dtype), load_model(TextEncoder, encoder, device)
    check_fit(model, vae, encoder)
    if args.compile:
        model.compile_stream()
    many, guidance, size = TEACHER_STEPS, GUIDANCE, args.size or weights.own_size(path)
    if weights.is_public(path):
        import wan  # stands on the last shelf

        many, guidance = wan.TEACHER_STEPS, wan.GUIDANCE
    else:
        prompts = args.prompts or [text for _, text in args.changes]
        flags.say_what_is_unknown(prompts, encoder.config.words, path)
    flags.check_size(size, vae.space_stride, model.config.patch_size)

    def make(text, generator):
        if args.teacher:
            how = {"size": size, "guidance": guidance, "null": encoder([args.negative or ""])}
            steps = args.steps or many
            return iter([sample_teacher(model, vae, text, generator, args.frames, steps, **how)])
        return text_to_video(model, vae, text, generator, args.steps, args.window, size)

    if args.prompts:
        weights.make_folder(args.out)
        parts = (args.prompts, args.samples or 5, args.seed, args.frames, args.out)
        write_many(make, encoder, *parts)
        return
    total, generator = args.frames, torch.Generator().manual_seed(args.seed)
    noise, shape = noise_source(generator, device), chunk_shape(model, vae, 1, size)
    steps = args.steps or model.config.steps
    starts = from_noise(noise, shape, model.schedule.timesteps(steps))
    if args.image:
        image = read_image(args.image, size).to(device)
        starts = itertools.chain(from_image(image, vae), starts)
    if args.video:
        source, length = read_video(args.video, size)
        total = min((n for n in (total, length) if n is not None), default=None)
        times = model.schedule.timesteps(steps, 0.7 if args.strength is None else args.strength)
        parts = pieces(source, model.config.chunk, vae.config.time_stride, vae.ahead)
        starts = from_video(parts, vae, noise, shape, times, model.schedule)
    flags.say_what_is_late(args.changes, total, model.config.chunk, vae.config.time_stride)
    started = time.perf_counter()
    with tqdm(total=total, unit="frame", desc="teacher" if args.teacher else "streaming") as bar:
        texts = [(seconds * FPS, encoder([text])) for seconds, text in args.changes]
        if args.teacher:
            chunks = make(texts[0][1], generator)
        else:
            prompt = prompt_at([(frame, model.text_keys(text)) for frame, text in texts])
            cache = model.new_cache(1, *shape[-2:], window=args.window)
            denoise = functools.partial(denoise_chunk, model, noise=noise)
            chunks = stream(model, vae, prompt, starts, cache, denoise)
        count, first = write_videos(until_interrupted(chunks), [args.out], args.frames, total, bar)
    spent, wait = time.perf_counter() - started, 1000 * (first - started)
    speed = f"first frame after {wait:.0f} ms, {count / spent:.1f} frames/s"
    print(f"wrote {args.out}: {count} frames of {size[1]} x {size[0]}; {speed}")
    if args.video and args.frames and count < args.frames:
        print(f"--video has no more: {count / FPS:g} of {args.seconds:g} seconds")


if __name__ == "__main__":
    launch.run_main(main)
