import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import generator, tiny_model, tiny_text, tiny_vae

import bench
from model import DiT


@pytest.fixture
def world():
    """A tiny student, its VAE and a prompt."""
    model = tiny_model(num_layers=2, window=3).requires_grad_(False)
    return model, tiny_vae(), tiny_text()


def test_the_row_without_a_cache_makes_the_same_video(world):
    plain = bench.without_cache(*world, generator(), (1, 21, 8, 8, 8))
    cached = bench.student_video(*world, generator(), (64, 64))
    for a, b in itertools.islice(zip(plain, cached, strict=True), 6):
        assert (a - b).abs().max() < 1e-4


def test_passes_and_operations_are_counted(world):
    chunks = bench.student_video(*world, generator(), (64, 64))
    passes, flops = bench.count(world[0], chunks, 21, torch.device("cpu"))
    assert passes == 4 + 1 + 4
    assert flops > 0


def test_the_command_prints_the_table_of_its_json(command_line, monkeypatch):
    monkeypatch.setattr(bench, "FRAMES", 9)
    monkeypatch.setattr(bench, "TEACHER_STEPS", 2)
    flags = ["--repeats", 1, "--late", 6, "--device", "cpu", "--out", "bench"]
    status, out, err = command_line(bench, *flags)
    assert status == 0, err
    result = json.loads(Path("bench.json").read_text())
    assert bench.table(result) in out
    assert Path("bench.md").read_text() in out
    assert len(result["rows"]) == 3
    assert len(result["stages, ms"]) == 4
    assert result["matmul GFLOP/s"] > 0
    assert result["rows"]["teacher, 2 steps, guided"]["passes"] == 2
    assert "chunk 6 takes" in out


@pytest.mark.parametrize("flag", ["--late", "--repeats"])
def test_no_turns_at_all_are_refused(command_line, flag):
    status, _, err = command_line(bench, flag, 0)
    assert status == 2
    assert f"{flag}: must lie between 1" in err


@pytest.fixture
def small_wan(monkeypatch):
    """Let the size of Wan 2.1 have one layer, and the teacher few steps."""
    fields, *sides = bench.SIZES["wan-1.3b"]
    monkeypatch.setitem(bench.SIZES, "wan-1.3b", (fields | {"num_layers": 1}, *sides))
    monkeypatch.setattr(bench, "WAN_STEPS", 3)


def test_operations_and_bytes_of_a_large_model_are_counted_without_it(command_line, small_wan):
    flags = ["--size", "wan-1.3b", "--count", "--peak", 1000, "--out", "count"]
    status, out, err = command_line(bench, *flags)
    assert status == 0, err
    told = json.loads(Path("count.json").read_text())
    assert bench.counted(told) in out
    assert "168" in out
    assert "15.7" in out
    tokens = 7 * 3 * 30 * 52
    assert told["cache, GiB"] == pytest.approx(2 * tokens * 1536 * 2 / 2**30)
    bound = 12 * 1000 / told["a chunk behind a full window, TFLOP"]
    assert told["bound at the given peak, frames/s"] == pytest.approx(bound)
    assert told["rows"]["times fewer"]["first frame"] > told["rows"]["times fewer"]["clip"] > 1


def test_what_is_counted_is_what_a_run_does():
    config, generated = tiny_model().config, torch.Generator().manual_seed(0)
    told = bench.count_all(config, (64, 64), 2)["rows"]["student, 4 steps, TFLOP"]
    parts = bench.random_parts(DiT, config, 4, torch.device("cpu"), torch.float32)
    model, _, vae, encoder = parts
    text = encoder([bench.PROMPT])
    for name, frames in (("first frame", 1), ("clip", bench.FRAMES)):
        chunks = bench.student_video(model, vae, text, generated, (64, 64))
        flops = bench.count(model, chunks, frames, torch.device("cpu"))[1]
        assert told[name] == pytest.approx(flops / 1e12, rel=0.01)


def test_a_peak_without_counting_is_refused(command_line):
    status, _, err = command_line(bench, "--peak", 3)
    assert status == 2
    assert "--peak goes with --count" in err
