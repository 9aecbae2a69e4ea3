"""Training clips as latents, encoded once and kept in a file."""

import contextlib
import hashlib
import os

import torch
from tqdm import tqdm

from data import sample_clips
from distributed import first_alone
from memory import Planning
from training import read_saved
from weights import UserError, check_stored, is_plain, written

# how often a motion is drawn, in the order of data.MOTIONS: a bounce and a spin take far longer to
# learn than standing still
SHARES = torch.tensor([1.0, 2, 2, 8, 2, 2, 12, 2])


def join(parts):
    """Join parts, each a dict of tensors and lists, one after the other."""
    joined = {name: [part[name] for part in parts] for name in parts[0]}
    for name, values in joined.items():
        if torch.is_tensor(values[0]):
            joined[name] = torch.cat(values)
        else:
            joined[name] = [value for part in values for value in part]
    return joined


def read_kept(path, kinds):
    """Read a dict from a file. kinds: what it must hold, name -> torch.Tensor, or list for texts,
    all of one length. Raises UserError for anything else."""
    kept = read_saved(path)
    right = kept.keys() == kinds.keys()
    right = right and all(isinstance(kept[name], kind) for name, kind in kinds.items())
    texts = [text for part in kept.values() if isinstance(part, list) for text in part]
    tensors = [part for part in kept.values() if torch.is_tensor(part)]
    right = right and all(is_plain(part) and part.ndim for part in tensors)
    right = right and all(isinstance(text, str) for text in texts)
    if right:
        check_stored(path, tensors)
        right = len({len(part) for part in kept.values()}) == 1
    if not right or not all(part.isfinite().all() for part in tensors):
        raise UserError(f"{path} does not hold {' and '.join(kinds)}; delete it to begin again")
    return kept


@first_alone()  # of many processes one makes it
def kept_in(path, kinds, told, count, make):
    """Read what the file `path` keeps, see `read_kept`; if it is not there it is made in `count`
    parts.

    make(first) yields the parts for `join` from number `first` on. Each is kept in a file, so that
    a run that is stopped meanwhile goes on where it was. told: what is made, "encoding 9 clips".
    """
    if Planning.on:  # which has nothing to keep: one part stands for all
        return next(iter(make(0)))
    if os.path.exists(path):
        return read_kept(path, kinds)
    files = [f"{path}.{number}" for number in range(count)]
    first = next((n for n, name in enumerate(files) if not os.path.exists(name)), count)
    print(f"first, {told}, once for all runs; then comes the training")
    try:
        bar = tqdm(make(first), told, total=count, initial=first, unit="batch")
        for name, part in zip(files[first:], bar, strict=True):
            with written(name) as file:
                torch.save(part, file)
    except KeyboardInterrupt:
        print("stopped before the training; what is done is kept: the same command goes on")
        raise
    kept = join([read_kept(name, kinds) for name in files])
    with written(path) as file:
        torch.save(kept, file)
    for name in files:
        with contextlib.suppress(FileNotFoundError):  # another run has
            os.remove(name)
    return kept


@torch.no_grad()
def encode_clips(vae, clips, batch=16):
    """Encode clips, a `data.Batch` that renders itself: latents [N, T, C, h, w] in bf16.
    They are kept in a file of runs/latents that is named by the VAE and the clips."""
    parts = (next(vae.parameters()), *vars(clips).values())
    key = hashlib.sha256(b"".join(part.detach().cpu().numpy().tobytes() for part in parts))
    name = f"{key.hexdigest()[:8]}-{len(clips)}.pt"

    def make(first):
        for i in range(first * batch, len(clips), batch):
            video = clips[i : i + batch].to(vae.mean.device).render()
            yield {"latents": vae.encode(video).to("cpu", torch.bfloat16)}

    told, count = f"encoding {len(clips):,} clips", -(-len(clips) // batch)
    path = os.path.join("runs", "latents", name)
    latents = kept_in(path, {"latents": torch.Tensor}, told, count, make)["latents"]
    if not Planning.on and (latents.ndim != 5 or len(latents) != len(clips)):
        raise UserError(f"{path} does not hold {len(clips):,} clips; delete it to begin again")
    return latents


def training_clips(count):
    """Draw the clips that teacher and student are trained on, the same ones for both."""
    return sample_clips(count, torch.Generator().manual_seed(0), shares=SHARES)


def draw_pieces(clips, total, count, frames, generator):
    """Draw `count` pieces of `frames` out of the `total` frames of any of `clips` clips; half of
    them begin with the clip. -> clip [count, 1] and frame [count, frames] indices."""
    index = torch.randint(clips, (count,), generator=generator)
    start = torch.randint(total - frames + 1, (count,), generator=generator)
    start = start * torch.randint(2, (count,), generator=generator)
    return index[:, None], torch.arange(frames) + start[:, None]


class LatentClips:
    """Clips of the shapes world, their prompts and their latents."""

    def __init__(self, vae, clips):
        self.clips, self.latents = clips, encode_clips(vae, clips)

    @property
    def frames(self):
        return self.latents.shape[1]

    def batch(self, count, frames, generator, device):
        """Draw random pieces of `frames` latent frames: (x0 [B, T, C, h, w], B prompts)."""
        rows, columns = draw_pieces(len(self.clips), self.frames, count, frames, generator)
        x0 = self.latents[rows, columns].to(device, torch.float32)
        return x0, self.clips[rows[:, 0]].prompts(generator)
