"""Stage 0: the many-step bidirectional teacher, by flow matching, and the text encoder with it.

python teacher.py               trains both on latents of the shapes world
python teacher.py --causal      makes a causal many-step teacher of the shipped one, to compare with
python teacher.py --actions     makes a causal teacher of the action world (NFD) of the shipped one
"""

import copy
import hashlib
import os
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data import ACTIONS, Walks, sample_clips, sample_walks, save_sheet
from evaluate import fixed_set, health, make_videos, play_walks
from model import DiT
from sample import rollout
from text import TextEncoder
from training import EMA, Muon, autocast, check_training, optimise, train, training_parser
from vae import VAE
from weights import UserError, load_model, run_main, save_weights, shipped

# how often a motion is drawn, in the order of data.MOTIONS: a bounce and a spin take far longer to learn than standing still
SHARES = torch.tensor([1.0, 2, 2, 8, 2, 2, 12, 2])


class LatentClips:
    """Clips of the shapes world or walks of the action world, and their latents, encoded once and kept in a file beside the runs.
    Walks twice: as they are and, for a past that has drifted, each in a size that is off by up to 1.5 pixels."""

    def __init__(self, vae, clips):
        self.clips, self.latents = clips, self._encoded(vae, clips)
        if isinstance(clips, Walks):
            off = 3 * torch.rand(len(clips), generator=torch.Generator().manual_seed(0)) - 1.5
            self.drifted = self._encoded(vae, replace(clips, radius=clips.radius + off))

    @staticmethod
    @torch.no_grad()
    def _encoded(vae, clips, batch=16, folder="runs/latents"):
        key = hashlib.sha256(
            b"".join(
                v.detach().cpu().numpy().tobytes()
                for v in (vae.encoder[1].weight, *vars(clips).values())
            )
        )
        path = os.path.join(folder, f"{key.hexdigest()[:8]}-{len(clips)}.pt")
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            latents = [
                vae.encode(clips[i : i + batch].to(vae.mean.device).render()).to(
                    "cpu", torch.bfloat16
                )
                for i in tqdm(range(0, len(clips), batch), desc="encoding clips", unit="batch")
            ]
            torch.save({"latents": torch.cat(latents)}, path + ".tmp")
            os.replace(path + ".tmp", path)
        return torch.load(path, weights_only=True)["latents"]

    def batch(self, count, frames, generator, device):
        """`count` random pieces of `frames` latent frames: (x0 [B, T, C, h, w], prompts). Half begin with the clip. Of walks also actions
        [B, T] and the past with which to learn x0 [B, T, C, h, w], whose size has drifted."""
        walks, total = isinstance(self.clips, Walks), self.latents.shape[1]
        index = torch.multinomial(
            torch.ones(len(self.clips)) if walks else SHARES[self.clips.motion],
            count,
            True,
            generator=generator,
        )
        start = torch.randint(total - frames + 1, (count,), generator=generator)
        start = start * torch.randint(2, (count,), generator=generator)
        rows, columns = index[:, None], torch.arange(frames) + start[:, None]
        x0, prompts = (
            self.latents[rows, columns].to(device, torch.float32),
            self.clips[index].prompts(generator),
        )
        if not walks:
            return x0, prompts
        actions = self.clips.actions[rows, columns]
        actions[:, 0] = 0  # nothing comes before the first frame
        return (
            x0,
            prompts,
            actions.to(device),
            self.drifted[rows, columns].to(device, torch.float32),
        )


def draw_times(count, schedule, generator):
    """Diffusion times [count]: logit-normal, where the network learns most, and then shifted."""
    return schedule.shifted(torch.sigmoid(torch.randn(count, generator=generator)))


