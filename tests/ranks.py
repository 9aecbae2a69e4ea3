"""The first 20 steps of training stages on tiny networks, in as many processes as torchrun starts.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER WAY...        see tests/test_distributed.py
"""

import json
import os
import sys

import torch

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
import launch  # noqa: E402

from steps import WAYS, on_tiny_networks, train_tiny  # noqa: E402

import training  # noqa: E402


def first_steps(way):
    """Take 20 steps of one of WAYS into a folder of its own: see `train_tiny`."""
    out = f"{way.replace(' ', '_')}-{launch.WORLD}"
    caught = train_tiny(WAYS[way], out, steps=range(20))
    caught.numbers = [
        {k: torch.as_tensor(v).item() for k, v in numbers.items()} for numbers in caught.numbers
    ]
    return caught


if __name__ == "__main__":
    folder, *ways = sys.argv[1:]
    with on_tiny_networks(folder):
        for way in ways:
            caught = first_steps(way)
            path, generator = os.path.join(caught.run.out, "checkpoint.pt"), torch.Generator()
            progress = {"step": 10, "seconds": 0.0}
            training.save_checkpoint(path, caught.run, caught.state, generator, **progress)
            if launch.RANK == 0:
                with open(os.path.join(caught.run.out, "numbers.json"), "w") as file:
                    json.dump(caught.numbers, file)
