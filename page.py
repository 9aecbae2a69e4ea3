"""A page to play on (Next-Frame Diffusion) and to steer the text model: a server on localhost."""

import contextlib
import functools
import json
import os
import re
import threading
import time
import traceback
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import imageio.v3 as iio
import torch

from data import BACKGROUNDS, COLOURS, FPS, MOTIONS, SHAPES, SIZE
from diffusion import noise_source
from flags import check_size
from media import to_uint8
from model import DiT
from play import LOOKS, NAMES
from sample import PROMPT, chunk_shape, denoise_chunk, from_noise, stream
from text import TextEncoder, split
from vae import VAE
from weights import ROOT, UserError, check_fit, load_model, shipped

AHEAD = 12  # frames that wait to be shown, at most: a chunk of the text model
WAIT = 2  # seconds for the body of a request, which comes with its headers
KNOWN = {"colours": COLOURS, "shapes": SHAPES, "backgrounds": BACKGROUNDS, "motions": MOTIONS}


class Changed(Exception):
    """The frames in the making are no longer wanted."""


@dataclass
class Show:
    """The frames that every open tab sees: one thread makes them, and a few wait until another
    shows them, one a frame time, while somebody watches. At a new action the next frame stays as it
    is; those after it are taken back, and the making of more stops at the model's next pass."""

    player: Callable  # player(looks, seed) -> Player
    streamed: Callable  # streamed(prompt, seed) -> iterator of frames [3, H, W]; prompt() -> str
    looks: str = LOOKS
    seed: int = 0  # of the first world; the next has the next
    fps: float = FPS
    mode: str = "play"  # or "text"
    action: str = "none"
    prompt: str = PROMPT
    paused: bool = False
    error: str = ""  # what ended the world; a wish begins the next
    worlds: int = 0  # begun
    stale: str = ""  # not "" when what is made is not wanted, but another "action" or "world" is
    waiting: list = field(default_factory=list)  # (image, mark) of frames to be shown
    image: bytes = b""  # the frame that is shown, as a PNG
    mark: dict | None = None  # of the player, after the frame that is shown
    number: int = 0  # of frames shown
    asked: float = float("-inf")  # when a tab last asked for a frame
    cost: float = 0.1  # seconds to make a frame, a running mean
    kept: float = 100.0  # percentage of the frames made that were not dropped
    changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self):
        for target in (self.make, self.pace):
            threading.Thread(target=target, daemon=True).start()

    def make(self):
        """Make frames for ever; an error ends a world and is shown."""
        while True:
            started = time.perf_counter()
            try:
                for frame, mark in self.frames():
                    image = iio.imwrite("<bytes>", to_uint8(frame).numpy(), extension=".png")
                    self.cost += 0.05 * (time.perf_counter() - started - self.cost)
                    self.put(image, mark)
                    started = time.perf_counter()
            except Exception as error:
                traceback.print_exc()
                self.error = f"{type(error).__name__}: {error}"
            with self.changed:
                self.changed.wait_for(lambda: not self.error)

    def frames(self):
        """Yield the frames of a world, each with the mark to return to it, if that can be."""
        with self.changed:
            self.stale = ""
            self.waiting.clear()
            seed = self.seed + self.worlds
            self.worlds += 1
        if self.mode == "play":
            yield from self.played(self.player(self.looks, seed))
        else:
            for frame in self.streamed(lambda: self.prompt, seed):
                yield frame, None
                if self.stale:
                    return

    def played(self, player):
        """Yield the frames of a world to play in, each with its mark."""
        self.mark = player.mark()
        held = 0  # frames made since the action changed
        with player.model.register_forward_pre_hook(self.check):
            while self.stale != "world":
                with self.changed:
                    if self.stale == "action":
                        player.back(self.waiting[-1][1] if self.waiting else self.mark)
                        self.stale, held = "", 0
                try:  # small blocks first: the new action shows soon
                    frame = player.step(NAMES.index(self.action), most=1 + held)
                except Changed:
                    continue
                self.kept = 100 * (1 - player.dropped / player.made)
                held += 1
                yield frame, player.mark()

    def check(self, *_):
        """Give up, before a pass of the model, what is no longer wanted."""
        if self.stale:
            raise Changed

    def put(self, image, mark):
        """Let a frame wait to be shown, if it is still wanted, until there is room for another."""
        with self.changed:
            if not self.stale:
                self.waiting.append((image, mark))
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.stale or len(self.waiting) < AHEAD)

    def pace(self):
        """Show the frames that wait, `fps` a second, while somebody watches."""
        due = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(self.ready)
                self.image, self.mark = self.waiting.pop(0)
                self.number += 1
                self.changed.notify_all()
            # a frame that was late makes the next wait less, by half a frame time at most
            due = max(due, time.perf_counter() - 0.5 / self.fps) + 1 / self.fps
            time.sleep(max(0.0, due - time.perf_counter()))

    def ready(self):
        return self.waiting and not self.paused and time.monotonic() - self.asked < 2

    def newest(self, after):
        """Wait a second at most for another frame than number `after`: (number, image)."""
        with self.changed:
            self.asked = time.monotonic()
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.number != after, timeout=1)
            return self.number, self.image

    def steer(self, wish):
        """Obey {"action": name}, {"looks": text}, {"prompt": text} or {"paused": true or false};
        else raise ValueError."""
        single = isinstance(wish, dict) and len(wish) == 1
        kind, value = next(iter(wish.items())) if single else (None, None)
        # half a surrogate pair, which JSON can hold, is a ValueError here
        worded = isinstance(value, str) and len(value.strip().encode()) <= 200 and split(value)
        with self.changed:
            if kind == "action" and value in NAMES:
                self.turn(value)
            elif kind in ("looks", "prompt") and worded:
                self.begin(kind, value)
            elif kind == "paused" and isinstance(value, bool):
                self.paused = value
            else:
                text = "looks and prompt (words, at most 200 bytes)"
                raise ValueError(f"one of action ({', '.join(NAMES)}), {text} and paused")
            self.error = ""
            self.changed.notify_all()

    def turn(self, action):
        """Lead to the frames after the next by another action."""
        if self.mode == "play" and action != self.action:
            self.stale = self.stale or "action"
            del self.waiting[1:]
        self.action = action

    def begin(self, kind, text):
        """Begin another world; a prompt in text mode steers the one that runs."""
        if kind == "looks" or self.mode == "play":
            self.stale = "world"
            self.waiting.clear()
        self.mode = {"looks": "play", "prompt": "text"}[kind]
        self.paused = False
        setattr(self, kind, text)

    def state(self):
        names = ("mode", "action", "looks", "prompt", "paused", "error", "number")
        rates = {"frames/s": round(1 / self.cost, 1), "guesses kept, %": round(self.kept, 1)}
        words = {kind: list(table) for kind, table in KNOWN.items()}
        return {name: getattr(self, name) for name in names} | rates | {"words": words}


