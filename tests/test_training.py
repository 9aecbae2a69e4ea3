import json
import math
import os
import shlex
import sys
import warnings

import pytest
import torch
from conftest import equal, tiny_run, train_linear

import flags
from model import ModelConfig
from text import TextConfig
from training import (
    causal_config,
    read_config,
    start_run,
    train,
    write_trained,
)
from weights import UserError


# --------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("die_at", [3, 6, 8])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, die_at):
    _, whole = train_linear(tmp_path / "whole")
    with pytest.raises(SystemError):
        train_linear(tmp_path / "cut", die_at=die_at)
    seconds, resumed = train_linear(tmp_path / "cut", resume=True)
    assert seconds is not None
    assert equal(resumed, whole)


def test_minutes_stop_a_run_before_its_end(tmp_path):
    assert train_linear(tmp_path, minutes=1e-9)[0] is None
    assert train_linear(tmp_path, resume=True, minutes=1e-9)[0] is None


def test_a_run_that_minutes_stopped_resumes_to_the_same_weights(tmp_path):
    _, whole = train_linear(tmp_path / "whole")
    train_linear(tmp_path / "cut", minutes=1e-9)
    seconds, resumed = train_linear(tmp_path / "cut", resume=True)
    assert seconds is not None
    assert equal(resumed, whole)


def test_log_has_every_tenth_step_once_after_a_resume(tmp_path):
    with pytest.raises(SystemError):
        train_linear(tmp_path, steps=30, die_at=21)
    train_linear(tmp_path, steps=30, resume=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20, 29]


@pytest.mark.parametrize("damage", [{"a": 1, 3: 4}, "not JSON", '{"step": "x"}', "\xff"])
def test_damaged_lines_of_a_log_are_dropped(tmp_path, damage):
    train_linear(tmp_path, steps=30, minutes=1e-9)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + f"{damage}\n".encode("latin-1") + whole[:9])
    train_linear(tmp_path, steps=30, resume=True)
    lines = log.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20, 29]


def test_a_run_that_died_before_its_first_checkpoint_has_one_log(tmp_path):
    with pytest.raises(SystemError):
        train_linear(tmp_path, save_every=99, die_at=3)
    train_linear(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_run_is_not_shorter_than_what_is_done(tmp_path):
    train_linear(tmp_path)
    with pytest.raises(UserError, match="9 steps are done, more than --steps 5"):
        train_linear(tmp_path, steps=5, resume=True)


def test_the_bar_says_why_it_stands_still(tmp_path, capsys):
    train_linear(tmp_path)
    assert "measuring samples" in capsys.readouterr().err


def test_a_stopped_run_ends_with_the_command_that_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/stage.py", "--out", "my runs"])
    train_linear(tmp_path, minutes=1e-9)
    assert capsys.readouterr().out.splitlines()[-1] == "python stage.py --out 'my runs' --resume"


def test_torchs_warning_of_mixed_dtypes_is_not_shown(tmp_path):
    def step(i, generator):
        warnings.warn("Mismatch dtype between input and weight: input dtype = ...", stacklevel=2)
        warnings.warn("another", stacklevel=2)
        return {}

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(tiny_run(tmp_path, steps=1), {"net": torch.nn.Linear(1, 1)}, step, lambda path: {})
    assert [str(warning.message) for warning in shown] == ["another"]


# ------------------------------------------------------------------------------- runs that fail
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_run_that_fails_says_where_and_what_to_do(tmp_path, factor):
    words = f"{tmp_path} failed at step 1: loss is {factor}.*begin again with a lower --lr than 0.1"
    with pytest.raises(UserError, match=words):
        train_linear(tmp_path, fail_at=1, factor=factor)


def test_an_infinite_gradient_alone_ends_a_run(tmp_path):
    with pytest.raises(UserError, match="step 3: grad is"):
        train_linear(tmp_path, fail_at=3, factor=1e38)


def test_a_run_that_fails_at_once_writes_nothing(tmp_path):
    with pytest.raises(UserError):
        train_linear(tmp_path, fail_at=0)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "device", ["cpu", "meta"]
)  # meta stands for a GPU, which is not waited for
@pytest.mark.parametrize("fail_at", [4, 5])
def test_a_run_that_fails_keeps_its_last_checkpoint(tmp_path, device, fail_at):
    train_linear(tmp_path / "good", steps=4)
    with pytest.raises(
        UserError, match=f"step {fail_at}: .*--resume its last checkpoint with a lower"
    ):
        train_linear(tmp_path / "bad", fail_at=fail_at, device=torch.device(device))
    assert torch.load(tmp_path / "bad" / "checkpoint.pt", weights_only=True)["step"] == 4


