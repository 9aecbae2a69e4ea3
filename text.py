"""From prompt to embeddings: a small encoder of words by their bytes, frozen after training."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class TextConfig:
    text_dim: int = 64  # width of an embedding
    words: int = 16  # embeddings per prompt; Wan's umT5 has 512
    bytes: int = 16  # longest word; what is beyond is cut off


def split(prompt):
    """Split a prompt into words: case, spaces and punctuation do not count."""
    return re.findall(r"[^\W_]+", prompt.lower())


class TextEncoder(nn.Module):
    """Encode prompts as embeddings [B, words, text_dim], one per word, padded with zeros.
    The empty prompt, all zeros, is the unconditional one of classifier-free guidance."""

    Config = TextConfig

    def __init__(self, config=None):
        super().__init__()
        self.config = config or TextConfig()
        dim = self.config.text_dim
        self.byte = nn.Embedding(256, dim, padding_idx=0)
        self.spell = nn.Conv1d(dim, dim, 3, padding=1)  # over three neighbouring bytes
        self.position = nn.Embedding(self.config.words, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    def tokens(self, prompts):
        """Split prompts into bytes [B, words, bytes], zero-padded."""
        words, limit = self.config.words, self.config.bytes
        tokens = torch.zeros(len(prompts), words, limit, dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            for slot, word in zip(row, split(prompt), strict=False):
                letters = list(word.encode())[:limit]
                slot[: len(letters)] = torch.tensor(letters)
        return tokens.to(self.position.weight.device)

    def forward(self, prompts):
        """Encode a list of B prompts: [B, words, text_dim]. Words beyond the limit are cut off."""
        tokens = self.tokens(prompts)
        letters = self.byte(tokens).flatten(0, 1).transpose(1, 2)  # [B * words, dim, bytes]
        word = F.gelu(self.spell(letters)).mean(-1).unflatten(0, tokens.shape[:2])
        word = word * 4 + self.position.weight
        return self.norm(word + self.mlp(word)) * (tokens[..., :1] > 0)
