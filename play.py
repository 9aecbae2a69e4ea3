"""Next-Frame Diffusion: a world that runs frame by frame, an action in, a frame out.

python play.py                                                      a page on localhost to play on
python play.py --actions right*20,up*10,none*5 --out play.mp4       plays a script
"""

import launch
import copy
import time

import torch
from tqdm import tqdm

import flags
import weights
from data import SIZE
from media import FrameWriter, check_out, until_interrupted
from nfd_teacher import ActionDiT
from nfd_world import ACTIONS
from sample import chunk_shape, denoise_chunk, remember_chunk
from text import TextEncoder
from vae import VAE
from weights import UserError, load_model, shipped

NAMES = list(ACTIONS)
MOST = 1_000_000  # actions of a script
LOOKS = "a red circle on a black background"


class Player:
    """A world of the action model: `step` takes an action and gives the frame that it leads to.

    Speculative sampling: neighbouring frames often share their action, so the next N frames are
    denoised in parallel under the present one, and shown while the actions that come are what was
    guessed. At the first that differs the rest is dropped; the cache, which takes frames in only
    after they were shown, and the random state are then as if they had never been made. N follows
    how often an action stays. most=1: no speculation. A viewer who is behind the player can also
    take back frames that were stepped to: what a `mark` holds is replaced, never changed in place.
    """

    @torch.no_grad()
    def __init__(self, model, vae, text, generator, steps=None, most=8, size=(SIZE, SIZE)):
        """text: the embedded looks of the world [1, S, text_dim]; size: (H, W)."""
        self.model, self.vae, self.generator, self.most = model, vae, generator, most
        self.keys = model.text_keys(text)
        self.times = model.schedule.timesteps(steps or model.config.steps)
        self.latent = chunk_shape(model, vae, 1, size)[2:]  # (C, h, w)
        self.cache = model.new_cache(1, *self.latent[1:], ahead=most)
        self.action = None  # the last one
        self.holds = 0.0  # how often an action stayed, a running mean
        self.shown = []  # (latent, action) of frames that are not yet in the cache
        self.ahead = []  # (latent, random state after it) of frames that are not yet shown
        self.random, self.decoder_state = generator.get_state(), {}
        self.blocks = self.made = self.stepped = 0

    @property
    def dropped(self):
        """How many of the frames made were in vain."""
        return self.made - self.stepped - len(self.ahead)

    @torch.no_grad()
    def step(self, action, most=None):
        """Make the frame [3, H, W] that an action (an index into ACTIONS) leads to.
        most: of a block that begins here, to have it sooner (None: the player's own)."""
        if action != self.action:
            self._drop()
        self.holds += 0.1 * ((action == self.action) - self.holds)
        self.action = action
        if not self.ahead:
            self._remember()
            self._make(min(self.guesses(), most or self.most))
        (x0, self.random), *self.ahead = self.ahead
        self.shown = [*self.shown, (x0, action)]
        self.stepped += 1
        self.decoder_state = dict(self.decoder_state)
        return self.vae.decode(x0, self.decoder_state)[0, 0]

    def mark(self):
        """Note where the world is now, for `back`."""
        return dict(vars(self))

    def back(self, mark):
        """Return to a mark: the frames made since are dropped as if they had never been made."""
        vars(self).update(mark, made=self.made, blocks=self.blocks)  # these count all work
        self._drop()

    def guesses(self):
        """Choose N, the frames of a block: what keeps the most frames for its cost.

        If the action stays with probability p, (1 - p^N) / (1 - p) of N frames are kept on average;
        with so few tokens in a frame, each adds about an eighth of what a block's passes take.
        """
        p = min(self.holds, 0.999)
        return max(range(1, self.most + 1), key=lambda n: (1 - p**n) / (1 - p) / (1 + n / 8))

    def _make(self, count):
        """Denoise `count` frames in parallel, each after those before it, under one action."""
        drawn, after = [], []
        for _ in range(count):  # what a frame draws does not depend on how many are made
            shape = (len(self.times) - 1, *self.latent)
            drawn.append(torch.randn(shape, generator=self.generator))
            after.append(self.generator.get_state())
        device = self.cache.k.device
        first, *rest = torch.stack(drawn, dim=1)[:, None].to(device)  # of [1, count, C, h, w]
        rest = iter(rest)
        actions = torch.full((1, count), self.action, device=device)
        parts = (self.model, first, self.times, (self.keys, actions), self.cache)
        x0 = denoise_chunk(*parts, noise=lambda shape: next(rest))
        self.ahead = list(zip(x0.split(1, dim=1), after, strict=True))
        self.blocks, self.made = self.blocks + 1, self.made + count

    def _remember(self):
        """Pass the frames shown since the last time through the model, clean, into the cache."""
        if self.shown:
            x0, actions = zip(*self.shown, strict=True)
            actions = torch.tensor([actions], device=x0[0].device)
            self.cache = copy.deepcopy(self.cache)
            remember_chunk(self.model, torch.cat(x0, dim=1), (self.keys, actions), self.cache)
            self.shown = []

    def _drop(self):
        """Forget what was made ahead: the guess was wrong."""
        self.ahead = []
        self.generator.set_state(self.random)


