"""Next-Frame Diffusion: a world that runs frame by frame, an action in, a frame out, with speculative sampling.

python play.py                                                        a page on localhost to play on
python play.py --actions right*20,up*10,none*5 --out play.mp4         plays a script
"""

import argparse
import time

import torch
from tqdm import tqdm

from data import SIZE
from media import FrameWriter
from model import DiT
from nfd_world import ACTIONS
from sample import check_out, denoise_chunk, remember_chunk
from text import TextEncoder
from vae import VAE
from weights import (
    UserError,
    choose_device,
    choose_dtype,
    device_flags,
    load_model,
    run_main,
    shipped,
)

NAMES = list(ACTIONS)
LOOKS, PROMPT = "a red circle on a black background", "a red circle bouncing on a black background"


class Player:
    """A world of the action model: `step` takes an action and gives the frame that it leads to.

    Speculative sampling: neighbouring frames often share their action, so the next N frames are denoised in parallel under the present one.
    They are shown while the actions that come are what was guessed. At the first that differs the rest is dropped; the cache,
    which takes frames in only after they were shown, and the random state are then as if they had never been made. N follows how often
    an action stays. most=1: no speculation.
    """

    @torch.no_grad()
    def __init__(self, model, vae, text, generator, steps=4, most=8, size=(SIZE, SIZE)):
        """text: the embedded looks of the world [1, S, text_dim]; size: (H, W)."""
        h, w = (side // 8 for side in size)
        self.model, self.vae, self.generator, self.most = model, vae, generator, most
        self.keys, self.times = model.text_keys(text), model.schedule.timesteps(steps)
        self.cache, self.shape = (
            model.new_cache(1, h, w, ahead=most),
            (steps, model.config.in_dim, h, w),
        )
        self.action, self.holds = None, 0.0  # the last action; how often one stayed, a running mean
        self.shown, self.ahead = (
            [],
            [],
        )  # latents [1, 1, C, h, w]: shown but not yet in the cache; made but not yet shown
        self.random, self.decoder_state = generator.get_state(), {}
        self.blocks = self.made = self.dropped = 0

    @torch.no_grad()
    def step(self, action):
        """The frame [3, H, W] that action (an index into ACTIONS) leads to."""
        if action != self.action:
            self._drop()
        self.holds += 0.1 * ((action == self.action) - self.holds)
        self.action = action
        if not self.ahead:
            self._remember()
            self._make(self.guesses())
        x0, self.random = self.ahead.pop(0)
        self.shown.append((x0, action))
        return self.vae.decode(x0, self.decoder_state)[0, 0]

    def guesses(self):
        """N: what keeps the most frames for its cost. If the action stays with probability p, (1 - p^N) / (1 - p) of N frames are kept on
        average; with so few tokens in a frame, each adds about an eighth of what the block's passes take anyhow."""
        p = min(self.holds, 0.999)
        return max(range(1, self.most + 1), key=lambda n: (1 - p**n) / (1 - p) / (1 + n / 8))

    def _make(self, count):
        """Denoise `count` frames in parallel, each seeing those before it, all under the present action."""
        noise, after = [], []
        for _ in range(
            count
        ):  # frame by frame: what a frame draws does not depend on how many are made
            noise.append(torch.randn(self.shape, generator=self.generator))
            after.append(self.generator.get_state())
        first, *rest = torch.stack(noise, dim=1)[:, None].to(
            self.cache.k.device
        )  # [steps, 1, count, C, h, w]
        rest = iter(rest)
        actions = torch.full((1, count), self.action, device=first.device)
        x0 = denoise_chunk(
            self.model,
            first,
            self.times,
            self.keys,
            self.cache,
            lambda shape: next(rest),
            actions=actions,
        )
        self.ahead = list(zip(x0.split(1, dim=1), after))
        self.blocks, self.made = self.blocks + 1, self.made + count

    def _remember(self):
        """The frames shown since the last time pass once more, clean, into the cache."""
        if self.shown:
            x0, actions = zip(*self.shown)
            remember_chunk(
                self.model,
                torch.cat(x0, dim=1),
                self.keys,
                self.cache,
                torch.tensor([actions], device=x0[0].device),
            )
            self.shown = []

    def _drop(self):
        """A guess was wrong: what was made ahead has never been."""
        self.dropped += len(self.ahead)
        self.ahead = []
        self.generator.set_state(self.random)


# ---------------------------------------------------------------------------------------------------------- command line
def parse_actions(text):
    """ "right*20,up*10,none" -> indices into ACTIONS. Raises UserError for what it cannot read."""
    actions = []
    for part in text.split(","):
        name, _, times = part.strip().partition("*")
        if (
            name not in ACTIONS
            or not (times or "1").isdecimal()
            or not 0 < int(times or 1) <= 1_000_000
        ):
            raise UserError(
                f"--actions cannot read {part.strip()!r}: write {', '.join(NAMES)}, each with *TIMES if it is to be held, and commas"
            )
        actions += [NAMES.index(name)] * int(times or 1)
    return actions


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description="Play in a world that a causal diffusion model makes, frame by frame."
    )
    add = parser.add_argument
    add(
        "--actions",
        help='a script such as "right*20,up*10,none*5"; without it a page opens on localhost',
    )
    add("--out", default="play.mp4", help="FILE.mp4, FILE.gif, or FILE.png for a sheet of frames")
    add("--looks", default=LOOKS, help=f'what is moved, such as "{LOOKS}"')
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=4, help="denoising steps")
    add(
        "--ahead", type=int, default=8, help="frames made ahead at most; 1: no speculative sampling"
    )
    add("--port", type=int, default=8000, help="of the page")
    add("--weights", default=shipped("player"))
    add("--vae", default=shipped("vae_frame"))
    add("--text-encoder", default=shipped("text_encoder"))
    device_flags(parser)
    args = parser.parse_args()
    if not args.looks.strip():
        raise UserError(f'--looks is empty; try "{LOOKS}"')
    if min(args.steps, args.ahead) < 1:
        raise UserError("--steps and --ahead must be at least 1")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port must lie between 0 and 65535, not {args.port}")
    actions = args.actions and parse_actions(args.actions)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, vae, encoder = (
        load_model(DiT, args.weights, device).to(dtype),
        load_model(VAE, args.vae, device).to(dtype),
        load_model(TextEncoder, args.text_encoder, device),
    )
    if (
        model.config.num_actions != len(ACTIONS)
        or model.config.in_dim != vae.config.latent_dim
        or vae.config.time_stride != 1
    ):
        raise UserError(
            f"{args.weights} and {args.vae} are not an action model and the frame-wise VAE that goes with it"
        )
    player = lambda looks: Player(
        model,
        vae,
        encoder([looks]),
        torch.Generator().manual_seed(args.seed),
        args.steps,
        args.ahead,
    )
    if actions is None:
        import page

        page.serve(player, device, dtype, args.port)
        return
    check_out(args.out)
    world, started = player(args.looks), time.perf_counter()
    with FrameWriter(args.out, len(actions)) as writer:
        for action in tqdm(actions, unit="frame", desc="playing"):
            writer.write(world.step(action)[None].float().cpu())
    spent = time.perf_counter() - started
    print(
        f"wrote {args.out}: {len(actions)} frames, {len(actions) / spent:.1f} frames/s; {world.made} made in {world.blocks} blocks, {world.dropped} dropped"
    )


if __name__ == "__main__":
    run_main(main)
