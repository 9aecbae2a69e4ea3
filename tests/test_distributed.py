"""Many processes: what two of them compute is what one does."""

import functools
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import generator, tiny_run
from ranks import first_steps
from steps import WAYS, train_tiny
from test_steps import folder  # noqa: F401

import checkpoints
import rows
import shards
import training
from optimisers import adamw, optimise
from weights import UserError, read_weights

RANKS = os.path.join(os.path.dirname(__file__), "ranks.py")
# a way to train in two processes, and the one in one process whose numbers it must have
PAIRS = {"teacher": "teacher", "dmd": "dmd", "rollout": "rollout", "recomputed": "rollout"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def two(folder):  # noqa: F811
    """The folder in which two processes have trained each of PAIRS for 20 steps."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*LAUNCH, RANKS, str(folder), *PAIRS], check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def one(two):
    """The same in this process: way -> what `train_tiny` caught."""
    return functools.cache(first_steps)


every_pair = pytest.mark.parametrize(("way", "plain"), PAIRS.items())


@every_pair
def test_two_processes_have_the_losses_of_one(way, plain, one, two):
    found = json.loads((two / f"{way}-2" / "numbers.json").read_text())
    assert len(found) == 20
    for ours, theirs in zip(found, one(plain).numbers, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@every_pair
def test_one_process_goes_on_from_the_shards_of_two(way, plain, one, two):
    fresh = train_tiny(WAYS[plain], steps=())
    path, run = str(two / f"{way}-2" / "checkpoint.pt"), tiny_run(two / f"{way}-2", steps=10)
    assert checkpoints.load_checkpoint(path, run, fresh.state, generator()) == (10, 0.0)
    ours, theirs = (shards.tensors_of(state) for state in (fresh.state, one(plain).state))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(v, theirs[k], atol=1e-4) for k, v in ours.items())


def test_two_processes_export_one_file(one, two):
    one("rollout")
    ours, theirs = (read_weights(str(two / f"rollout-{n}" / "student.safetensors")) for n in (2, 1))
    assert ours[1] == theirs[1]
    assert all(torch.allclose(v, theirs[0][k], atol=1e-2) for k, v in ours[0].items())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(two, tmp_path, damage):
    state = {"net": torch.nn.Linear(1, 1)}
    saved = torch.load(two / "dmd-2" / "checkpoint.pt", weights_only=True)
    name = next(name for name in saved["shards"] if name.endswith(".distcp"))
    content = bytearray((two / "dmd-2" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / os.path.dirname(name)).mkdir()
    for other in saved["shards"]:
        (tmp_path / other).write_bytes((two / "dmd-2" / other).read_bytes())
    if damage == "remove":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if damage == "flip" else content[:-1])
    (tmp_path / "checkpoint.pt").write_bytes((two / "dmd-2" / "checkpoint.pt").read_bytes())
    path, run = str(tmp_path / "checkpoint.pt"), tiny_run(tmp_path)
    with pytest.raises(UserError, match=os.path.basename(name)):
        checkpoints.load_checkpoint(path, run, state, generator())


def test_an_index_of_shards_runs_no_code(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="getcwd"):
        shards.Reader(str(tmp_path)).read_metadata()


# ------------------------------------------------------------------------------- rows of a batch
def rows_of(count, world, monkeypatch):
    """The rows that each of `world` processes takes of a batch of `count`."""
    monkeypatch.setattr(rows, "WORLD", world)
    taken = []
    for rank in range(world):
        monkeypatch.setattr(rows, "RANK", rank)
        taken.append(rows.own_rows(torch.arange(count)).tolist())
    return taken


def test_a_batch_is_split_into_rows(monkeypatch):
    assert rows_of(6, 3, monkeypatch) == [[0, 1], [2, 3], [4, 5]]


def test_each_process_has_as_many_rows_where_they_do_not_suffice(monkeypatch):
    assert rows_of(4, 3, monkeypatch) == [[0, 1], [2, 3], [3, 3]]


def test_a_batch_that_does_not_split_is_refused(monkeypatch, tmp_path):
    import flags

    monkeypatch.setattr(training, "WORLD", 2)
    parser = flags.training_parser("", 9, 8, 0.1, str(tmp_path / "out"))
    told = "--batch-size 8 does not split over 2 processes and --accumulate 3"
    with pytest.raises(UserError, match=told):
        training.start_run(parser.parse_args(["--accumulate", "3"]))
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------ parts of a batch
def test_the_gradients_of_the_parts_of_a_batch_add_up():
    nets = [torch.nn.Linear(4, 1) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, losses = torch.randn(6, 4, generator=generator()), []
    for net, parts in zip(nets, (1, 3), strict=True):
        optimizer = adamw(net.parameters(), 0.1)
        pieces = iter(x.chunk(parts))

        def step(i, generator, net=net, pieces=pieces, optimizer=optimizer):
            loss = net(next(pieces)).square().mean()
            return {"loss": loss.detach(), "grad": optimise(optimizer, loss)}

        numbers = training.add_up(step, {"o": optimizer}, parts)(0, None)
        losses.append([numbers["loss"].item(), numbers["grad"].item()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(nets[0].weight, nets[1].weight)
