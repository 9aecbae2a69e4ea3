"""Training clips as latents, encoded once and kept in a file."""

import hashlib
import os
from dataclasses import replace

import torch
from tqdm import tqdm

from nfd_world import Walks

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
