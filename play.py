"""Next-Frame Diffusion: a world that runs frame by frame, an action in, a frame out, with speculative sampling.

python play.py                                                        a page on localhost to play on
python play.py --actions right*20,up*10,none*5 --out play.mp4         plays a script
"""

import argparse
import itertools
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from tqdm import tqdm

from data import ACTIONS, FPS, SIZE, to_uint8
from files import FrameWriter
from model import DiT
from sample import check_out, denoise_chunk, remember_chunk, stream
from text import TextEncoder
from vae import VAE
from weights import ROOT, UserError, choose_device, choose_dtype, load_model, run_main, shipped

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


# -------------------------------------------------------------------------------------------------------------- the page
class Show:
    """What every open tab sees: one world or one stream of the text model. It runs in its own thread, and only while somebody watches."""

    def __init__(self, player, streamed, fps=FPS):
        """player(looks) -> Player; streamed(prompt) -> iterator of frames [3, H, W], where prompt() is the prompt of the moment."""
        self.player, self.streamed, self.fps = player, streamed, fps
        self.mode, self.action, self.looks, self.prompt = "play", "none", LOOKS, PROMPT
        self.image, self.number, self.viewers, self.cost, self.kept, self.fresh = (
            b"",
            0,
            0,
            0.1,
            100.0,
            False,
        )
        self.changed = threading.Condition()

    def frames(self):
        """Frame after frame of whatever the visitors want to see now."""
        while True:
            self.fresh = False
            if self.mode == "play":
                player = self.player(self.looks)
                while self.mode == "play" and not self.fresh:
                    yield player.step(NAMES.index(self.action))
                    self.kept = 100 * (1 - player.dropped / player.made)
            else:
                yield from itertools.takewhile(
                    lambda _: self.mode == "text", self.streamed(lambda: self.prompt)
                )

    def run(self):
        """Make frames for ever, at most `fps` a second; `cost` is the seconds that one takes, a running mean."""
        import imageio.v3 as iio

        frames, due = self.frames(), 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.viewers)
            started = time.perf_counter()
            frame = to_uint8(next(frames))
            image = iio.imwrite(
                "<bytes>",
                frame.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy(),
                extension=".jpg",
                quality=95,
            )
            self.cost += 0.05 * (time.perf_counter() - started - self.cost)
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - 1 / self.fps) + 1 / self.fps
            with self.changed:
                self.image, self.number = image, self.number + 1
                self.changed.notify_all()

    def steer(self, wish):
        """Do what a visitor wants, {"action": name}, {"looks": text} or {"prompt": text}. Raises ValueError for anything else."""
        kind, value = (
            next(iter(wish.items())) if isinstance(wish, dict) and len(wish) == 1 else (None, None)
        )
        if kind == "action" and value in NAMES:
            self.action = value
        elif (
            kind in ("looks", "prompt") and isinstance(value, str) and 0 < len(value.strip()) <= 200
        ):
            setattr(self, kind, value)
            self.mode, self.fresh = {"looks": "play", "prompt": "text"}[kind], kind == "looks"
        else:
            raise ValueError(
                f"one of action ({', '.join(NAMES)}), looks and prompt, as a JSON object"
            )

    def state(self):
        return {
            "mode": self.mode,
            "action": self.action,
            "looks": self.looks,
            "prompt": self.prompt,
            "frame": self.number,
            "frames/s": round(1 / self.cost, 1),
            "guesses kept, %": round(self.kept, 1),
        }


def handler(show):
    """The request handler of a Show: the page, its frames as one endless multipart image, its state, and wishes."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def answer(self, status, kind, body):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def local(self):
            """Whether the page was asked for by this machine's name: another site's page must not steer ours."""
            if self.headers.get("Host", "").rsplit(":", 1)[0] in ("127.0.0.1", "localhost"):
                return True
            self.answer(403, "text/plain", b"ask for 127.0.0.1")

        def do_GET(self):
            if not self.local():
                return
            if self.path == "/":
                with open(os.path.join(ROOT, "play.html"), "rb") as file:
                    self.answer(200, "text/html; charset=utf-8", file.read())
            elif self.path == "/state":
                self.answer(200, "application/json", json.dumps(show.state()).encode())
            elif self.path == "/frames":
                self.frames()
            else:
                self.answer(404, "text/plain", b"there is only / here")

        def frames(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with show.changed:
                show.viewers += 1
                show.changed.notify_all()
            try:
                seen = 0
                while True:
                    with show.changed:
                        show.changed.wait_for(lambda: show.number > seen)
                        image, seen = show.image, show.number
                    self.wfile.write(
                        b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
                        % (len(image), image)
                    )
            except OSError:  # the tab was closed
                pass
            finally:
                with show.changed:
                    show.viewers -= 1

        def do_POST(self):
            if not self.local():
                return
            try:
                length = int(self.headers.get("Content-Length", ""))
                if self.path != "/steer" or not 0 < length < 2000:
                    raise ValueError("POST a wish of less than 2000 bytes to /steer")
                show.steer(json.loads(self.rfile.read(length)))
                self.answer(200, "application/json", b"{}")
            except ValueError as error:  # not a number, not JSON, not UTF-8, not a wish
                self.answer(400, "text/plain; charset=utf-8", str(error).encode())

        def log_message(self, *_):
            pass

    return Handler


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
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
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
        serve(player, device, dtype, args.port)
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


def serve(player, device, dtype, port):
    """Open the page on localhost, and run until Ctrl-C."""
    student, vae, encoder = (
        load_model(DiT, shipped("student"), device).to(dtype),
        load_model(VAE, shipped("vae"), device).to(dtype),
        load_model(TextEncoder, shipped("text_encoder"), device),
    )

    def streamed(prompt):
        known = {}

        def text(frames):
            now = prompt()
            if now not in known:
                known[now] = encoder([now])
            return known[now]

        for _, video in stream(student, vae, text, torch.Generator().manual_seed(0)):
            yield from video[0]

    show = Show(player, streamed)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(show))
    except OSError as error:
        raise UserError(
            f"cannot open port {port}: {error.strerror}; choose another with --port"
        ) from None
    server.daemon_threads = True
    threading.Thread(target=show.run, daemon=True).start()
    print(f"play at http://127.0.0.1:{server.server_address[1]}  (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_main(main)
