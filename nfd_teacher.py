"""Next-Frame Diffusion, stage 0: the causal teacher of the action world, a frame at a time.

python nfd_teacher.py       makes it of the shipped text-to-video teacher
"""

import launch
import copy
import functools
import itertools
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

import flags
import training
from data import SIZE
from dataset import draw_pieces, encode_clips
from diffusion import draw_times, flow_matching_loss, noise_source, solve_ode
from dmd import rollout
from media import save_sheet
from model import DiT, ModelConfig
from nfd_world import ACTIONS, measure_walks, sample_walks
from optimisers import EMA, Muon, optimise
from sample import chunk_shape, denoise_chunk, from_noise, remember_chunk, stream
from teacher import draw_chunk_times, drop_prompts
from text import TextEncoder
from vae import VAE
from weights import beside, check_fit, load_model, read_weights, shipped

WALK = 96  # frames of a walk in the training set


# ------------------------------------------------------------------------------------- the model
@dataclass
class ActionConfig(ModelConfig):
    """The defaults are those of a frame-by-frame model."""

    chunk: int = 1
    window: int = 16
    num_actions: int = len(ACTIONS)


class ActionDiT(DiT):
    """v(x_t, t, prompt, actions): each frame is conditioned on the action that leads to it.

    Prompt and actions are one pair, so that samplers and losses pass it on as they pass a prompt.
    """

    Config = ActionConfig

    def __init__(self, config=None):
        super().__init__(config or ActionConfig())
        self.action_embedding = nn.Embedding(self.config.num_actions, self.config.dim)
        nn.init.normal_(self.action_embedding.weight, std=0.02)

    def forward(self, x_t, t, condition, **attention):
        """`DiT.forward`; condition: (text or its keys, actions [B, T])."""
        text, actions = condition
        frame = self.action_embedding(actions)
        return super().forward(x_t, t, text, frame=frame, **attention)


def with_actions(teacher, layers=4):
    """Make the action world's model from a text-to-video teacher, or from one of its own kind.

    Of actions it knows no more than that one. It keeps `layers` of the teacher's, evenly spaced:
    with so few tokens in a frame, depth is what a pass takes its time for.
    """
    kept = {f.name: getattr(teacher.config, f.name) for f in fields(ModelConfig)}
    kept |= {"shift": 12.0, "chunk": 1, "window": 16, "num_layers": layers}
    model, teacher = ActionDiT(ActionConfig(**kept)), copy.deepcopy(teacher)
    places = torch.linspace(0, len(teacher.blocks) - 1, layers).round().int().tolist()
    teacher.blocks = nn.ModuleList(teacher.blocks[place] for place in places)
    nn.init.zeros_(model.action_embedding.weight)
    model.load_state_dict(teacher.state_dict(), strict=False)
    return model.to(teacher.head.head.weight.device)


# -------------------------------------------------------------------------------------- sampling
def solve_frame(model, x, times, condition, cache):
    """Denoise a frame along the ODE, conditioned on the cache: the many-step teacher, unguided."""

    def velocity(x_t, t):
        return model(x_t, t, condition, cache=cache)

    return solve_ode(velocity, x, times, model.schedule)[-1]


@torch.no_grad()
def stream_walks(model, vae, text, actions, generator, steps=None, ode=False, size=(SIZE, SIZE)):
    """Stream walks frame by frame for embedded prompts text [B, S, text_dim] and actions [B, F].
    steps: the model's own by default; ode: along the ODE, not in few steps. See `sample.stream`."""
    noise, keys = noise_source(generator, text.device), model.text_keys(text)
    shape = chunk_shape(model, vae, len(text), size)
    starts = from_noise(noise, shape, model.schedule.timesteps(steps or model.config.steps))
    denoise = functools.partial(denoise_chunk, model, noise=noise)
    if ode:
        denoise = functools.partial(solve_frame, model)

    def condition(frames):
        return keys, actions[:, frames : frames + 1]

    cache = model.new_cache(len(text), *shape[-2:])
    return stream(model, vae, condition, starts, cache, denoise)


@torch.no_grad()
def walk_sheet(model, vae, encoder, path, count=8, frames=33, **sampling):
    """Draw a sheet of fixed walks as `stream_walks` makes them; -> `measure_walks`."""
    generator = torch.Generator().manual_seed(1)
    walks = sample_walks(count, frames, generator)
    text = encoder(walks.prompts())
    made = stream_walks(model, vae, text, walks.actions.to(text.device), generator, **sampling)
    video = torch.cat([video.cpu() for _, video in itertools.islice(made, frames)], dim=1)
    save_sheet(video, path)
    return measure_walks(video, walks)


