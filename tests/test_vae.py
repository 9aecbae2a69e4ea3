import pytest
import torch
from conftest import generator, tiny_vae

from data import sample_clips
from dataset import Shapes
from vae import VAE, mean_psnr
from weights import load_model, shipped


def video(frames):
    return sample_clips(2, generator()).render(0, frames)


@pytest.fixture(scope="module")
def vae():
    """A VAE with random weights in which every block does something."""
    vae = tiny_vae()
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    vae.normalise(video(17))
    return vae


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5)])
def test_the_first_frame_alone_makes_the_first_latent(vae, frames, latent_frames):
    latents = vae.encode(video(frames))
    assert latents.shape == (2, latent_frames, 8, 8, 8)
    assert vae.decode(latents).shape == (2, frames, 3, 64, 64)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_shape_of_latents_is_told_beforehand(vae, frames):
    assert vae.encode(video(frames)).shape[1:] == vae.latent_shape(frames, 64, 64)


def test_frames_beyond_the_last_latent_have_one_too(vae):
    assert vae.latent_shape(18, 64, 96) == (6, 8, 8, 12)


def test_a_clip_that_does_not_fill_its_latents_is_refused(vae):
    with pytest.raises(ValueError, match="1 \\+ 4 n frames, not 16"):
        vae.encode(video(16))


def test_a_stream_that_does_not_fill_its_latents_is_refused(vae):
    state = {}
    vae.encode(video(5), state)
    with pytest.raises(ValueError, match="4 n frames, not 5"):
        vae.encode(video(5), state)


def test_latents_are_normalised(vae):
    latents = vae.encode(video(17))
    assert latents.mean((0, 1, 3, 4)).abs().max() < 1e-4
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 1e-4


every_split = pytest.mark.parametrize("chunks", [[1, 4, 12], [9, 8], [5, 4, 4, 4]])


@every_split
def test_streamed_encoding_equals_the_whole_clips(vae, chunks):
    x, state = video(17), {}
    encoded = [vae.encode(part, state) for part in x.split(chunks, dim=1)]
    assert (torch.cat(encoded, dim=1) - vae.encode(x)).abs().max() < 1e-5


def decoded(vae, chunks):
    """Decode a clip as a stream: yields each part's video and the size of the state."""
    state = {}
    for part in vae.encode(video(17)).split([(frames + 3) // 4 for frames in chunks], dim=1):
        yield vae.decode(part, state), sum(message.numel() for message in state.values())


@every_split
def test_streamed_decoding_equals_the_whole_clips(vae, chunks):
    parts = [part for part, _ in decoded(vae, chunks)]
    assert [part.shape[1] for part in parts] == chunks
    whole = vae.decode(vae.encode(video(17)))
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5


@every_split
def test_the_state_of_a_stream_does_not_grow(vae, chunks):
    assert len({size for _, size in decoded(vae, chunks)}) == 1


def test_future_frames_never_reach_the_latents_before(vae):
    x = video(17)
    latents, changed = vae.encode(x), x.clone()
    changed[:, 9:] += 0.5  # frames 9 .. 12 make latent 3
    assert torch.equal(vae.encode(changed)[:, :3], latents[:, :3])
    assert not torch.allclose(vae.encode(changed)[:, 3], latents[:, 3])


def test_future_latents_never_reach_the_frames_before(vae):
    latents = vae.encode(video(17))
    later = latents.clone()
    later[:, 3:] += 1
    before, after = vae.decode(latents), vae.decode(later)
    assert torch.equal(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:13], before[:, 9:13])


def test_the_past_is_remembered(vae):
    x = video(17)
    changed = x.clone()
    changed[:, 1:5] += 0.5
    assert not torch.allclose(vae.encode(changed)[:, 2], vae.encode(x)[:, 2])


def test_shipped_weights_reconstruct_held_out_clips():
    clips = Shapes().watched(8, seed=1234)
    with torch.no_grad():
        assert mean_psnr(load_model(VAE, shipped("vae")), clips) >= 34
