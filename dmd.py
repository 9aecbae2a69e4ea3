"""Stage 2: DMD with a causal student and a bidirectional teacher (CausVid, Algorithm 1).

python dmd.py       distils the shipped teacher into the shipped ODE-initialised student
"""

import launch
import copy

import torch
from torch.nn import functional as F

import flags
import training
import weights
from dataset import training_world
from diffusion import GUIDANCE, flow_matching_loss, guided_v, noise_source, with_null
from evaluate import fixed_sheet
from model import DiT
from ode_init import chunk_levels
from optimisers import EMA, adamw, optimise
from sample import denoise_chunk, predict_x0, remember_chunk
from text import TextEncoder
from vae import VAE
from weights import check_fit, load_model, made_with, shipped


# ---------------------------------------------------------------------------------------- the loss
def dmd_loss(x0_hat, real, fake, schedule, t, eps):
    """Compute a loss whose gradient on the student's x0_hat [B, T, C, h, w] is DMD's (eq. 7, 8).

    real(x_t), fake(x_t): the x0 predictions of the teacher and of the fake score at t [B, T]; no
    gradient reaches them. Returns (loss, mean |x0_hat - x0_real|).

    The gradient is that of KL(p_fake || p_data) at time t:
    s_fake - s_real = alpha_t (x0_fake - x0_real) / sigma_t^2, weighted by sigma_t^2 / alpha_t and
    by 1 / mean |x0_hat - x0_real| of each clip, which makes all t count alike.
    """
    with torch.no_grad():
        x_t = schedule.add_noise(x0_hat, eps, t)
        x0_real, x0_fake = real(x_t), fake(x_t)
        distance = (x0_hat - x0_real).abs().flatten(1).mean(1)  # [B]
        weight = distance.reshape(-1, 1, 1, 1, 1).clamp(min=1e-6)
        # gradient = (x0_fake - x0_real) / mean |x0_hat - x0_real|
        gradient = (x0_fake - x0_real) / weight
    # a loss with this gradient: 1/2 || x0_hat - stopgrad(x0_hat - gradient) ||^2
    return 0.5 * F.mse_loss(x0_hat, (x0_hat - gradient).detach()), distance.mean()


# --------------------------------------------------------------------------- what the student makes
def student_x0(student, x0, text, generator):
    """Predict all chunks of real latents x0 at once, each noised to a student time of its own:
    x0_hat (Algorithm 1, first half). A chunk at time 0 is context, and stays what it is."""
    c, schedule = student.config, student.schedule
    level = chunk_levels(*x0.shape[:2], c.chunk, c.steps + 1, generator)
    t = schedule.timesteps(c.steps).float()[level].to(x0.device)
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t)
    return schedule.x0(x_t, student(x_t, t, text, chunk=c.chunk, window=c.window).float(), t)


def rollout(model, noise, times, prompt, generator, cache):
    """Generate the model's own clip, chunk by chunk from its own cache as in sampling: x0_hat.

    Self Forcing. Each chunk of noise [B, T, C, h, w] stops after a random number of the steps at
    times [N + 1]. The gradient goes through the last of them alone; what later chunks read of it
    from the cache is a constant. prompt(frames): the keys after so many latent frames; cache: may
    hold a past that the clip goes on from.
    """
    chunks, renoise = noise.split(cache.chunk, dim=1), noise_source(generator, noise.device)
    stops = torch.randint(1, len(times), (len(chunks),), generator=generator).tolist()
    x0_hat, frames = [], 0
    for x, stop in zip(chunks, stops, strict=True):
        keys = prompt(frames)
        with torch.no_grad():
            x = denoise_chunk(model, x, times[:stop], keys, cache, renoise)
        x0_hat.append(predict_x0(model, x, times[stop - 1], keys, cache))
        remember_chunk(model, x0_hat[-1], keys, cache)
        frames += x.shape[1]
    return torch.cat(x0_hat, dim=1)


def rollout_x0(student, x0, text, generator):
    """Roll the student out from noise to clips shaped as x0, in place of `student_x0`."""
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    times = student.schedule.timesteps(student.config.steps)
    cache, keys = student.new_cache(len(x0), *x0.shape[-2:]), student.text_keys(text)
    return rollout(student, noise, times, lambda frames: keys, generator, cache)


# -------------------------------------------------------------------------------------- Algorithm 1
def clip_times(count, frames, schedule, generator):
    """Draw one time for each whole clip: uniform over [0.02, 0.98], then shifted: [B, T]."""
    u = 0.02 + 0.96 * torch.rand(count, 1, generator=generator)
    return schedule.shifted(u).expand(-1, frames)