# -------------------------------------------------------------------------------------- training
class WalkLatents:
    """Walks and their latents, twice: as they are and, for a past that has drifted, each in a size
    that is off by up to 1.5 pixels."""

    def __init__(self, vae, walks):
        off = 3 * torch.rand(len(walks), generator=torch.Generator().manual_seed(0)) - 1.5
        self.walks, self.latents = walks, encode_clips(vae, walks)
        self.drifted = encode_clips(vae, replace(walks, radius=walks.radius + off))

    def batch(self, count, frames, generator, device):
        """Draw random pieces: (x0 [B, T, C, h, w], B prompts, actions [B, T], x0 of the past)."""
        total = self.latents.shape[1]
        rows, columns = draw_pieces(len(self.walks), total, count, frames, generator)
        x0 = self.latents[rows, columns].to(device, torch.float32)
        past = self.drifted[rows, columns].to(device, torch.float32)
        actions = self.walks.actions[rows, columns]
        actions[:, 0] = 0  # nothing comes before the first frame
        return x0, self.walks[rows[:, 0]].prompts(), actions.to(device), past


def draw_walk_times(count, frames, schedule, generator):
    """Draw diffusion times [count, frames] of walks.

    In half of them every other frame is clean: what sampling does most, the next frame conditioned
    on a clean past. A quarter has blocks of 8 frames with one time, or all clean: what speculative
    sampling does. A quarter is as in Diffusion Forcing, with a quarter of the shift: after a clean
    past only nearly pure noise leaves open where a frame's shape is.
    """
    t = draw_chunk_times(count, frames, 1, replace(schedule, shift=schedule.shift / 4), generator)
    turns, blocks = t[1::2], t[2::4]
    odd = torch.randint(2, (len(turns), 1), generator=generator)
    noisy = (torch.arange(frames) + odd) % 2
    turns.copy_(noisy * draw_times(turns.numel(), schedule, generator).view_as(turns))
    blocks.copy_(draw_chunk_times(len(blocks), frames, 8, schedule, generator))
    return t


def continue_walks(model, x_t, times, text, actions, generator, past):
    """`rollout` of noisy frames x_t [B, T, C, h, w] after clean ones, past [B, F, C, h, w].
    F may be 0. actions [B, F + T]."""
    cache, keys, given = model.new_cache(len(x_t), *x_t.shape[-2:]), model.text_keys(text), 0
    if past.shape[1]:
        given = past.shape[1]
        remember_chunk(model, past, (keys, actions[:, :given]), cache)

    def condition(frames):
        return keys, actions[:, given + frames : given + frames + 1]

    return rollout(model, x_t, times, condition, generator, cache)


@torch.no_grad()
def own_past(model, x0, steps, text, actions, generator, run=4):
    """Make the past as the model itself leaves it, where data would be too good.

    Of walks x0 [B, T, C, h, w] the first half window is kept. Each run of 4 frames after it is
    what the model makes, conditioned on data, from the data's own frames noised to a random t in
    `steps` denoising steps or fewer. Half of the walks also begin with such a run, without a past:
    no stream's first frames are as good as the data's. In every eighth walk each frame is a first
    guess without a past, a blur: what is lost can come back.

    Trained to continue such a past with the data's frames, a model mends what it did wrong; one
    that has only seen data builds upon it. A past that strays from the data's places, after longer
    runs or from more noise, teaches to jump there, and a jump is an action not obeyed: t is at most
    0.6, and 0.9 for the first run, which begins in a blur when sampling.
    """
    (B, T), given, schedule = x0.shape[:2], model.config.window // 2, model.schedule
    half, lost = B // 2, B // 8
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    t = 0.2 + 0.4 * torch.rand(1, generator=generator).item()
    x_t, times = schedule.add_noise(x0, noise, t), schedule.timesteps(steps, t)
    starts = range(0, T - given - run + 1, run)

    def pieces(y, first, last):
        return torch.cat([y[:, start + first : start + last] for start in starts])

    early, none = schedule.add_noise(x0, noise, t + 0.3)[half:, :run], x0[half:, :0]
    early_times, acts = schedule.timesteps(steps, t + 0.3), actions[half:, :run]
    first = continue_walks(model, early, early_times, text[half:], acts, generator, none)
    x0 = torch.cat([x0[:half], torch.cat([first, x0[half:, run:]], dim=1)])
    noisy, texts = pieces(x_t, given, given + run), text.repeat(len(starts), 1, 1)
    acts, past = pieces(actions, 0, given + run), pieces(x0, 0, given)
    made = continue_walks(model, noisy, times, texts, acts, generator, past)
    own = torch.cat([x0[:, :given], *made.split(B), x0[:, given + len(starts) * run :]], dim=1)
    if lost:
        none = torch.zeros_like(actions[:lost])
        t = torch.ones(lost, T, device=x0.device)
        v = model(noise[:lost], t, (text[:lost], none), chunk=1, window=1)
        own = torch.cat([schedule.x0(noise[:lost], v, t), own[lost:]])
    return own


