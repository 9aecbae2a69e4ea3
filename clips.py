"""A folder of one's own clips: their captions, and pieces of them, decoded once and kept in files.

A clip is cut into pieces of so many frames at 16 a second, one after the other; what is left at its
end is dropped. Pieces are kept as pixels, for the VAE, or as latents, for the transformer, in
safetensors shards of runs/clips. A shard is opened when one of its pieces is drawn.
"""

import contextlib
import csv
import functools
import glob
import hashlib
import itertools
import os

import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data import FPS
from distributed import first_alone
from media import decode, to_uint8
from weights import UserError, opened, reason, written

SHARD = 2**26  # bytes: a shard that has reached it is written


# ---------------------------------------------------------------------------- what a folder holds
def find_clips(folder):
    """Find the clips in a folder and the folders in it: {name: caption}, "" without one.

    A caption stands in NAME.txt beside its clip, or in captions.csv. Every other file counts as a
    clip: what cannot be decoded is skipped later. Raises UserError for captions without a clip.
    """
    names = glob.glob("**", root_dir=folder, recursive=True)
    names = sorted(name for name in names if os.path.isfile(os.path.join(folder, name)))
    clips = {name: "" for name in names if not name.lower().endswith((".txt", ".csv"))}
    if not clips:
        raise UserError(f"there is no clip in {folder}: put videos into it")
    if "captions.csv" in names:
        clips |= read_table(folder, clips)
    by_stem = {}
    for name in clips:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    for text in (name for name in names if name.lower().endswith(".txt")):
        path, stem = os.path.join(folder, text), os.path.splitext(text)[0]
        if stem not in by_stem:
            raise UserError(f"{path} captions no clip: there is no {stem}.mp4 or the like")
        for name in by_stem[stem]:
            if clips[name]:
                raise UserError(f"{name} has a caption in captions.csv and in {path}: keep one")
            clips[name] = plain(read_text(path))
    return clips