def test_a_run_that_failed_goes_on_from_its_checkpoint(tmp_path):
    _, whole = train_linear(tmp_path / "whole")
    with pytest.raises(UserError):
        train_linear(tmp_path / "cut", fail_at=5)
    assert equal(train_linear(tmp_path / "cut", resume=True)[1], whole)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = torch.nn.Linear(1, 1)

    def step(i, generator):
        net.weight.data.fill_(math.inf)
        return {"loss": 1.0}

    with pytest.raises(UserError, match="largest weight is inf"):
        train(tiny_run(tmp_path, steps=1), {"net": net}, step, lambda path: {})
    assert not os.path.exists(tmp_path / "checkpoint.pt")


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    def step(i, generator):
        os.symlink("/dev/full", tmp_path / "log.jsonl")
        return {"loss": 1.0}

    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left"):
        train(tiny_run(tmp_path), {"net": torch.nn.Linear(1, 1)}, step, lambda path: {})


# --------------------------------------------------------------------------------------- settings
def start(out, *arguments):
    """`start_run` of a stage that has a flag of its own."""
    parser = flags.training_parser("", 9, 1, 0.1, str(out))
    parser.add_argument("--teacher", default="none")
    return start_run(parser.parse_args(["--device", "cpu", *map(str, arguments)]))


def begin(out, *arguments):
    """A run that has made one step of its 9."""
    settings = start(out, *arguments).settings
    train_linear(out, minutes=1e-9, settings=settings)


@pytest.mark.parametrize(
    ("flag", "value"), [("--seed", 1), ("--batch-size", 2), ("--teacher", "another")]
)
def test_a_resumed_run_cannot_change_what_it_learns(tmp_path, flag, value):
    begin(tmp_path)
    with pytest.raises(UserError, match=f"cannot go on with {flag} {value}, not"):
        start(tmp_path, "--resume", flag, value)


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--steps", 12, "steps"),
        ("--lr", 0.5, "lr"),
        ("--save-every", 7, "save_every"),
        ("--minutes", 3.0, "minutes"),
        ("--dtype", "bfloat16", None),
        ("--threads", 1, None),
    ],
)
def test_a_resumed_run_says_what_it_changes(tmp_path, capsys, flag, value, field):
    begin(tmp_path)
    resumed = start(tmp_path, "--resume", flag, value)
    assert f"goes on with {flag} {value}, not" in capsys.readouterr().out
    assert field is None or getattr(resumed, field) == value


def test_a_resumed_run_that_changes_nothing_says_nothing(tmp_path, capsys):
    begin(tmp_path)
    capsys.readouterr()
    start(tmp_path, "--resume")
    assert "goes on" not in capsys.readouterr().out


def test_a_file_with_other_contents_is_another_setting(tmp_path):
    path = tmp_path / "teacher"
    path.write_text("one")
    begin(tmp_path / "run", "--teacher", path)
    start(tmp_path / "run", "--resume", "--teacher", path.rename(tmp_path / "moved"))
    path.write_text("another")
    with pytest.raises(UserError, match="--teacher"):
        start(tmp_path / "run", "--resume", "--teacher", path)


def test_a_resumed_run_has_the_learning_rate_that_it_is_given(tmp_path):
    train_linear(tmp_path / "slow", minutes=1e-9)
    train_linear(tmp_path / "same", minutes=1e-9)
    _, slow = train_linear(tmp_path / "slow", resume=True, lr=1e-9)
    _, same = train_linear(tmp_path / "same", resume=True)
    _, first = train_linear(tmp_path / "first", steps=1)
    assert not equal(same, slow)
    assert torch.allclose(slow[0], first[0], atol=1e-3)


