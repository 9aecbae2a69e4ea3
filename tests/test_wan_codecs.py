import pytest
import torch
from conftest import PROMPT, generator, tiny_model
from safetensors.torch import save_file
from torch.nn import functional as F

import wan
from text import TextEncoder
from vae import VAE
from wan import FullVAE, GivenText, TinyVAE
from weights import UserError, check_fit, load_model, made_with


def video(frames, seed=0, size=(16, 24)):
    return 2 * torch.rand(1, frames, 3, *size, generator=generator(seed)) - 1


# ---------------------------------------------------------------------------- the tiny autoencoder
def tiny():
    """A random TAEW2.1 of few channels, in which every layer counts."""
    torch.manual_seed(0)
    vae = TinyVAE(latent_dim=4, dim=6, widths=(10, 8, 6, 5)).double().eval().requires_grad_(False)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vae


def remembering(tensors, name, frames):
    """TAEHV's residual block over a list of frames [1, C, H, W], one by one."""
    made, past = [], torch.zeros_like(frames[0])
    for x in frames:
        y = torch.cat([x, past], dim=1)
        for n, act in ((0, F.relu), (2, F.relu), (4, lambda y: y)):
            weight, bias = (tensors[f"{name}.conv.{n}.{part}"] for part in ("weight", "bias"))
            y = act(F.conv2d(y, weight, bias, padding=1))
        made.append(F.relu(y + x))
        past = x
    return made


def original_encode(tensors, frames):
    """TAEHV's encoder frame by frame, by the names of its file; frames in [0, 1]."""

    def conv(x, place, **options):
        bias = tensors.get(f"encoder.{place}.bias")
        return F.conv2d(x, tensors[f"encoder.{place}.weight"], bias, padding=1, **options)

    frames = [F.relu(conv(x, 0)) for x in frames]
    for place, merged in ((2, 2), (7, 2), (12, 1)):
        groups = [frames[i : i + merged] for i in range(0, len(frames), merged)]
        weight = tensors[f"encoder.{place}.conv.weight"]
        frames = [conv(F.conv2d(torch.cat(g, dim=1), weight), place + 1, stride=2) for g in groups]
        for block in range(place + 2, place + 5):
            frames = remembering(tensors, f"encoder.{block}", frames)
    return [conv(x, 17) for x in frames]


def original_decode(tensors, latents):
    """TAEHV's decoder frame by frame, by the names of its file: frames in [0, 1]."""

    def conv(x, place):
        bias = tensors.get(f"decoder.{place}.bias")
        return F.conv2d(x, tensors[f"decoder.{place}.weight"], bias, padding=1)

    frames = [F.relu(conv(3 * torch.tanh(x / 3), 1)) for x in latents]
    for place, split in ((3, 1), (9, 2), (15, 2)):
        for block in range(place, place + 3):
            frames = remembering(tensors, f"decoder.{block}", frames)
        weight = tensors[f"decoder.{place + 4}.conv.weight"]
        large = [F.interpolate(x, scale_factor=2) for x in frames]
        frames = [part for x in large for part in F.conv2d(x, weight).chunk(split, dim=1)]
        frames = [conv(x, place + 5) for x in frames]
    return [conv(F.relu(x), 22).clamp(0, 1) for x in frames][3:]


def test_the_tiny_encoder_is_that_of_its_file_frame_by_frame():
    vae, x = tiny(), video(8).double()
    expected = original_encode(vae.state_dict(), [frame / 2 + 0.5 for frame in x.unbind(1)])
    assert torch.allclose(vae.encode(x), torch.stack(expected, dim=1), atol=1e-6)


def test_the_tiny_decoder_is_that_of_its_file_frame_by_frame():
    vae, x = tiny(), 4 * torch.randn(1, 4, 4, 2, 3).double()
    expected = torch.stack(original_decode(vae.state_dict(), x.unbind(1)), dim=1)
    assert expected.shape[1] == 13
    assert torch.allclose(vae.decode(x), 2 * expected - 1, atol=1e-6)


def test_the_tiny_encoder_repeats_the_last_frame():
    vae, x = tiny(), video(5)
    longer = torch.cat([x, x[:, -1:].expand(-1, 3, -1, -1, -1)], dim=1)
    assert torch.equal(vae.encode(x), vae.encode(longer))


def test_an_image_is_a_video_that_stands_still():
    vae, x = tiny(), video(1)
    assert torch.equal(vae.encode(x), vae.encode(x.expand(-1, 4, -1, -1, -1)))


def streamed(run, parts):
    """What a codec makes of parts of a stream."""
    state = {}
    return torch.cat([run(part, state) for part in parts], dim=1)


def test_the_tiny_autoencoder_streams():
    vae, x = tiny(), video(16)
    latents = vae.encode(x)
    assert torch.allclose(streamed(vae.encode, x.split([8, 4, 4], dim=1)), latents, atol=1e-6)
    parts = latents.split([2, 1, 1], dim=1)
    assert torch.allclose(streamed(vae.decode, parts), vae.decode(latents), atol=1e-6)


