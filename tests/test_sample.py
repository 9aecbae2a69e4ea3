import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import sample
from data import BOUNCE, CLOCKWISE, PULSE, RISE, SLIDE, sample_clips
from diffusion import solve_ode
from metrics import fit_motions, recover
from model import DiT, ModelConfig
from sample import pieces, remember_chunk, stream
from text import TextEncoder
from vae import VAE, VAEConfig
from weights import WEIGHTS, load_model, save_weights, shipped

ROOT = os.path.dirname(WEIGHTS)
PROMPT = "a red circle bouncing on a black background"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with random weights of a tiny model, and the flags that name them."""
    torch.manual_seed(0)
    folder, config = (
        tmp_path_factory.mktemp("weights"),
        ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1),
    )
    model, vae, encoder = DiT(config), VAE(VAEConfig(8, 4, 16, 16, 16)), TextEncoder()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    save_weights(str(folder / "model.safetensors"), model.state_dict(), config)
    save_weights(str(folder / "vae.safetensors"), vae.state_dict(), vae.config)
    save_weights(str(folder / "text.safetensors"), encoder.state_dict(), encoder.config)
    return folder, [
        "--weights",
        folder / "model.safetensors",
        "--vae",
        folder / "vae.safetensors",
        "--text-encoder",
        folder / "text.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "seconds", "frames"),
    [("a.mp4", 5, 80), ("b.gif", 0.5, 8), ("c.mp4", 20, 320), ("e.mp4", 0.01, 1)],
)
def test_writes_a_video_that_reads_back(tiny, command_line, tmp_path, name, seconds, frames):
    status, out, err = command_line(
        sample, "--prompt", PROMPT, "--seconds", seconds, "--out", tmp_path / name, *tiny[1]
    )
    assert status == 0, err
    video = iio.imread(tmp_path / name)
    assert video.shape == (frames, 64, 64, 3)
    assert os.listdir(tmp_path) == [name]
    assert "frames/s" in out
    assert "first frame after" in out
    assert "%" in err


def test_writes_a_sheet_and_samples_the_teacher(tiny, command_line, tmp_path):
    status, _, err = command_line(
        sample, "--prompt", PROMPT, "--out", "sheet.png", "--teacher", "--steps", 2, *tiny[1]
    )
    assert status == 0, err
    assert iio.imread(tmp_path / "sheet.png").shape == (2 * 66, 8 * 66, 3)
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_shipped_weights_make_a_video(tmp_path):
    command = [
        sys.executable,
        os.path.join(ROOT, "sample.py"),
        "--prompt",
        PROMPT,
        "--seconds",
        "1",
        "--out",
        "a.gif",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frames = iio.imread(tmp_path / "a.gif").astype(int)
    assert frames.shape == (16, 64, 64, 3)
    assert frames[:, :3, :3].mean() < 40  # a black background ...
    reddest = (frames[..., 0] - frames[..., 1]).reshape(16, -1).max(1)
    assert (reddest > 80).all()  # ... and something red in every frame


def bad_inputs(folder):
    truncated, other = folder / "truncated.safetensors", folder / "other.safetensors"
    truncated.write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    config = ModelConfig(
        dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1, in_dim=4, out_dim=4
    )
    save_weights(str(other), DiT(config).state_dict(), config)
    wrong = ModelConfig(dim=16, ffn_dim=32, freq_dim=8, num_heads=1, num_layers=1)
    save_weights(str(folder / "wrong.safetensors"), DiT(config).state_dict(), wrong)
    return [
        (["--prompt", " "], "prompt is empty"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--steps", "0"], "--steps"),
        (["--window", "0"], "--window"),
        (["--steps", "many"], "--steps"),
        (["--dtype", "float3"], "--dtype"),
        (["--device", "warp"], "warp"),
        (["--out", "video.avi"], ".mp4"),
        (["--out", "no/such/folder/a.mp4"], "no/such/folder"),
        (["--weights", folder / "nowhere.safetensors"], "nowhere"),
        (["--weights", truncated], "truncated"),
        (["--weights", other], "does not go with"),
        (["--weights", folder / "wrong.safetensors"], "do not fit"),
        (["--weights", folder / "vae.safetensors"], "not hold a DiT"),
        (["--vae", folder / "model.safetensors"], "not hold a VAE"),
        (["--teacher", "--seconds", "6"], "81 frames"),
        (["--nonsense"], "nonsense"),
        (["--prompts", "prompts.txt"], "one of --prompt and --prompts"),
        (["--image", folder / "nowhere.png"], "nowhere.png"),
        (["--video", folder / "model.safetensors"], "cannot read a video"),
        (["--video", "a", "--image", "b"], "one of --image and --video"),
        (["--video", "a", "--strength", "1.5"], "--strength"),
        (["--strength", "0.5"], "--strength goes with --video"),
        (["--samples", "3"], "--samples goes with --prompts"),
        (["--image", "a", "--teacher"], "does not go with --teacher"),
        (["--prompt-at", "7", "late"], "--prompt-at 7"),
        (["--prompt-at", "soon", "x"], "soon"),
        (["--prompt-at", "1", " "], "empty prompt"),
        (["--prompt-at", "1", "a", "--prompt-at", "1", "b"], "twice"),
    ]


def test_bad_input_ends_in_one_clear_line_and_status_2(tiny, command_line, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"there before")
    for arguments, words in bad_inputs(tiny[0]):
        status, _, err = command_line(
            sample, "--prompt", PROMPT, "--out", "a.mp4", *tiny[1], *arguments
        )
        lines = [line for line in err.splitlines() if "error:" in line]
        assert status == 2, (arguments, err)
        assert len(lines) == 1, (arguments, err)
        assert words in lines[0], (arguments, err)
        assert os.listdir(tmp_path) == ["a.mp4"]
        assert (tmp_path / "a.mp4").read_bytes() == b"there before"


def parts():
    torch.manual_seed(0)
    model = DiT(ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=2)).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model, VAE(VAEConfig(8, 4, 16, 16, 16)).eval(), TextEncoder()([PROMPT]).detach()


def latents(seed, chunks, **options):
    model, vae, text = parts()
    torch.seed()  # the global random state must not matter
    source = stream(model, vae, text, torch.Generator().manual_seed(seed), **options)
    return torch.cat([next(source)[0] for _ in range(chunks)], dim=1)


def test_same_seed_same_latents_bit_for_bit():
    assert torch.equal(latents(0, 6), latents(0, 6))
    assert not torch.equal(latents(0, 2), latents(1, 2))
    assert torch.equal(
        latents(0, 6)[:, :9], latents(0, 3)
    )  # a longer video begins as the shorter one


def test_a_stream_is_algorithm_2_chunk_by_chunk():
    """The stream equals Algorithm 2 written with a full block-causal forward over all latents so far, and no cache."""
    model, _vae, text = parts()
    streamed, g, past = (
        latents(0, 6, window=3),
        torch.Generator().manual_seed(0),
        torch.zeros(1, 0, 8, 8, 8),
    )
    for _chunk in range(6):
        x, times = torch.randn(1, 3, 8, 8, 8, generator=g), model.schedule.timesteps(4)
        for t, r in itertools.pairwise(times):
            t_all = torch.cat([torch.zeros(1, past.shape[1]), torch.full((1, 3), float(t))], dim=1)
            with torch.no_grad():
                v = model(torch.cat([past, x], dim=1), t_all, text, chunk=3, window=3)[:, -3:]
            x = model.schedule.x0(x, v, t)
            if r > 0:
                x = model.schedule.add_noise(x, torch.randn(x.shape, generator=g), r)
        past = torch.cat([past, x], dim=1)
    assert (streamed - past).abs().max() < 1e-4


def test_memory_and_frames_of_a_stream():
    model, vae, text = parts()
    source = stream(model, vae, text, torch.Generator().manual_seed(0), window=2)
    assert [next(source)[1].shape[1] for _ in range(5)] == [9, 12, 12, 12, 12]
    cache = model.new_cache(1, 8, 8, window=2)
    size = cache.k.numel() + cache.v.numel()
    with torch.no_grad():
        for _ in range(5):
            remember_chunk(model, torch.randn(1, 3, 8, 8, 8), model.text_keys(text), cache)
            assert cache.frames <= 3
            assert cache.k.numel() + cache.v.numel() == size


def test_solver_guides_from_the_null_prompt():
    model, _, text = parts()
    noise = torch.randn(1, 3, 8, 8, 8)
    states = solve_ode(model, noise, text, steps=4, guidance=1.0)
    assert torch.equal(states[0], noise)
    assert len(states) == 5
    with torch.no_grad():
        v = model(noise, torch.ones(1, 3), text)
    assert torch.allclose(
        states[1], model.schedule.step(noise, v, 1.0, model.schedule.timesteps(4)[1]), atol=1e-5
    )  # guidance 1 is the prompt's v
    null = solve_ode(model, noise, torch.zeros_like(text), steps=4, guidance=5.0)
    assert torch.allclose(
        null, solve_ode(model, noise, torch.zeros_like(text), steps=4, guidance=1.0), atol=1e-5
    )


def test_guidance_1_is_the_plain_ode_without_null_prompts():
    model, vae, text = parts()
    plain, doubled = (
        next(stream(model, vae, text, torch.Generator().manual_seed(0), steps=3, guidance=g))[0]
        for g in (1, 1 + 1e-9)
    )
    assert (plain - doubled).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------- steering
def steered(chunks=4, seed=0, **steering):
    model, vae, text = parts()
    source = stream(
        model, vae, steering.pop("text", text), torch.Generator().manual_seed(seed), **steering
    )
    made = list(itertools.islice(source, chunks))
    return torch.cat([x for x, _ in made], dim=1), torch.cat([v for _, v in made], dim=1)


def film(frames=45):
    return sample_clips(1, torch.Generator().manual_seed(0)).render(0, frames)[0]


def test_strength_0_reconstructs_the_video_and_strength_1_ignores_it():
    vae = parts()[1]
    with torch.no_grad():
        latents = vae.encode(film()[None])
        expected = vae.decode(latents)
    x, made = steered(99, video=pieces(film(), 3), strength=0.0)
    assert (x - latents).abs().max() < 1e-5
    assert (made - expected).abs().max() < 1e-5
    assert torch.equal(steered(4, video=pieces(film(), 3), strength=1.0)[0], steered(4)[0])
    between = steered(99, video=pieces(film(), 3), strength=0.3)[0]
    assert 0.01 < (between - latents).abs().mean() < (steered(4)[0][:, :12] - latents).abs().mean()


@pytest.mark.parametrize("frames", [1, 3, 9, 10, 21, 44])
def test_a_video_gives_as_many_frames_as_it_has(frames):
    assert steered(99, video=pieces(film(frames), 3), strength=0.5)[1].shape[1] == frames


def test_output_begins_before_the_video_has_ended():
    read = []
    model, vae, text = parts()
    frames = (read.append(i) or frame for i, frame in enumerate(film(45)))
    next(
        stream(
            model,
            vae,
            text,
            torch.Generator().manual_seed(0),
            video=pieces(frames, 3),
            strength=0.5,
        )
    )
    assert len(read) == 9


def test_the_first_frame_is_the_image_and_the_rest_follow_from_it():
    vae, image = parts()[1], film(1)
    with torch.no_grad():
        expected = vae.decode(vae.encode(image[None]))
    x, made = steered(4, image=image)
    assert x.shape[1] == 10
    assert made.shape[1] == 37
    assert torch.equal(made[:, :1], expected)
    assert not torch.allclose(
        x[:, 1:], steered(4, image=-image)[0][:, 1:]
    )  # the image is seen by what comes after


def test_a_new_prompt_takes_effect_at_the_next_chunk_and_its_keys_are_made_once(monkeypatch):
    text, asked, made = parts()[2], [], []
    other = TextEncoder()(["a blue star"]).detach()
    keys = DiT.text_keys
    monkeypatch.setattr(DiT, "text_keys", lambda self, text: made.append(text) or keys(self, text))
    changed = steered(
        6, text=lambda frames: asked.append(frames) or (text if frames < 20 else other)
    )[0]
    assert asked == [0, 9, 21, 33, 45, 57]
    assert len(made) == 2
    same = steered(6)[0]
    assert torch.equal(changed[:, :6], same[:, :6])
    assert not torch.allclose(changed[:, 6:9], same[:, 6:9])


def test_each_video_of_a_batch_is_what_it_is_alone():
    model, vae, text = parts()
    both = stream(
        model, vae, text.expand(2, -1, -1), [torch.Generator().manual_seed(s) for s in (3, 4)]
    )
    both = torch.cat([next(both)[0] for _ in range(3)], dim=1)
    for row, seed in zip(both, (3, 4)):
        assert (row - steered(3, seed)[0][0]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def streamed():
    """Streams with the shipped weights, and their truth as `recover` finds it: (prompts, chunks, **steering) -> (video, Recovered)."""
    encoder, model, vae = (
        load_model(TextEncoder, shipped("text_encoder")),
        load_model(DiT, shipped("student")),
        load_model(VAE, shipped("vae")),
    )

    def make(text, chunks=7, **steering):
        texts = [encoder(prompts) for prompts in text]
        change = steering.pop("change", None)
        steering["text"] = texts[0] if change is None else lambda frames: texts[frames >= change]
        made = itertools.islice(
            stream(model, vae, generator=torch.Generator().manual_seed(0), **steering), chunks
        )
        video = torch.cat([video for _, video in made], dim=1)
        return video, recover(video)

    return make


def some_clips(motions, colour=0, count=2):
    """`count` clips of each of the motions, all of one colour on black."""
    every = sample_clips(4000, torch.Generator().manual_seed(5))
    every = every[(every.background == 0) & (every.shape == 1)]
    clips = every[torch.cat([torch.nonzero(every.motion == m)[:count, 0] for m in motions])]
    return replace(clips, colour=torch.full_like(clips.colour, colour))


def farthest(found, x, y):
    """How far the recovered tracks lie from the tracks (x, y): the mean over frames and clips in pixels."""
    return ((found.x - x).square() + (found.y - y).square()).sqrt().mean().item()


def test_the_object_of_an_image_is_kept_and_moves_as_the_prompt_says(streamed):
    clips = some_clips([SLIDE, RISE, PULSE], colour=2)
    image = clips.render(0, 1)[:, 0]
    _video, found = streamed([clips.prompts()], image=image)
    shown = recover(image[:, None])
    assert (found.x[:, 0] - shown.x[:, 0]).abs().max() < 0.5
    assert (found.y[:, 0] - shown.y[:, 0]).abs().max() < 0.5
    for name in ("colour", "shape", "background"):
        assert (getattr(found, name) == getattr(shown, name)).float().mean() > 0.95
    assert (fit_motions(found, clips.shape).argmin(1) == clips.motion).float().mean() > 0.7


def test_between_the_strengths_the_motion_of_a_video_stays_and_the_colour_is_the_prompt_s(streamed):
    clips = some_clips([SLIDE, RISE, CLOCKWISE, BOUNCE])
    painted = replace(
        clips,
        colour=torch.full_like(clips.colour, 2),
        background=torch.full_like(clips.background, 2),
    )
    source = clips.render()
    parts = source[:, :9], *source[:, 9:].split(12, dim=1)
    x, y, _, _ = clips.track(torch.arange(81) / 16)
    followed = streamed([painted.prompts()], video=iter(parts), strength=0.7)[1]
    alone = streamed([painted.prompts()])[1]
    assert (followed.colour == 2).float().mean() > 0.9
    assert (followed.background == 2).float().mean() > 0.9
    assert farthest(followed, x, y) < 5
    assert farthest(alone, x, y) > 10


def test_a_new_prompt_arrives_within_two_chunks_and_the_motion_goes_on(streamed):
    before = some_clips([SLIDE, CLOCKWISE])
    after = replace(
        before,
        colour=torch.full_like(before.colour, 2),
        background=torch.full_like(before.background, 2),
    )
    _video, found = streamed([before.prompts(), after.prompts()], change=45)
    assert (found.colour[:, :45] == 0).float().mean() > 0.95
    assert (found.background[:, :45] == 0).float().mean() > 0.95
    assert (found.colour[:, 69:] == 2).float().mean() > 0.95
    assert (found.background[:, 69:] == 2).float().mean() > 0.95
    leap = (found.x.diff(dim=1).square() + found.y.diff(dim=1).square()).sqrt()
    assert leap[:, 42:54].amax() < 4  # pixels from frame to frame across the change
    assert (fit_motions(found, before.shape).argmin(1) == before.motion).float().mean() > 0.7


def test_steering_from_the_command_line(tiny, command_line, tmp_path):
    for index, flags in enumerate(
        (
            ["--image", "a.png"],
            ["--video", "a.mp4", "--strength", 0.3],
            ["--prompt-at", 0.7, "a blue star"],
        )
    ):
        iio.imwrite("a.png", np.zeros((90, 70, 3), "uint8"))
        iio.imwrite("a.mp4", np.zeros((40, 90, 70, 3), "uint8"), fps=20)
        status, out, err = command_line(
            sample, "--prompt", PROMPT, "--out", f"{index}.mp4", *flags, *tiny[1]
        )
        assert status == 0, err
        assert ("resized and cropped" in out) == (index < 2), err
        assert len(iio.imread(f"{index}.mp4")) == (32 if index == 1 else 80)


def test_many_prompts_go_on_where_they_stopped(tiny, command_line, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    flags = [
        "--prompts",
        "prompts.txt",
        "--samples",
        2,
        "--seconds",
        0.5,
        "--out",
        "made",
        *tiny[1],
    ]
    status, out, err = command_line(sample, *flags)
    names = {
        f"{prompt}-{index}.mp4" for prompt in ("a red circle", "a blue star") for index in (0, 1)
    }
    assert status == 0, err
    assert set(os.listdir("made")) == names, err
    assert "4 of them new" in out, err
    os.remove("made/a blue star-1.mp4")
    kept = os.path.getmtime("made/a red circle-0.mp4")
    status, out, err = command_line(sample, *flags)
    assert set(os.listdir("made")) == names
    assert "1 of them new" in out
    assert os.path.getmtime("made/a red circle-0.mp4") == kept
    command_line(
        sample,
        "--prompt",
        "a blue star",
        "--seed",
        1,
        "--seconds",
        0.5,
        "--out",
        "alone.mp4",
        *tiny[1],
    )
    assert (
        np.abs(iio.imread("alone.mp4").astype(int) - iio.imread("made/a blue star-1.mp4")).max()
        < 20
    )


def test_ctrl_c_leaves_a_playable_file_of_what_was_made(tiny, tmp_path):
    command = [
        sys.executable,
        os.path.join(ROOT, "sample.py"),
        "--prompt",
        PROMPT,
        "--seconds",
        "100000",
        "--out",
        "a.mp4",
        *map(str, tiny[1]),
    ]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    part = tmp_path / ".a.mp4.part.mp4"
    while running.poll() is None and not (
        part.exists() and part.stat().st_size > 50_000
    ):  # the file grows as it is made
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert f"{len(iio.imread(tmp_path / 'a.mp4'))} frames" in out
