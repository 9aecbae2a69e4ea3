"""Each training script as a user runs it, for a few steps, from the shipped weights of the stage before."""

import importlib
import os
import subprocess
import sys

import pytest

import teacher
import vae
from weights import ROOT, WEIGHTS, read_weights, shipped

SMALL = ("--steps", "3", "--out", "out", "--batch-size", "1")
STAGES = [
    ("vae.py", ["vae.safetensors"]),
    ("vae.py --decoder-only", ["vae.safetensors"]),
    ("vae.py --frame-wise", ["vae_frame.safetensors"]),
    ("teacher.py --clips 16", ["teacher.safetensors", "text_encoder.safetensors"]),
    ("teacher.py --clips 16 --causal", ["causal_teacher.safetensors"]),
    (
        "nfd_teacher.py --clips 2 --weights " + shipped("action_teacher"),
        ["action_teacher.safetensors"],
    ),
    ("nfd_consistency.py --clips 2", ["player.safetensors"]),
    ("ode_init.py --trajectories 16 --solver-steps 4", ["ode_init.safetensors"]),
    ("dmd.py --clips 16", ["student.safetensors"]),
    ("dmd.py --clips 16 --rollout self --causal-scores", ["student.safetensors"]),
]


@pytest.mark.parametrize(("command", "files"), STAGES)
def test_script_trains_and_writes_weights_log_and_sheet(command, files, command_line, tmp_path):
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, script), *flags, *SMALL],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path / "out")) == {"checkpoint.pt", "log.jsonl", "sheet.png", *files}
    for name in set(files) & set(os.listdir(WEIGHTS)):  # and what is shipped was made as this is
        assert (
            read_weights(tmp_path / "out" / name)[1] == read_weights(os.path.join(WEIGHTS, name))[1]
        )
    status, _, err = command_line(
        importlib.import_module(script.removesuffix(".py")), *flags, *SMALL
    )
    assert status == 2
    assert "--resume" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps"),
        (["--lr", "-1"], "--lr"),
        (["--minutes", "nan"], "--minutes"),
        (["--device", "warp"], "warp"),
        (["--resume"], "nothing to resume"),
        (["--out", "/dev/null/x"], "--out"),
    ],
)
def test_bad_flags_end_in_one_line_and_status_2(arguments, words, command_line):
    status, _, err = command_line(vae, *arguments)
    assert status == 2
    assert words in err.splitlines()[-1]


def test_only_a_causal_teacher_begins_with_weights(command_line):
    status, _, err = command_line(teacher, "--weights", shipped("teacher"))
    assert status == 2
    assert "--causal" in err
    assert len(err.splitlines()) == 1
    assert not os.listdir()
    status, _, err = command_line(teacher, "--causal", "--weights", shipped("action_teacher"))
    assert status == 2
    assert "nfd_teacher.py" in err
    assert len(err.splitlines()) == 1
