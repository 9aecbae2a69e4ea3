import copy

import pytest
import torch

from data import sample_clips
from vae import VAE, VAEConfig, frame_wise, held_out_psnr, psnr
from weights import UserError, load_model, shipped


@pytest.fixture(scope="module")
def vae():
    """A VAE with random weights in which every block does something."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_dim=4, dim=32, fine_dim=16, pixel_dim=16))
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    vae.normalise(video(17))
    return vae.eval().requires_grad_(False)


def video(frames):
    return sample_clips(2, torch.Generator().manual_seed(0)).render(0, frames)


def test_sizes(vae):
    latents = vae.encode(video(17))
    assert latents.shape == (2, 5, 4, 8, 8)
    assert vae.decode(latents).shape == (2, 17, 3, 64, 64)
    assert vae.encode(video(1)).shape[1] == 1  # the first frame alone makes the first latent
    with pytest.raises(ValueError, match="16"):
        vae.encode(video(16))


def test_latents_are_normalised(vae):
    latents = vae.encode(video(17))
    assert latents.mean((0, 1, 3, 4)).abs().max() < 1e-4
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("chunks", [[1, 4, 12], [9, 8], [5, 4, 4, 4]])
def test_streaming_equals_the_whole_clip(vae, chunks):
    x, encoder_state, decoder_state, sizes = video(17), {}, {}, []
    latents = vae.encode(x)
    encoded = [vae.encode(part, encoder_state) for part in x.split(chunks, dim=1)]
    assert (torch.cat(encoded, 1) - latents).abs().max() < 1e-5
    decoded = []
    for part in encoded:
        decoded.append(vae.decode(part, decoder_state))
        sizes.append(sum(message.numel() for message in decoder_state.values()))
    assert [part.shape[1] for part in decoded] == chunks
    assert (torch.cat(decoded, 1) - vae.decode(latents)).abs().max() < 1e-5
    assert len(set(sizes)) == 1  # the state does not grow


def test_future_frames_never_reach_the_past(vae):
    x = video(17)
    latents, changed = vae.encode(x), x.clone()
    changed[:, 9:] += 0.5  # frames 9 .. 12 make latent 3
    assert torch.equal(vae.encode(changed)[:, :3], latents[:, :3])
    assert not torch.allclose(vae.encode(changed)[:, 3], latents[:, 3])
    later = latents.clone()
    later[:, 3:] += 1
    assert torch.equal(vae.decode(later)[:, :9], vae.decode(latents)[:, :9])
    assert not torch.allclose(vae.decode(later)[:, 9:13], vae.decode(latents)[:, 9:13])


def test_the_past_is_remembered(vae):
    x = video(17)
    changed = x.clone()
    changed[:, 1:5] += 0.5
    assert not torch.allclose(vae.encode(changed)[:, 2], vae.encode(x)[:, 2])


def test_missing_weights_are_named():
    with pytest.raises(UserError, match="nowhere.safetensors"):
        load_model(VAE, "nowhere.safetensors")


def test_shipped_weights_reconstruct_held_out_clips():
    assert held_out_psnr(load_model(VAE, shipped("vae")), count=8) >= 34


@torch.no_grad()
def test_the_frame_wise_vae_begins_nearly_as_good_as_the_shipped_one():
    x, vae = (
        sample_clips(2, torch.Generator().manual_seed(0)).render(0, 9),
        frame_wise(load_model(VAE, shipped("vae"))),
    )
    latents = vae.encode(x)
    assert latents.shape[1] == 9
    assert psnr(vae.decode(latents), x) > 30


def test_without_memory_the_frame_wise_vae_gives_what_the_first_frame_of_a_clip_gives(vae):
    still = copy.deepcopy(vae)
    for name, parameter in still.named_parameters():
        if ".conv1." in name:
            parameter[len(parameter) // 2 :] = 0  # the message to the next frame
    one, frame = frame_wise(still), video(1)
    assert (one.encode(frame) - still.encode(frame)).abs().max() < 1e-4
    assert (one.decode(one.encode(frame)) - still.decode(still.encode(frame))).abs().max() < 1e-4