class Distillation:
    """The student, the frozen teacher and the online fake score, and the updates of Algorithm 1.

    generate(student, x0, text, generator) -> x0_hat: `student_x0`, or `rollout_x0` (Self Forcing).
    causal_scores: the teacher is a causal one, and so is the fake score (Table 4).
    """

    def __init__(self, student, teacher, generate, run, guidance, fake_updates, causal_scores):
        self.student, self.teacher = student.train(), teacher.requires_grad_(False)
        self.fake = copy.deepcopy(teacher).requires_grad_(True).train()
        self.student_optimizer = adamw(student.parameters(), run.lr, betas=(0.0, 0.99))
        self.fake_optimizer = adamw(self.fake.parameters(), 2 * run.lr, betas=(0.0, 0.99))
        self.ema = EMA(student, 0.99)
        self.generate, self.run = generate, run
        self.guidance, self.fake_updates, self.attention = guidance, fake_updates, {}
        if causal_scores:
            self.attention = {"chunk": teacher.config.chunk, "window": teacher.config.window}

    def state(self):
        """All that a checkpoint must hold."""
        names = ("student", "fake", "ema", "student_optimizer", "fake_optimizer")
        return {name: getattr(self, name) for name in names}

    def step(self, i, x0, text, generator):
        """Generate clips; every fifth time update the student; always update the fake score."""
        update = i % self.fake_updates == 0
        with torch.set_grad_enabled(update), self.run.autocast():
            x0_hat = self.generate(self.student, x0, text, generator)
        t = clip_times(*x0.shape[:2], self.student.schedule, generator).to(x0.device)
        numbers = {}
        if update:
            numbers = self.update_student(x0_hat, t, text, generator)
            self.ema.update(self.student, i // self.fake_updates)
        return numbers | self.update_fake(x0_hat.detach(), t, text, generator)

    def update_student(self, x0_hat, t, text, generator):
        """Update the student by `dmd_loss` on its clips x0_hat."""
        schedule, prompts = self.student.schedule, with_null(text)

        def real(x_t):
            v = guided_v(self.teacher, x_t, t, prompts, self.guidance, **self.attention)
            return schedule.x0(x_t, v, t)

        def fake(x_t):
            return schedule.x0(x_t, self.fake(x_t, t, text, **self.attention).float(), t)

        eps = torch.randn(x0_hat.shape, generator=generator).to(x0_hat.device)
        with self.run.autocast():
            loss, distance = dmd_loss(x0_hat, real, fake, schedule, t, eps)
        return {"grad": optimise(self.student_optimizer, loss), "distance": distance}

    def update_fake(self, x0_hat, t, text, generator):
        """Let the fake score learn the distribution of the student's clips x0_hat."""
        with self.run.autocast():
            loss = flow_matching_loss(self.fake, x0_hat, t, text, generator, **self.attention)
        return {"fake_loss": loss, "fake_grad": optimise(self.fake_optimizer, loss)}


def main():
    parser = flags.model_parser("Distil the teacher into a student.", 450, 8, 1e-4, "runs/dmd")
    add = parser.add_argument
    add("--guidance", type=flags.real(0), default=GUIDANCE, help="of the teacher")
    told = "of the fake score for one of the student"
    add("--fake-updates", type=flags.whole(), default=5, help=told)
    told = "weights that the scores start from"
    add("--teacher", default=shipped("teacher"), type=flags.parts, help=told)
    told = "weights that the student starts from"
    add("--student", default=shipped("ode_init"), type=flags.parts, help=told)
    told = "the teacher is a causal one, and so is the fake score"
    add("--causal-scores", action="store_true", help=told)
    told = "what it denoises: noised data, CausVid, or noise, from its own cache, Self Forcing"
    add("--rollout", choices=["data", "self"], default="data", help=told)
    add("--clips", type=flags.whole(), help="of the shapes world to train on (3072)")
    args = parser.parse_args()
    weights.check_role(args.teacher, "causal teacher" if args.causal_scores else "teacher")
    codecs = made_with(args.student, *made_with(args.teacher, args.vae, args.text_encoder))
    args.vae, args.text_encoder = codecs
    world = training_world(args, args.teacher)
    run = training.start_run(args)
    vae = load_model(VAE, args.vae, run.device)
    encoder = load_model(TextEncoder, args.text_encoder, run.device)
    teacher = load_model(DiT, args.teacher, run.device)
    student = load_model(DiT, args.student, run.device)
    given = (args.chunk, args.window, args.student_steps)
    student.config = training.causal_config(student.config, *given)
    check_fit(teacher, vae, encoder)
    check_fit(student, vae, encoder)
    data = world.latents(vae, student.config.patch_size)
    averaged = copy.deepcopy(student).eval()
    generate = rollout_x0 if args.rollout == "self" else student_x0
    scores = (args.guidance, args.fake_updates, args.causal_scores)
    distillation = Distillation(student, teacher, generate, run, *scores)
    if run.compile:
        teacher.compile()
        distillation.fake.compile()
        if args.rollout == "data":  # a graph for each length of a rollout's past does not pay
            student.compile()

    def step(i, generator):
        x0, prompts = data.batch(run.batch_size, data.frames, generator, run.device)
        with torch.no_grad():
            text = encoder(prompts)
        return distillation.step(i, x0, text, generator)

    def sheet(path):
        averaged.load_state_dict(distillation.ema.shadow)
        return fixed_sheet("student", averaged, vae, encoder, path, world)

    seconds = training.train(run, distillation.state(), step, sheet, [teacher, averaged])
    if seconds is not None:
        parts = (distillation.ema.shadow, student.config, seconds, codecs, world.sampled)
        training.write_transformer(run, "student", *parts, **world.origin)


if __name__ == "__main__":
    launch.run_main(main)
