import glob
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, full_disk, tiny_action_model, tiny_model, tiny_vae
from safetensors import safe_open
from safetensors.torch import save_file

from model import DiT, ModelConfig
from nfd_teacher import ActionConfig, ActionDiT
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import (
    ROOT,
    UserError,
    beside,
    check_fit,
    check_role,
    command_line,
    file_hash,
    load_model,
    made_with,
    provenance,
    read_weights,
    save_weights,
    shipped,
    written,
)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "w.safetensors")


def save(path, model):
    save_weights(path, model.state_dict(), model.config)


@pytest.mark.parametrize("build", [tiny_model, tiny_action_model, tiny_vae, TextEncoder])
def test_a_network_comes_back_from_its_file_in_bf16(path, build):
    model = build()
    save(path, model)
    loaded = load_model(type(model), path)
    assert loaded.config == model.config
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a.bfloat16().float(), b)


def test_weights_are_bf16_in_the_file_and_float32_when_read(path):
    save_weights(path, {"a": torch.ones(1000)}, TextConfig(3))
    assert read_weights(path)[0]["a"].dtype == torch.float32
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").dtype == torch.bfloat16


def test_the_metadata_says_where_weights_come_from(path):
    save_weights(path, {"a": torch.ones(1000)}, TextConfig(3), steps=7, quality="good")
    assert read_weights(path)[1]["text_dim"] == 3
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert {"command", "commit", "hardware", "torch"} <= set(found)
    assert found["steps"] == "7"
    assert found["quality"] == "good"


def test_writing_weights_leaves_one_file(path, tmp_path):
    save_weights(path, {"a": torch.ones(1000)}, TextConfig(3))
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_weights_can_be_read_by_whom_the_umask_lets(path):
    before = os.umask(0o022)
    try:
        save_weights(path, {"a": torch.ones(1000)}, TextConfig(3))
    finally:
        os.umask(before)
    assert os.stat(path).st_mode & 0o777 == 0o644


def test_a_full_disk_is_named_and_what_was_there_stays(path, tmp_path):
    save_weights(path, {"a": torch.ones(10)}, TextConfig(3))
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*w\.safetensors: File too la"):
        save_weights(path, {"a": torch.ones(9000)}, TextConfig(3))
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert read_weights(path)[0]["a"].shape == (10,)


def test_a_machine_without_git_does_not_know_the_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == "unknown"


def test_the_command_line_is_one_that_a_shell_takes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/sample.py", "--prompt", "a red circle"])
    assert command_line() == "python sample.py --prompt 'a red circle'"


def test_names_from_a_file_do_not_break_the_line(path):
    save_weights(
        path, tiny_model().state_dict() | {"a\x1b[31m\n": torch.ones(1)}, ModelConfig(**TINY)
    )
    with pytest.raises(UserError) as raised:
        load_model(DiT, path)
    assert str(raised.value).isprintable()


def test_missing_weights_are_named():
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        load_model(VAE, "nowhere.safetensors")


@pytest.mark.parametrize("part", [slice(100), slice(-10), slice(0), None])
def test_damaged_weights_are_named(path, tmp_path, part):
    save_weights(path, {"a": torch.ones(1000)}, TextConfig(3))
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"not safetensors at all" if part is None else file.read_bytes()[part])
    with pytest.raises(UserError, match=r"w\.safetensors"):
        read_weights(path)


def huge_header(path):
    """The header says that it is longer than any file."""
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def pickled(path):
    torch.save({"a": torch.ones(3)}, path)


def nested(path):
    """JSON that is nested deeper than Python goes."""
    save_file({"a": torch.ones(3)}, path, {"config": 100_000 * "["})


def broken(path):
    save_file({"a": torch.ones(3)}, path, {"config": "{broken"})


@pytest.mark.parametrize("make", [huge_header, pickled, nested, broken, os.mkdir])
def test_what_is_no_weights_file_is_named_in_one_line(tmp_path, make):
    make(tmp_path / "w")
    with pytest.raises(UserError, match="/w") as raised:
        load_model(VAE, str(tmp_path / "w"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    model = tiny_model()
    model.head.head.bias.data[3] = value
    save(path, model)
    with pytest.raises(UserError, match=r"head\.head\.bias is not finite"):
        load_model(DiT, path)


def test_weights_of_another_size_do_not_fit(path):
    save_weights(path, tiny_model(dim=32).state_dict(), ModelConfig(**TINY))
    with pytest.raises(UserError, match="do not fit"):
        load_model(DiT, path)


@pytest.mark.parametrize("build", [tiny_action_model, tiny_vae, TextEncoder])
def test_weights_of_another_network_are_no_dit(path, build):
    save(path, build())
    with pytest.raises(UserError, match="does not hold a DiT"):
        load_model(DiT, path)


def test_weights_of_a_dit_are_no_action_model(path):
    save(path, tiny_model(chunk=1))
    with pytest.raises(UserError, match="do not fit"):
        load_model(ActionDiT, path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 0), ("num_heads", 3), ("chunk", 0), ("steps", -1), ("dim", "wide")],
)
def test_a_config_that_no_model_can_have_is_refused(path, field, value):
    model = tiny_model()
    setattr(model.config, field, value)
    save(path, model)
    with pytest.raises(UserError, match="do not fit the model"):
        load_model(DiT, path)


