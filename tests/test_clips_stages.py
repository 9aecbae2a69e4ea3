"""The five commands that lead from a folder of clips to a streamed video, for a step each."""

import functools
import json
import os
import subprocess

import pytest
import torch
from conftest import TINY
from test_clips import clip
from test_distributed import LAUNCH
from test_stages import run_script

import dmd
import evaluate
import memory
import ode_init
import sample
import teacher
import vae
from model import DiT
from text import TextEncoder
from vae import VAE, VAEConfig
from weights import load_model, opened

RUN = "--data own --steps 1 --batch-size 1 --threads 1"
TEACHER, STUDENT = "runs/teacher/teacher.safetensors", "runs/dmd/student.safetensors"


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The folder of a run of all stages on two clips of 33 frames of 16 x 32."""
    folder = tmp_path_factory.mktemp("own")
    for name, caption in (("a", "a grey zebra"), ("b", "coloured bars")):
        clip(f"{folder}/own/{name}.mp4", 2.2)
        (folder / "own" / f"{name}.txt").write_text(caption)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae.VAEConfig", functools.partial(VAEConfig, 8, 4, 16, 16, 16))
        run_script(f"vae.py {RUN} --size 16 32 --frames 33", folder)
    vae_flag = "--vae runs/vae/vae.safetensors"
    run_script(f"teacher.py {RUN} {vae_flag} --config tiny.json", folder)
    run_script(f"teacher.py {RUN} --causal --weights {TEACHER} --out runs/causal", folder)
    solve = "--trajectories 3 --solver-steps 4"
    run_script(f"ode_init.py {RUN} --teacher {TEACHER} {solve}", folder)
    student = "--student runs/ode_init/ode_init.safetensors"
    run_script(f"dmd.py {RUN} --teacher {TEACHER} {student}", folder)
    return folder


@pytest.fixture
def call(stages, command_line, monkeypatch):
    """Calls a script in the folder of the run: (module, line of flags)"""
    monkeypatch.chdir(stages)
    return lambda module, line: command_line(module, *line.split())


def test_weights_carry_what_they_were_trained_on(stages):
    for path in (TEACHER, STUDENT, "runs/causal/causal_teacher.safetensors"):
        with opened(str(stages / path)) as file:
            told = file.metadata()
        assert (told["size"], told["frames"]) == ("16 32", "33")
        assert told["words"] == "a bars coloured grey zebra"


def test_a_stream_has_the_size_of_the_clips(call):
    status, out, err = call(sample, f"--prompt zebra --seconds 1 --out a.mp4 --weights {STUDENT}")
    assert status == 0, err
    assert "wrote a.mp4: 16 frames of 32 x 16" in out


def test_words_are_unknown_that_no_caption_has(call):
    line = f"--prompt zebra,circle --seconds 0.1 --out a.mp4 --weights {STUDENT}"
    out = call(sample, line)[1]
    assert "takes circle for words it knows:\na, bars, coloured, grey, zebra\n" in out


def test_a_teacher_makes_clips_of_the_length_it_learnt(call):
    status, out, err = call(sample, f"--prompt zebra --out a.png --steps 2 --teacher {TEACHER}")
    assert status == 0, err
    assert "wrote a.png: 33 frames of 32 x 16" in out
    line = f"--prompt zebra --seconds 3 --teacher {TEACHER}"
    assert "the teacher makes at most 33 frames" in call(sample, line)[2]


def test_a_window_is_no_longer_than_the_clips(stages):
    assert load_model(DiT, str(stages / TEACHER)).config.window == 3  # of 9 latent frames


def test_the_log_holds_no_measure_of_the_shapes_world(stages):
    for stage in ("vae", "teacher", "causal", "ode_init", "dmd"):
        assert (stages / "runs" / stage / "sheet.png").exists()
        names = set().union(*map(json.loads, (stages / "runs" / stage / "log.jsonl").open()))
        assert not names & {"text alignment", "shape", "motion", "diversity", "frame quality"}


def test_held_out_clips_are_measured(call, stages):
    models = f"--teacher {TEACHER} --student {STUDENT}"
    causal = "--causal runs/causal/causal_teacher.safetensors"
    status, _, err = call(
        evaluate, f"--data own --seconds 20 --clips 2 --out table {models} {causal}"
    )
    assert status == 0, err
    quality, losses, drifts = json.loads((stages / "table.json").read_text())["rows"]
    assert len(quality) == 3
    assert [name.split()[0] for name in losses] == ["teacher", "causal"]
    assert all(1 < loss < 5 for row in losses.values() for loss in row.values())
    assert len(drifts) == 4  # first and last ten seconds of both that stream
    assert {"sharpness", "contrast", "colour"} <= set(next(iter(drifts.values())))


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        (evaluate, f"--student {STUDENT}", "was trained on one's own clips"),
        (evaluate, f"--data own --over-time --student {STUDENT}", "--over-time does not go with"),
        (evaluate, f"--data own --seconds 15 --student {STUDENT}", "--seconds must be 20 at least"),
        (evaluate, "--data own --student", "was not trained on clips of one's own"),
        (dmd, f"--teacher {TEACHER}", "name them with --data"),
        (ode_init, "--data own", "was not trained on clips of one's own"),
        (teacher, "--data own", "vae.safetensors was not trained on clips of one's own"),
        (teacher, "--data own --clips 3", "--clips goes with the shapes world"),
        (vae, "--size 16 16", "--size goes with --data"),
        (vae, "--data own --size 16 40", "multiples of 16, not 40"),
        (vae, "--data tiny.json", "tiny.json is not a folder that can be read"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(call, module, line, words):
    status, _, err = call(module, f"{line} --out new")
    assert status == 2
    assert words in err.splitlines()[-1]
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_resumed_training_on_clips_ends_in_the_same_weights(stages, monkeypatch):
    """Bit for bit, the autoencoder and the teacher."""
    monkeypatch.chdir(stages)
    monkeypatch.setattr("vae.VAEConfig", functools.partial(VAEConfig, 8, 4, 16, 16, 16))
    more = "--data own --batch-size 1 --threads 1 --save-every 2 --device cpu --dtype float32"
    trained = {
        "vae": f"vae.py {more} --size 16 32 --frames 33",
        "teacher": f"teacher.py {more} --vae runs/vae/vae.safetensors --config tiny.json",
    }
    for name, command in trained.items():
        run_script(f"{command} --steps 4 --out whole_{name}", stages)
        run_script(f"{command} --steps 4 --minutes 1e-9 --out {name}", stages)
        assert not os.path.exists(f"{name}/{name}.safetensors")
        run_script(f"{command} --steps 4 --out {name} --resume", stages)
        network = VAE if name == "vae" else DiT
        both = [load_model(network, f"{out}/{name}.safetensors") for out in (f"whole_{name}", name)]
        for one, two in zip(*(part.state_dict().values() for part in both), strict=True):
            assert torch.equal(one, two)


def test_two_processes_train_on_clips_as_one_does(stages, tmp_path):
    for name in ("own", "tiny.json", "runs/vae/vae.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(stages / name)
    more = "--data own --steps 2 --batch-size 2 --device cpu --dtype float32 --threads 1"
    command = f"teacher.py {more} --vae runs/vae/vae.safetensors --config tiny.json"
    script, *flags = f"{command} --out two".split()
    script = os.path.join(os.path.dirname(os.path.dirname(__file__)), script)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*LAUNCH, script, *flags], check=True, cwd=tmp_path, env=environment)
    run_script(f"{command} --out one", tmp_path)
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("one", "two")]
    steps = [[json.loads(line) for line in log if "loss" in line] for log in logs]
    for name in ("loss", "grad"):  # a network that starts at zero has a loss that tells little
        one, two = ([step[name] for step in log] for log in steps)
        assert len(one) == 2
        assert one == pytest.approx(two, abs=1e-4)


def test_a_run_does_not_go_on_with_other_clips(stages, monkeypatch, call):
    monkeypatch.setattr("vae.VAEConfig", functools.partial(VAEConfig, 8, 4, 16, 16, 16))
    clip(f"{stages}/other/a.mp4", 2.2)
    line = "--data own --steps 1 --size 16 32 --frames 33 --threads 1 --batch-size 1 --resume"
    err = call(vae, line.replace("own", "other") + " --out runs/vae")[2]
    assert "runs/vae cannot go on with --data with contents" in err


def test_the_text_encoder_is_trained_on_the_captions(stages):
    encoder = load_model(TextEncoder, str(stages / "runs/teacher/text_encoder.safetensors"))
    assert encoder.config.words == 16
    assert encoder(["a grey zebra"]).any()


def test_a_dry_run_decodes_nothing(call, monkeypatch):
    monkeypatch.setattr("clips.make_shards", None)
    line = "--data own --size 32 32 --frames 13 --steps 2 --dry-run 1 --out dry"
    status, out, err = call(vae, line)
    memory.Planning.on.__exit__(None, None, None)
    memory.Planning.on = None
    assert status == 0, err
    assert "in GiB" in out
