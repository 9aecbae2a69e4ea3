import launch
import contextlib
import math
import os
import signal
import sys

import pytest
import torch

import flags
from model import DiT, ModelConfig
from nfd_teacher import ActionConfig, ActionDiT
from optimisers import EMA, Muon, optimise
from page import Show
from text import TextEncoder
from training import Run, train
from vae import VAE, VAEConfig

TINY = {"dim": 16, "ffn_dim": 16, "freq_dim": 8, "num_heads": 1, "num_layers": 1}
THREADS = torch.get_num_threads()
PROMPT = "a red circle bouncing on a black background"


for name in ("SIGINT", "SIGHUP"):  # what a background job ignores, so would the scripts it starts
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Every test begins with the same random state and threads, alone or in the suite."""
    torch.manual_seed(0)
    monkeypatch.setattr(flags, "fastest_threads", lambda: THREADS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(network=DiT, config=ModelConfig, **fields):
    """A seeded random transformer whose output is not zero, as that of an untrained one is."""
    torch.manual_seed(0)
    model = network(config(**TINY | fields)).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def tiny_action_model(**fields):
    """The same for the action world, in which every action counts."""
    model = tiny_model(ActionDiT, ActionConfig, **fields)
    torch.nn.init.normal_(model.action_embedding.weight)
    return model


def tiny_vae(time_stride=4):
    """A seeded random autoencoder."""
    torch.manual_seed(0)
    widths = {"dim": 16, "fine_dim": 16, "pixel_dim": 16}
    return VAE(VAEConfig(time_stride=time_stride, **widths)).eval().requires_grad_(False)


def tiny_text(prompt=PROMPT):
    """An embedded prompt [1, S, text_dim] of a seeded random encoder."""
    torch.manual_seed(0)
    return TextEncoder()([prompt]).detach()


def tiny_run(out="out", **fields):
    """A training run of a few steps on the CPU."""
    given = {"steps": 9, "batch_size": 1, "lr": 1e-3, "seed": 0, "out": str(out), "resume": False}
    given |= {"save_every": 2, "minutes": math.inf, "compile": False}
    return Run(**given | {"device": torch.device("cpu"), "dtype": torch.float32} | fields)


@pytest.fixture
def page():
    """A page of tiny models: (its port, its Show)."""
    from pages import plain_frames, player, running  # which imports this module

    with running(Show(player, plain_frames, fps=200)) as ends:
        yield ends


@contextlib.contextmanager
def full_disk(size=2000):
    """No file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")  # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def command_line(monkeypatch, capsys, tmp_path):
    """Calls a script in this process as its command line does, in an empty folder.

    (module, *arguments) -> (status, stdout, stderr)
    """
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            launch.run_main(module.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def train_linear(out, die_at=None, warmup=3, fail_at=None, factor=math.nan, **flags):
    """A small training run -> (seconds or None, weights and averages).
    die_at: the power goes; fail_at: the loss of that step is multiplied by `factor`."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    ema = EMA(net)
    optimizer = Muon(net.parameters(), net.parameters(), flags.get("lr", 0.1))
    os.makedirs(out, exist_ok=True)

    def step(i, generator):
        if i == die_at:
            raise SystemError("power cut")
        x = torch.randn(8, 4, generator=generator)
        loss = (net(x) - x.flip(1)).square().mean() * (factor if i == fail_at else 1)
        norm = optimise(optimizer, loss)
        ema.update(net, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        with open(path, "w") as file:
            file.write("samples")
        return {}

    state = {"net": net, "ema": ema, "optimizer": optimizer}
    seconds = train(tiny_run(out, **{"lr": 0.1} | flags), state, step, sheet, warmup)
    return seconds, [*net.state_dict().values(), *ema.shadow.values()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
