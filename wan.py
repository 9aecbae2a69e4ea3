"""Public checkpoints: Wan 2.1, CausVid and Self Forcing, Wan's autoencoders and its text encoder.

The network is `DiT` as it is. This file recognises a checkpoint by its keys, reads its config off
the tensors' shapes, and holds the published presets. docs/WAN.md says where the files are.
"""

import contextlib
import html
import importlib
import math
import os
import re

import torch
from torch import nn
from torch.nn import functional as F

import weights
from model import DiT, ModelConfig
from text import TextConfig, TextEncoder
from untrusted import check_stored, from_folder, map_weights, read_json
from vae import VAE, Down, MemoryBlock, Up, VAEConfig, conv
from weights import UserError, sides, summary

WORDS = 512  # tokens of a prompt; shorter ones are padded with zeros, which are attended to
SIZE = (480, 832)  # height and width that the checkpoints were trained for
TEACHER_STEPS, GUIDANCE = 50, 5.0  # of the bidirectional model
CAUSAL = {"chunk": 3, "window": 7}  # the 21 latent frames of 81 frames
# how each is sampled; times are thousandths before the shift, see `ModelConfig`
PRESETS = {
    "wan": {"shift": 5.0, **CAUSAL},
    # 1000, 757, 522 are entries 0, 36 and 44 of a table of 50 steps with shift 8
    "causvid": {"shift": 8.0, "steps": 3, "times": (1000, 280, 120), **CAUSAL},
    "self-forcing": {"shift": 5.0, "steps": 4, **CAUSAL},  # 1000, 750, 500, 250 before the shift
}
WRAPPERS = re.compile(r"_(fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")
# diffusers' names of parameters, and those of the release
NAMES = [
    (r"^condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
]
# what else a file holds, by what is found in its keys
OTHERS = {
    "lora": "a LoRA, which has to be merged into its model first",
    "vace": "VACE, a model for editing",
    "img_emb|image_embed|k_img|add_k_proj": "an image-to-video model",
    "face_|motion_encoder|audio": "a model driven by a face or by sound (Wan 2.2)",
    "control_adapter|ref_conv": "a model with camera control",
    "scale_weight|scaled_fp8": "quantised weights",
    "token_embedding|shared.weight": "a text encoder; --text-encoder takes the folder of one",
    r"decoder\.": "an autoencoder; --vae takes taew2_1.safetensors or a folder of Wan's",
}
EXPERTS = {"high_noise": "low_noise", "transformer_2": "transformer"}  # beside each other
EXPERTS |= {other: name for name, other in EXPERTS.items()}


def read_checkpoint(path):
    """Map a checkpoint into memory: (name -> tensor, the key that they were under or None)."""
    found = map_weights(path)
    under = next((name for name in ("generator_ema", "generator") if name in found), None)
    tensors = found.get(under, found)
    items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(type(name) is str and weights.is_plain(value) for name, value in items):
        raise UserError(f"{path} holds other things than floating point of 16 to 64 bits")
    check_stored(path, tensors.values())
    return dict(tensors), under


# ------------------------------------------------------------------------------------ transformers
def released_name(key):
    """Translate a parameter's name in any of the layouts to that of Wan's release."""
    key = WRAPPERS.sub("", key).removeprefix("model.")
    for theirs, ours in NAMES:
        key = re.sub(theirs, ours, key)
    return key


def kind_of(path, tensors, under):
    """Recognise a checkpoint by its keys: a name in PRESETS. Raises UserError for all others."""
    for part, title in OTHERS.items():
        if any(re.search(part, name.lower()) for name in tensors):
            raise UserError(f"{path} holds {title}, not a transformer of Wan 2.1 (text to video)")
    if not any(released_name(name) == "patch_embedding.weight" for name in tensors):
        problem = f"{path} holds {summary(tensors)}: no transformer of Wan 2.1 or distilled from it"
        raise UserError(f"{problem}; the embedding of a prompt goes with --text-embedding")
    if under == "generator_ema" or (under and any(map(WRAPPERS.search, tensors))):
        return "self-forcing"
    whole = os.path.abspath(path)
    begin = os.path.dirname(whole if os.path.isdir(path) else os.path.dirname(whole))
    other = begin + re.sub("|".join(EXPERTS), lambda m: EXPERTS[m[0]], whole[len(begin) :])
    if not under and other != whole and os.path.exists(other):
        raise UserError(f"{path} and {other} are the two experts of Wan 2.2, not Wan 2.1")
    return "causvid" if under else "wan"


def config_of(path, tensors, preset):
    """Read the config from shapes, the heads from config.json or dim / 128. Raises UserError."""
    near = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    given = read_json(near) if os.path.isfile(near) else {}
    try:
        dim, in_dim, *patch = sides(tensors, "patch_embedding.weight", 5)
        sizes = {"dim": dim, "in_dim": in_dim, "patch_size": patch}
        sizes["ffn_dim"] = sides(tensors, "blocks.0.ffn.0.weight", 2)[0]
        sizes["freq_dim"] = sides(tensors, "time_embedding.0.weight", 2)[1]
        sizes["text_dim"] = sides(tensors, "text_embedding.0.weight", 2)[1]
        sizes["out_dim"] = sides(tensors, "head.head.weight", 2)[0] // math.prod(patch)
        sizes["num_layers"] = sum(name.endswith(".ffn.0.weight") for name in tensors)
        if in_dim > sizes["out_dim"] or in_dim == 48:
            what = "is Wan 2.2 TI2V-5B" if in_dim == 48 else "takes an image or a control"
            raise UserError(f"{path} {what}: {in_dim} channels, not 16")
        heads = given.get("num_heads", given.get("num_attention_heads", dim // 128))
        if type(heads) is not int or heads < 1 or dim % (2 * heads):
            problem = f"{path} is {dim} wide, which is not {heads!r:.40} heads of an even width"
            raise UserError(f"{problem}: {near} must give num_heads")
        return ModelConfig(num_heads=heads, **sizes, **PRESETS[preset])
    except ValueError as error:
        raise UserError(f"{path} is damaged or not whole: {error}; download it again") from None


def load_transformer(path, device, dtype, preset=None, layers=None, steps=None):
    """Load a `DiT`, each tensor straight from the mapped file to the device, and print how it is
    sampled. preset: a name in PRESETS (None: what the keys tell); layers: use only the first so
    many; steps: those that it is sampled in (None: the preset's). Raises UserError."""
    found, under = read_checkpoint(path)
    kind = kind_of(path, found, under)
    preset = preset or kind
    tensors = {released_name(name): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise UserError(f"{path} holds the same weights under two names")
    config = config_of(path, tensors, preset)
    with torch.device("meta"):
        model = DiT(config)
    try:
        weights.check_shapes(model.state_dict(), tensors)
        model.blocks = model.blocks[:layers]
        config.num_layers = len(model.blocks)
        tensors = {name: tensors[name].to(device, dtype) for name in model.state_dict()}
        weights.check_numbers(tensors)
    except ValueError as error:
        raise UserError(f"the weights in {path} do not fit the model: {error}") from None
    model.load_state_dict(tensors, assign=True)
    steps = steps or (TEACHER_STEPS if preset == "wan" else config.steps)
    times = [round(1000 * t) for t in model.schedule.timesteps(steps)[:-1].tolist()]
    how = f"under guidance {GUIDANCE:g}" if preset == "wan" else f"at {times}"
    print(f"{path} holds {kind}; preset {preset}: {steps} steps {how}, shift {config.shift:g}")
    return model.eval()


# ------------------------------------------------------------------------------------ autoencoders
class InputMemory(MemoryBlock):
    """TAEHV's residual block: beside each frame it sees its own input of the frame before."""

    def __init__(self, dim):
        nn.Module.__init__(self)
        convs = conv(2 * dim, dim), conv(dim, dim), conv(dim, dim)
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x, clips, state):
        return F.relu(x + self.conv(torch.cat([x, self.before(x, clips, state)], dim=1)))


def pointwise(layer):
    """Make a `Down` or an `Up` see each pixel by itself."""
    layer.conv = nn.Conv2d(layer.conv.in_channels, layer.conv.out_channels, 1, bias=False)
    return layer


class TinyVAE(VAE):
    """TAEW2.1: video <-> Wan's latents, normalised. Latent frame i is made of the frames 4 i to
    4 i + 3 and decoded to 4 i - 3 to 4 i, so that encoding has to look 3 frames ahead."""

    ahead = 3

    def __init__(self, latent_dim=16, dim=64, widths=(256, 128, 64, 64)):
        nn.Module.__init__(self)
        self.config = VAEConfig(latent_dim=latent_dim)
        stages = [conv(3, dim), nn.ReLU()]
        for frames in (2, 2, 1):
            half = nn.Conv2d(dim, dim, 3, 2, padding=1, bias=False)
            stages += [pointwise(Down(dim, dim, frames, 1)), half]
            stages += [InputMemory(dim) for _ in range(3)]
        self.encoder = nn.ModuleList([*stages, conv(dim, latent_dim)])
        stages = [nn.Identity(), conv(latent_dim, widths[0]), nn.ReLU()]
        for frames, dim, out in zip((1, 2, 2), widths[:-1], widths[1:], strict=True):
            stages += [InputMemory(dim) for _ in range(3)]
            stages += [nn.Upsample(scale_factor=2), pointwise(Up(dim, dim, frames, 1))]
            stages += [nn.Conv2d(dim, out, 3, padding=1, bias=False)]
        self.decoder = nn.ModuleList([*stages, nn.ReLU(), conv(widths[-1], 3)])
        self.register_buffer("mean", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("std", torch.ones(latent_dim), persistent=False)
        self.to(memory_format=torch.channels_last)

    def encode(self, video, state=None):
        """Encode video [B, F, 3, H, W] as [B, T, C, h, w], T = F / 4 rounded up: the last frame is
        repeated. The chunks of a stream have 4 n frames. Raises ValueError for others."""
        if state is not None and video.shape[1] % 4:
            raise ValueError(f"a stream has chunks of 4 n frames, not {video.shape[1]}")
        rest = video[:, -1:].expand(-1, -video.shape[1] % 4, -1, -1, -1)
        return self._run(self.encoder, (torch.cat([video, rest], dim=1) + 1) / 2, state)

    def decode_raw(self, latents, state=None):
        softly_clamped = 3 * torch.tanh(latents / 3)
        return 2 * super().decode_raw(softly_clamped, state).clamp(0, 1) - 1


class FullVAE(nn.Module):
    """Wan's own autoencoder as diffusers has it, AutoencoderKLWan, with the state outside."""

    space_stride, ahead, latent_shape = VAE.space_stride, 0, VAE.latent_shape

    def __init__(self, vae):
        super().__init__()
        self.vae, self.config = vae, VAEConfig(latent_dim=vae.config.z_dim)
        for name in ("mean", "std"):
            value = torch.tensor(vae.config[f"latents_{name}"])
            self.register_buffer(name, value.view(-1, 1, 1, 1), persistent=False)

    def _run(self, name, groups, state):
        """Run encoder or decoder over groups of frames, each [B, C, F, H, W], one by one."""
        count = self.vae._cached_conv_counts[name]
        past, network, parts = list(state.get(name, [None] * count)), getattr(self.vae, name), []
        for group in groups:
            if name == "encoder":
                part = self.vae.quant_conv(network(group, feat_cache=past, feat_idx=[0]))
            else:
                first, group = name not in state, self.vae.post_quant_conv(group)
                part = network(group, feat_cache=past, feat_idx=[0], first_chunk=first)
            parts.append(part)
            state[name] = past
        return torch.cat(parts, dim=2)

    def encode(self, video, state=None):
        """`VAE.encode`."""
        head, state = 0 if state else 1, {} if state is None else state
        if video.shape[1] % 4 != head:
            raise ValueError(f"a clip must have 1 + 4 n frames, not {video.shape[1]}")
        video = video.to(self.mean.dtype).transpose(1, 2)
        groups = video.split([1] * head + [4] * (video.shape[2] // 4), dim=2)
        raw = self._run("encoder", groups, state).chunk(2, dim=1)[0]
        return ((raw - self.mean) / self.std).transpose(1, 2)

    def decode(self, latents, state=None):
        """`VAE.decode`, within [-1, 1]."""
        raw = latents.to(self.mean.dtype).transpose(1, 2) * self.std + self.mean
        video = self._run("decoder", raw.split(1, dim=2), {} if state is None else state)
        return video.clamp(-1, 1).transpose(1, 2)


def load_vae(path, device, dtype):
    """Load TAEW2.1 from its file, or AutoencoderKLWan from its folder. Raises UserError."""
    if os.path.isdir(path):
        folder = next(filter(os.path.isdir, (os.path.join(path, "vae"), path)))
        vae = from_folder("diffusers", "AutoencoderKLWan", folder, torch_dtype=dtype)
        return FullVAE(vae).to(device, dtype).eval()
    tensors, _ = read_checkpoint(path)
    try:
        widths = [sides(tensors, f"decoder.{place}.weight", 4)[0] for place in (1, 8, 14, 20)]
        latent_dim, dim = (sides(tensors, f"encoder.{place}.weight", 4)[0] for place in (17, 0))
        with weights.Room(2 * sum(tensor.numel() for tensor in tensors.values())):
            vae = TinyVAE(latent_dim, dim, widths)
        for place in (7, 13, 19):  # where a file can make more frames of one, the last count
            name = f"decoder.{place}.conv.weight"
            sides(tensors, name, 4)
            tensors[name] = tensors[name][-vae.decoder[place].conv.out_channels :]
        weights.check_shapes(vae.state_dict(), tensors)
        weights.check_numbers(tensors)
    except ValueError as error:
        problem = f"{path} holds {summary(tensors)}, not TAEW2.1 ({error})"
        raise UserError(f"{problem}; --vae takes that or a folder of AutoencoderKLWan") from None
    vae.load_state_dict(tensors)
    return vae.to(device, dtype).eval()


# -------------------------------------------------------------------------------------------- text
def clean(prompt):
    """Clean a prompt as the release does: Unicode, entities of HTML, white space."""
    with contextlib.suppress(ImportError):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


class UMT5(nn.Module):
    """UMT5-XXL: prompts to [B, 512, 4096]. It is on the GPU only while it encodes."""

    def __init__(self, folder, device, dtype=torch.bfloat16):
        super().__init__()
        parts = [os.path.join(folder, name) for name in ("text_encoder", "tokenizer")]
        self.network = from_folder("transformers", "UMT5EncoderModel", parts[0], dtype=dtype)
        self.tokenizer = from_folder("transformers", "AutoTokenizer", parts[1])
        self.config = TextConfig(text_dim=self.network.config.d_model, words=WORDS)
        self.device = device

    @torch.no_grad()
    def forward(self, prompts):
        """Encode a list of B prompts; what follows a prompt is zero."""
        how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer([clean(text) for text in prompts], max_length=WORDS, **how)
        ids, mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        text = self.network.to(self.device)(ids, mask).last_hidden_state
        self.network.to("cpu")
        return text * mask[..., None]


class GivenText(nn.Module):
    """An embedding [tokens, width] of a file, and perhaps one named null, for the empty prompt."""

    def __init__(self, path):
        super().__init__()
        tensors = read_checkpoint(path)[0]
        parts = [part for name, part in tensors.items() if name != "null"]
        parts.append(tensors.get("null", torch.zeros_like(parts[0]) if parts else None))
        fits = len(parts) == 2 and parts[0].shape[-1:] == parts[1].shape[-1:]
        for name, part in zip(("text", "null"), parts, strict=False):
            fits = fits and part.ndim > 1 and part.shape[:-2].numel() == 1
            fits = fits and 0 < part.shape[-2] <= WORDS and 0 < part.shape[-1] <= 2**16
            if not fits or not part.isfinite().all():
                problem = f"{path} holds {summary(tensors)}, not one finite embedding"
                raise UserError(f"{problem} [1 to {WORDS} tokens, width], and maybe one named null")
            part = part.float().flatten(0, -2)
            # padded with zeros before the text MLP, as the release does
            self.register_buffer(name, F.pad(part, (0, 0, 0, WORDS - len(part))))
        self.config = TextConfig(text_dim=self.text.shape[1], words=WORDS)
        print(f"{path}: one embedding, which stands for every prompt")

    def forward(self, prompts):
        """The embedding for each of B prompts, whatever it says, but for the empty one."""
        return torch.stack([self.text if prompt else self.null for prompt in prompts])


def load(network, path, device, dtype, **options):
    """Load a public file in place of one of our own: `weights.load_model` passes them on."""
    if network is DiT:
        return load_transformer(path, device, dtype, **options)
    if network is VAE:
        return load_vae(path, device, dtype)
    if network is TextEncoder:
        text = UMT5(path, device) if os.path.isdir(path) else GivenText(path).to(device)
        return text.requires_grad_(False)
    raise UserError(f"{path} does not hold a {network.__name__}")
