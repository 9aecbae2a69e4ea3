import json
import os

import pytest
import torch
from conftest import generator, tiny_run

import training
from model import ModelConfig
from training import (
    EMA,
    Muon,
    adamw,
    causal_config,
    optimise,
    orthogonal,
    read_config,
    train,
    write_results,
)
from weights import UserError


# --------------------------------------------------------------------------------- the loop
def run(out, die_at=None, warmup=3, **flags):
    """A small training run -> (seconds or None, weights and averages); die_at: the power goes."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    ema, optimizer = EMA(net), Muon(net.parameters(), net.parameters(), 0.1)
    os.makedirs(out, exist_ok=True)

    def step(i, generator):
        if i == die_at:
            raise SystemError("power cut")
        x = torch.randn(8, 4, generator=generator)
        loss = (net(x) - x.flip(1)).square().mean()
        norm = optimise(optimizer, loss)
        ema.update(net, i)
        return {"loss": loss, "grad": norm}

    def sheet(path):
        return {}

    state = {"net": net, "ema": ema, "optimizer": optimizer}
    seconds = train(tiny_run(out, **flags), state, step, sheet, warmup)
    return seconds, [*net.state_dict().values(), *ema.shadow.values()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("die_at", [3, 6, 8])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, die_at):
    _, whole = run(tmp_path / "whole")
    with pytest.raises(SystemError):
        run(tmp_path / "cut", die_at=die_at)
    seconds, resumed = run(tmp_path / "cut", resume=True)
    assert seconds is not None
    assert equal(resumed, whole)


def test_minutes_stop_a_run_before_its_end(tmp_path):
    assert run(tmp_path, minutes=1e-9)[0] is None
    assert run(tmp_path, resume=True, minutes=1e-9)[0] is None


def test_a_run_that_minutes_stopped_resumes_to_the_same_weights(tmp_path):
    _, whole = run(tmp_path / "whole")
    run(tmp_path / "cut", minutes=1e-9)
    seconds, resumed = run(tmp_path / "cut", resume=True)
    assert seconds is not None
    assert equal(resumed, whole)


def test_log_has_every_tenth_step_once_after_a_resume(tmp_path):
    with pytest.raises(SystemError):
        run(tmp_path, steps=30, die_at=21)
    run(tmp_path, steps=30, resume=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20, 29]


def test_a_checkpoint_that_is_damaged_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="does not fit this run"):
        run(tmp_path, resume=True)


# ------------------------------------------------------------------------------------ the configs
def test_small_is_the_default_config():
    assert read_config("small") == ModelConfig()


def test_a_config_file_holds_fields_of_the_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dim": 48, "num_heads": 1, "patch_size": [1, 2, 2]}))
    assert read_config(str(path)) == ModelConfig(dim=48, num_heads=1)


def test_chunk_window_and_steps_change_where_they_are_given():
    changed = causal_config(ModelConfig(chunk=5, window=6, steps=7), None, 3, 2)
    assert changed == ModelConfig(chunk=5, window=3, steps=2)


@pytest.mark.parametrize("given", [(0, None, None), (None, 0, None), (None, None, 0)])
def test_chunk_window_and_steps_of_less_than_1_are_refused(given):
    with pytest.raises(UserError, match="at least 1"):
        causal_config(ModelConfig(), *given)


# ------------------------------------------------------------------------- averages and optimisers
def test_average_moves_slowly_to_the_weights():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA(net, decay=0.9)
    net.weight.data.fill_(1.0)
    for i in range(1000, 1010):
        ema.update(net, i)
    assert ema.shadow["weight"].item() == pytest.approx(1 - 0.9**10, rel=1e-4)


def in_singular_vectors(shape):
    """(`orthogonal` of matrices in their own singular vectors, their singular values)."""
    x = torch.randn(3, *shape, generator=generator())
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u.mT @ orthogonal(x) @ vh.mT, s


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonal_keeps_the_singular_vectors(shape):
    out, _ = in_singular_vectors(shape)
    assert (out - torch.diag_embed(out.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_orthogonal_evens_out_the_singular_values(shape):
    out, s = in_singular_vectors(shape)
    large = s / s.amax(1, keepdim=True) > 0.05
    assert (out.diagonal(dim1=1, dim2=2)[large] - 0.95).abs().max() < 0.3


@pytest.fixture
def twins():
    """Equal layers after a step of Muon and one of AdamW, and the weight before: (a, b, weight)."""
    layers = [torch.nn.Linear(24, 8) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    before, x = layers[0].weight.detach().clone(), torch.ones(2, 24)
    x = x + torch.randn(2, 24, generator=generator(1))
    muon = Muon(layers[0].parameters(), layers[0].parameters(), 0.1)
    for layer, optimizer in zip(layers, (muon, adamw(layers[1].parameters(), 0.1)), strict=True):
        optimise(optimizer, layer(x).square().sum())
    return *layers, before


def test_muon_moves_what_is_no_matrix_as_adamw_does(twins):
    muon, adam, _ = twins
    assert torch.equal(muon.bias, adam.bias)


def test_muon_moves_a_matrix_otherwise_than_adamw(twins):
    muon, adam, _ = twins
    assert not torch.allclose(muon.weight, adam.weight)


def test_muon_moves_no_direction_farther_than_the_others(twins):
    muon, _, before = twins
    moved = (before - muon.weight.detach()) / (0.1 * 0.2 * 24**0.5)
    assert torch.linalg.matrix_norm(moved, 2) < 1.3


# ------------------------------------------------------------------------------- results and docs
@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder whose docs/RESULTS.md has two places for tables, one of which has been filled."""
    monkeypatch.setattr(training, "ROOT", str(tmp_path))
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- results/speed.json -->\nold\nrows\n<!-- end -->\nbetween\n"
    page += "<!-- results/other.json -->\n<!-- end -->\n"
    (tmp_path / "docs" / "RESULTS.md").write_text(page)
    write_results(str(tmp_path / "results" / "speed"), {"rows": {"a": 1}}, "| a | \\1 |")
    return tmp_path


def test_results_stand_in_the_docs_where_their_marker_is(results):
    page = "before\n<!-- results/speed.json -->\n| a | \\1 |\n<!-- end -->\nbetween\n"
    page += "<!-- results/other.json -->\n<!-- end -->\n"
    assert (results / "docs" / "RESULTS.md").read_text() == page


def test_results_are_kept_as_json(results):
    assert json.loads((results / "results" / "speed.json").read_text())["rows"] == {"a": 1}


def test_results_that_cannot_be_written_are_named():
    with pytest.raises(UserError, match="cannot write /dev/null/speed"):
        write_results("/dev/null/speed", {}, "")
