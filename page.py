"""A page to play on, and to steer the text model: an HTTP server on localhost (Next-Frame Diffusion)."""

import itertools
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from data import FPS
from media import to_uint8
from model import DiT
from play import LOOKS, NAMES, PROMPT
from sample import stream
from text import TextEncoder
from vae import VAE
from weights import ROOT, UserError, load_model, shipped


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
                with open(os.path.join(ROOT, "page.html"), "rb") as file:
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
