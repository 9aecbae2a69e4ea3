import pytest
import torch
from conftest import generator, tiny_vae

from data import sample_clips
from nfd_vae import frame_wise
from vae import VAE, psnr
from weights import load_model, shipped


def video(frames):
    return sample_clips(2, generator()).render(0, frames)


@torch.no_grad()
def test_the_frame_wise_vae_begins_nearly_as_good_as_the_shipped():
    x, vae = video(9), frame_wise(load_model(VAE, shipped("vae")))
    latents = vae.encode(x)
    assert latents.shape[1] == 9
    assert psnr(vae.decode(latents), x) > 30


@pytest.fixture
def still():
    """A VAE with random weights in which every block does something, but none remembers."""
    vae = tiny_vae()
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
        if ".conv1." in name:
            parameter[len(parameter) // 2 :] = 0  # the message to the next frame
    vae.normalise(video(17))
    return vae


def test_without_memory_a_frame_is_encoded_as_a_clips_first(still):
    one, frame = frame_wise(still), video(1)
    assert (one.encode(frame) - still.encode(frame)).abs().max() < 1e-4


def test_without_memory_a_latent_is_decoded_as_a_clips_first(still):
    one, latent = frame_wise(still), still.encode(video(1))
    assert (one.decode(latent) - still.decode(latent)).abs().max() < 1e-4
