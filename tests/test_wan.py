import json
import os
import pickle
import re
import zipfile

import pytest
import torch
from conftest import generator, tiny_model
from safetensors.torch import save_file

import wan
from model import DiT
from weights import UserError, check_role, load_model

# heads, width of a head, ffn, frequencies, channels, text width, layers, patch
SHAPES = [
    (2, 12, 40, 8, 4, 10, 2, (1, 2, 2)),
    (3, 10, 17, 6, 5, 7, 1, (1, 1, 2)),
    (1, 26, 33, 12, 3, 9, 3, (2, 2, 1)),
]


def theirs(heads, width, ffn, freq, channels, text, layers, patch):
    """A random transformer of diffusers, whose tables and norms are not what they start as."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": heads, "attention_head_dim": width, "ffn_dim": ffn}
    sizes |= {"freq_dim": freq, "in_channels": channels, "out_channels": channels}
    model = diffusers.WanTransformer3DModel(
        **sizes, text_dim=text, num_layers=layers, patch_size=patch
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(shape):
    """Latents [2, T, C, h, w], one time for each clip, text [2, 5, text]."""
    (*_, channels, text, _, patch), g = shape, generator()
    x = torch.randn(2, 2 * patch[0], channels, 3 * patch[1], 2 * patch[2], generator=g)
    return x, torch.rand(2, generator=g), torch.randn(2, 5, text, generator=g)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------------- transformers
@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_our_transformer_is_that_of_diffusers(shape, tmp_path):
    model, (x, t, text) = theirs(*shape), inputs(shape)
    expected = model(x.transpose(1, 2), 1000 * t, text).sample.transpose(1, 2)
    model.save_pretrained(tmp_path)
    ours = load_model(DiT, str(tmp_path))
    made = ours(x, t[:, None].expand(x.shape[:2]), text)
    assert relative(made, expected) < 1e-5


def public_model(**fields):
    """A tiny model with heads of the width that a checkpoint without a config.json has."""
    return tiny_model(dim=256, num_heads=2, num_layers=2, text_dim=10, **fields)


def as_diffusers(name):
    """Translate a name of the release into one of diffusers."""
    pairs = [("time_embedding.0", "condition_embedder.time_embedder.linear_1")]
    pairs += [("time_embedding.2", "condition_embedder.time_embedder.linear_2")]
    pairs += [("text_embedding.0", "condition_embedder.text_embedder.linear_1")]
    pairs += [("text_embedding.2", "condition_embedder.text_embedder.linear_2")]
    pairs += [("time_projection.1", "condition_embedder.time_proj"), ("head.head", "proj_out")]
    pairs += [("head.modulation", "scale_shift_table"), ("modulation", "scale_shift_table")]
    pairs += [("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2")]
    pairs += [("self_attn", "attn1"), ("cross_attn", "attn2"), (".o.", ".to_out.0.")]
    pairs += [(f".{part}.", f".to_{part}.") for part in "qkv"]
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def write(layout, folder, model):
    """Write a model in one of the five layouts: -> its path."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, index = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index"
    path = folder / (one if layout in ("release", "diffusers") else "model.pt")
    if layout == "release":
        save_file(tensors, path, {"format": "pt"})
    elif layout == "diffusers":
        save_file({as_diffusers(name): t for name, t in tensors.items()}, path)
    elif layout == "shards":
        names, places = list(tensors), {}
        for n, part in enumerate((names[::2], names[1::2])):
            file = f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            places |= dict.fromkeys(part, file)
        path = folder / f"{index}.json"
        path.write_text(json.dumps({"weight_map": places}))
    elif layout == "causvid":
        torch.save({"generator": {f"model.{n}": t for n, t in tensors.items()}}, path)
    else:
        wrapped = "model._fsdp_wrapped_module."
        named = {
            wrapped + n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t
            for n, t in tensors.items()
        }
        torch.save({layout: named, "step": 9}, path)
    return str(path)


KINDS = {"release": "wan", "diffusers": "wan", "shards": "wan", "causvid": "causvid"}
KINDS |= {"generator_ema": "self-forcing", "generator": "self-forcing"}


