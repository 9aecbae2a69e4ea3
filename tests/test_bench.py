import itertools
import json

import torch

import bench
from model import DiT, ModelConfig
from sample import stream
from text import TextEncoder
from vae import VAE, VAEConfig


def parts():
    torch.manual_seed(0)
    model = (
        DiT(ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=2, window=3))
        .eval()
        .requires_grad_(False)
    )
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return (
        model,
        VAE(VAEConfig(8, 4, 16, 16, 16)).eval().requires_grad_(False),
        TextEncoder()(["a red circle"]).detach(),
    )


def test_the_row_without_a_cache_makes_the_same_video():
    model, vae, text = parts()
    plain = bench.without_cache(
        model, vae, text, torch.Generator().manual_seed(0), (1, 21, 8, 8, 8)
    )
    cached = stream(model, vae, text, torch.Generator().manual_seed(0))
    for a, (_, b) in itertools.islice(zip(plain, cached), 6):
        assert (a - b).abs().max() < 1e-4


def test_passes_and_operations_are_counted():
    model, vae, text = parts()
    chunks = (video for _, video in stream(model, vae, text, torch.Generator().manual_seed(0)))
    passes, flops = bench.count(model, chunks, 21, torch.device("cpu"))
    assert passes == 9
    assert flops > 0


def test_the_command_prints_the_table_of_its_json(command_line, monkeypatch):
    monkeypatch.setattr(bench, "FRAMES", 9)
    monkeypatch.setattr(bench, "TEACHER_STEPS", 2)
    status, out, err = command_line(
        bench, "--repeats", 1, "--late", 6, "--device", "cpu", "--out", "bench"
    )
    assert status == 0, err
    result = json.load(open("bench.json"))
    assert bench.table(result) in out
    assert open("bench.md").read() in out
    assert len(result["rows"]) == 3
    assert len(result["stages, ms"]) == 4
    assert result["matmul GFLOP/s"] > 0
    assert result["rows"]["teacher, 2 steps, guided"]["passes"] == 2
    assert "chunk 6 costs" in out


def test_actions_change_as_often_as_they_should():
    for every in (1, 4, 16):
        actions = torch.tensor(bench.held_actions(4000, every))
        assert abs((actions.diff() != 0).float().mean() - 1 / every) < 0.03


def test_the_rows_of_the_action_world():
    torch.manual_seed(0)
    model = DiT(
        ModelConfig(
            dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1, chunk=1, num_actions=5
        )
    ).eval()
    vae = VAE(VAEConfig(8, 1, 16, 16, 16)).eval()
    with torch.no_grad():
        rows = bench.play_rows(
            model, model, vae, TextEncoder(), (64, 64), torch.device("cpu"), 1, 24
        )
    assert len(rows) == 9
    assert all(row["frames/s"] > 0 for row in rows.values())
    held, changed = (
        rows[f"player, 4 steps, the action changes every {n} frames, speculative"] for n in (64, 1)
    )
    assert held["frames a block"] > 1.5
    assert changed["frames a block"] == 1
    assert changed["dropped, %"] == 0


def test_no_turns_at_all_are_refused(command_line):
    status, _, err = command_line(bench, "--late", 0)
    assert status == 2
    assert "--late must be at least 1" in err