def handler(show):
    """Make the request handler of a Show: the page, its frames, its state, and wishes."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30
        protocol_version = "HTTP/1.1"  # a tab asks for all its frames on one connection
        disable_nagle_algorithm = True

        def handle(self):
            with contextlib.suppress(ConnectionError):  # the tab was closed
                super().handle()

        def answer(self, status, body, kind="text/plain; charset=utf-8", **headers):
            headers |= {"Content-Type": kind, "Content-Length": len(body)}
            if status >= 400:  # the request may have a body that was not read
                headers["Connection"] = "close"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refused(self):
            """Refuse other sites' pages, which may link to this page and no more."""
            host, post = self.headers.get("Host", ""), self.command == "POST"
            local = host.rsplit(":", 1)[0] in ("127.0.0.1", "localhost")
            if post or self.path.partition("?")[0] != "/":
                local &= self.headers.get("Origin", f"http://{host}") == f"http://{host}"
                local &= self.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
            typed = self.headers.get_content_type() == "application/json"
            if not local:
                self.answer(403, b"ask for 127.0.0.1, from its own page")
            elif post and not typed:
                self.answer(415, b"a wish is application/json")
            return not local or (post and not typed)

        def do_GET(self):
            if self.refused():
                return
            if self.path.partition("?")[0] == "/":
                with open(os.path.join(ROOT, "page.html"), "rb") as file:
                    self.answer(200, file.read(), "text/html; charset=utf-8")
            elif self.path == "/state":
                self.answer(200, json.dumps(show.state()).encode(), "application/json")
            elif asked := re.fullmatch(r"/frame\?after=(\d{1,18})", self.path):
                number, image = show.newest(int(asked[1]))
                self.answer(200, image, "image/png", **{"X-Frame": number})
            else:
                self.answer(404, b"there is only / here")

        do_HEAD = do_GET

        def do_POST(self):
            if self.refused():
                return
            length = self.headers.get("Content-Length", "")
            counted = length.isdecimal() and len(length) < 5 and 0 < int(length) < 2000
            if self.path != "/steer" or not counted:
                self.answer(400, b"POST a wish of less than 2000 bytes to /steer")
                return
            try:
                self.connection.settimeout(WAIT)
                show.steer(json.loads(self.rfile.read(int(length))))
                self.connection.settimeout(self.timeout)
                self.answer(200, b"{}", "application/json")
            except TimeoutError:
                self.answer(408, b"the wish is shorter than its Content-Length")
            except (json.JSONDecodeError, UnicodeError, RecursionError):
                self.answer(400, b"a wish is JSON in UTF-8")
            except ValueError as error:
                self.answer(400, str(error).encode())

        def log_message(self, *_):
            pass

    return Handler


