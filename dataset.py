"""What the training scripts train on: the shapes world, or a folder of one's own clips.

Both give pixels to the VAE, and to the transformers latents, encoded once and kept, with prompts.
"""

import contextlib
import hashlib
import os
import shlex

import torch
from tqdm import tqdm

import flags
from clips import PlannedPieces, before_training, find_clips, kept_pieces, say_once
from data import FRAMES, PROMPT, SIZE, sample_clips
from distributed import first_alone
from memory import Planning
from text import TextConfig, split
from training import read_saved
from untrusted import check_stored
from weights import UserError, is_plain, is_public, own_clips, written

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
    with before_training(told):
        bar = tqdm(make(first), told, total=count, initial=first, unit="batch")
        for name, part in zip(files[first:], bar, strict=True):
            with written(name) as file:
                torch.save(part, file)
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


# ------------------------------------------------------------------------------- the shapes world
class Shapes:
    """The shapes world as the training scripts see it; `OwnClips` has the same face."""

    own, size, frames, words = False, (SIZE, SIZE), FRAMES, TextConfig.words
    flags, origin, key = [], {}, ""
    sampled = f'sample.py --prompt "{PROMPT}" --weights'

    def __init__(self, count=3072):
        self.count = count

    def prepare(self, vae, patch):
        """Do nothing: its size fits every VAE, and pixels are drawn when they are needed."""

    def video(self, count, frames, generator, device="cpu"):
        """Draw pieces of pixels for the VAE: [count, frames, 3, H, W] in [-1, 1]."""
        start = torch.randint(FRAMES - frames, (), generator=generator).item()
        return sample_clips(count, generator).to(device).render(start, frames)

    def watched(self, count, seed, device="cpu"):
        """Draw the whole clips that a VAE is watched with: [count, F, 3, H, W]."""
        clips = sample_clips(count, torch.Generator().manual_seed(seed), "held-out")
        return clips.to(device).render()

    def latents(self, vae, patch):
        """Encode the clips: `LatentClips`."""
        return LatentClips(vae, training_clips(self.count))

    def prompter(self, vae, patch):
        """Make the function (count, generator) -> prompts."""

        def prompts(count, generator):
            return sample_clips(count, generator).prompts(generator)

        return prompts


# ----------------------------------------------------------------------------- one's own clips
def training_world(args, path=None):
    """Make what the flags of `flags.data_flags` name: `Shapes`, or `OwnClips`, whose size and
    frames are by default those of the weights `path` that are trained on. Raises UserError."""
    flags.check_needed(args, size="data", frames="data")
    if not args.data:
        if path and own_clips(path):
            raise UserError(f"{path} was trained on clips of one's own: name them with --data")
        return Shapes(args.clips or 3072)
    if args.clips:
        raise UserError("--clips goes with the shapes world: of --data all clips are used")
    return own_world(args.data, path, args.size, args.frames)


def own_world(folder, path, size=None, frames=None):
    """Make `OwnClips` of a folder, of the size and frames given or those of the weights `path`."""
    trained = own_clips(path) if path else {}
    if path and not trained and not is_public(path):
        told = "was not trained on clips of one's own: train it with --data, and name it"
        raise UserError(f"{path} {told}")
    size, frames = size or trained.get("size"), frames or trained.get("frames")
    return OwnClips(folder, tuple(size or (SIZE, SIZE)), frames or FRAMES)


def next_command(world, script, *given):
    """Say how the stage after this one is started on the same world, but for a path at the end."""
    return shlex.join([script, *world.flags, *given])


def spread(clips, count):
    """Spread `count` indices evenly over 0 .. clips - 1."""
    return torch.linspace(0, clips - 1, count).round().long()


