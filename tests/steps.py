"""The first steps of each training stage: as its script takes them, and written out by hand.

Each main() runs as it is, but for `training.train`: in its place a few steps are taken. By hand:
the paper's equations, AdamW of torch, and random numbers in the order of the code.
"""

import contextlib
import copy
import functools
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import generator
from torch import nn
from torch.nn.utils import clip_grad_norm_

import training
from data import FRAMES, sample_clips
from dataset import LatentClips, Shapes, training_clips
from model import DiT
from nfd_teacher import WALK, ActionDiT, WalkLatents, draw_walk_times, own_past, with_actions
from nfd_vae import frame_wise
from nfd_world import sample_walks
from optimisers import Muon
from text import TextEncoder
from vae import VAE, VAEConfig
from weights import load_model

STEPS = (0, 1, 4, 5, 10_005)  # so late, an average has its whole memory
LR = 0.003
T, CHUNK, WINDOW, SHIFT = 9, 3, 2, 5.0  # of the tiny models; the window ends before the clip
CAUSAL = {"chunk": CHUNK, "window": WINDOW}
TIMES = SHIFT * torch.linspace(1, 0, 5) / (1 + (SHIFT - 1) * torch.linspace(1, 0, 5))
PROMPTS = sample_clips(4, generator()).prompts(generator())
STATES = torch.randn(4, 5, T, 8, 4, 4, generator=generator()).bfloat16()  # of 4 trajectories


def load(network, name):
    return load_model(network, f"{name}.safetensors")


# ------------------------------------------------------------------------ a script's first steps
def latents_of(vae, clips):
    """Random latents of clips or walks, others for other sizes of the shapes."""
    frames = clips.actions.shape[1] if hasattr(clips, "actions") else T
    seeded = generator(int(1000 * clips.radius.sum()))
    return torch.randn(len(clips), frames, 8, 4, 4, generator=seeded).bfloat16()


class FewShapes(Shapes):
    """Four clips at most, where many would only take time."""

    def video(self, count, *drawn):
        return super().video(min(count, 4), *drawn)


def trajectories(*_):
    return {"states": STATES, "prompts": PROMPTS}


@contextlib.contextmanager
def on_tiny_networks(folder):
    """Let the scripts run in a folder of tiny weights, with random latents for clips."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("dataset.encode_clips", latents_of)
        patch.setattr("nfd_teacher.encode_clips", latents_of)
        patch.setattr("ode_init.kept_in", trajectories)
        patch.setattr("dataset.Shapes", FewShapes)
        patch.setattr("nfd_vae.Shapes", FewShapes)
        patch.setattr("vae.mean_psnr", lambda vae, clips: 0.0)
        patch.setattr("vae.VAEConfig", functools.partial(VAEConfig, 8, 4, 16, 16, 16))
        patch.setattr("nfd_vae.shipped", "{}.safetensors".format)
        yield
    torch.set_num_threads(threads)


def weights_of(part):
    return {k: v.clone() for k, v in part.state_dict().items()}


def without_optimizers(state):
    return {k: v for k, v in state.items() if not isinstance(v, torch.optim.Optimizer)}


def train_tiny(command, out="out", steps=STEPS, seconds=1.0):
    """Run a script, with these steps as its training.

    -> what it called `training.train` with, start: its networks before, numbers: what each step
    returned, drawn: the state of the random numbers after.
    """
    script, *flags = command.split()
    caught = SimpleNamespace()

    def train(run, state, step, sheet, others=()):
        caught.run, caught.state, caught.step, caught.sheet = run, state, step, sheet
        caught.start = copy.deepcopy(without_optimizers(state))
        training.prepare(run, state, others)
        g = generator(run.seed)
        caught.numbers = [step(i, g) for i in steps]
        caught.drawn = g.get_state()
        return seconds

    shared = f"--steps 10 --lr {LR} --out {out} --dtype float32 --threads 1 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train", train)
        patch.setattr(sys, "argv", [script, *flags, *shared.split()])
        importlib.import_module(script).main()
    return caught


# ------------------------------------------------------------------------ the same steps by hand
class Learner:
    """A network, its optimiser and an average of its weights for each of some decays."""

    def __init__(self, network, optimizer, *decays):
        self.network, self.optimizer, self.decays = network, optimizer, decays
        self.averages = [copy.deepcopy(network) for _ in decays]

    def learn(self, loss, i):
        """Take one step down the loss, and move the averages; -> the norm of the gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        groups = self.optimizer.param_groups
        norm = clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        self.optimizer.step()
        new = self.network.state_dict()
        for average, full in zip(self.averages, self.decays, strict=True):
            decay = min(full, (1 + i) / (10 + i))
            for k, v in average.state_dict().items():
                v.copy_(decay * v + (1 - decay) * new[k])
        return norm


