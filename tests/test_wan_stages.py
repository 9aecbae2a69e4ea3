"""The training scripts from public checkpoints, for a few steps."""

import functools

import pytest
from test_wan_cli import files  # noqa: F401, a fixture

import dmd
import evaluate
import metrics
import ode_init
import teacher
from model import DiT
from weights import load_model

TEACHER = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("script", "roles", "more", "made"),
    [
        (
            teacher,
            {"--weights": f"release/{TEACHER}"},
            ["--causal", "--clips", 2],
            "causal_teacher",
        ),
        (
            ode_init,
            {"--teacher": f"release/{TEACHER}"},
            ["--trajectories", 16, "--solver-steps", 4],
            "ode_init",
        ),
        (
            dmd,
            {"--teacher": f"release/{TEACHER}", "--student": "causvid/model.pt"},
            ["--clips", 2],
            "student",
        ),
    ],
)
def test_a_stage_starts_from_public_checkpoints(
    command_line,
    files,  # noqa: F811
    monkeypatch,
    script,
    roles,
    more,
    made,
):
    monkeypatch.setattr(evaluate, "fixed_set", functools.partial(metrics.fixed_set, prompts=1))
    given = [part for flag, name in roles.items() for part in (flag, files / name)]
    given += ["--vae", files / "taew2_1.safetensors", "--text-encoder", files / "text.safetensors"]
    given += [*more, "--steps", 2, "--batch-size", 1, "--device", "cpu", "--out", "out"]
    status, _, err = command_line(script, *given)
    assert status == 0, err
    config = load_model(DiT, f"out/{made}.safetensors").config
    assert (config.dim, config.chunk, config.window) == (128, 3, 7)
    assert config.times == ((1000, 280, 120) if script is dmd else ())