def main():
    description = "Train the causal teacher of the action world, a frame at a time."
    parser = flags.training_parser(description, 1600, 16, 2e-3, "runs/action_teacher")
    parser.add_argument("--clips", type=flags.whole(), default=3072, help="walks to train on")
    told = "weights to start from, of a text-to-video teacher or of an action teacher"
    add = parser.add_argument
    add("--weights", default=shipped("teacher"), type=flags.source, help=told)
    flags.codec_flags(parser)
    args = parser.parse_args()
    args.vae = args.vae or shipped("vae_frame")
    args.text_encoder = args.text_encoder or beside(args.weights, "text_encoder")
    run = training.start_run(args)
    has_actions = (read_weights(args.weights)[1] or {}).get("num_actions")
    network = ActionDiT if has_actions else DiT
    model = with_actions(load_model(network, args.weights, run.device))
    vae = load_model(VAE, args.vae, run.device)
    encoder = load_model(TextEncoder, args.text_encoder, run.device).requires_grad_(False)
    check_fit(model, vae, encoder)
    with run.autocast():
        data = WalkLatents(vae, sample_walks(args.clips, WALK, torch.Generator().manual_seed(0)))
    both = nn.ModuleList([model.train(), encoder])
    averaged = nn.ModuleList([ActionDiT(model.config), TextEncoder()]).to(run.device)
    ema = EMA(both)
    optimizer = Muon(model.blocks.parameters(), both.parameters(), run.lr)
    if run.compile:
        model.compile(dynamic=False)  # a graph for images, one for walks
    schedule, window = model.schedule, model.config.window
    of_images = replace(schedule, shift=0.25 * schedule.shift)

    def image_batch(generator):
        """First frames, which have no past: a walk has only one."""
        x0, prompts, actions, _ = data.batch(16 * run.batch_size, 1, generator, run.device)
        with run.autocast():
            text = drop_prompts(encoder(prompts), generator)
        t = draw_times(len(x0), of_images, generator)[:, None].to(run.device)
        return x0, t, (text, actions)

    def walk_batch(generator):
        """Walks whose clean frames are what the model made, not data."""
        x0, prompts, actions, past = data.batch(run.batch_size, 2 * window, generator, run.device)
        with run.autocast():
            text = drop_prompts(encoder(prompts), generator)
            t = draw_walk_times(*x0.shape[:2], schedule, generator).to(run.device)
            averaged.load_state_dict(ema.shadow)
            own = own_past(averaged[0], past, 2, text, actions, generator)
        x0 = torch.where((t == 0)[..., None, None, None], own, x0)
        return x0, t, (text, actions)

    def step(i, generator):
        x0, t, condition = walk_batch(generator) if i % 4 else image_batch(generator)
        with run.autocast():
            chunks = {"chunk": model.config.chunk, "window": window}
            loss = flow_matching_loss(model, x0, t, condition, generator, **chunks)
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        return walk_sheet(averaged[0], vae, averaged[1], path, steps=8, ode=True)

    state = {"model": both, "ema": ema, "optimizer": optimizer}
    seconds = training.train(run, state, step, sheet, [averaged])
    if seconds is not None:
        averaged.load_state_dict(ema.shadow)
        codecs, then = (args.vae, args.text_encoder), "nfd_consistency.py --teacher"
        parts = (averaged[0].state_dict(), model.config, seconds, codecs, then)
        training.write_transformer(run, "action_teacher", *parts)


if __name__ == "__main__":
    launch.run_main(main)