def test_a_stream_for_the_tiny_encoder_has_groups_of_four():
    with pytest.raises(ValueError, match="4 n frames"):
        tiny().encode(video(5), {})


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
def test_the_tiny_autoencoder_comes_back_from_its_file(tmp_path, name):
    vae, path = tiny().float(), str(tmp_path / name)
    tensors = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    if name.endswith(".pth"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    loaded = load_model(VAE, path)
    assert torch.equal(
        loaded.decode(torch.ones(1, 2, 4, 2, 2)), vae.decode(torch.ones(1, 2, 4, 2, 2))
    )


def test_a_file_that_can_split_frames_further_gives_the_last_ones(tmp_path):
    vae, path = tiny().float(), str(tmp_path / "taew2_1.pth")
    tensors = vae.state_dict()
    weight = tensors["decoder.7.conv.weight"]
    tensors["decoder.7.conv.weight"] = torch.cat([torch.zeros_like(weight), weight])
    torch.save(tensors, path)
    assert torch.equal(load_model(VAE, path).decoder[7].conv.weight, weight)


@pytest.mark.parametrize("tensors", [{"a": torch.ones(3)}, {"decoder.1.weight": torch.ones(3, 3)}])
def test_another_autoencoder_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "taehv.safetensors")
    with pytest.raises(UserError, match=r"holds .* \(3.*not TAEW2\.1 \(.*decoder\.1\.weight is"):
        load_model(VAE, str(tmp_path / "taehv.safetensors"))


# ---------------------------------------------------------------------------- the full autoencoder
@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A random AutoencoderKLWan of few channels and its folder."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    means = {"latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.1, 0.9, 2.0]}
    vae = diffusers.AutoencoderKLWan(**sizes, **means).eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("full")
    vae.save_pretrained(folder / "vae")
    return vae, str(folder)


def test_the_full_autoencoder_is_that_of_diffusers_with_wans_normalisation(full):
    theirs, ours, x = full[0], load_model(VAE, full[1]), video(9)
    mean, std = (
        torch.tensor(theirs.config[f"latents_{n}"]).view(3, 1, 1, 1) for n in ("mean", "std")
    )
    raw = theirs.encode(x.transpose(1, 2)).latent_dist.mode()
    latents = ours.encode(x)
    assert torch.allclose(latents, ((raw - mean) / std).transpose(1, 2), atol=1e-6)
    expected = theirs.decode(latents.transpose(1, 2) * std + mean).sample
    assert torch.allclose(ours.decode(latents), expected.transpose(1, 2), atol=1e-6)


def test_the_full_autoencoder_streams_bit_for_bit(full):
    vae, x = FullVAE(full[0]), video(13)
    latents = vae.encode(x)
    assert torch.equal(streamed(vae.encode, x.split([5, 4, 4], dim=1)), latents)
    assert torch.equal(streamed(vae.decode, latents.split([1, 2, 1], dim=1)), vae.decode(latents))


def test_two_streams_of_the_full_autoencoder_do_not_meet(full):
    vae = FullVAE(full[0])
    one, two = torch.randn(2, 1, 2, 3, 2, 2)
    states, made = ({}, {}), ([], [])
    for frame in range(2):
        for x, state, parts in zip((one, two), states, made, strict=True):
            parts.append(vae.decode(x[:, frame : frame + 1], state))
    for x, parts in zip((one, two), made, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), vae.decode(x))


def test_the_published_normalisation_is_that_of_diffusers():
    """As in Wan 2.1's wan/modules/vae.py."""
    diffusers = pytest.importorskip("diffusers")
    default = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1]).config
    mean = "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922"
    mean += " -.9497 .2503 -.2921"
    std = "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579"
    std += " 1.6382 1.1253 2.8251 1.9160"
    assert default.latents_mean == [float(part) for part in mean.split()]
    assert default.latents_std == [float(part) for part in std.split()]


@pytest.mark.parametrize("frames", [4, 6])
def test_the_full_autoencoder_refuses_a_clip_of_another_length(full, frames):
    with pytest.raises(ValueError, match="1 \\+ 4 n frames"):
        FullVAE(full[0]).encode(video(frames))


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_an_autoencoder_is_named(tmp_path, made):
    if made:
        pytest.importorskip("diffusers")
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"AutoencoderKLWan .*{tmp_path}"):
        load_model(VAE, str(tmp_path))


