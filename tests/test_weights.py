import os

import pytest
import torch
from conftest import TINY, tiny_action_model, tiny_model, tiny_vae
from safetensors import safe_open

from model import DiT, ModelConfig
from nfd_teacher import ActionConfig, ActionDiT
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import UserError, check_fit, load_model, read_weights, save_weights


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
