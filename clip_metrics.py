"""Measures that need no truth, for one's own clips: how well a many-step model denoises those held
out of training at each time t, and how far a long stream drifts from the looks of its beginning.
"""

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data import FPS
from diffusion import flow_matching_loss

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SPAN = 10 * FPS  # frames at the beginning and at the end of a stream that are compared


@torch.no_grad()
def loss_by_time(model, encoder, data, count, seed=0, batch=4, **attention):
    """The flow-matching loss on `count` whole pieces of data, a `dataset.OwnLatents`, at each of
    TIMES: {"t = 0.1": mean}. Every model meets the same pieces and the same noise."""
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    dtype, totals = next(model.parameters()).dtype, dict.fromkeys(TIMES, 0.0)
    batches = [min(batch, count - start) for start in range(0, count, batch)]
    for size in tqdm(batches, desc="denoising", unit="batch"):
        x0, prompts = data.batch(size, data.frames, generator, device)
        text = encoder(prompts)
        for t in TIMES:
            times = torch.full(x0.shape[:2], t, device=device)
            loss = flow_matching_loss(model, x0.to(dtype), times, text, generator, **attention)
            totals[t] += loss.item() * size
    return {f"t = {t}": total / count for t, total in totals.items()}


def looks(video):
    """What frames of video [B, F, 3, H, W] look like, in levels of 0 to 255: name -> [B, F].

    sharpness: mean difference of neighbouring pixels' brightness; contrast: its standard deviation;
    colour: mean difference of a pixel's largest and smallest channel; red, green, blue: the means.
    """
    pixels = (video.float().clamp(-1, 1) + 1) * 127.5
    gray = pixels.mean(2)  # [B, F, H, W]
    across, down = gray.diff(dim=-1).abs(), gray.diff(dim=-2).abs()
    return {
        "sharpness": (across.mean((-1, -2)) + down.mean((-1, -2))) / 2,
        "contrast": gray.std((-1, -2)),
        "colour": (pixels.amax(2) - pixels.amin(2)).mean((-1, -2)),
        **{name: pixels[:, :, n].mean((-1, -2)) for n, name in enumerate(("red", "green", "blue"))},
    }


def drift(chunks, frames, name="stream"):
    """Measure a stream of chunks (latents, video), `frames` frames long, in constant memory: the
    `looks` of its first and last ten seconds, and how far the colours moved: means over its videos.

    change: mean distance of the ends' means of red, green and blue.
    """
    found, done = [], 0
    with tqdm(total=frames, desc=name, unit="frame") as bar:
        for _, video in chunks:
            found.append({key: value.cpu() for key, value in looks(video).items()})
            bar.update(min(video.shape[1], frames - done))
            done += video.shape[1]
            if done >= frames:
                break
    joined = {key: torch.cat([part[key] for part in found], dim=1)[:, :frames] for key in found[0]}
    ends = {"first 10 s": slice(0, SPAN), "last 10 s": slice(-SPAN, None)}
    means = {
        end: {key: value[:, span].mean(1) for key, value in joined.items()}
        for end, span in ends.items()
    }
    first, last = (
        torch.stack([means[end][channel] for channel in ("red", "green", "blue")]) for end in ends
    )
    rows = {
        end: {key: mean[key].mean().item() for key in ("sharpness", "contrast", "colour")}
        for end, mean in means.items()
    }
    rows["last 10 s"]["change"] = F.l1_loss(first, last).item()
    return rows
