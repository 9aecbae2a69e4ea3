import os
import subprocess
import sys

import imageio.v3 as iio
import pytest
import torch

import sample
from model import DiT, ModelConfig, save_model
from sample import FrameWriter, make_chunk, solve_ode, stream
from text import TextEncoder
from training import WEIGHTS, save_weights
from vae import VAE, VAEConfig

ROOT = os.path.dirname(WEIGHTS)
PROMPT = "a red circle bouncing on a black background"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with random weights of a tiny model, and the flags that name them."""
    torch.manual_seed(0)
    folder, config = tmp_path_factory.mktemp("weights"), ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1)
    model, vae, encoder = DiT(config), VAE(VAEConfig(8, 4, 16, 16, 16)), TextEncoder()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    save_model(str(folder / "model.safetensors"), model.state_dict(), config)
    save_weights(str(folder / "vae.safetensors"), vae.state_dict(), vars(vae.config))
    save_weights(str(folder / "text.safetensors"), encoder.state_dict(), vars(encoder.config))
    return folder, ["--weights", folder / "model.safetensors", "--vae", folder / "vae.safetensors", "--text-encoder", folder / "text.safetensors"]


@pytest.mark.parametrize("name, seconds, frames", [("a.mp4", 5, 80), ("b.gif", 0.5, 8), ("c.mp4", 20, 320), ("e.mp4", 0.01, 1)])
def test_writes_a_video_that_reads_back(tiny, command_line, tmp_path, name, seconds, frames):
    status, out, err = command_line(sample, "--prompt", PROMPT, "--seconds", seconds, "--out", tmp_path / name, *tiny[1])
    assert status == 0, err
    video = iio.imread(tmp_path / name)
    assert video.shape == (frames, 64, 64, 3) and os.listdir(tmp_path) == [name]
    assert "frames/s" in out and "first frame after" in out and "%" in err


def test_writes_a_sheet_and_samples_the_teacher(tiny, command_line, tmp_path):
    status, _, err = command_line(sample, "--prompt", PROMPT, "--out", "sheet.png", "--teacher", "--steps", 2, *tiny[1])
    assert status == 0, err
    assert iio.imread(tmp_path / "sheet.png").shape == (2 * 66, 8 * 66, 3) and os.listdir(tmp_path) == ["sheet.png"]


def test_shipped_weights_make_a_video(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "sample.py"), "--prompt", PROMPT, "--seconds", "1", "--out", "a.gif"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frames = iio.imread(tmp_path / "a.gif").astype(int)
    assert frames.shape == (16, 64, 64, 3)
    assert frames[:, :3, :3].mean() < 40                                              # a black background ...
    reddest = (frames[..., 0] - frames[..., 1]).reshape(16, -1).max(1)
    assert (reddest > 80).all()                                                       # ... and something red in every frame


def bad_inputs(folder):
    truncated, other = folder / "truncated.safetensors", folder / "other.safetensors"
    truncated.write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    config = ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1, in_dim=4, out_dim=4)
    save_model(str(other), DiT(config).state_dict(), config)
    wrong = ModelConfig(dim=16, ffn_dim=32, freq_dim=8, num_heads=1, num_layers=1)
    save_model(str(folder / "wrong.safetensors"), DiT(config).state_dict(), wrong)
    return [(["--prompt", " "], "prompt is empty"), (["--seconds", "-1"], "--seconds"), (["--seconds", "nan"], "--seconds"),
            (["--steps", "0"], "--steps"), (["--window", "0"], "--window"), (["--steps", "many"], "--steps"), (["--dtype", "float3"], "--dtype"),
            (["--device", "warp"], "warp"), (["--out", "video.avi"], ".mp4"), (["--out", "no/such/folder/a.mp4"], "no/such/folder"),
            (["--weights", folder / "nowhere.safetensors"], "nowhere"), (["--weights", truncated], "truncated"),
            (["--weights", other], "does not go with"), (["--weights", folder / "wrong.safetensors"], "do not fit"),
            (["--weights", folder / "vae.safetensors"], "not hold a transformer"), (["--vae", folder / "model.safetensors"], "not hold a VAE"),
            (["--teacher", "--seconds", "6"], "81 frames"), (["--nonsense"], "nonsense")]


def test_bad_input_ends_in_one_clear_line_and_status_2(tiny, command_line, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"there before")
    for arguments, words in bad_inputs(tiny[0]):
        status, _, err = command_line(sample, "--prompt", PROMPT, "--out", "a.mp4", *tiny[1], *arguments)
        lines = [line for line in err.splitlines() if "error:" in line]
        assert status == 2 and len(lines) == 1 and words in lines[0], (arguments, err)
        assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"there before"


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_run_that_fails_midway_leaves_no_half_written_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"there before")
    with pytest.raises(RuntimeError), FrameWriter(str(tmp_path / name), 32) as out:
        out.write(torch.zeros(16, 3, 64, 64))
        raise RuntimeError("out of memory")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"there before"


def parts():
    torch.manual_seed(0)
    model = DiT(ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=2)).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model, VAE(VAEConfig(8, 4, 16, 16, 16)).eval(), TextEncoder()([PROMPT]).detach()


def latents(seed, chunks, **options):
    model, vae, text = parts()
    torch.seed()                                                                      # the global random state must not matter
    source = stream(model, vae, text, torch.Generator().manual_seed(seed), **options)
    return torch.cat([next(source)[0] for _ in range(chunks)], dim=1)


def test_same_seed_same_latents_bit_for_bit():
    assert torch.equal(latents(0, 6), latents(0, 6)) and not torch.equal(latents(0, 2), latents(1, 2))
    assert torch.equal(latents(0, 6)[:, :9], latents(0, 3))                          # a longer video begins as the shorter one


def test_a_stream_is_algorithm_2_chunk_by_chunk():
    """The stream equals Algorithm 2 written with a full block-causal forward over all latents so far, and no cache."""
    model, vae, text = parts()
    streamed, g, past = latents(0, 6, window=3), torch.Generator().manual_seed(0), torch.zeros(1, 0, 8, 8, 8)
    for chunk in range(6):
        x, times = torch.randn(1, 3, 8, 8, 8, generator=g), model.schedule.timesteps(4)
        for t, r in zip(times[:-1], times[1:]):
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
            make_chunk(model, torch.randn(1, 3, 8, 8, 8), model.schedule.timesteps(1), model.text_keys(text), cache, None)
            assert cache.frames <= 3 and cache.k.numel() + cache.v.numel() == size


def test_solver_guides_from_the_null_prompt():
    model, _, text = parts()
    noise = torch.randn(1, 3, 8, 8, 8)
    states = solve_ode(model, noise, text, steps=4, guidance=1.0)
    assert torch.equal(states[0], noise) and len(states) == 5
    with torch.no_grad():
        v = model(noise, torch.ones(1, 3), text)
    assert torch.allclose(states[1], model.schedule.step(noise, v, 1.0, model.schedule.timesteps(4)[1]), atol=1e-5)     # guidance 1 is the prompt's v
    null = solve_ode(model, noise, torch.zeros_like(text), steps=4, guidance=5.0)
    assert torch.allclose(null, solve_ode(model, noise, torch.zeros_like(text), steps=4, guidance=1.0), atol=1e-5)
