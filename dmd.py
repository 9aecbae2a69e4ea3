"""Stage 2: asymmetric distillation with DMD (CausVid, Algorithm 1): a causal student, a bidirectional teacher.

python dmd.py           distils the shipped teacher into the shipped ODE-initialised student
"""

import copy
import os

import torch
from torch.nn import functional as F

from data import sample_clips
from dataset import LatentClips
from diffusion import GUIDANCE, flow_matching_loss, guided_v, noise_source, with_null
from model import DiT
from ode_init import STUDENT_STEPS, chunk_levels, student_sheet
from sample import denoise_chunk, predict_x0, remember_chunk
from text import TextEncoder
from training import EMA, adamw, autocast, check_training, optimise, train, training_parser
from vae import VAE
from weights import load_model, run_main, save_weights, shipped


def dmd_loss(x0_hat, real, fake, schedule, t, eps):
    """The distribution matching loss, whose gradient on the student's x0_hat [B, T, C, h, w] is

        (x0_fake - x0_real) / mean |x0_hat - x0_real|                                             (DMD, equations 7 and 8)

    That is the gradient of KL(p_fake || p_data) at time t: s_fake - s_real = alpha_t (x0_fake - x0_real) / sigma_t^2, weighted by
    sigma_t^2 / alpha_t over the mean, which is taken over each clip and makes all t count alike. Like that of any mean it is
    divided by the number of elements. real(x_t), fake(x_t): the teacher's and the fake score's x0 predictions at t [B, T].
    Returns (loss, mean |x0_hat - x0_real|). No gradient reaches real or fake.
    """
    with torch.no_grad():
        x_t = schedule.add_noise(
            x0_hat, eps, t
        )  # the student's clip, noised to one t for the whole clip
        x0_real, x0_fake = real(x_t), fake(x_t)
        distance = (x0_hat - x0_real).abs().flatten(1).mean(1)
        gradient = (x0_fake - x0_real) / distance.reshape(-1, *[1] * (x0_hat.ndim - 1)).clamp(
            min=1e-6
        )
    # a loss with this gradient: 1/2 || x0_hat - stopgrad(x0_hat - gradient) ||^2
    return 0.5 * F.mse_loss(x0_hat, (x0_hat - gradient).detach()), distance.mean()


def student_x0(student, x0, text, generator):
    """Algorithm 1, first half: noise each chunk of real latents x0 at its own student time, 0 included, and let the causal
    student predict them all at once. -> x0_hat; a chunk at time 0 is context, and stays what it is."""
    c, schedule = student.config, student.schedule
    level = chunk_levels(x0.shape[0], x0.shape[1], c.chunk, STUDENT_STEPS + 1, generator)
    t = schedule.timesteps(STUDENT_STEPS).float()[level].to(x0.device)
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0.device), t)
    return schedule.x0(x_t, student(x_t, t, text, chunk=c.chunk, window=c.window).float(), t)


def rollout(model, noise, times, text, generator, first=None, actions=None):
    """Generate the model's own clip, chunk by chunk from its own cache as in sampling: x0_hat.

    Self Forcing. Each chunk of noise [B, T, C, h, w] stops after a random number of the steps at
    times [N + 1]. The gradient goes through the last of them alone; what later chunks read of it
    from the cache is a constant. first [B, F, C, h, w]: the clip goes on from these latents, at
    most a window of them. actions [B, F + T]: see `DiT.forward`.
    """
    k, given = model.config.chunk, 0 if first is None else first.shape[1]
    renoise = noise_source(generator, noise.device)
    cache, keys = model.new_cache(len(noise), *noise.shape[-2:]), model.text_keys(text)
    if given:
        remember_chunk(model, first, keys, cache, None if actions is None else actions[:, :given])
    chunks = noise.split(k, dim=1)
    acts = [None] * len(chunks) if actions is None else actions[:, given:].split(k, dim=1)
    stops = torch.randint(1, len(times), (len(chunks),), generator=generator).tolist()
    x0_hat = []
    for x, stop, act in zip(chunks, stops, acts, strict=True):
        with torch.no_grad():
            x = denoise_chunk(model, x, times[:stop], keys, cache, renoise, act)
        x0_hat.append(predict_x0(model, x, times[stop - 1], keys, cache, act))
        remember_chunk(model, x0_hat[-1], keys, cache, act)
    return torch.cat(x0_hat, dim=1)


