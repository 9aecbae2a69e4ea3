"""A short pass of fuzz_weights.py, and that it sees what it looks for."""

import concurrent.futures
import multiprocessing
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("resource")  # Windows has none

import fuzz_weights

from weights import UserError


@pytest.fixture(scope="module")
def fresh():
    """A process that holds little: what a fork frees of a large one hides what its loader takes."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield lambda *args, **named: pool.submit(*args, **named).result()


def test_damaged_weights_are_refused_or_loaded_right(fresh):
    table, failures, _ = fresh(fuzz_weights.fuzz, 60, seed=1, show=str)
    assert not failures
    assert {"refused", "whole", "as written"} == {verdict for *_, verdict in table}


def raises(_):
    raise KeyError("a")


def goes_on(_):
    """A message that no terminal shows in one line."""
    error = UserError("a")
    error.args = ("a\nb",)
    raise error


def grows(_):
    torch.ones(40_000_000)
    raise UserError("a")


def dies(_):
    os._exit(1)


def lies(_):
    return {"a": torch.zeros(3)}, None


def judge(load, path):
    with mock.patch.object(fuzz_weights, "load", lambda name, path: load(path)):
        return fuzz_weights.judge("causvid", path, ({"a": torch.ones(3)}, None))


@pytest.mark.parametrize(
    ("load", "verdict"),
    [
        (raises, "traceback"),
        (goes_on, "lines"),
        (grows, "memory"),
        (dies, "crash or hang"),
        (lies, "other numbers"),
    ],
)
def test_a_loader_that_fails_is_seen(fresh, tmp_path, load, verdict):
    path = str(tmp_path / "a.pt")
    torch.save({"a": torch.ones(3)}, path)
    found, *_ = fresh(judge, load, path)
    assert found == f"FAILED: {verdict}"