class OwnClips:
    """Clips of a folder, cut into pieces of `frames` frames of size (H, W), and their captions.
    A clip without a caption has the empty prompt, which is the unconditional one."""

    own = True

    def __init__(self, folder, size, frames):
        self.folder, self.size, self.frames = folder, size, frames
        self.names, self.captions = zip(*find_clips(folder).items(), strict=True)
        self.flags, known = ["--data", folder], [split(caption) for caption in self.captions]
        told = repr((sorted(zip(self.names, self.captions, strict=True)), size, frames))
        self.key = f"-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        example = next((c for c in self.captions if split(c)), PROMPT)
        self.sampled = shlex.join(["sample.py", "--prompt", example, "--weights"])
        self.words = max([TextConfig.words, *(min(len(words), 64) for words in known)])
        self.origin = {"size": f"{size[0]} {size[1]}", "frames": frames}
        self.origin["words"] = " ".join(sorted({word for words in known for word in words}))

    def check(self, vae, patch):
        """Raise UserError for a size or a length that strides or patches do not divide."""
        flags.check_size(self.size, vae.space_stride, patch)
        flags.check_frames(self.frames, vae.config.time_stride)

    def kept(self, encode, key, shape):
        """Keep what encode(piece) makes of the pieces, frames of a shape: see `kept_pieces`."""
        if Planning.on:
            return PlannedPieces(shape)
        return kept_pieces(self.folder, self.names, self.size, self.frames, encode, key)

    def prepare(self, vae, patch):
        """Keep the pixels of the clips, which `video` draws from. Raises UserError as `check`."""
        self.check(vae, patch)
        self.pixels = self.kept(torch.clone, "pixels", (*self.size, 3))

    def some_captions(self, count):
        """Choose the captions that training is watched with, from all over the folder."""
        return [self.captions[n] for n in spread(len(self.captions), count).tolist()]

    def read(self, index, start, frames, device):
        """Read pixels from the pieces of index [count]: [count, frames, 3, H, W] in [-1, 1]."""
        pixels = self.pixels.read(index, start, frames).to(device)
        return pixels.movedim(-1, -3).float() / 127.5 - 1

    def video(self, count, frames, generator, device="cpu"):
        rows, columns = draw_pieces(len(self.pixels), self.frames, count, frames, generator)
        return self.read(rows[:, 0], columns[:, 0], frames, device)

    def watched(self, count, seed, device="cpu"):
        return torch.stack(list(self.each(count, device)))

    def each(self, count, device):
        """Go through `count` pieces from all over the folder, or all: [F, 3, H, W] each."""
        for number in spread(len(self.pixels), min(count, len(self.pixels))).tolist():
            yield self.read(torch.tensor([number]), torch.tensor([0]), self.frames, device)[0]

    def latents(self, vae, patch):
        """Encode the pieces: `OwnLatents`. Raises UserError if no clip has a caption."""
        self.check(vae, patch)
        without = [n for n, c in zip(self.names, self.captions, strict=True) if not split(c)]
        if len(without) == len(self.names):
            told = "put NAME.txt beside NAME.mp4, or captions.csv into it"
            raise UserError(f"no clip in {self.folder} has a caption: {told}")
        if without:
            counted = f"{len(without)} of {len(self.names)} clips have no caption"
            say_once(f"{counted} and are trained with the empty prompt: {', '.join(without)}")
        return OwnLatents(vae, self)

    def prompter(self, vae, patch):
        """Make the function (count, generator) -> captions of random pieces."""
        return self.latents(vae, patch).prompts


class OwnLatents:
    """Pieces of one's own clips as latents, in files, and the captions of their clips."""

    def __init__(self, vae, clips):
        mean, self.captions = vae.mean, clips.captions

        @torch.no_grad()
        def encode(piece):
            video = piece.to(mean.device).movedim(-1, -3)[None] / 127.5 - 1
            return vae.encode(video)[0].to("cpu", torch.bfloat16)

        self.frames, *shape = vae.latent_shape(clips.frames, *clips.size)
        self.pieces = clips.kept(encode, network_hash(vae), shape)

    def batch(self, count, frames, generator, device):
        """Draw random pieces of `frames` latent frames: (x0 [B, T, C, h, w], B captions)."""
        rows, columns = draw_pieces(len(self.pieces), self.frames, count, frames, generator)
        x0 = self.pieces.read(rows[:, 0], columns[:, 0], frames)
        return x0.to(device, torch.float32), self.captions_of(rows[:, 0])

    def prompts(self, count, generator):
        return self.captions_of(torch.randint(len(self.pieces), (count,), generator=generator))

    def captions_of(self, index):
        return [self.captions[self.pieces.places[number][0]] for number in index.tolist()]


def network_hash(network):
    """Hash the values of a network: 8 hexadecimal digits."""
    key = hashlib.sha256()
    for value in network.state_dict().values():
        key.update(value.detach().float().cpu().numpy().tobytes())
    return key.hexdigest()[:8]
