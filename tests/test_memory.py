"""Dry runs: what they print, what they refuse, and that they leave nothing."""

import json
import os

import pytest
import torch
from conftest import TINY, tiny_model, tiny_run, tiny_text

import memory
import teacher
import training


@pytest.fixture
def dry(command_line, tmp_path):
    """A dry run of the smallest teacher: (*flags) -> (status, stdout, stderr)."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def call(*flags):
        return command_line(teacher, "--config", "tiny.json", "--clips", "20", *flags)

    yield call
    if memory.Planning.on:
        memory.Planning.on.__exit__(None, None, None)
        memory.Planning.on = None


def test_a_dry_run_counts_on_each_device_and_writes_nothing(dry):
    status, out, _ = dry("--dry-run", "2", "--recompute", "--dtype", "bfloat16")
    assert status == 0
    assert "on each of 2 devices, 4 clips at a time" in out
    assert float(out.split("activations")[1].split()[0]) > 0
    assert os.listdir() == ["tiny.json"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--resume"], "--dry-run goes without"),
        (["--compile"], "--dry-run goes without"),
        (["--batch-size", "3"], "does not split over 2 processes"),
    ],
)
def test_a_dry_run_refuses_what_it_cannot_serve(dry, flags, told):
    status, _, err = dry("--dry-run", "2", *flags)
    assert status == 2
    assert told in err
    assert len(err.splitlines()) == 1


def test_the_ledger_knows_the_most_that_lived_at_once():
    with memory.Ledger() as ledger:
        a = torch.zeros(100, device="meta")
        b = a + 1
        del a
        c = b.view(10, 10) + b.view(10, 10)
        del b, c
        torch.zeros(50, device="meta")
    assert ledger.most == 2 * 400
    assert ledger.now == 0


def kept_for_the_backward_pass(**how):
    """Bytes that autograd saves in a forward pass of a tiny transformer, in a run with flags."""
    model, sizes = tiny_model(num_layers=6), []
    training.prepare(tiny_run(**how), {"model": model}, ())

    def save(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, give_back):
        model(torch.zeros(1, 6, 8, 8, 8), torch.full((1, 6), 0.5), tiny_text())
    return sum(sizes)


def test_recomputing_keeps_less_for_the_backward_pass():
    assert kept_for_the_backward_pass(recompute=True) < kept_for_the_backward_pass() / 2