# ---------------------------------------------------------------------------------- command line
def parse_actions(text):
    """Read "right*20,up*10,none" as indices into ACTIONS; UserError for what it cannot read."""
    actions = []
    for part in text.split(","):
        name, held, times = part.strip().partition("*")
        times = times if held else "1"
        fits = times.isdecimal() and len(times) < 8 and 0 < int(times) <= MOST - len(actions)
        if name not in ACTIONS or not fits:
            raise UserError(
                f"--actions cannot read {part.strip()!r}: write {', '.join(NAMES)}, "
                f"each with *TIMES if it is to be held, and commas; at most {MOST:,} in all"
            )
        actions += [NAMES.index(name)] * int(times)
    return actions


@torch.no_grad()
def main():
    description = "Play in a world that a causal diffusion model makes, frame by frame."
    parser = flags.Parser(description)
    add = parser.add_argument
    told = 'such as "right*20,up*10,none*5"; without it a page opens on localhost'
    add("--actions", type=flags.words, help=told)
    told = "FILE.mp4, FILE.gif, or FILE.png for a sheet of frames"
    add("--out", type=flags.words, help=f"{told} (play.mp4)")
    add("--looks", default=LOOKS, type=flags.words, help="what is moved")
    add("--seed", type=flags.SEED, default=0, help="of the noise")
    add("--steps", type=flags.whole(1, 1000), help="denoising steps (the weights' own)")
    told = "frames made ahead at most; 1: no speculative sampling"
    add("--ahead", type=flags.whole(1, 1000), default=8, help=told)
    add("--port", type=flags.whole(0, 65535), default=8000, help="of the page")
    told = "do not open the page in a browser"
    add("--no-browser", dest="browser", action="store_false", help=told)
    told = "weights of the transformer"
    add("--weights", default=shipped("player"), type=flags.source, help=told)
    told = "the page begins with this text model, whose --vae and --text-encoder are then (none)"
    add("--student", type=flags.parts, help=told)
    told = "height and width of the video of --student (64 64; of a public checkpoint 480 832)"
    add("--size", nargs=2, type=flags.whole(16, 4096), metavar=("H", "W"), help=told)
    flags.codec_flags(parser)
    flags.device_flags(parser)
    args = parser.parse_args()
    flags.check_needed(args, out="actions", size="student")
    if args.student and args.actions:
        raise UserError("--student goes with the page, not with --actions")
    flags.check_encoder(args.text_encoder)
    args.out = args.out or "play.mp4"
    actions = args.actions and parse_actions(args.actions)
    if actions:
        check_out(args.out)
    weights.check_role(args.weights, "player", "action teacher")
    own, text_model = (args.vae, args.text_encoder), {}
    if args.student:
        weights.check_role(args.student, "student")
        text_model["files"] = (args.student, *weights.made_with(args.student, *own))
        text_model["size"] = args.size or weights.own_size(args.student)
        own = (None, None)
    vae, encoder = weights.made_with(args.weights, *own, "vae_frame")
    device, dtype = flags.on_device(args.device, args.dtype, args.threads)
    model = load_model(ActionDiT, args.weights, device).to(dtype)
    vae, encoder = load_model(VAE, vae, device).to(dtype), load_model(TextEncoder, encoder, device)
    weights.check_fit(model, vae, encoder)
    flags.say_what_is_unknown([args.looks], encoder.config.words)

    def player(looks, seed):
        generator = torch.Generator().manual_seed(seed)
        return Player(model, vae, encoder([looks]), generator, args.steps, args.ahead)

    if actions is None:
        import page

        given = (args.port, args.looks, args.seed, args.browser)
        page.serve(player, device, dtype, *given, **text_model)
        return
    world, started = player(args.looks, args.seed), time.perf_counter()
    with FrameWriter(args.out, len(actions)) as writer:
        script = until_interrupted(actions)
        for action in tqdm(script, total=len(actions), unit="frame", desc="playing"):
            writer.write(world.step(action)[None].float().cpu())
    rate = writer.count / (time.perf_counter() - started)
    print(
        f"wrote {args.out}: {writer.count} frames, {rate:.1f} frames/s; "
        f"{world.made} made in {world.blocks} blocks, {world.dropped} dropped"
    )


if __name__ == "__main__":
    launch.run_main(main)
