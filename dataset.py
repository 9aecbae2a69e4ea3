"""Training clips as latents, encoded once and kept in a file."""

import hashlib
import os

import torch
from tqdm import tqdm

# how often a motion is drawn, in the order of data.MOTIONS: a bounce and a spin take far longer to
# learn than standing still
SHARES = torch.tensor([1.0, 2, 2, 8, 2, 2, 12, 2])


def kept_in(path, make):
    """Read what the file `path` holds; make() makes it if it is not there."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(make(), path + ".tmp")
        os.replace(path + ".tmp", path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def encode_clips(vae, clips, batch=16):
    """Encode clips, a `data.Batch` that renders itself: latents [N, T, C, h, w] in bf16.
    They are kept in a file of runs/latents that is named by the VAE and the clips."""
    parts = (vae.encoder[1].weight, *vars(clips).values())
    key = hashlib.sha256(b"".join(part.detach().cpu().numpy().tobytes() for part in parts))

    def make():
        latents = []
        for i in tqdm(range(0, len(clips), batch), desc="encoding clips", unit="batch"):
            video = clips[i : i + batch].to(vae.mean.device).render()
            latents.append(vae.encode(video).to("cpu", torch.bfloat16))
        return {"latents": torch.cat(latents)}

    name = f"{key.hexdigest()[:8]}-{len(clips)}.pt"
    return kept_in(os.path.join("runs", "latents", name), make)["latents"]


def draw_pieces(weights, total, count, frames, generator):
    """Draw `count` pieces of `frames` out of `total` frames, half of which begin with the clip.

    weights [N]: how often each clip is drawn. -> clip [count, 1] and frame [count, frames] indices.
    """
    index = torch.multinomial(weights, count, True, generator=generator)
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
        weights = SHARES[self.clips.motion]
        rows, columns = draw_pieces(weights, self.frames, count, frames, generator)
        x0 = self.latents[rows, columns].to(device, torch.float32)
        return x0, self.clips[rows[:, 0]].prompts(generator)