def stream_text(student, vae, encoder, prompt, seed=0, size=(SIZE, SIZE)):
    """Stream frames [3, H, W] of the text model; prompt() says what they show from now on."""
    shape = chunk_shape(student, vae, 1, size)
    noise = noise_source(torch.Generator().manual_seed(seed), student.head.head.weight.device)
    starts = from_noise(noise, shape, student.schedule.timesteps(student.config.steps))

    @functools.lru_cache(8)
    def keys(text):
        return student.text_keys(encoder([text]))

    cache = student.new_cache(1, *shape[-2:])
    denoise = functools.partial(denoise_chunk, student, noise=noise)
    for _, video in stream(student, vae, lambda frames: keys(prompt()), starts, cache, denoise):
        yield from video[0]


SHIPPED = tuple(shipped(name) for name in ("student", "vae", "text_encoder"))


def serve(
    player, device, dtype, port, looks=LOOKS, seed=0, browser=True, files=SHIPPED, size=(SIZE, SIZE)
):
    """Serve the page on localhost until Ctrl-C, and open it. player(looks, seed) -> Player.
    files: of the text model, which the page begins with if they are not the shipped ones; size: of
    its video, (H, W)."""
    student = load_model(DiT, files[0], device, dtype)
    vae = load_model(VAE, files[1], device, dtype)
    encoder = load_model(TextEncoder, files[2], device)
    check_fit(student, vae, encoder)
    check_size(size, vae.space_stride, student.config.patch_size)
    streamed = functools.partial(stream_text, student, vae, encoder, size=size)
    show = Show(player, streamed, looks, seed, mode="play" if files == SHIPPED else "text")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(show))
    except OSError as error:
        reason = f"cannot open port {port}: {error.strerror}"
        raise UserError(f"{reason}; choose another with --port") from None
    server.daemon_threads = True
    show.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    print(f"play at {url}  (Ctrl-C ends it)", flush=True)
    if browser:  # in a thread: a browser in the terminal would block
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    server.serve_forever()
