import os

import pytest
import torch
from conftest import equal, full_disk, train_linear

from checkpoints import check_hash, mend
from weights import UserError


def damaged(path, how):
    """Cut a file short, or change a bit of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(path.read_bytes()[:-200] if how == "cut" else content)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, how):
    _, whole = train_linear(tmp_path / "whole")
    with pytest.raises(SystemError):
        train_linear(tmp_path / "cut", die_at=7)
    damaged(tmp_path / "cut" / "checkpoint.pt", how)
    mend(str(tmp_path / "cut"))
    assert "goes on from the one before it, of step 4" in capsys.readouterr().out
    assert equal(train_linear(tmp_path / "cut", resume=True)[1], whole)


def test_a_changed_bit_of_a_checkpoint_is_found_wherever_it_is(tmp_path):
    train_linear(tmp_path)
    path, found = tmp_path / "checkpoint.pt", 0
    content = path.read_bytes()
    for place in range(0, len(content) - 64, 97):
        changed = bytearray(content)
        changed[place] ^= 16
        path.write_bytes(changed)
        with pytest.raises(UserError, match="its checksum does not fit"):
            check_hash(str(path))
        found += 1
    assert found > 50


def whole_but(change):
    """Damage to a checkpoint: its dict with a change."""

    def damage(path):
        torch.save(torch.load(path, weights_only=True) | change, path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: torch.save(torch.ones(3), path),
        lambda path: torch.save({}, path),
        whole_but({"state": {}}),
        whole_but({"state": {"net": {}, "ema": {}, "optimizer": {}}}),
        whole_but({"shards": 3}),
        whole_but({"shards": {"elsewhere": "0"}}),
    ],
    ids=[
        "text",
        "empty",
        "cut",
        "a tensor",
        "an empty dict",
        "no parts",
        "empty parts",
        "shards that are none",
        "shards that are not there",
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, damage):
    train_linear(tmp_path)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt") as raised:
        train_linear(tmp_path, resume=True)
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_named_in_one_line(tmp_path):
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt: File too la"):
        train_linear(tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint_and_nothing_else(tmp_path):
    train_linear(tmp_path, steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with full_disk(), pytest.raises(UserError):
        train_linear(tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert set(os.listdir(tmp_path)) == {"checkpoint.pt", "log.jsonl", "sheet.png"}


def test_a_full_disk_leaves_both_checkpoints(tmp_path):
    train_linear(tmp_path, steps=4)
    names = ["checkpoint.pt", "checkpoint.before.pt"]
    before = [(tmp_path / name).read_bytes() for name in names]
    with full_disk(), pytest.raises(UserError):
        train_linear(tmp_path, resume=True)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    train_linear(tmp_path)
    path = tmp_path / "checkpoint.pt"
    found, saved = torch.load(path, weights_only=True), bytearray(path.read_bytes())
    weight = found["state"]["net"]["weight"].numpy().tobytes()
    place = saved.index(weight)
    saved[place + 1] ^= 4
    path.write_bytes(saved)
    with pytest.raises(UserError, match=r"cannot read .*checkpoint\.pt: it is damaged"):
        train_linear(tmp_path, resume=True)