def clip_times(count, frames, schedule, generator, device):
    """One diffusion time for each whole clip: uniform over [0.02, 0.98], then shifted: [count, frames]."""
    u = 0.02 + 0.96 * torch.rand(count, 1, generator=generator)
    return schedule.shifted(u).expand(-1, frames).to(device)


def main():
    """Algorithm 1: five updates of the fake score on the student's clips for one of the student by `dmd_loss`."""
    parser = training_parser(
        "Distil the teacher into the causal few-step student.", 450, 8, 1e-4, "runs/dmd"
    )
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of the teacher")
    parser.add_argument(
        "--fake-updates",
        type=int,
        default=5,
        help="fake-score updates for each update of the student",
    )
    parser.add_argument(
        "--teacher",
        default=shipped("teacher"),
        help="weights that the scores start from",
    )
    parser.add_argument(
        "--student",
        default=shipped("ode_init"),
        help="weights that the student starts from",
    )
    parser.add_argument(
        "--causal-scores",
        action="store_true",
        help="the teacher is a causal one, and so is the fake score",
    )
    parser.add_argument(
        "--rollout",
        choices=["data", "self"],
        default="data",
        help="what the student denoises: noised data (CausVid), "
        "or noise, chunk after chunk behind its own past (Self Forcing)",
    )
    parser.add_argument("--clips", type=int, default=3072, help="clips in the training set")
    args = parser.parse_args()
    check_training(args)
    torch.manual_seed(args.seed)
    vae, encoder = (
        load_model(VAE, shipped("vae"), args.device),
        load_model(TextEncoder, shipped("text_encoder"), args.device),
    )
    data = LatentClips(vae, sample_clips(args.clips, torch.Generator().manual_seed(0)))
    teacher = load_model(DiT, args.teacher, args.device).requires_grad_(False)
    fake = (
        copy.deepcopy(teacher).requires_grad_(True).train()
    )  # the online fake score starts as the teacher
    student = load_model(DiT, args.student, args.device).train()
    averaged, schedule = copy.deepcopy(student).eval(), student.schedule
    attention = (
        {"chunk": teacher.config.chunk, "window": teacher.config.window}
        if args.causal_scores
        else {}
    )
    ema = EMA(student, 0.99)
    student_optimizer = adamw(student.parameters(), args.lr, betas=(0.0, 0.99))
    fake_optimizer = adamw(fake.parameters(), 2 * args.lr, betas=(0.0, 0.99))

    if args.compile:
        for network in (teacher, fake) + (student,) * (
            args.rollout == "data"
        ):  # a graph for each length of a rollout's past does not pay
            network.compile()

    def step(i, generator):
        x0, prompts = data.batch(args.batch_size, data.latents.shape[1], generator, args.device)
        with torch.no_grad():
            text = encoder(prompts)
        update, numbers = i % args.fake_updates == 0, {}
        with torch.set_grad_enabled(update), autocast(args):
            if args.rollout == "self":
                x0_hat = rollout(
                    student,
                    torch.randn(x0.shape, generator=generator).to(args.device),
                    schedule.timesteps(STUDENT_STEPS),
                    text,
                    generator,
                )
            else:
                x0_hat = student_x0(student, x0, text, generator)
        t = clip_times(*x0.shape[:2], schedule, generator, args.device)
        if update:  # one update of the student for five of the fake score
            real = lambda x_t: schedule.x0(
                x_t, guided_v(teacher, x_t, t, with_null(text), args.guidance, **attention), t
            )
            eps = torch.randn(x0.shape, generator=generator).to(args.device)
            with autocast(args):
                of_fake = lambda x_t: schedule.x0(x_t, fake(x_t, t, text, **attention).float(), t)
                loss, distance = dmd_loss(x0_hat, real, of_fake, schedule, t, eps)
            numbers = {"grad": optimise(student_optimizer, loss), "distance": distance}
            ema.update(student, i // args.fake_updates)
        with autocast(args):  # the fake score learns the student's distribution
            fake_loss = flow_matching_loss(fake, x0_hat.detach(), t, text, generator, **attention)
        optimise(fake_optimizer, fake_loss)
        return numbers | {"fake_loss": fake_loss}

    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        return student_sheet(averaged, vae, encoder, path)

    state = {
        "student": student,
        "fake": fake,
        "ema": ema,
        "student_optimizer": student_optimizer,
        "fake_optimizer": fake_optimizer,
    }
    if train(args, state, step, sheet):
        path = os.path.join(args.out, "student.safetensors")
        save_weights(
            path,
            ema.shadow,
            student.config,
            stage="student",
            steps=args.steps,
            seconds=round(args.seconds),
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
