"""Each training script as a user runs it, for a few steps, from the shipped weights before it."""

import functools
import importlib
import json
import os
import sys
from dataclasses import replace

import pytest

import evaluate
import metrics
import teacher
import vae
from model import DiT
from nfd_teacher import ActionDiT
from text import TextEncoder
from vae import VAE
from weights import WEIGHTS, load_model, save_weights, shipped

SMALL = ("--steps", "3", "--out", "out", "--batch-size", "1")
NETWORKS = {
    "vae": VAE,
    "vae_frame": VAE,
    "text_encoder": TextEncoder,
    "action_teacher": ActionDiT,
    "player": ActionDiT,
}
STAGES = [
    ("vae.py", ["vae"]),
    ("nfd_vae.py", ["vae_frame"]),
    ("teacher.py --clips 16", ["teacher", "text_encoder"]),
    ("teacher.py --clips 16 --text-encoder " + shipped("text_encoder"), ["teacher"]),
    ("teacher.py --clips 16 --causal", ["causal_teacher"]),
    ("nfd_teacher.py --clips 2 --weights " + shipped("action_teacher"), ["action_teacher"]),
    ("nfd_consistency.py --clips 2", ["player"]),
    ("ode_init.py --trajectories 16 --solver-steps 4", ["ode_init"]),
    ("dmd.py --clips 16", ["student"]),
    ("dmd.py --clips 16 --rollout self --causal-scores --teacher causal.safetensors", ["student"]),
]


def run_script(command, folder):
    """Run a script in a folder as its command line does."""
    script, *flags = command.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(evaluate, "fixed_set", functools.partial(metrics.fixed_set, prompts=1))
        importlib.import_module(script.removesuffix(".py")).main()


def config_of(name, folder):
    path = os.path.join(folder, f"{name}.safetensors")
    return load_model(NETWORKS.get(name, DiT), path).config


@pytest.mark.parametrize(("command", "names"), STAGES)
def test_script_trains_and_writes_weights_log_and_sheet(command, names, command_line, tmp_path):
    script, *flags = command.split()
    causal = load_model(DiT, shipped("teacher"))
    origin = {"stage": "causal teacher"}
    save_weights(str(tmp_path / "causal.safetensors"), causal.state_dict(), causal.config, **origin)
    run_script(" ".join([command, *SMALL]), tmp_path)
    files = {f"{name}.safetensors" for name in names}
    assert set(os.listdir("out")) == {"checkpoint.pt", "log.jsonl", "sheet.png"} | files
    for name in names:
        if os.path.exists(shipped(name)):  # what is shipped was made as this is
            assert config_of(name, "out") == config_of(name, WEIGHTS)
    module = importlib.import_module(script.removesuffix(".py"))
    status, _, err = command_line(module, *flags, *SMALL)  # what is there stays
    assert status == 2
    assert "--resume" in err.splitlines()[-1]


@pytest.fixture(scope="module")
def tiny_stages(tmp_path_factory):
    """The folder of a teacher of another size, and of students that are used in another way."""
    folder = tmp_path_factory.mktemp("stages")
    size = {"dim": 48, "ffn_dim": 48, "num_layers": 1, "num_heads": 1}
    (folder / "tiny.json").write_text(json.dumps(size))
    run = "--steps 1 --batch-size 1 --out"
    encoder = "--text-encoder teacher/text_encoder.safetensors"
    run_script(f"teacher.py --config tiny.json --clips 8 {run} teacher", folder)
    run_script(
        f"ode_init.py --teacher teacher/teacher.safetensors {encoder} --trajectories 16 "
        f"--solver-steps 4 --student-steps 2 --chunk 2 --window 3 {run} ode_init",
        folder,
    )
    run_script(
        f"dmd.py --teacher teacher/teacher.safetensors --student ode_init/ode_init.safetensors "
        f"{encoder} --clips 8 {run} dmd",
        folder,
    )
    return folder


def test_a_config_file_says_the_size_of_the_teacher(tiny_stages):
    config = config_of("teacher", tiny_stages / "teacher")
    assert (config.dim, config.ffn_dim, config.num_layers, config.num_heads) == (48, 48, 1, 1)


@pytest.mark.parametrize(("name", "out"), [("ode_init", "ode_init"), ("student", "dmd")])
def test_students_carry_their_steps_chunk_and_window(tiny_stages, name, out):
    teacher = config_of("teacher", tiny_stages / "teacher")
    assert config_of(name, tiny_stages / out) == replace(teacher, steps=2, chunk=2, window=3)


def refused(result, words):
    """Whether a command line ended in one line that holds certain words."""
    status, _, err = result
    return status == 2 and words in err and len(err.splitlines()) == 1


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
    assert refused(command_line(vae, *arguments), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("{dim: 3}", "is not a model's config"),
        ("[1, 2]", "is not a model's config"),
        ('{"width": 48}', "width"),
        ('{"dim": 50, "num_heads": 3}', "dim 50"),
        ('{"dim": 9, "num_heads": 3}', "dim 9"),
        ('{"num_layers": 0}', "from 1 to"),
    ],
    ids=["missing", "not JSON", "a list", "unknown field", "not divisible", "odd heads", "empty"],
)
def test_a_bad_config_file_ends_in_one_line(content, words, command_line, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    assert refused(command_line(teacher, "--config", "config.json"), words)


@pytest.mark.parametrize("flag", ["--chunk", "--window", "--student-steps"])
def test_a_causal_model_needs_at_least_1_of_each(flag, command_line):
    assert refused(command_line(teacher, flag, 0), flag)


def test_only_a_causal_teacher_begins_with_weights(command_line):
    assert refused(command_line(teacher, "--weights", shipped("teacher")), "--causal")
    assert not os.listdir()


def test_a_causal_teacher_has_the_size_of_its_weights(command_line, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    arguments = ("--causal", "--config", "config.json")
    assert refused(command_line(teacher, *arguments), "--config does not go with --causal")


def test_a_causal_teacher_does_not_begin_with_an_action_teacher(command_line):
    arguments = ("--causal", "--weights", shipped("action_teacher"))
    assert refused(command_line(teacher, *arguments), "does not hold a DiT")
