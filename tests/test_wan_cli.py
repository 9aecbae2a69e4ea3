import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import PROMPT, tiny_model
from safetensors.torch import save_file
from test_wan import write
from test_wan_codecs import tiny, umt5  # noqa: F401, a fixture

import page
import play
import sample
from weights import shipped

SIZE = ["--size", 32, 48]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny checkpoint of each layout, the autoencoder and an embedding."""
    folder = tmp_path_factory.mktemp("public")
    sizes = {"dim": 128, "num_heads": 1, "num_layers": 3, "text_dim": 14, "in_dim": 4, "out_dim": 4}
    for layout in ("release", "causvid", "generator_ema"):
        (folder / layout).mkdir()
        write(layout, folder / layout, tiny_model(**sizes))
    save_file(
        {k: v.contiguous() for k, v in tiny().float().state_dict().items()},
        folder / "taew2_1.safetensors",
    )
    save_file({"text": torch.randn(9, 14), "null": torch.randn(2, 14)}, folder / "text.safetensors")
    save_file({"text": torch.randn(9, 15)}, folder / "wide.safetensors")
    (folder / "two").mkdir()
    write("causvid", folder / "two", tiny_model(patch_size=(2, 2, 2), **sizes))
    return folder


@pytest.fixture
def run(command_line, files):
    """Calls the sampler for a checkpoint of a layout at reduced depth: -> stdout."""

    def call(layout, *arguments, role="--weights", text=("--text-embedding", "text.safetensors")):
        path = "diffusion_pytorch_model.safetensors" if layout == "release" else "model.pt"
        text = [text[0], files / text[1]] if text else []
        common = ["--vae", files / "taew2_1.safetensors", "--layers", 2, "--seconds", 1]
        given = [role, files / layout / path, *common, *SIZE, *text, "--device", "cpu"]
        status, out, err = command_line(sample, *given, "--out", "a.gif", *arguments)
        assert status == 0, err
        return out

    return call


@pytest.mark.parametrize("layout", ["causvid", "generator_ema"])
def test_a_distilled_checkpoint_streams(run, layout):
    out = run(layout, "--seconds", 2)
    assert "wrote a.gif: 32 frames of 48 x 32" in out
    assert ("shift 8" in out) == (layout == "causvid")
    assert iio.imread("a.gif").shape == (32, 32, 48, 3)


def test_a_bidirectional_checkpoint_is_sampled_as_a_teacher(run):
    out = run("release", "--steps", 2, "--negative", "blurred", role="--teacher")
    assert "preset wan: 2 steps under guidance 5, shift 5" in out
    assert iio.imread("a.gif").shape == (16, 32, 48, 3)


def test_the_preset_of_another_model_can_be_asked_for(run):
    out = run("release", "--preset", "causvid")
    assert "3 steps at [1000, 757, 522], shift 8" in out


@pytest.mark.parametrize(("steps", "times"), [(2, "[1000, 889]"), (3, "[1000, 757, 522]")])
def test_the_steps_that_are_asked_for_are_told(run, steps, times):
    assert f"{steps} steps at {times}, shift 8" in run("causvid", "--steps", steps)


def test_image_to_video_at_that_size(run):
    iio.imwrite("a.png", np.zeros((90, 70, 3), "uint8"))
    out = run("causvid", "--image", "a.png")
    assert "resized and cropped to 48 x 32" in out
    assert iio.imread("a.gif").shape == (16, 32, 48, 3)


@pytest.mark.parametrize("frames", [1, 9, 12, 16, 21])
def test_video_to_video_at_that_size_has_the_videos_length(run, frames):
    iio.imwrite("b.mp4", np.zeros((frames, 96, 64, 3), "uint8"), fps=16)
    run("causvid", "--video", "b.mp4", "--strength", 0.5, "--seconds", 9)
    assert len(iio.imread("a.gif")) == frames


def test_prompts_of_a_text_encoder_change_on_the_way(run, files, umt5):  # noqa: F811
    frames = {}
    for name, change in (("same", ()), ("changed", ("--prompt-at", 0.5, "blue"))):
        run(
            "causvid", "--prompt", PROMPT, "--seconds", 2, *change, text=("--text-encoder", umt5[2])
        )
        frames[name] = iio.imread("a.gif").astype(int)
    assert np.array_equal(frames["same"][:9], frames["changed"][:9])
    assert not np.array_equal(frames["same"], frames["changed"])


def test_many_prompts_at_that_size(run, umt5):  # noqa: F811
    with open("prompts.txt", "w") as file:
        file.write("a red circle\nblue\n")
    flags = ["--prompts", "prompts.txt", "--samples", 1, "--out", "made"]
    run("causvid", *flags, text=("--text-encoder", umt5[2]))
    assert iio.imread("made/blue-0.mp4").shape == (16, 32, 48, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "{}/release/diffusion_pytorch_model.safetensors"], "holds 'teacher'"),
        (["--teacher", "{}/causvid/model.pt"], "holds 'student'"),
        (["--weights", "{}/causvid/model.pt", "--size", "30", "48"], "multiples of 16"),
        (
            ["--weights", "{}/causvid/model.pt", "--text-embedding", "{}/wide.safetensors"],
            "width 14",
        ),
        (["--weights", "{}/causvid/model.pt", "--prompt", "x"], "--text-embedding stands"),
        (["--weights", shipped("student"), "--layers", "2"], "--layers goes with public"),
        (["--weights", "{}/causvid/model.pt", "--negative", "x"], "--negative goes with --teacher"),
        (
            ["--teacher", "{}/causvid/model.pt", "--preset", "causvid"],
            "--preset goes with a student",
        ),
        (["--weights", "{}/taew2_1.safetensors"], "an autoencoder"),
        (["--weights", "{}/text.safetensors"], "goes with --text-embedding"),
        (["--weights", "{}/causvid/model.pt", "--vae", "{}/causvid/model.pt"], "not TAEW2.1"),
        (["--weights", "{}/two/model.pt"], "span 2 latent frames; a stream needs patches of 1"),
        (["--weights", shipped("vae")], "goes with --vae"),
        (["--weights", "{}/causvid"], "holds neither"),
    ],
)
def test_bad_input_is_one_line(command_line, files, arguments, words):
    given = ["--vae", files / "taew2_1.safetensors", "--text-embedding", files / "text.safetensors"]
    given += [part.replace("{}", str(files)) for part in arguments]
    status, _, err = command_line(sample, *given)
    assert status == 2, err
    assert len(err.splitlines()) == 1, err
    assert words in err


@pytest.mark.parametrize(("script", "role"), [(sample, "--weights"), (play, "--student")])
def test_an_embedding_does_not_stand_in_for_a_text_encoder(command_line, files, script, role):
    given = [role, files / "causvid" / "model.pt", "--vae", files / "taew2_1.safetensors"]
    given += ["--text-encoder", files / "text.safetensors"]
    given += ["--prompt", "x"] if script is sample else []
    status, _, err = command_line(script, *given)
    assert status == 2
    assert "--text-embedding, without --prompt" in err


@pytest.mark.parametrize("flag", ["--vae", "--text-encoder"])
def test_what_is_missing_is_told(command_line, files, flag):
    given = {"--vae": files / "taew2_1.safetensors", "--text-encoder": files}
    del given[flag]
    rest = [part for pair in given.items() for part in pair]
    path = files / "causvid" / "model.pt"
    status, _, err = command_line(sample, "--weights", path, "--prompt", "x", *rest)
    assert status == 2
    assert f"needs {flag}" in err
    assert "docs/WAN.md" in err


def test_the_page_streams_a_checkpoint_at_its_size(command_line, files, umt5, monkeypatch):  # noqa: F811
    shows = []
    monkeypatch.setattr(page.Show, "start", lambda show: shows.append(show))
    monkeypatch.setattr(
        page.ThreadingHTTPServer, "serve_forever", lambda server: server.server_close()
    )
    given = ["--student", files / "causvid" / "model.pt", "--vae", files / "taew2_1.safetensors"]
    given += ["--text-encoder", umt5[2], *SIZE, "--device", "cpu", "--port", 0, "--no-browser"]
    status, _, err = command_line(play, *given)
    assert status == 0, err
    assert shows[0].mode == "text"
    frames = shows[0].streamed(lambda: PROMPT, 0)
    assert next(frames).shape == (3, 32, 48)
