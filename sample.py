"""The sampler: video chunk by chunk from a KV cache (CausVid, Algorithm 2), and the many-step ODE solver to compare it with.

    python sample.py --prompt "a red circle bouncing on a black background"          writes sample.mp4
"""
import argparse
import contextlib
import os
import time

import torch
from tqdm import tqdm

from data import FPS, FRAMES, SIZE, save_sheet, to_uint8
from model import load_model
from text import load_text_encoder
from training import WEIGHTS, UserError, choose_device, choose_dtype, run_main
from vae import load_vae

TEACHER_STEPS, GUIDANCE = 32, 2.0         # the paper's: 50 and 3.5; in this small world 2 makes cleaner shapes


# -------------------------------------------------------------------------------------------- few steps, causal, cached
def make_chunk(model, noise, times, keys, cache, generator, guidance=None, stop=None):
    """One chunk of Algorithm 2: denoise `noise` [B, k, C, h, w] at the few-step times [N + 1], which end in 0, then write
    the clean chunk's keys and values into the cache. -> x0, the chunk's latents.

    guidance: solve the ODE with classifier-free guidance instead, in many steps (the causal many-step teacher); keys and cache are
    then for 2 B, the prompts and as many null prompts. stop: end after so many steps, only the last with gradient (Self Forcing).
    """
    schedule, x, last = model.schedule, noise, len(times) - 2 if stop is None else stop - 1
    attention = dict(chunk=cache.chunk, window=cache.window, cache=cache)
    at = lambda x, t: torch.full(x.shape[:2], float(t), device=x.device)
    trained = torch.is_grad_enabled()
    for step, (t, r) in enumerate(zip(times[:last + 1], times[1:])):
        with torch.set_grad_enabled(trained and step == last):
            if guidance is not None:
                x = schedule.step(x, guided_v(model, x, at(x, t), keys, guidance, **attention), t, r)
                continue
            x = schedule.x0(x, model(x, at(x, t), keys, **attention), t)
            if step < last:
                x = schedule.add_noise(x, torch.randn(x.shape, generator=generator).to(x.device), r)      # re-noise to the next time
    with torch.no_grad():
        clean = x.repeat(cache.k.shape[1] // len(x), 1, 1, 1, 1)
        model(clean, at(clean, 0), keys, **attention)
        cache.commit(x.shape[1])
    return x


@torch.no_grad()
def stream(model, vae, text, generator, steps=4, window=None, size=SIZE, guidance=None):
    """Endless video in constant memory: yields (latents [B, k, C, h, w], video [B, F, 3, size, size]) chunk by chunk.

    text [B, S, text_dim]: embedded prompts; generator: on the CPU, so that a seed gives the same noise on every device.
    The first chunk has 1 + 4 (k - 1) frames, each further one 4 k. window: chunks attended to, the model's own by default.
    guidance: as for `make_chunk`, for a causal model that was not distilled.
    """
    c, side, device, prompts = model.config, size // 8, text.device, with_null(text) if guidance is not None else text
    cache = model.new_cache(len(prompts), side, side, window=window)
    keys, times, state = model.text_keys(prompts), model.schedule.timesteps(steps), {}
    while True:
        noise = torch.randn(len(text), c.chunk, c.in_dim, side, side, generator=generator).to(device)
        latents = make_chunk(model, noise, times, keys, cache, generator, guidance)
        yield latents, vae.decode(latents, state)


# ------------------------------------------------------------------------------------------------ many steps, guided
def with_null(text):
    """Embedded prompts [B, S, text_dim] and as many null prompts, which are all zeros -> [2 B, S, text_dim]."""
    return torch.cat([text, torch.zeros_like(text)])


def guided_v(model, x_t, t, text, guidance, **attention):
    """Classifier-free guidance, two passes made as one batch. x_t [B, T, C, h, w]; text: `with_null`, or its keys."""
    v_text, v_null = model(torch.cat([x_t, x_t]), torch.cat([t, t]), text, **attention).chunk(2)
    return v_null + guidance * (v_text - v_null)                               # v = v_null + g (v_text - v_null)


@torch.no_grad()
def solve_ode(model, x, text, steps=TEACHER_STEPS, guidance=GUIDANCE):
    """Solve the bidirectional teacher's guided probability-flow ODE from noise x [B, T, C, h, w] at t = 1 to t = 0.

    -> the states at schedule.timesteps(steps), [steps + 1, B, T, C, h, w], noise first, x0 last.
    """
    schedule, times, states = model.schedule, model.schedule.timesteps(steps), [x]
    keys = model.text_keys(with_null(text))
    for t, r in zip(times[:-1], times[1:]):
        v = guided_v(model, x, torch.full(x.shape[:2], float(t), device=x.device), keys, guidance)
        x = schedule.step(x, v, t, r)
        states.append(x)
    return torch.stack(states)


# -------------------------------------------------------------------------------------------------------- command line
class FrameWriter:
    """Writes frames to .mp4, .gif or a .png sheet of 16, under a temporary name that becomes `path` when all went well."""

    def __init__(self, path, total):
        self.path, self.kind = path, os.path.splitext(path)[1].lower()
        self.temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.part{self.kind}")
        self.picked = {round(i * (total - 1) / 15) for i in range(16)} if self.kind == ".png" else None
        self.count, self.sheet = 0, []

    def __enter__(self):
        import imageio.v2 as iio
        options = {".mp4": dict(fps=FPS, codec="libx264", quality=9, macro_block_size=2, ffmpeg_log_level="error"),
                   ".gif": dict(duration=1000 / FPS, loop=0)}
        self.writer = iio.get_writer(self.temporary, **options[self.kind]) if self.picked is None else None
        return self

    def write(self, video):
        """Append video [F, 3, H, W] in [-1, 1]."""
        for index, frame in enumerate(to_uint8(video), self.count):
            if self.picked is None:
                self.writer.append_data(frame.numpy())
            elif index in self.picked:
                self.sheet.append(video[index - self.count].cpu())
        self.count += len(video)

    def __exit__(self, error, *_):
        if self.writer is not None:
            self.writer.close()
        elif error is None:
            rows = torch.stack(self.sheet)
            save_sheet(rows.unflatten(0, (-1, 8)) if len(rows) % 8 == 0 else rows[None], self.temporary, columns=16)
        if error is None:
            os.replace(self.temporary, self.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.temporary)


def parse_args():
    parser = argparse.ArgumentParser(description="Make a video from a prompt, streaming it chunk by chunk.")
    add = parser.add_argument
    add("--prompt", required=True, help='such as "a red circle bouncing on a black background"')
    add("--seconds", type=float, default=5.0, help="length of the video (16 frames/s)")
    add("--seed", type=int, default=0)
    add("--out", default="sample.mp4", help="FILE.mp4, FILE.gif, or FILE.png for a sheet of frames")
    add("--steps", type=int, help="denoising steps (student 4, teacher 32)")
    add("--window", type=int, help="chunks of the past and present that a chunk sees")
    add("--teacher", action="store_true", help="sample the bidirectional many-step teacher, for comparison (at most 81 frames)")
    add("--weights", help="the transformer's weights (weights/student.safetensors or teacher.safetensors)")
    add("--vae", default=os.path.join(WEIGHTS, "vae.safetensors"))
    add("--text-encoder", default=os.path.join(WEIGHTS, "text_encoder.safetensors"))
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()

    if not args.prompt.strip():
        raise UserError('the prompt is empty; try --prompt "a red circle bouncing on a black background"')
    if not 0 < args.seconds < float("inf"):
        raise UserError(f"--seconds must be greater than 0, not {args.seconds:g}")
    for flag in ("steps", "window"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1")
    if os.path.splitext(args.out)[1].lower() not in (".mp4", ".gif", ".png"):
        raise UserError(f"--out {args.out} must end in .mp4, .gif or .png")
    folder = os.path.dirname(args.out) or "."
    if os.path.isdir(args.out) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {args.out}: {folder} is not a folder that can be written to")
    args.frames = max(1, round(args.seconds * FPS))
    if args.teacher and args.frames > FRAMES:
        raise UserError(f"the teacher makes whole clips of at most {FRAMES} frames: --seconds {FRAMES / FPS:.2f} or less")
    args.weights = args.weights or os.path.join(WEIGHTS, "teacher.safetensors" if args.teacher else "student.safetensors")
    return args


def main():
    args = parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model = load_model(args.weights, device).to(dtype)
    vae, encoder = load_vae(args.vae, device).to(dtype), load_text_encoder(args.text_encoder, device)
    if (model.config.in_dim, model.config.text_dim) != (vae.config.latent_dim, encoder.config.text_dim):
        raise UserError(f"{args.weights} does not go with the VAE ({vae.config.latent_dim} channels, the transformer "
                        f"{model.config.in_dim}) and text encoder ({encoder.config.text_dim}, {model.config.text_dim})")
    generator = torch.Generator().manual_seed(args.seed)

    started, first = time.perf_counter(), None
    with FrameWriter(args.out, args.frames) as out, torch.no_grad(), \
            tqdm(total=args.frames, unit="frame", desc="teacher" if args.teacher else "streaming") as bar:
        text = encoder([args.prompt])
        if args.teacher:
            shape = (1, 1 + -(-(args.frames - 1) // 4), model.config.in_dim, SIZE // 8, SIZE // 8)
            noise = torch.randn(shape, generator=generator).to(device)
            chunks = ((x0, vae.decode(x0)) for x0 in [solve_ode(model, noise, text, args.steps or TEACHER_STEPS)[-1]])
        else:
            chunks = stream(model, vae, text, generator, args.steps or 4, args.window)
        for _, video in chunks:
            video = video[0, :args.frames - out.count].float().cpu()
            first = first or time.perf_counter() - started
            out.write(video)
            bar.update(len(video))
            if out.count == args.frames:
                break
        spent = time.perf_counter() - started
    print(f"wrote {args.out}: {args.frames} frames of {SIZE} x {SIZE}; "
          f"first frame after {1000 * first:.0f} ms, {args.frames / spent:.1f} frames/s")


if __name__ == "__main__":
    run_main(main)
