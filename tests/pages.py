"""A page on a free port, and what a tab asks of it."""

import contextlib
import http.client
import json
import threading
import time
from http.server import ThreadingHTTPServer

import torch
from conftest import generator, tiny_action_model, tiny_text, tiny_vae

from page import handler
from play import Player


class Noted(Player):
    """A player whose marks hold the actions that led to the world so far."""

    actions = ()

    def step(self, action, most=None):
        frame = super().step(action, most)
        self.actions = (*self.actions, action)
        return frame


def player(looks, seed, most=4):
    model = tiny_action_model(num_layers=2, window=3).requires_grad_(False).double()
    text = tiny_text(looks).double()
    return Noted(model, tiny_vae(1).double(), text, generator(seed), most=most)


def plain_frames(prompt, seed):
    """Frames that are as bright as the prompt is long."""
    while True:
        yield torch.full((3, 64, 64), 0.01 * len(prompt()))


@contextlib.contextmanager
def running(show):
    """Run a page on a free port: (its port, its Show)."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler(show))
    httpd.daemon_threads = True
    show.start()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd.server_address[1], show
    show.paused = True
    httpd.shutdown()
    httpd.server_close()


def ask(port, method, path, body=None, **headers):
    """-> (status, content) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def wish(port, body, **headers):
    """-> the status that a wish is answered with."""
    headers = {"Content-Type": "application/json"} | headers
    return ask(port, "POST", "/steer", body, **headers)[0]


def steer(port, **wished):
    assert wish(port, json.dumps(wished)) == 200


def state(port):
    return json.loads(ask(port, "GET", "/state")[1])


def watch(port, frames):
    """Look at some frames, as a tab does: {number: PNG}."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    seen, number, end = {}, 0, time.time() + 20
    while len(seen) < frames and time.time() < end:
        connection.request("GET", f"/frame?after={number}")
        answer = connection.getresponse()
        image, last = answer.read(), number
        number = int(answer.headers["X-Frame"])
        if number != last:
            seen[number] = image
    assert len(seen) == frames
    return seen


def until(condition):
    end = time.time() + 20
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return condition()
