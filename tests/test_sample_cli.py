import os
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import PROMPT, TINY, tiny_model, tiny_vae

import sample
from model import ModelConfig
from text import TextEncoder
from weights import ROOT, save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with random weights of tiny networks, and with some that do not fit."""
    folder = tmp_path_factory.mktemp("weights")

    def save(name, network, config=None):
        path = str(folder / f"{name}.safetensors")
        save_weights(path, network.state_dict(), config or network.config)

    for name, network in (("model", tiny_model()), ("vae", tiny_vae()), ("text", TextEncoder())):
        save(name, network)
    save("other", tiny_model(in_dim=4, out_dim=4))
    save("wrong", tiny_model(), ModelConfig(**TINY | {"ffn_dim": 32}))
    save("quick", tiny_model(steps=2, window=2))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:2000])
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    """The flags that name the tiny networks."""
    files = {"--weights": "model", "--vae": "vae", "--text-encoder": "text"}
    return [arg for flag, name in files.items() for arg in (flag, folder / f"{name}.safetensors")]


@pytest.fixture
def run(command_line, tiny):
    """Calls the sampler with the tiny networks: (*arguments) -> (status, stdout, stderr)."""

    def call(*arguments):
        return command_line(sample, *tiny, *arguments)

    return call


@pytest.mark.parametrize(
    ("name", "seconds", "frames"),
    [("a.mp4", 5, 80), ("b.gif", 0.5, 8), ("c.mp4", 20, 320), ("e.mp4", 0.01, 1)],
)
def test_writes_a_video_that_reads_back(run, tmp_path, name, seconds, frames):
    out = tmp_path / name
    status, _, err = run("--prompt", PROMPT, "--seconds", seconds, "--out", out)
    assert status == 0, err
    assert iio.imread(out).shape == (frames, 64, 64, 3)
    assert os.listdir(tmp_path) == [name]


def test_says_how_fast_it_was(run):
    _, out, err = run("--prompt", PROMPT, "--seconds", 0.5)
    assert "wrote sample.mp4: 8 frames of 64 x 64" in out
    assert "frames/s" in out
    assert "first frame after" in out
    assert "%" in err  # the progress bar


def test_writes_a_sheet(run, tmp_path):
    status, _, err = run("--prompt", PROMPT, "--out", "sheet.png")
    assert status == 0, err
    assert iio.imread("sheet.png").shape == (2 * 66, 8 * 66, 3)
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_samples_the_teacher(run, folder):
    teacher = ["--teacher", folder / "model.safetensors", "--steps", 2]
    status, _, err = run("--prompt", PROMPT, "--out", "a.gif", *teacher)
    assert status == 0, err
    assert len(iio.imread("a.gif")) == 80


def test_follows_the_steps_and_the_window_of_the_weights(run, folder):
    quick = ["--weights", folder / "quick.safetensors"]
    flags = {"own": quick, "given": ["--steps", 2, "--window", 2], "other": []}
    for name, more in flags.items():
        run("--prompt", PROMPT, "--seconds", 3, "--out", f"{name}.gif", *more)
    own, given, other = (iio.imread(f"{name}.gif") for name in flags)
    assert np.array_equal(own, given)
    assert not np.array_equal(own, other)


@pytest.fixture(scope="module")
def of_shipped_weights(tmp_path_factory):
    """The second that the command of the README makes, as whole numbers."""
    out = tmp_path_factory.mktemp("shipped") / "a.gif"
    script = os.path.join(ROOT, "sample.py")
    flags = ["--prompt", PROMPT, "--seconds", "1", "--out", out]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return iio.imread(out).astype(int)


def test_shipped_weights_make_a_video(of_shipped_weights):
    assert of_shipped_weights.shape == (16, 64, 64, 3)


def test_shipped_weights_follow_the_prompt(of_shipped_weights):
    assert of_shipped_weights[:, :3, :3].mean() < 40  # a black background ...
    reddest = of_shipped_weights[..., 0] - of_shipped_weights[..., 1]
    assert (reddest.max((1, 2)) > 80).all()  # ... and something red in every frame


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--prompt {blank}", "--prompt: is empty"),
        ("--seconds -1", "--seconds"),
        ("--seconds nan", "--seconds"),
        ("--steps 0", "--steps"),
        ("--window 0", "--window"),
        ("--steps many", "--steps"),
        ("--dtype float3", "--dtype"),
        ("--device warp", "warp"),
        ("--out video.avi", ".mp4"),
        ("--out no/such/folder/a.mp4", "no/such/folder"),
        ("--weights {folder}/nowhere.safetensors", "nowhere"),
        ("--weights {folder}/truncated.safetensors", "truncated"),
        ("--weights {folder}/other.safetensors", "does not go with"),
        ("--weights {folder}/wrong.safetensors", "do not fit"),
        ("--weights {folder}/vae.safetensors", "it goes with --vae"),
        ("--vae {folder}/model.safetensors", "not hold a VAE"),
        ("--teacher --seconds 6", "81 frames"),
        ("--nonsense", "nonsense"),
        ("--prompts a.mp4", "one of --prompt and --prompts"),
        ("--image {folder}/nowhere.png", "nowhere.png"),
        ("--video {folder}/model.safetensors", "cannot read a video"),
        ("--video a.mp4 --image a.mp4", "one of --image and --video"),
        ("--video a.mp4 --strength 1.5", "--strength"),
        ("--prompt more", "--prompt is there twice"),
        ("--strength 0.5", "--strength goes with --video"),
        ("--samples 3", "--samples goes with --prompts"),
        ("--image a.mp4 --teacher", "does not go with --teacher"),
        ("--prompt-at 7 late", "--prompt-at 7"),
        ("--prompt-at soon x", "soon"),
        ("--prompt-at 1 {blank}", "is empty"),
        ("--prompt-at 1 a --prompt-at 1 b", "twice"),
    ],
)
def test_bad_input_ends_in_one_clear_line_and_status_2(run, tmp_path, folder, arguments, words):
    (tmp_path / "a.mp4").write_bytes(b"there before")
    given = [part.format(folder=folder, blank=" ") for part in arguments.split()]
    status, _, err = run("--prompt", PROMPT, "--out", "a.mp4", *given)
    assert status == 2, err
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"there before"


@pytest.mark.parametrize(
    ("flags", "frames", "fitted"),
    [
        (["--image", "a.png"], 80, True),
        (["--video", "b.mp4", "--strength", 0.3], 32, True),
        (["--prompt-at", 0.7, "a blue star"], 80, False),
    ],
)
def test_steers_from_the_command_line(run, flags, frames, fitted):
    iio.imwrite("a.png", np.zeros((90, 70, 3), "uint8"))
    iio.imwrite("b.mp4", np.zeros((40, 90, 70, 3), "uint8"), fps=20)
    status, out, err = run("--prompt", PROMPT, "--out", "made.mp4", *flags)
    assert status == 0, err
    assert ("resized and cropped" in out) == fitted
    assert len(iio.imread("made.mp4")) == frames


# --------------------------------------------------------------------------------- many prompts
NAMES = {f"{prompt}-{index}.mp4" for prompt in ("a red circle", "a blue star") for index in (0, 1)}


@pytest.fixture
def run_many(run, tmp_path):
    """Calls the sampler for two prompts, twice each, into the folder `made`: -> stdout."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    flags = ["--prompts", "prompts.txt", "--samples", 2, "--seconds", 0.5, "--out", "made"]

    def call():
        status, out, err = run(*flags)
        assert status == 0, err
        return out

    return call