def draw_chunk_times(count, frames, chunk, schedule, generator):
    """Diffusion Forcing, and NFD with chunk=1: a time of its own for each chunk [count, frames]. Some are clean, at t = 0, as context is
    when sampling: in each clip a share of its own, from none to all."""
    chunks = -(-frames // chunk)
    noisy = torch.rand(count, chunks, generator=generator) > torch.rand(
        count, 1, generator=generator
    )
    return (
        draw_times(count * chunks, schedule, generator).view(count, chunks) * noisy
    ).repeat_interleave(chunk, dim=1)[:, :frames]


def draw_walk_times(count, frames, schedule, generator):
    """Diffusion times [count, frames] of walks: for a quarter of them as in Diffusion Forcing. In half of them every other frame is clean: what
    sampling does most, the next frame behind a clean past. A quarter has blocks of 8 frames with one time, or all clean: what speculative
    sampling does. Behind a clean past only nearly pure noise leaves open where a frame's shape is: Diffusion Forcing gets a quarter of the shift."""
    t = draw_chunk_times(count, frames, 1, replace(schedule, shift=schedule.shift / 4), generator)
    turns, blocks = t[1::2], t[2::4]
    noisy = (torch.arange(frames) + torch.randint(2, (len(turns), 1), generator=generator)) % 2
    turns.copy_(noisy * draw_times(turns.numel(), schedule, generator).view_as(turns))
    blocks.copy_(draw_chunk_times(len(blocks), frames, 8, schedule, generator))
    return t


def flow_matching_loss(model, x0, t, text, generator, **attention):
    """E || v(x_t, t, text) - (eps - x0) ||^2 for x0 [B, T, C, h, w] and t [B, T] (flow matching, the denoising loss), over frames with t > 0:
    in a clean one nothing tells eps."""
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    v = model(model.schedule.add_noise(x0, eps, t), t, text, **attention)
    error = F.mse_loss(v.float(), model.schedule.v(x0, eps, t), reduction="none").mean((2, 3, 4))
    return torch.where(t > 0, error, 0.0).sum() / (t > 0).sum().clamp(min=1)


@torch.no_grad()
def own_past(model, x0, steps, text, actions, generator, run=4):
    """The past as the model itself leaves it, where data would be too good: of walks x0 [B, T, C, h, w] the first half window as it is, and
    then each run of 4 frames as the model makes it behind the data, from the data's own frames noised to a random t in `steps` denoising
    steps or fewer. Half of the walks also begin with such a run, behind nothing: no stream's first frames are as good as the data's.
    In every eighth walk each frame is a first guess without a past, a blur: what is lost can come back.

    Trained to make the data's frames behind it, a model mends what it did wrong; one that has only seen data builds upon it. What strays
    from where the data's shape is, in longer runs or from so much noise that its place does not show, teaches to jump there, and a jump is
    an action not obeyed: t is at most 0.6, of the first run, which begins in a blur when sampling, 0.9.
    """
    (B, T), given, device = x0.shape[:2], model.config.window // 2, x0.device
    noise = torch.randn(x0.shape, generator=generator).to(device)
    t = 0.2 + 0.4 * torch.rand(1, generator=generator).item()
    noised = lambda t: (model.schedule.add_noise(x0, noise, t), model.schedule.timesteps(steps, t))
    (x_t, times), (x_s, earlier) = noised(t), noised(t + 0.3)
    starts = range(0, T - given - run + 1, run)
    pieces = lambda y, first, last: torch.cat([y[:, s + first : s + last] for s in starts])
    first = rollout(
        model,
        x_s[B // 2 :, :run],
        earlier,
        text[B // 2 :],
        generator,
        actions=actions[B // 2 :, :run],
    )
    x0 = torch.cat([x0[: B // 2], torch.cat([first, x0[B // 2 :, run:]], dim=1)])
    made = rollout(
        model,
        pieces(x_t, given, given + run),
        times,
        text.repeat(len(starts), 1, 1),
        generator,
        pieces(x0, 0, given),
        pieces(actions, 0, given + run),
    )
    own = torch.cat([x0[:, :given], *made.split(B), x0[:, given + len(starts) * run :]], dim=1)
    lost, t = B // 8, torch.ones(B // 8, T, device=device)
    if not lost:
        return own
    v = model(
        noise[:lost], t, text[:lost], chunk=1, window=1, actions=torch.zeros_like(actions[:lost])
    )
    return torch.cat([model.schedule.x0(noise[:lost], v, t), own[lost:]])


def with_actions(teacher, layers=4):
    """The model of the action world (NFD) that begins as a text-to-video teacher, or as one of its own kind: frame by frame, with a window of
    16. Of the actions it knows no more than that one.

    It keeps `layers` of the teacher's, evenly spaced: with so few tokens in a frame, depth is what a pass takes its time for."""
    model = DiT(
        replace(
            teacher.config,
            shift=12.0,
            chunk=1,
            window=16,
            num_actions=len(ACTIONS),
            num_layers=layers,
        )
    )
    teacher = copy.deepcopy(teacher)
    teacher.blocks = nn.ModuleList(
        teacher.blocks[i]
        for i in torch.linspace(0, len(teacher.blocks) - 1, layers).round().int().tolist()
    )
    nn.init.zeros_(model.action_embedding.weight)
    model.load_state_dict(teacher.state_dict(), strict=False)
    return model.to(teacher.head.head.weight.device)


def main():
    parser = training_parser(
        "Train the bidirectional teacher and the text encoder.", 1600, 16, 2e-3, "runs/teacher"
    )
    parser.add_argument("--clips", type=int, default=3072, help="clips in the training set")
    parser.add_argument(
        "--weights",
        help="for --causal and --actions: begin with these (weights/teacher.safetensors)",
    )
    parser.add_argument(
        "--causal",
        action="store_true",
        help="block-causal attention and a time for each chunk, from the shipped teacher on",
    )
    parser.add_argument(
        "--actions",
        action="store_true",
        help="the causal teacher of the action world, a frame at a time, from the shipped teacher on",
    )
    args = parser.parse_args()
    causal, seed = args.causal or args.actions, torch.Generator().manual_seed(0)
    if args.weights and not causal:
        raise UserError(
            "--weights goes with --causal or --actions: the bidirectional teacher begins anew, with its text encoder"
        )
    check_training(args)
    torch.manual_seed(args.seed)
    model = (
        load_model(DiT, args.weights or shipped("teacher"), args.device)
        if causal
        else DiT().to(args.device)
    )
    if model.config.num_actions and not args.actions:
        raise UserError(
            f"{args.weights} holds a model of the action world: train it with --actions"
        )
    if args.actions:
        model = with_actions(model)
        vae, frames = load_model(VAE, shipped("vae_frame"), args.device), 32
        with autocast(args):
            data = LatentClips(vae, sample_walks(args.clips, 96, seed))
    else:
        vae, frames = load_model(VAE, shipped("vae"), args.device), 21
        data = LatentClips(vae, sample_clips(args.clips, seed))
    encoder = (
        load_model(TextEncoder, shipped("text_encoder"), args.device).requires_grad_(False)
        if causal
        else TextEncoder().to(args.device)
    )
    attention = dict(chunk=model.config.chunk, window=model.config.window) if causal else {}
    both = nn.ModuleList([model.train(), encoder])
    averaged = nn.ModuleList([DiT(model.config), TextEncoder()]).to(args.device)
    ema, optimizer = EMA(both), Muon(model.blocks.parameters(), both.parameters(), args.lr)

    if args.compile:
        model.compile(dynamic=False)  # a graph for images, one for whole clips, one for short ones

    def step(i, generator):
        # images first: geometry and colours are cheap to learn on single latent frames, sixteen times as many of them; then whole clips
        # and, every other step, three times as many of a third of the length: what a shape does next shows in a few frames.
        # In the action world every fourth step is of images: a first frame has no context, and a walk has only one such
        images = i % 4 == 0 if args.actions else i < 0.16 * args.steps and not causal
        short = i % 2 and not causal
        count, length = (
            (16 * args.batch_size, 1)
            if images
            else (3 * args.batch_size, frames // 3)
            if short
            else (args.batch_size, frames)
        )
        x0, prompts, *walk = data.batch(count, length, generator, args.device)
        actions, past = walk or (None, None)
        keep = (torch.rand(count, generator=generator) > 0.1).to(
            args.device
        )  # 10% learn the null prompt
        if causal and not images:
            t = (
                draw_walk_times(count, length, model.schedule, generator)
                if args.actions
                else draw_chunk_times(count, length, model.config.chunk, model.schedule, generator)
            )
        else:
            # the more latents agree on a thing, the more noise it takes to hide it: a clip's track is decided nearer to t = 1 than a
            # frame's colour, and how far a shape has turned nearer to 0; so a third of the clips get twice the shift, a third a quarter
            scale = (
                (0.25 if args.actions else 1)
                if images
                else torch.tensor([0.25, 1.0, 2.0])[torch.randint(3, (count,), generator=generator)]
            )
            t = draw_times(
                count, replace(model.schedule, shift=model.config.shift * scale), generator
            )[:, None].expand(-1, length)
        with autocast(args):
            text = encoder(prompts) * keep[:, None, None]
            if args.actions and not images:  # context is what the model made, not data
                averaged.load_state_dict(ema.shadow)
                x0 = torch.where(
                    (t == 0)[..., None, None, None].to(args.device),
                    own_past(averaged[0], past, 2, text, actions, generator),
                    x0,
                )
            loss = flow_matching_loss(
                model, x0, t.to(args.device), text, generator, actions=actions, **attention
            )
        norm = optimise(optimizer, loss)
        ema.update(both, i)
        return {"loss": loss, "grad": norm}

    @torch.no_grad()
    def sheet(path):
        averaged.load_state_dict(ema.shadow)
        if args.actions:
            video, measured = play_walks(
                averaged[0], vae, averaged[1], count=8, frames=33, steps=8, guidance=1
            )
            save_sheet(video, path)
            return measured
        clips, noise = fixed_set()
        video = make_videos(
            "causal" if causal else "teacher",
            averaged[0],
            vae,
            averaged[1](clips.prompts()),
            noise,
            steps=8,
        )
        save_sheet(video, path)
        return health(video, clips)

    if train(args, {"model": both, "ema": ema, "optimizer": optimizer}, step, sheet):
        averaged.load_state_dict(ema.shadow)
        name = "action_teacher" if args.actions else "causal_teacher" if causal else "teacher"
        origin = dict(stage=name.replace("_", " "), steps=args.steps, seconds=round(args.seconds))
        save_weights(
            os.path.join(args.out, name + ".safetensors"),
            averaged[0].state_dict(),
            model.config,
            **origin,
        )
        if not causal:
            save_weights(
                os.path.join(args.out, "text_encoder.safetensors"),
                averaged[1].state_dict(),
                encoder.config,
                **origin,
            )
        print(
            f"wrote {args.out}/{name}.safetensors"
            + ("" if causal else " and text_encoder.safetensors")
        )


if __name__ == "__main__":
    run_main(main)
