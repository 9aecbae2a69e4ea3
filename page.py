"""A page to play on (Next-Frame Diffusion) and to steer the text model: a server on localhost."""

import functools
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import imageio.v3 as iio
import torch

from data import FPS
from diffusion import noise_source
from media import to_uint8
from model import DiT
from play import LOOKS, NAMES
from sample import PROMPT, chunk_shape, denoise_chunk, from_noise, stream
from text import TextEncoder
from vae import VAE
from weights import ROOT, UserError, load_model, shipped


@dataclass
class Show:
    """Make the frames that every open tab sees, in a thread of its own, while somebody watches."""

    player: Callable  # player(looks) -> Player
    streamed: Callable  # streamed(prompt) -> iterator of frames [3, H, W]; prompt() -> str
    fps: float = FPS
    mode: str = "play"  # or "text"
    action: str = "none"
    looks: str = LOOKS
    prompt: str = PROMPT
    image: bytes = b""  # the newest frame, as a JPEG
    number: int = 0  # of frames made
    viewers: int = 0
    cost: float = 0.1  # seconds a frame, a running mean
    kept: float = 100.0  # percentage of the frames made that were not dropped
    fresh: bool = False  # whether to begin again with new looks
    changed: threading.Condition = field(default_factory=threading.Condition)

    def frames(self):
        """Yield frame after frame of what the visitors ask for."""
        while True:
            self.fresh = False
            if self.mode == "play":
                player = self.player(self.looks)
                while self.mode == "play" and not self.fresh:
                    yield player.step(NAMES.index(self.action))
                    self.kept = 100 * (1 - player.dropped / player.made)
            else:
                frames = self.streamed(lambda: self.prompt)
                yield from itertools.takewhile(lambda _: self.mode == "text", frames)

    def run(self):
        """Make frames for ever, at most `fps` a second."""
        frames = self.frames()
        due = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.viewers)
            started = time.perf_counter()
            frame = to_uint8(next(frames))
            frame = frame.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
            image = iio.imwrite("<bytes>", frame, extension=".jpg", quality=95)
            self.cost += 0.05 * (time.perf_counter() - started - self.cost)
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter() - 1 / self.fps) + 1 / self.fps
            with self.changed:
                self.image, self.number = image, self.number + 1
                self.changed.notify_all()

    def steer(self, wish):
        """Obey {"action": name}, {"looks": text} or {"prompt": text}; else raise ValueError."""
        single = isinstance(wish, dict) and len(wish) == 1
        kind, value = next(iter(wish.items())) if single else (None, None)
        worded = isinstance(value, str) and 0 < len(value.strip()) <= 200
        if kind == "action" and value in NAMES:
            self.action = value
        elif kind in ("looks", "prompt") and worded:
            setattr(self, kind, value)
            self.mode = {"looks": "play", "prompt": "text"}[kind]
            self.fresh = kind == "looks"
        else:
            names = ", ".join(NAMES)
            raise ValueError(f"one of action ({names}), looks and prompt, as a JSON object")

    def state(self):
        state = {name: getattr(self, name) for name in ("mode", "action", "looks", "prompt")}
        rates = {"frames/s": round(1 / self.cost, 1), "guesses kept, %": round(self.kept, 1)}
        return state | {"frame": self.number} | rates


def handler(show):
    """Make the request handler of a Show: the page, its frames, its state, and wishes."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def answer(self, status, kind, body):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def local(self):
            """Answer 403 unless Host is this machine: another site's page must not steer ours."""
            local = self.headers.get("Host", "").rsplit(":", 1)[0] in ("127.0.0.1", "localhost")
            if not local:
                self.answer(403, "text/plain", b"ask for 127.0.0.1")
            return local

        def do_GET(self):
            if not self.local():
                return
            if self.path == "/":
                with open(os.path.join(ROOT, "page.html"), "rb") as file:
                    self.answer(200, "text/html; charset=utf-8", file.read())
            elif self.path == "/state":
                self.answer(200, "application/json", json.dumps(show.state()).encode())
            elif self.path == "/frames":
                self.frames()
            else:
                self.answer(404, "text/plain", b"there is only / here")

        def frames(self):
            """Send frames as one endless multipart image, until the tab is closed."""
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
            with show.changed:
                show.viewers += 1
                show.changed.notify_all()
            seen = 0
            try:
                while True:
                    with show.changed:
                        while show.number <= seen:
                            show.changed.wait()
                        image, seen = show.image, show.number
                    self.wfile.write(head % (len(image), image))
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


def stream_text(student, vae, encoder, prompt):
    """Stream frames [3, H, W] of the text model; prompt() says what they show from now on."""
    shape = chunk_shape(student, vae, 1)
    noise = noise_source(torch.Generator().manual_seed(0), student.head.head.weight.device)
    starts = from_noise(noise, shape, student.schedule.timesteps(student.config.steps))

    @functools.lru_cache(8)
    def keys(text):
        return student.text_keys(encoder([text]))

    cache = student.new_cache(1, *shape[-2:])
    denoise = functools.partial(denoise_chunk, student, noise=noise)
    for _, video in stream(student, vae, lambda frames: keys(prompt()), starts, cache, denoise):
        yield from video[0]


def serve(player, device, dtype, port):
    """Open the page on localhost, and run until Ctrl-C. player(looks) -> Player."""
    student = load_model(DiT, shipped("student"), device).to(dtype)
    vae = load_model(VAE, shipped("vae"), device).to(dtype)
    encoder = load_model(TextEncoder, shipped("text_encoder"), device)
    show = Show(player, functools.partial(stream_text, student, vae, encoder))
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