@pytest.mark.parametrize("found", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named_before_the_run_starts(tmp_path, found):
    (tmp_path / "checkpoint.pt").write_bytes(found)
    with pytest.raises(UserError, match=r"cannot read .*checkpoint\.pt"):
        start(tmp_path, "--resume")


@pytest.mark.parametrize("saved", [{"settings": "all"}, {"base_lr": 5}, {}])
def test_damaged_settings_are_named_before_the_run_starts(tmp_path, saved):
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        start(tmp_path, "--resume")


class Code:
    """Something that a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("run",)


def test_code_in_a_checkpoint_is_not_run_nor_is_it_told_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"settings": Code()}, "checkpoint.pt")
    with pytest.raises(UserError, match="holds more than numbers and text") as raised:
        start(tmp_path, "--resume")
    assert "weights_only" not in str(raised.value)
    assert os.listdir() == ["checkpoint.pt"]


def test_a_log_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*log\.jsonl"):
        train_linear(tmp_path)


def test_a_second_training_into_a_folder_is_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")  # Windows has none
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another training writes to"):
        start(tmp_path)
    os.close(other)
    start(tmp_path)


# ------------------------------------------------------------------------- before the first step
def test_a_run_that_never_was_is_not_resumed(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        start(tmp_path / "nowhere", "--resume")
    assert not os.listdir(tmp_path)


def test_a_folder_of_other_things_is_not_resumed(tmp_path):
    (tmp_path / "latents").mkdir()
    with pytest.raises(UserError, match="nothing to resume"):
        start(tmp_path, "--resume")


def test_a_run_that_was_stopped_in_its_preparation_is_resumed(tmp_path, capsys):
    _, whole = train_linear(tmp_path / "whole")
    start(tmp_path / "cut")
    start(tmp_path / "cut", "--resume")
    assert "no checkpoint yet" in capsys.readouterr().out
    assert equal(train_linear(tmp_path / "cut", resume=True)[1], whole)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_that_was_killed_in_its_first_checkpoint_leaves_nothing(tmp_path, resume):
    (tmp_path / ".checkpoint.pt.0123abcd.tmp").write_bytes(b"half of a checkpoint")
    start(tmp_path, *resume)
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------- what a run writes
def test_what_to_do_with_the_weights_is_the_last_line(tmp_path, capsys):
    config, tensors = TextConfig(), {"a": torch.ones(1)}
    run = tiny_run(tmp_path / "my run")
    path = write_trained(run, "x", tensors, config, 1.0, then="sample.py --weights")
    assert path == str(tmp_path / "my run" / "x.safetensors")
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last) == ["next:", "python", "sample.py", "--weights", path]


# ------------------------------------------------------------------------------------ the configs
def test_small_is_the_default_config():
    assert read_config("small") == ModelConfig()


def test_a_config_file_holds_fields_of_the_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dim": 48, "num_heads": 1, "patch_size": [1, 2, 2]}))
    assert read_config(str(path)) == ModelConfig(dim=48, num_heads=1)


def test_chunk_window_and_steps_change_where_they_are_given():
    changed = causal_config(ModelConfig(chunk=5, window=6, steps=7), None, 3, 2)
    assert changed == ModelConfig(chunk=5, window=3, steps=2)


def test_another_number_of_steps_forgets_the_list_of_times():
    config = ModelConfig(steps=3, times=(1000, 280, 120))
    assert causal_config(config, 2, None, 3).times == (1000, 280, 120)
    assert causal_config(config, None, None, 2).times == ()


@pytest.mark.parametrize("given", [(0, None, None), (None, 0, None), (None, None, 0)])
def test_chunk_window_and_steps_of_less_than_1_are_refused(given):
    with pytest.raises(UserError, match="from 1 to"):
        causal_config(ModelConfig(), *given)
