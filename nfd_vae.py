"""The autoencoder of Next-Frame Diffusion: one latent for each frame.

An action must show in the next frame, so frames are not merged in time.

python nfd_vae.py       makes it of the shipped VAE, and trains it on
"""

import launch
from dataclasses import replace

import flags
import training
from dataset import Shapes
from vae import VAE, train_vae
from weights import load_model, shipped


def frame_wise(vae):
    """Make a VAE of time stride 1 from one of stride n.

    Every frame goes the way of a clip's first frame: it fills its group with n copies of itself,
    and of the n decoded frames the last counts.
    """
    n, tensors = vae.config.time_stride, vae.state_dict()
    one = VAE(replace(vae.config, time_stride=1))
    tensors["encoder.5.conv.weight"] = tensors["encoder.5.conv.weight"].unflatten(1, (n, -1)).sum(1)
    for name in ("decoder.1.conv.weight", "decoder.1.conv.bias"):
        tensors[name] = tensors[name].unflatten(0, (n, -1))[-1]
    one.load_state_dict(tensors)
    return one.to(vae.mean.device)


def main():
    description = "Make a frame-wise autoencoder of the shipped one, and train it on."
    run = training.start_run(
        flags.training_parser(description, 400, 8, 1e-3, "runs/vae_frame").parse_args()
    )
    vae = frame_wise(load_model(VAE, shipped("vae"), run.device))
    train_vae(run, "vae_frame", vae, Shapes(), begin=1.0)


if __name__ == "__main__":
    launch.run_main(main)
