"""The first 20 steps of training stages on tiny networks, in as many processes as torchrun starts.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER OUT.json STAGE...     see tests/test_distributed.py
"""

import json
import os
import sys

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import torch

import launch
from steps import STAGES, on_tiny_networks, train_tiny


def numbers_of(names):
    """What each of the steps returned: stage -> [{name: number}]."""
    made = {}
    for name in names:
        steps = train_tiny(STAGES[name][0], f"{name}-{launch.WORLD}".replace(" ", "_"), steps=range(20)).numbers
        made[name] = [{k: torch.as_tensor(v).item() for k, v in numbers.items()} for numbers in steps]
    return made


if __name__ == "__main__":
    folder, out, *names = sys.argv[1:]
    with on_tiny_networks(folder):
        made = numbers_of(names or STAGES)
    if launch.RANK == 0:
        with open(out, "w") as file:
            json.dump(made, file)