def save_with(path, model, **changed):
    """Weights whose config says something else; None: says nothing."""
    config = vars(model.config) | changed
    config = {name: value for name, value in config.items() if value is not None}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, {"config": json.dumps(config)})


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (tiny_model, "dim", 192_000_000),
        (tiny_model, "num_layers", 192_000_000),
        (tiny_model, "ffn_dim", 900_000),
        (tiny_model, "shift", float("inf")),
        (tiny_model, "patch_size", [1, 2000, 2000]),
        (tiny_model, "patch_size", 3),
        (tiny_action_model, "num_actions", 999_999),
        (tiny_vae, "dim", 960_000),
        (tiny_vae, "time_stride", -4),
        (tiny_vae, "latent_dim", [8]),
        (TextEncoder, "bytes", 2.5),
        (TextEncoder, "bytes", 0),
        (TextEncoder, "words", "many"),
        (TextEncoder, "text_dim", {"a": 1}),
    ],
)
def test_odd_and_gigantic_fields_are_refused_at_once(path, build, field, value):
    model, started = build(), time.monotonic()
    save_with(path, model, **{field: value})
    with pytest.raises(UserError, match="do not fit the model") as raised:
        load_model(type(model), path)
    assert time.monotonic() - started < 5
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("size", [100_000, 900_000])
def test_a_gigantic_network_is_not_built(path, size):
    model = tiny_model()
    save_with(path, model, dim=size, ffn_dim=size, num_layers=8)
    with pytest.raises(UserError, match=r"larger than the file|allocate"):
        load_model(DiT, path)


def test_a_field_that_no_network_has_is_refused(path):
    save_with(path, tiny_model(), depth=9)
    with pytest.raises(UserError, match="does not hold a DiT"):
        load_model(DiT, path)


def test_a_field_that_is_missing_has_its_default(path):
    save_with(path, tiny_model(), steps=None)
    assert load_model(DiT, path).config.steps == ModelConfig().steps


def test_a_size_that_is_missing_is_refused(path):
    save_with(path, tiny_model(), dim=None)
    with pytest.raises(UserError, match="do not fit"):
        load_model(DiT, path)


@pytest.mark.parametrize("config", ["null", "[]", "3", '"DiT"'])
def test_a_config_that_is_no_dict_is_refused(path, config):
    save_file(tiny_model().state_dict(), path, {"config": config})
    with pytest.raises(UserError, match="does not hold a DiT"):
        load_model(DiT, path)


@pytest.mark.parametrize("change", ["missing", "added"])
def test_weights_of_other_names_do_not_fit(path, change):
    model = tiny_model()
    tensors = model.state_dict() | {"more": torch.ones(1)}
    if change == "missing":
        del tensors["more"], tensors["head.head.bias"]
    save_weights(path, tensors, model.config)
    with pytest.raises(UserError, match=r"is missing|none of its parameters|larger than"):
        load_model(DiT, path)


def test_a_field_that_is_0_is_one_that_the_network_lacks(path):
    config = ActionConfig(**TINY)
    config.num_actions = 0
    save_weights(path, tiny_model().state_dict(), config)
    assert isinstance(load_model(DiT, path), DiT)


def test_transformer_vae_and_encoder_of_one_kind_fit():
    check_fit(tiny_model(), tiny_vae(), TextEncoder())


def test_a_transformer_of_other_latents_does_not_fit():
    vae = VAE(VAEConfig(latent_dim=4, dim=16, fine_dim=16, pixel_dim=16))
    with pytest.raises(UserError, match=r"8 latent channels .* does not go with the VAE \(4\)"):
        check_fit(tiny_model(), vae, TextEncoder())


def test_a_transformer_of_other_prompts_does_not_fit():
    with pytest.raises(UserError, match=r"width 64, does not .* text encoder \(32\)"):
        check_fit(tiny_model(), tiny_vae(), TextEncoder(TextConfig(text_dim=32)))


