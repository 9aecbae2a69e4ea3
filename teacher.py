"""Stage 0: the many-step bidirectional teacher, by flow matching, and the text encoder with it.

python teacher.py               trains both on latents of the shapes world
python teacher.py --causal      makes a causal many-step teacher of the shipped one (Table 4)
"""

import launch
import copy

import torch
from torch import nn

import flags
import training
from dataset import next_command, training_world
from diffusion import draw_times, flow_matching_loss
from evaluate import fixed_sheet
from model import DiT
from optimisers import EMA, Muon, optimise
from text import TextConfig, TextEncoder
from vae import VAE
from weights import UserError, check_fit, load_model, made_with, shipped


# --------------------------------------------------------------------------------- what is drawn
def batch_shape(i, steps, batch_size, frames):
    """Choose what step i of the bidirectional teacher trains on: (clips, latent frames of each).

    Images first: geometry and colours are cheap to learn on many single latent frames. Then whole
    clips and, in every other step, thirds of them: what a shape does next shows in a few frames.
    """
    if i < 0.16 * steps:
        return 16 * batch_size, 1
    return (3 * batch_size, frames // 3) if i % 2 else (batch_size, frames)


def draw_clip_times(count, frames, schedule, generator):
    """Draw times [count, frames]. Half of the clips have one time, spread as in sampling: what
    happens in a clip is decided near t = 1. The others, and images, have uniform times: one for
    each run of 1 to 4 frames (Diffusion Forcing). Next to cleaner frames, how a motion goes on is
    quickly learnt; what a frame looks like is decided at low t.
    """
    one = schedule.shifted(torch.rand(count, 1, generator=generator)).expand(-1, frames)
    length = torch.randint(1, 5, (), generator=generator).item()
    own = torch.rand(count, -(-frames // length), generator=generator)
    own = own.repeat_interleave(length, dim=1)[:, :frames]
    alike = torch.rand(count, 1, generator=generator) < (0.5 if frames > 1 else 0.0)
    return torch.where(alike, one, own)


def draw_chunk_times(count, frames, chunk, schedule, generator):
    """Draw a time for each chunk [count, frames], as in Diffusion Forcing. Some are clean, at
    t = 0, as the past is when sampling: in each clip a share of its own, from none to all."""
    chunks = -(-frames // chunk)
    drawn = torch.rand(count, chunks, generator=generator)
    noisy = drawn > torch.rand(count, 1, generator=generator)
    t = draw_times(count * chunks, schedule, generator).view(count, chunks) * noisy
    return t.repeat_interleave(chunk, dim=1)[:, :frames]


def drop_prompts(text, generator):
    """Replace a tenth of the embedded prompts [B, S, text_dim] by the null prompt, for guidance."""
    keep = torch.rand(len(text), generator=generator) > 0.1
    return text * keep.to(text.device)[:, None, None]


# -------------------------------------------------------------------------------------- training
def train_teacher(run, model, encoder, vae, data, world, shape, times, kind, attention):
    """Train a transformer and, if it takes gradients, the text encoder by flow matching.

    shape(i) -> (clips, latent frames) of step i; times(count, frames, generator) -> t; kind: how
    `evaluate.make_videos` samples it. -> (the averages of both, seconds of `training.train`).
    """
    both = nn.ModuleList([model.train(), encoder])
    averaged = copy.deepcopy(both).eval()
    ema = EMA(both)
    optimizer = Muon(model.blocks.parameters(), both.parameters(), run.lr)
    if run.compile:
        model.compile(dynamic=False)  # a graph for images, one for whole clips, one for short ones

    def step(i, generator):
        x0, prompts = data.batch(*shape(i), generator, run.device)
        with run.autocast():
            text = drop_prompts(encoder(prompts), generator)
            t = times(*x0.shape[:2], generator).to(run.device)
            loss = flow_matching_loss(model, x0, t, text, generator, **attention)
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        return fixed_sheet(kind, averaged[0], vae, averaged[1], path, world, steps=8)

    state = {"model": both, "ema": ema, "optimizer": optimizer}
    seconds = training.train(run, state, step, sheet, [averaged])
    averaged.load_state_dict(ema.shadow)
    return averaged, seconds


def train_bidirectional(run, model, encoder, vae, data, world):
    """Train the paper's teacher: `train_teacher` without chunks."""

    def shape(i):
        return batch_shape(i, run.steps, run.batch_size, data.frames)

    def times(count, frames, generator):
        return draw_clip_times(count, frames, model.schedule, generator)

    return train_teacher(run, model, encoder, vae, data, world, shape, times, "teacher", {})


def train_causal(run, model, encoder, vae, data, world):
    """Train a causal many-step teacher on whole clips: block-causal, with a time for each chunk."""
    chunk, window = model.config.chunk, model.config.window

    def shape(i):
        return run.batch_size, data.frames

    def times(count, frames, generator):
        return draw_chunk_times(count, frames, chunk, model.schedule, generator)

    attention = {"chunk": chunk, "window": window}
    return train_teacher(run, model, encoder, vae, data, world, shape, times, "causal", attention)


def main():
    parser = flags.model_parser("Train teacher and text encoder.", 3000, 8, 5e-3, "runs/teacher")
    add = parser.add_argument
    add("--clips", type=flags.whole(), help="of the shapes world to train on (3072)")
    told = "small, or a JSON file with fields of ModelConfig"
    add("--config", default="small", type=flags.words, help=told)
    told = "train a causal teacher: block-causal attention and a time for each chunk"
    add("--causal", action="store_true", help=told)
    add("--weights", type=flags.parts, help="with --causal: start from these (the shipped)")
    args = parser.parse_args()
    if args.weights and not args.causal:
        raise UserError("--weights goes with --causal: the bidirectional teacher starts anew")
    if args.causal and args.config != "small":
        raise UserError("--config does not go with --causal: the weights carry their config")
    config, start = training.read_config(args.config), args.weights or shipped("teacher")
    if args.causal:
        args.vae, args.text_encoder = made_with(start, args.vae, args.text_encoder)
    args.vae = args.vae or shipped("vae")
    world = training_world(args, start if args.causal else args.vae)
    run = training.start_run(args)
    model = load_model(DiT, start, run.device) if args.causal else DiT(config).to(run.device)
    vae = load_model(VAE, args.vae, run.device)
    if args.text_encoder:
        encoder = load_model(TextEncoder, args.text_encoder, run.device).requires_grad_(False)
    else:
        encoder = TextEncoder(TextConfig(config.text_dim, world.words)).to(run.device)
    check_fit(model, vae, encoder)
    data = world.latents(vae, model.config.patch_size)
    given = (args.chunk, args.window, args.student_steps, data.frames)
    model.config = training.causal_config(model.config, *given)
    parts = (run, model, encoder, vae, data, world)
    averaged, seconds = train_causal(*parts) if args.causal else train_bidirectional(*parts)
    if seconds is None:
        return
    name, then = "teacher", next_command(world, "ode_init.py", "--teacher")
    if args.causal:
        name, then = "causal_teacher", next_command(world, "evaluate.py", "--causal")
    if not args.text_encoder:
        parts = ("text_encoder", averaged[1].state_dict(), encoder.config, seconds)
        args.text_encoder = training.write_trained(run, *parts)
    parts, codecs = (averaged[0].state_dict(), model.config), (args.vae, args.text_encoder)
    training.write_transformer(run, name, *parts, seconds, codecs, then, **world.origin)


if __name__ == "__main__":
    launch.run_main(main)