def read_text(path):
    """Read a text file. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: save it as UTF-8") from None


def plain(text):
    """Write a caption in one line."""
    return " ".join(text.split())


def read_table(folder, clips):
    """Read captions.csv, with the columns file and caption: {name: caption}. Raises UserError."""
    path, captions = os.path.join(folder, "captions.csv"), {}
    table = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    try:
        if not {"file", "caption"} <= set(table.fieldnames or ()):
            raise UserError(f'{path} must begin with a header, the line "file,caption"')
        for row in table:
            name = os.path.normpath(row["file"] or "")
            if name not in clips:
                told = f"there is no clip {row['file']!r} in {folder}"
                raise UserError(f"{path}, line {table.line_num}: {told}")
            if name in captions:
                raise UserError(f"{path}, line {table.line_num}: {name} is there twice")
            captions[name] = plain(row["caption"] or "")
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}; is a quotation mark missing?") from None
    return captions


# ------------------------------------------------------------------------- from files to pieces
class Decoder(IterableDataset):
    """Decode clips in the workers of a DataLoader, each clip in one of them, as a stream.

    Yields (number of the clip, a piece [frames, H, W, 3] of bytes, ""), and at the end of each clip
    (number, None, why it has no piece).
    """

    def __init__(self, paths, size, frames):
        self.paths, self.size, self.frames = paths, size, frames

    def __iter__(self):
        worker = get_worker_info()
        for number in range(worker.id, len(self.paths), worker.num_workers):
            source, found = map(to_uint8, decode(self.paths[number], self.size)), False
            while len(piece := list(itertools.islice(source, self.frames))) == self.frames:
                found = True
                yield number, torch.stack(piece).numpy(), ""
            why = f"too short, {len(piece)} of {self.frames} frames" if piece else "cannot be read"
            yield number, None, "" if found else why


@functools.cache
def say_once(told):
    """Print a line, which is not printed again."""
    print(told)


@contextlib.contextmanager
def before_training(told):
    """Say what is made before a training begins, and at Ctrl-C that it is kept."""
    print(f"first, {told}, once for all runs; then comes the training")
    try:
        yield
    except KeyboardInterrupt:
        print("stopped before the training; what is done is kept: the same command goes on")
        raise


def read_shards(prefix):
    """Find the shards of a clip: ([(path, pieces in it)], why there is no piece), or None if they
    are not all there and whole."""
    found = []
    for number in itertools.count():
        path = f"{prefix}-{number}.safetensors"
        try:
            with opened(path) as file:
                found.append((path, file.get_slice("pieces").get_shape()[0]))
                told = file.metadata() or {}
        except UserError:
            return None
        if "end" in told:
            return found, told["end"]


def cores():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_shards(paths, prefixes, size, frames, encode, told):
    """Decode clips and write what encode(piece [frames, H, W, 3]) makes of them into shards."""
    workers = min(len(paths), cores(), 8)
    # the loader draws a seed, which must not come from what the training draws from
    how = {"num_workers": workers, "batch_size": None, "generator": torch.Generator()}
    loader = DataLoader(Decoder(paths, size, frames), collate_fn=tuple, **how)
    made, count = {}, {}
    with tqdm(total=len(paths), desc=told, unit="clip") as bar:
        for clip, piece, why in loader:
            pieces = made.setdefault(clip, [])
            if piece is not None:
                pieces.append(encode(torch.from_numpy(piece)))
            if piece is None or sum(part.nbytes for part in pieces) >= SHARD:
                number = count.get(clip, 0)
                tensor = torch.stack(pieces).contiguous() if pieces else torch.zeros(0)
                end = {"end": why} if piece is None else {}
                with written(f"{prefixes[clip]}-{number}.safetensors") as file:
                    file.write(save({"pieces": tensor}, end))
                count[clip] = number + 1
                del made[clip]
            bar.update(piece is None)


@first_alone()  # of many processes one makes them
def kept_pieces(folder, names, size, frames, encode, key):
    """Make what is missing of the pieces of a folder's clips: `Pieces`. Names the clips that are
    skipped. key: what `encode` depends on. Raises UserError if no clip is left."""
    kind = hashlib.sha256(repr((tuple(size), frames, FPS, key)).encode()).hexdigest()[:8]
    paths = [os.path.join(folder, name) for name in names]
    prefixes = [os.path.join("runs", "clips", kind, clip_hash(folder, name)) for name in names]
    found = [read_shards(prefix) for prefix in prefixes]
    missing = [number for number, shards in enumerate(found) if shards is None]
    if missing:
        told = f"decoding {len(missing):,} clips"
        with before_training(told):
            some = ([own[number] for number in missing] for own in (paths, prefixes))
            make_shards(*some, size, frames, encode, told)
    found = [shards or read_shards(prefixes[n]) for n, shards in enumerate(found)]
    skipped = [f"{name} ({why})" for name, (_, why) in zip(names, found, strict=True) if why]
    if len(skipped) == len(names):
        raise UserError(f"no clip in {folder} can be used: {skipped[0]}")
    if skipped:
        say_once(f"{len(skipped)} of {len(names)} clips are skipped: {', '.join(skipped)}")
    places = [
        (clip, path, row)
        for clip, (shards, _) in enumerate(found)
        for path, count in shards
        for row in range(count)
    ]
    return Pieces(places)


def clip_hash(folder, name):
    """Name a clip by its name, size and time of change: 16 hexadecimal digits."""
    told = os.stat(os.path.join(folder, name))
    key = repr((name, told.st_size, told.st_mtime_ns))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


class PlannedPieces:
    """Stand in for pieces in a dry run, which has nothing to keep: frames of a shape."""

    places = ((0, "", 0),)

    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return 1

    def read(self, index, start, frames):
        return torch.zeros(len(index), frames, *self.shape)


class Pieces:
    """Pieces of clips in shards: places, the number of the clip, the shard and the row of each."""

    def __init__(self, places):
        self.places = places

    def __len__(self):
        return len(self.places)

    def read(self, index, start, frames):
        """Read `frames` frames of each piece of index [count] from start [count] on."""
        parts = []
        for number, first in zip(index.tolist(), start.tolist(), strict=True):
            _, path, row = self.places[number]
            with opened(path) as file:
                parts.append(file.get_slice("pieces")[row, first : first + frames])
        return torch.stack(parts)
