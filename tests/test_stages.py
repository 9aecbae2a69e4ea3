"""Each training script as a user runs it, for a few steps, from the shipped weights of the stage before."""
import os
import subprocess
import sys

import pytest

from training import WEIGHTS

ROOT = os.path.dirname(WEIGHTS)
SCRIPTS = {"vae.py": [["vae.safetensors"], "--batch-size", "1"],
           "teacher.py": [["teacher.safetensors", "text_encoder.safetensors"], "--clips", "16", "--batch-size", "1"],
           "ode_init.py": [["ode_init.safetensors"], "--trajectories", "16", "--solver-steps", "4", "--batch-size", "1"],
           "dmd.py": [["student.safetensors"], "--clips", "16", "--batch-size", "1"]}


def run(script, *arguments, cwd):
    return subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_and_writes_weights_log_and_sheet(script, tmp_path):
    files, *flags = SCRIPTS[script]
    done = run(script, "--steps", "3", "--out", "out", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path / "out")) == {"checkpoint.pt", "log.jsonl", "sheet.png", *files}
    again = run(script, "--steps", "3", "--out", "out", *flags, cwd=tmp_path)
    assert again.returncode == 2 and "--resume" in again.stderr.splitlines()[-1]           # nothing is overwritten


@pytest.mark.parametrize("arguments, words", [(["--steps", "0"], "--steps"), (["--lr", "-1"], "--lr"), (["--minutes", "nan"], "--minutes"),
                                              (["--device", "warp"], "warp"), (["--resume"], "nothing to resume"), (["--out", "/dev/null/x"], "--out")])
def test_bad_flags_end_in_one_line_and_status_2(arguments, words, tmp_path):
    done = run("vae.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