# ------------------------------------------------------------------------------ what goes together
@pytest.fixture
def family(tmp_path):
    """Paths of a VAE, a text encoder, and a transformer that names both."""
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("vae", "text_encoder")}
    for path in paths.values():
        save_weights(path, {"a": torch.ones(9)}, TextConfig(3), about=path)
    origin = {name: file_hash(path) for name, path in paths.items()}
    paths["teacher"] = str(tmp_path / "teacher.safetensors")
    save_weights(paths["teacher"], {"a": torch.ones(9)}, TextConfig(3), **origin)
    return paths


def test_a_transformer_goes_with_what_it_was_made_with(family):
    made_with(family["teacher"], family["vae"], family["text_encoder"])


@pytest.mark.parametrize(("name", "flag"), [("vae", "--vae"), ("text_encoder", "--text-encoder")])
def test_a_transformer_does_not_go_with_others(family, name, flag):
    given = family | {name: shipped(name)}
    with pytest.raises(UserError, match=f"another .*name that one with {flag}"):
        made_with(family["teacher"], given["vae"], given["text_encoder"])


def test_a_transformer_that_names_nothing_goes_with_all(family):
    made_with(family["vae"], shipped("vae"), family["text_encoder"])


def test_a_missing_transformer_is_named(family):
    with pytest.raises(UserError, match="nowhere"):
        made_with("nowhere", family["vae"], family["text_encoder"])


def test_what_is_beside_the_weights_comes_first(family):
    assert beside(family["teacher"], "text_encoder") == family["text_encoder"]


def test_what_is_not_beside_the_weights_is_shipped(family):
    assert beside(family["teacher"], "vae_frame") == shipped("vae_frame")


def test_what_is_beside_a_transformer_is_chosen_for_it(family):
    chosen = list(made_with(family["teacher"], None, None))
    assert chosen == [family["vae"], family["text_encoder"]]


def test_weights_of_another_role_are_refused():
    with pytest.raises(UserError, match="holds 'teacher', not student; it goes with --teacher"):
        check_role(shipped("teacher"), "student")


def test_weights_of_another_network_say_where_they_go():
    with pytest.raises(UserError, match="does not hold a TextEncoder; it goes with --vae"):
        load_model(TextEncoder, shipped("vae"))


def test_weights_of_the_right_role_are_taken():
    for name in ("student", "ode_init"):
        check_role(shipped(name), "student")


# ------------------------------------------------------------------------------ the command line
def test_a_reader_that_goes_away_ends_a_script_without_a_word():
    read, write = os.pipe()
    os.close(read)
    script = "import launch; launch.run_main(lambda: print('x' * 10**6))"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_two_processes_that_write_one_file_do_not_meet(tmp_path):
    path = str(tmp_path / "a.json")
    with written(path) as file:
        script = f"import weights\nwith weights.written({path!r}) as file: file.write(b'theirs')"
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
        file.write(b"ours")
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"ours"


def ended(main, **streams):
    """How a script ends whose main() is this Python expression."""
    script = f"import launch, torch; launch.run_main(lambda: {main})"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, **streams)


@pytest.mark.parametrize("main", ["torch.empty(2**62, dtype=torch.uint8)", "bytes(2**60)"])
def test_too_little_memory_is_told_in_one_line(main):
    run = ended(main, capture_output=True)
    assert run.returncode == 2
    assert re.fullmatch(r".*error: out of memory; .*\n", run.stderr)


def test_another_error_is_no_lack_of_memory():
    run = ended("torch.zeros(2) @ torch.zeros(3)", capture_output=True)
    assert "Traceback" in run.stderr


def test_a_script_ends_well_without_a_place_to_print():
    run = ended("print(1)", preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_full_disk_under_what_is_printed_is_told():
    if not os.path.exists("/dev/full"):
        pytest.skip("only Linux has such a file")
    with open("/dev/full", "w") as full:
        run = ended("print(1)", stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 2
    assert re.fullmatch(r".*error: no space left for what is written or printed\n", run.stderr)


def test_complex_weights_are_refused(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1, dtype=torch.complex64)}, path)
    with pytest.raises(UserError, match="not floating point"):
        read_weights(path)


def test_a_stage_is_told_in_one_line(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, path, {"stage": "x\n\x1b[31mred"})
    with pytest.raises(UserError, match=r"holds 'x\\n\\x1b"):
        check_role(path, "student")


SCRIPTS = [
    path for path in glob.glob(f"{ROOT}/*.py") if "launch.run_main(main)" in Path(path).read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=os.path.basename)
def test_ctrl_c_while_torch_is_imported_is_no_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # found before the real one
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-B", script], env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_who_imports_a_module_here_keeps_pythons_way_to_end():
    script = "import sys, weights; assert sys.excepthook is sys.__excepthook__"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