def test_a_missing_library_is_named(full, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(wan.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install diffusers"):
        load_model(VAE, full[1])


# ------------------------------------------------------------------------------------------- text
@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """A random UMT5 and a tokenizer of words in a folder as diffusers writes it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("umt5")
    sizes = {"d_model": 14, "d_kv": 5, "num_heads": 3, "d_ff": 18, "num_layers": 2}
    config = transformers.UMT5Config(vocab_size=40, **sizes)
    network = transformers.UMT5EncoderModel(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    network.save_pretrained(folder / "text_encoder")
    words = ["<pad>", "</s>", "<unk>", *PROMPT.split(), "&", "blue"]
    tokenizer = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(dict.fromkeys(words))}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder / "tokenizer")
    return network, fast, str(folder)


@torch.no_grad()
def test_the_text_encoder_is_that_of_transformers_and_zero_behind_the_prompt(umt5):
    network, tokenizer, folder = umt5
    ours = wan.UMT5(folder, "cpu", torch.float32)
    prompts = [PROMPT, "blue", ""]
    made = ours(prompts)
    assert made.shape == (3, 512, 14)
    for row, prompt in zip(made, prompts, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        alone = network(ids).last_hidden_state[0]
        error = (row[: len(alone)] - alone).norm() / alone.norm()
        assert error < 1e-5
        assert not row[len(alone) :].any()


def test_the_text_encoder_stays_as_it_is_in_training(umt5):
    encoder = load_model(TextEncoder, umt5[2])
    assert encoder.config.text_dim == 14
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_prompt_is_cleaned_as_the_release_does():
    assert wan.clean("  a\tred &amp;amp; \n blue ") == "a red & blue"


def test_a_prompt_longer_than_512_tokens_is_cut(umt5):
    made = wan.UMT5(umt5[2], "cpu", torch.float32)(["red " * 900])
    assert made.shape == (1, 512, 14)


def test_a_folder_without_a_text_encoder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"UMT5EncoderModel .*{tmp_path}"):
        load_model(TextEncoder, str(tmp_path))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("shape", [(7, 14), (1, 7, 14)])
def test_an_embedding_from_a_file_is_padded_with_zeros(tmp_path, name, shape):
    text, path = torch.randn(shape), str(tmp_path / name)
    if name.endswith(".pt"):
        torch.save(text, path)
    else:
        save_file({"prompt_embeds": text}, path)
    made = load_model(TextEncoder, path)(["anything", ""])
    assert made.shape == (2, 512, 14)
    assert torch.equal(made[0, :7], text.view(7, 14))
    assert not made[0, 7:].any()
    assert not made[1].any()


def test_an_embedding_may_come_with_that_of_the_empty_prompt(tmp_path):
    text, null = torch.randn(7, 14), torch.randn(2, 14)
    save_file({"text": text, "null": null}, tmp_path / "a.safetensors")
    made = GivenText(str(tmp_path / "a.safetensors"))(["", "anything"])
    assert torch.equal(made[0, :2], null)
    assert torch.equal(made[1, :7], text)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(513, 4)},
        {"a": torch.ones(2, 4), "b": torch.ones(2, 4)},
        {"a": torch.full((2, 4), float("nan"))},
        {"a": torch.ones(0, 4)},
        {"a": torch.ones(3, 0)},
        {"a": torch.ones(2, 7, 4)},
        {"a": torch.ones(2, 4, dtype=torch.int64)},
        {"a": torch.ones(2, 4), "null": torch.ones(2, 3)},
        {"a": torch.tensor(3.0)},
        {"a": torch.ones(4)},
    ],
)
def test_what_is_no_embedding_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors"):
        load_model(TextEncoder, str(tmp_path / "a.safetensors"))


def test_what_is_found_in_place_of_an_embedding_is_told(tmp_path):
    save_file({"a": torch.ones(2, 7, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"holds a \(2, 7, 4\), not .* \[1 to 512 tokens, width\]"):
        load_model(TextEncoder, str(tmp_path / "a.safetensors"))


def test_an_embedding_of_another_width_does_not_fit(tmp_path):
    save_file({"a": torch.ones(3, 14)}, tmp_path / "a.safetensors")
    encoder = load_model(TextEncoder, str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=r"width 10, does not go with .* text encoder \(14\)"):
        check_fit(tiny_model(in_dim=4, out_dim=4, text_dim=10), tiny(), encoder)


# ------------------------------------------------------------------------------ what goes together
def test_the_tiny_autoencoder_beside_a_checkpoint_is_chosen(tmp_path):
    (tmp_path / "taew2_1.safetensors").write_bytes(b"")
    vae, text = made_with(str(tmp_path / "model.pt"), None, "folder")
    assert (vae, text) == (str(tmp_path / "taew2_1.safetensors"), "folder")


@pytest.mark.parametrize(
    ("vae", "text", "flag"), [(None, "a", "--vae"), ("a", None, "--text-encoder")]
)
def test_what_a_checkpoint_needs_is_told(tmp_path, vae, text, flag):
    with pytest.raises(UserError, match=flag):
        made_with(str(tmp_path / "model.pt"), vae, text)


def test_the_padding_is_attended_to():
    """Rows of zeros become keys like others: the text MLP has biases."""
    model = tiny_model(text_dim=10)
    torch.nn.init.normal_(model.text_embedding[2].bias)
    text = torch.randn(1, 3, 10)
    x, t = torch.randn(1, 3, 8, 4, 4), torch.rand(1, 3)
    padded = F.pad(text, (0, 0, 0, 509))
    assert not torch.allclose(model(x, t, text), model(x, t, padded))
