import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import training
from text import TextConfig
from training import EMA, Muon, adamw, optimise, orthogonal, train
from weights import UserError, read_weights, save_weights


def run(out, steps=9, resume=False, die_at=None, minutes=math.inf):
    """A small training run; die_at: the power goes in this step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    ema, optimizer = EMA(net), Muon(net.parameters(), net.parameters(), 0.1)
    os.makedirs(out, exist_ok=True)
    args = SimpleNamespace(
        seed=0,
        steps=steps,
        out=str(out),
        resume=resume,
        save_every=2,
        minutes=minutes,
        device=torch.device("cpu"),
    )

    def step(i, generator):
        if i == die_at:
            raise SystemError("power cut")
        x = torch.randn(8, 4, generator=generator)
        loss = (net(x) - x.flip(1)).square().mean()
        norm = optimise(optimizer, loss)
        ema.update(net, i)
        return {"loss": loss, "grad": norm}

    done = train(
        args,
        {"net": net, "ema": ema, "optimizer": optimizer},
        step,
        sheet=lambda path: None,
        warmup=3,
    )
    return done, net.state_dict(), ema.shadow


@pytest.mark.parametrize("die_at", [3, 6, 8])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, die_at):
    _, net, ema = run(tmp_path / "whole")
    with pytest.raises(SystemError):
        run(tmp_path / "cut", die_at=die_at)
    done, net2, ema2 = run(tmp_path / "cut", resume=True)
    assert done
    assert all(torch.equal(net[k], net2[k]) and torch.equal(ema[k], ema2[k]) for k in net)


def test_minutes_stop_a_run_that_resumes_to_the_same_weights(tmp_path):
    _, net, _ = run(tmp_path / "whole")
    assert run(tmp_path / "cut", minutes=1e-9)[0] is False
    assert run(tmp_path / "cut", resume=True, minutes=1e-9)[0] is False
    done, net2, _ = run(tmp_path / "cut", resume=True)
    assert done
    assert all(torch.equal(net[k], net2[k]) for k in net)


def test_log_has_every_tenth_step_once_after_a_resume(tmp_path):
    with pytest.raises(SystemError):
        run(tmp_path, steps=30, die_at=21)
    run(tmp_path, steps=30, resume=True)
    steps = [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")]
    assert steps == [0, 10, 20, 29]


def test_weights_are_bf16_with_metadata_and_damaged_files_are_refused(tmp_path):
    path = str(tmp_path / "w.safetensors")
    save_weights(path, {"a": torch.ones(1000)}, TextConfig(3), steps=7, quality="good")
    tensors, config = read_weights(path)
    assert config["text_dim"] == 3
    assert tensors["a"].dtype == torch.float32
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").dtype == torch.bfloat16
        assert {"command", "commit", "hardware", "steps", "quality"} <= set(file.metadata())
    assert os.listdir(tmp_path) == ["w.safetensors"]
    whole = open(path, "rb").read()
    for part in (whole[:100], whole[:-10], b"", b"not safetensors at all"):
        with open(path, "wb") as file:
            file.write(part)
        with pytest.raises(UserError, match="w.safetensors"):
            read_weights(path)


def test_average_moves_slowly_to_the_weights():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA(net, decay=0.9)
    net.weight.data.fill_(1.0)
    for i in range(1000, 1010):
        ema.update(net, i)
    assert ema.shadow["weight"].item() == pytest.approx(1 - 0.9**10, rel=1e-4)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonal_keeps_singular_vectors_and_evens_out_singular_values(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    out = u.mT @ orthogonal(x) @ vh.mT  # diagonal in the singular vectors of x
    assert (out - torch.diag_embed(out.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert (
        out.diagonal(dim1=1, dim2=2)[s / s.amax(1, keepdim=True) > 0.05].sub(0.95).abs().max() < 0.3
    )


def test_muon_moves_hidden_matrices_orthogonally_and_all_else_as_adamw_does():
    torch.manual_seed(0)
    net, twin = (torch.nn.Linear(24, 8) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    before = net.weight.detach().clone()
    for module, optimizer in (
        (net, Muon(net.parameters(), net.parameters(), 0.1)),
        (twin, adamw(twin.parameters(), 0.1, betas=(0.9, 0.99))),
    ):
        optimise(
            optimizer,
            module(
                torch.ones(2, 24) + torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
            )
            .square()
            .sum(),
        )
    moved = (before - net.weight.detach()) / (0.1 * 0.2 * 24**0.5)
    assert torch.equal(net.bias, twin.bias)
    assert not torch.allclose(net.weight, twin.weight)
    assert torch.linalg.matrix_norm(moved, 2) < 1.3  # no direction moves farther than the others


def test_results_stand_in_the_docs_where_their_marker_is(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ROOT", str(tmp_path))
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "docs" / "RESULTS.md"
    readme.write_text(
        "before\n<!-- results/speed.json -->\nold\nrows\n<!-- end -->\nbetween\n<!-- results/other.json -->\n<!-- end -->\n"
    )
    training.write_results(str(tmp_path / "results" / "speed"), {"rows": {"a": 1}}, "| a | \\1 |")
    assert (
        readme.read_text()
        == "before\n<!-- results/speed.json -->\n| a | \\1 |\n<!-- end -->\nbetween\n<!-- results/other.json -->\n<!-- end -->\n"
    )
    assert json.loads((tmp_path / "results" / "speed.json").read_text())["rows"] == {"a": 1}