def adamw(parameters, lr=LR, betas=(0.9, 0.99)):
    return torch.optim.AdamW(parameters, lr, betas, weight_decay=0.0)


def muon(model, whole):
    return Muon(model.blocks.parameters(), whole.parameters(), LR)


def per_frame(t):
    return t[..., None, None, None]


def noised(x0, eps, t):
    """x_t = (1 - t) x0 + t eps."""
    return (1 - per_frame(t)) * x0 + per_frame(t) * eps


def shifted(u, shift=SHIFT):
    """t = s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def normal(shape, g):
    return torch.randn(shape, generator=g)


def one_level_a_chunk(count, levels, g):
    level = torch.randint(levels, (count, T // CHUNK), generator=g)
    return level.repeat_interleave(CHUNK, dim=1)


def dropped(text, g):
    """A tenth of the prompts is replaced by the null prompt."""
    keep = torch.rand(len(text), generator=g) > 0.1
    return text * keep[:, None, None]


def clips():
    return LatentClips(None, training_clips(4))


def walks():
    return WalkLatents(None, sample_walks(2, WALK, generator()))


def denoising_loss(network, x0, t, condition, g, **attention):
    """E || v(x_t, t) - (eps - x0) ||^2 over the frames that are not clean."""
    eps = normal(x0.shape, g)
    v = network(noised(x0, eps, t), t, condition, **attention)
    return (v - (eps - x0))[t > 0].square().mean()


def vae_by_hand(start, shapes=((4, 1), (4, 1), (2, 5), (2, 5), (2, 9))):
    """shapes: clips and frames of each at every one of STEPS."""
    vae = start["vae"]
    learner = Learner(vae, Muon(vae.parameters(), vae.parameters(), LR), 0.998)

    def step(i, g):
        count, frames = shapes[STEPS.index(i)]
        first = torch.randint(FRAMES - frames, (), generator=g).item()
        video = sample_clips(count, g).render(first, frames)
        mean, logvar = vae.moments(video)
        # KL(N(mean, var) || N(0, 1)) = (mean^2 + var - 1 - log var) / 2
        kl = ((mean**2 + logvar.exp() - 1 - logvar) / 2).mean()
        latents = mean + (logvar / 2).exp() * normal(mean.shape, g)
        error = (vae.decode_raw(latents) - video).square().mean()
        norm = learner.learn(error + 1e-4 * kl, i)
        # the range of pixels is 2
        return {"psnr": 10 * torch.log10(2**2 / error), "grad": norm}

    return {"vae": vae, "ema": learner.averages[0]}, step


def frame_vae_by_hand(start):
    return vae_by_hand({"vae": frame_wise(load(VAE, "vae"))}, [(2, 9)] * len(STEPS))


def teacher_by_hand(start):
    data, both = clips(), start["model"]
    learner = Learner(both, muon(both[0], both), 0.999)
    # images first, then whole clips and thirds of them
    shapes = ((64, 1), (64, 1), (4, T), (12, T // 3), (12, T // 3))

    def step(i, g):
        count, frames = shapes[STEPS.index(i)]
        x0, prompts = data.batch(count, frames, g, "cpu")
        text = dropped(both[1](prompts), g)
        one = shifted(torch.rand(count, 1, generator=g))
        length = torch.randint(1, 5, (), generator=g)
        t = torch.rand(count, -(-frames // length), generator=g)
        t = t.repeat_interleave(length, dim=1)[:, :frames]
        alike = torch.rand(count, generator=g) < 0.5
        if frames > 1:
            t[alike] = one[alike].expand(-1, frames)
        loss = denoising_loss(both[0], x0, t, text, g)
        return {"loss": loss, "grad": learner.learn(loss, i)}

    return {"model": both, "ema": learner.averages[0]}, step


def causal_teacher_by_hand(start):
    data, encoder = clips(), load(TextEncoder, "text_encoder")
    both = nn.ModuleList([load(DiT, "teacher"), encoder.requires_grad_(False)])
    learner = Learner(both, muon(both[0], both), 0.999)

    def step(i, g):
        x0, prompts = data.batch(4, T, g, "cpu")
        text = dropped(encoder(prompts), g)
        noisy = torch.rand(4, T // CHUNK, generator=g) > torch.rand(4, 1, generator=g)
        t = shifted(normal(4 * T // CHUNK, g).sigmoid()).view(4, -1) * noisy
        t = t.repeat_interleave(CHUNK, dim=1)
        loss = denoising_loss(both[0], x0, t, text, g, **CAUSAL)
        return {"loss": loss, "grad": learner.learn(loss, i)}

    return {"model": both, "ema": learner.averages[0]}, step


def ode_init_by_hand(start):
    student, encoder = load(DiT, "teacher"), load(TextEncoder, "text_encoder")
    learner = Learner(student, muon(student, student), 0.999)

    def step(i, g):
        rows = torch.randint(4, (4,), generator=g)
        text = encoder([PROMPTS[row] for row in rows]).detach()
        level = one_level_a_chunk(4, 5, g)
        states = STATES[rows].float()
        x_t = torch.stack(
            [torch.stack([states[b, level[b, f], f] for f in range(T)]) for b in range(4)]
        )
        t = TIMES[level]
        x0_hat = x_t - per_frame(t) * student(x_t, t, text, **CAUSAL)
        # L_init = E || G({x_{t^i}^i}, {t^i}) - {x_0^i} ||^2
        loss = (x0_hat - states[:, -1]).square().mean()
        return {"loss": loss, "grad": learner.learn(loss, i)}

    return {"student": student, "ema": learner.averages[0]}, step


def student_of_data(student, x0, text, g):
    """Algorithm 1: each chunk of a clip is noised to a time of its own."""
    t = TIMES[one_level_a_chunk(len(x0), 5, g)]
    x_t = noised(x0, normal(x0.shape, g), t)
    return x_t - per_frame(t) * student(x_t, t, text, **CAUSAL)


def student_of_noise(student, x0, text, g):
    """Self Forcing: chunks from noise, one after the other, each with one pass with a gradient."""
    noise, keys = normal(x0.shape, g), student.text_keys(text)
    stops = torch.randint(1, 5, (T // CHUNK,), generator=g).tolist()
    cache, made = student.new_cache(len(x0), 4, 4), []
    for x, stop in zip(noise.split(CHUNK, dim=1), stops, strict=True):
        for last in range(stop):
            t = torch.full(x.shape[:2], TIMES[last].item())
            with torch.set_grad_enabled(torch.is_grad_enabled() and last == stop - 1):
                x0_hat = x - per_frame(t) * student(x, t, keys, cache=cache)
            if last < stop - 1:
                x = noised(x0_hat, normal(x.shape, g), TIMES[last + 1].expand(x.shape[:2]))
        with torch.no_grad():
            student(x0_hat, torch.zeros(x.shape[:2]), keys, cache=cache)
        cache.commit(CHUNK)
        made.append(x0_hat)
    return torch.cat(made, dim=1)


def dmd_by_hand(start, guidance=2.0, every=5, generate=student_of_data, attention=None):
    """every: steps of the fake score for one of the student; attention: of both scores."""
    data, encoder = clips(), load(TextEncoder, "text_encoder")
    student, teacher, fake = load(DiT, "student"), load(DiT, "teacher"), load(DiT, "teacher")
    learner = Learner(student, adamw(student.parameters(), LR, (0.0, 0.99)), 0.99)
    critic = Learner(fake, adamw(fake.parameters(), 2 * LR, (0.0, 0.99)))
    attention = attention or {}

    def gradient(x0_hat, t, text, g):
        """(x0_fake - x0_real) / mean |x0_hat - x0_real|, and that mean for each clip."""
        x_t = noised(x0_hat, normal(x0_hat.shape, g), t)
        v_text = teacher(x_t, t, text, **attention)
        v_null = teacher(x_t, t, torch.zeros_like(text), **attention)
        x0_real = x_t - per_frame(t) * (v_null + guidance * (v_text - v_null))
        x0_fake = x_t - per_frame(t) * fake(x_t, t, text, **attention)
        distance = (x0_hat - x0_real).abs().mean((1, 2, 3, 4))
        return (x0_fake - x0_real) / distance.view(-1, 1, 1, 1, 1), distance

    def step(i, g):
        x0, prompts = data.batch(4, T, g, "cpu")
        text = encoder(prompts).detach()
        numbers = {}
        x0_hat = generate(student, x0, text, g)
        # one time for each clip
        t = shifted(0.02 + 0.96 * torch.rand(4, 1, generator=g)).expand(4, T)
        if i % every == 0:
            with torch.no_grad():
                direction, distance = gradient(x0_hat, t, text, g)
            norm = learner.learn((x0_hat * direction).mean(), i // every)
            numbers = {"grad": norm, "distance": distance.mean()}
        loss = denoising_loss(fake, x0_hat.detach(), t, text, g, **attention)
        return numbers | {"fake_loss": loss, "fake_grad": critic.learn(loss, i)}

    return {"student": student, "fake": fake, "ema": learner.averages[0]}, step


def action_teacher_by_hand(start):
    data, model = walks(), with_actions(load(DiT, "teacher"))
    encoder = load(TextEncoder, "text_encoder").requires_grad_(False)
    both = nn.ModuleList([model, encoder])
    learner = Learner(both, muon(model, both), 0.999)

    def step(i, g):
        count, frames = (4, 32) if i % 4 else (64, 1)
        x0, prompts, actions, past = data.batch(count, frames, g, "cpu")
        text = dropped(encoder(prompts), g)
        if i % 4:
            t = draw_walk_times(count, frames, model.schedule, g)
            own = own_past(learner.averages[0][0], past, 2, text, actions, g)
            x0 = torch.where(per_frame(t) == 0, own, x0)
        else:
            t = shifted(normal(count, g).sigmoid(), 12 / 4)[:, None]
        loss = denoising_loss(model, x0, t, (text, actions), g, chunk=1, window=16)
        return {"loss": loss, "grad": learner.learn(loss, i)}

    return {"model": both, "ema": learner.averages[0]}, step


def player_by_hand(start):
    teacher, student = (load(ActionDiT, "action_teacher") for _ in range(2))
    data, encoder = walks(), load(TextEncoder, "text_encoder")
    student.config.shift = SHIFT / 4
    attention = {"chunk": 1, "window": 4}
    times = shifted(torch.tensor([1.0, 0.5, 0.0]), SHIFT / 4)
    learner = Learner(student, muon(student, student), 0.95, 0.998)
    target, slow = learner.averages

    def step(i, g):
        shape = (4, 8) if i % 4 else (64, 1)
        x0, prompts, actions, past = data.batch(*shape, g, "cpu")
        level = torch.randint(2, shape, generator=g)
        condition = (encoder(prompts).detach(), actions)
        if i % 4:
            clean = draw_walk_times(*shape, teacher.schedule, g) == 0
            own = own_past(slow, past, 3, *condition, g)
            level = level.masked_fill(clean, 2)
            x0 = torch.where(per_frame(clean), own, x0)
        t, r = times[level], times[(level + 1).clamp(max=2)]
        x_t = noised(x0, normal(x0.shape, g), t)
        with torch.no_grad():
            x_r = x_t - per_frame(t - r) * teacher(x_t, t, condition, **attention)  # dx / dt = v
            goal = x_r - per_frame(r) * target(x_r, r, condition, **attention)
        x0_hat = x_t - per_frame(t) * student(x_t, t, condition, **attention)
        square = (x0_hat - goal).square().mean((2, 3, 4))
        loss = ((square + 0.03**2).sqrt() - 0.03).mean()
        return {"loss": loss, "grad": learner.learn(loss, i)}

    return {"student": student, "ema": target, "slow": slow}, step


# ---------------------------------------------------------------------- each stage in both ways
SHARED = "--text-encoder text_encoder.safetensors --batch-size 4"
CODEC = f"--vae vae.safetensors {SHARED}"
WALKS = f"--vae vae_frame.safetensors {SHARED} --clips 2"
TEACHER = "--teacher teacher.safetensors"
DMD = f"dmd --student student.safetensors {TEACHER} {CODEC} --clips 4"
WEIGHTS = "--weights teacher.safetensors"
PLAYER = "--teacher action_teacher.safetensors"
STAGES = {
    "vae": ("vae --batch-size 2", vae_by_hand),
    "frame vae": ("nfd_vae --batch-size 2", frame_vae_by_hand),
    "teacher": (
        "teacher --config tiny.json --vae vae.safetensors --batch-size 4 --clips 4",
        teacher_by_hand,
    ),
    "causal teacher": (f"teacher --causal {WEIGHTS} {CODEC} --clips 4", causal_teacher_by_hand),
    "ode init": (
        f"ode_init {TEACHER} {CODEC} --trajectories 16 --solver-steps 4",
        ode_init_by_hand,
    ),
    "dmd": (DMD, dmd_by_hand),
    "guidance 3": (f"{DMD} --guidance 3", functools.partial(dmd_by_hand, guidance=3.0)),
    "every second": (f"{DMD} --fake-updates 2", functools.partial(dmd_by_hand, every=2)),
    "causal scores": (f"{DMD} --causal-scores", functools.partial(dmd_by_hand, attention=CAUSAL)),
    "rollout": (f"{DMD} --rollout self", functools.partial(dmd_by_hand, generate=student_of_noise)),
    "action teacher": (f"nfd_teacher {WEIGHTS} {WALKS}", action_teacher_by_hand),
    "player": (f"nfd_consistency {PLAYER} {WALKS}", player_by_hand),
}


# the commands, and one that computes its activations twice, with the same numbers as "rollout"
WAYS = {name: command for name, (command, _) in STAGES.items()}
WAYS["recomputed"] = f"{DMD} --rollout self --recompute"


def by_hand(build, start):
    """Take STEPS of a stage by hand, as `train_tiny` takes those of the script."""
    state, step = build(start)
    g = generator()
    numbers = [step(i, g) for i in STEPS]
    return SimpleNamespace(state=state, numbers=numbers, drawn=g.get_state())