@pytest.mark.parametrize("layout", KINDS)
def test_a_checkpoint_of_each_layout_comes_back(layout, tmp_path, capsys):
    model = public_model()
    loaded = load_model(DiT, write(layout, tmp_path, model))
    assert f"holds {KINDS[layout]}; preset {KINDS[layout]}" in capsys.readouterr().out
    assert loaded.config.num_heads == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["", "diffusion_pytorch_model-00002-of-00002.safetensors"])
def test_shards_are_found_by_their_folder_and_by_one_of_them(tmp_path, kind):
    write("shards", tmp_path, public_model())
    assert load_model(DiT, str(tmp_path / kind)).config.num_layers == 2


def test_a_checkpoint_is_loaded_straight_in_bf16(tmp_path):
    loaded = load_model(DiT, write("release", tmp_path, public_model()), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_loaded_file_has_no_second_copy_in_memory(tmp_path, monkeypatch):
    """In the dtype of the file its tensors are the mapped ones."""
    found = {}
    read = wan.read_checkpoint

    def keep(path):
        found.update(read(path)[0])
        return found, None

    monkeypatch.setattr(wan, "read_checkpoint", keep)
    loaded = load_model(DiT, write("release", tmp_path, public_model()))
    for name, parameter in loaded.named_parameters():
        assert parameter.data_ptr() == found[name].data_ptr()


def test_fewer_layers_are_the_first_ones(tmp_path):
    model = public_model()
    loaded = load_model(DiT, write("causvid", tmp_path, model), layers=1)
    assert len(loaded.blocks) == loaded.config.num_layers == 1
    assert torch.equal(loaded.blocks[0].modulation, model.blocks[0].modulation)


@pytest.mark.parametrize(
    ("kind", "shift", "times"),
    [
        ("causvid", 8, [1, 28 / 37, 12 / 23, 0]),
        ("self-forcing", 5, [1, 0.9375, 5 / 6, 0.625, 0]),
    ],
)
def test_a_preset_has_the_published_shift_and_times(tmp_path, kind, shift, times):
    config = load_model(DiT, write("causvid", tmp_path, public_model()), preset=kind).config
    assert (config.shift, config.chunk, config.window) == (shift, 3, 7)
    grid = DiT(config).schedule.timesteps(config.steps)
    assert torch.allclose(grid, torch.tensor(times, dtype=torch.float64), atol=1e-12)


def test_the_times_of_causvid_are_entries_of_a_table_of_50_steps():
    schedule = DiT.schedule.fget(public_model(**wan.PRESETS["causvid"]))
    table = schedule.timesteps(50)
    assert torch.equal(schedule.timesteps(3)[:3].float(), table[[0, 36, 44]].float())
    assert (1000 * table[[0, 36, 44]]).round().tolist() == [1000, 757, 522]


def test_the_teacher_has_the_published_preset():
    assert (wan.TEACHER_STEPS, wan.GUIDANCE, wan.PRESETS["wan"]["shift"]) == (50, 5, 5)


# ---------------------------------------------------------------------------------- what is refused
def refused(path, network=DiT):
    """The line that refuses a file."""
    with pytest.raises(UserError) as raised:
        load_model(network, str(path))
    told = str(raised.value)
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("img_emb.proj.0.weight", "image-to-video"),
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
        ("condition_embedder.image_embedder.norm1.weight", "image-to-video"),
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "LoRA"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "LoRA"),
        ("face_adapter.fuser_blocks.0.linear1_q.weight", "Wan 2.2"),
        ("casual_audio_encoder.weights", "Wan 2.2"),
        ("control_adapter.conv.weight", "camera control"),
        ("blocks.0.ffn.0.scale_weight", "quantised"),
        ("decoder.middle.0.residual.0.gamma", "autoencoder"),
        ("shared.weight", "text encoder"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused_by_name(tmp_path, key, title):
    tensors = {name: tensor.clone() for name, tensor in public_model().state_dict().items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(tensors | {key: torch.ones(1)}, path)
    assert title in refused(path)


EXPERTS = [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")]


@pytest.mark.parametrize("folders", EXPERTS)
def test_two_experts_beside_each_other_are_refused(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir()
        path = write("release", tmp_path / name, public_model())
    for found in (path, os.path.dirname(path)):
        assert "two experts of Wan 2.2" in refused(found)


def test_files_of_two_experts_beside_each_other_are_refused(tmp_path):
    for name in ("a_high_noise.safetensors", "a_low_noise.safetensors"):
        os.replace(write("release", tmp_path, public_model()), tmp_path / name)
    assert "two experts of Wan 2.2" in refused(tmp_path / "a_low_noise.safetensors")


@pytest.mark.parametrize("name", ["low_noise", "transformer", "high_noise_model", "model"])
def test_a_folders_name_alone_says_nothing(tmp_path, name):
    for outer in ("a", "low_noise", "high_noise"):
        (tmp_path / outer / name).mkdir(parents=True)
        path = write("release", tmp_path / outer / name, public_model())
    assert load_model(DiT, path)


@pytest.mark.parametrize(("fields", "title"), [({"in_dim": 48, "out_dim": 48}, "TI2V-5B")])
def test_other_latents_are_refused(tmp_path, fields, title):
    assert title in refused(write("release", tmp_path, public_model(**fields)))


def test_a_transformer_that_takes_an_image_beside_the_noise_is_refused(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in public_model().state_dict().items()}
    tensors["patch_embedding.weight"] = torch.zeros(256, 20, 1, 2, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    assert "20 channels" in refused(tmp_path / "a.safetensors")


def test_a_transformer_of_another_size_is_loaded(tmp_path):
    """As the 14B model differs."""
    path = write("release", tmp_path, public_model(ffn_dim=40, freq_dim=12))
    assert load_model(DiT, path).config.ffn_dim == 40


def test_a_head_count_that_is_told_counts(tmp_path):
    path = write("release", tmp_path, public_model())
    (tmp_path / "config.json").write_text('{"num_heads": 4}')
    assert load_model(DiT, path).config.num_heads == 4


@pytest.mark.parametrize("told", ["{", "[3]", '{"num_heads": 7}', '{"num_heads": true}'])
def test_a_config_that_does_not_fit_is_refused(tmp_path, told):
    path = write("release", tmp_path, public_model())
    (tmp_path / "config.json").write_text(told)
    assert "config.json" in refused(path)


DAMAGED = {
    "patch_embedding.weight": torch.ones(256, 8),
    "head.head.weight": torch.ones(3, 256),
    "blocks.0.ffn.0.weight": torch.ones(16, 0),
    "time_embedding.0.weight": torch.ones(256, 7),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tensor_is_not_blamed_on_the_config(tmp_path, name):
    tensors = {key: tensor.clone() for key, tensor in public_model().state_dict().items()}
    save_file(tensors | {name: DAMAGED[name]}, tmp_path / "a.safetensors")
    told = refused(tmp_path / "a.safetensors")
    assert "damaged" in told
    assert "config.json" not in told


@pytest.mark.parametrize("layers", [None, 1])
def test_a_gap_in_the_blocks_is_refused_at_any_depth(tmp_path, layers):
    tensors = public_model().state_dict()
    tensors = {name.replace("blocks.1.", "blocks.2."): t.clone() for name, t in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\..* is missing"):
        load_model(DiT, str(tmp_path / "a.safetensors"), layers=layers)


def test_weights_under_two_names_are_refused(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in public_model().state_dict().items()}
    save_file(tensors | {"model.head.head.bias": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "two names" in refused(tmp_path / "a.safetensors")


def test_a_missing_shard_is_named(tmp_path):
    path = write("shards", tmp_path, public_model())
    os.remove(tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    assert "00002-of-00002" in refused(path)


def test_a_truncated_shard_is_named(tmp_path):
    path = write("shards", tmp_path, public_model())
    shard = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "00001-of-00002" in refused(path)


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path):
    path = write("shards", tmp_path, public_model())
    index = json.loads((tmp_path / os.path.basename(path)).read_text())
    index["weight_map"]["blocks.9.ffn.0.bias"] = next(iter(index["weight_map"].values()))
    (tmp_path / os.path.basename(path)).write_text(json.dumps(index))
    assert "blocks.9.ffn.0.bias" in refused(path)


@pytest.mark.parametrize("part", [slice(200), slice(-200), slice(0)])
def test_a_truncated_pt_file_is_named(tmp_path, part):
    path = tmp_path / "model.pt"
    write("causvid", tmp_path, public_model())
    path.write_bytes(path.read_bytes()[part])
    assert "model.pt" in refused(path)


def old_format(saved, path):
    torch.save(saved, path, _use_new_zipfile_serialization=False)


def test_a_pt_file_of_the_old_format_is_loaded(tmp_path):
    tensors = {f"model.{name}": tensor for name, tensor in public_model().state_dict().items()}
    old_format({"generator": tensors}, tmp_path / "model.pt")
    assert load_model(DiT, str(tmp_path / "model.pt")).config.num_layers == 2


@pytest.mark.parametrize("save", [torch.save, old_format])
@pytest.mark.parametrize("end", [3, 200, -200])
def test_a_pt_file_that_is_cut_short_is_refused_in_our_words(tmp_path, save, end):
    path = tmp_path / "model.pt"
    save({"generator": {"a": torch.ones(999)}}, path)
    path.write_bytes(path.read_bytes()[:end])
    assert re.search(r"model\.pt: it is damaged, .*; download it again$", refused(path))


def compressed(path):
    """Write a zip again, compressed."""
    with zipfile.ZipFile(path) as parts:
        contents = {part: parts.read(part) for part in parts.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        for name, content in contents.items():
            parts.writestr(name, content)


def test_a_compressed_pt_file_is_refused(tmp_path):
    """Which could be a gigabyte of zeros, and cannot be mapped."""
    numbers = torch.randint(-(2**31), 2**31, (9999,), dtype=torch.int32).view(torch.float32)
    torch.save({"generator": {"a": numbers}}, tmp_path / "model.pt")
    compressed(tmp_path / "model.pt")
    assert "not what torch.save writes" in refused(tmp_path / "model.pt")


def test_a_tensor_larger_than_what_it_is_stored_in_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"generator": {"a": torch.zeros(1).expand(10**9, 10**3)}}, path)
    assert "larger than the file" in refused(path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pt_file_with_code_in_it_is_refused_and_not_executed(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"generator": Code()}, tmp_path / "model.pt")
    assert "model.pt" in refused(tmp_path / "model.pt")
    assert not os.path.exists("executed")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"generator": 3},
        {"a": 1},
        torch.ones(3),
        [1],
        {0: torch.ones(3)},
    ],
)
def test_a_pt_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_that_are_not_floating_point_are_refused(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in public_model().state_dict().items()}
    torch.save({"generator": tensors}, tmp_path / "model.pt")
    assert "floating point" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("change", ["missing", "added", "nan"])
def test_weights_that_are_not_whole_are_refused(tmp_path, change):
    model = public_model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change == "missing":
        del tensors["blocks.1.norm3.bias"]
    elif change == "added":
        tensors["blocks.1.norm3.more"] = torch.ones(1)
    else:
        tensors["blocks.1.norm3.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    assert "blocks.1.norm3" in refused(tmp_path / "a.safetensors")


def test_a_folder_without_weights_is_named(tmp_path):
    assert str(tmp_path) in refused(tmp_path)


def test_a_bidirectional_checkpoint_is_no_student(tmp_path):
    with pytest.raises(
        UserError, match=r"holds 'teacher', not student; .*--teacher, or .*--preset"
    ):
        check_role(write("release", tmp_path, public_model()), "student")


def test_a_distilled_checkpoint_is_no_teacher(tmp_path):
    with pytest.raises(UserError, match="holds 'student', not teacher; it goes with --weights"):
        check_role(write("causvid", tmp_path, public_model()), "teacher")
