import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import generator, tiny_model, tiny_text, tiny_vae

import bench


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