def test_many_prompts_give_a_folder_as_vbench_wants_it(run_many):
    assert "4 of them new" in run_many()
    assert set(os.listdir("made")) == NAMES


def test_many_prompts_go_on_where_they_stopped(run_many):
    run_many()
    os.remove("made/a blue star-1.mp4")
    kept = os.path.getmtime("made/a red circle-0.mp4")
    assert "1 of them new" in run_many()
    assert set(os.listdir("made")) == NAMES
    assert os.path.getmtime("made/a red circle-0.mp4") == kept


def test_an_empty_file_is_no_video_that_is_there(run_many):
    run_many()
    open("made/a red circle-0.mp4", "w").close()
    assert "1 of them new" in run_many()


def test_number_i_of_a_prompt_is_that_of_seed_plus_i(run_many, run):
    run_many()
    run("--prompt", "a blue star", "--seed", 1, "--seconds", 0.5, "--out", "alone.mp4")
    alone = iio.imread("alone.mp4").astype(int)
    assert np.abs(alone - iio.imread("made/a blue star-1.mp4")).max() < 20


# ---------------------------------------------------------------------------------------- Ctrl-C
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_playable_file_of_what_was_made(tiny, tmp_path, name):
    flags = ["--prompt", PROMPT, "--seconds", "100000", "--out", "a.mp4", *map(str, tiny)]
    command = [sys.executable, os.path.join(ROOT, "sample.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}

    def grown():
        return any(part.stat().st_size > 50_000 for part in tmp_path.glob(".a.mp4.*"))

    with subprocess.Popen(command, cwd=tmp_path, **pipes) as running:
        while running.poll() is None and not grown():  # the file grows as it is made
            time.sleep(0.1)
        running.send_signal(getattr(signal, name))
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert f"{len(iio.imread(tmp_path / 'a.mp4'))} frames" in out


def test_a_prompt_that_comes_too_late_is_told(run):
    _, out, _ = run("--prompt", PROMPT, "--seconds", 1, "--prompt-at", 0.9, "a blue star")
    assert "too late" in out


def test_a_signal_leaves_nothing_of_many_prompts_that_is_not_whole(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    flags = ["--prompts", "prompts.txt", "--seconds", "100000", "--out", "made", *map(str, tiny)]
    command = [sys.executable, os.path.join(ROOT, "sample.py"), *flags]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not list(tmp_path.glob("made/.*")):
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=60)
    assert running.returncode == 130
    assert not os.listdir(tmp_path / "made")
