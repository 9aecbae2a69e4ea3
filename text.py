"""From prompt to embeddings: a small byte-level encoder, trained together with the teacher and frozen afterwards.

A prompt is split into words, a word is its UTF-8 bytes. Nothing is out of vocabulary, and no tokeniser is needed.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class TextConfig:
    text_dim: int = 64  # width of an embedding
    words: int = 16  # embeddings a prompt; Wan's umT5 has 512
    bytes: int = 16  # longest word; what is beyond is cut off


class TextEncoder(nn.Module):
    """Prompts -> embeddings [B, words, text_dim], one per word, zeros behind the last. The empty prompt, all zeros, is the
    unconditional one of classifier-free guidance."""

    Config = TextConfig

    def __init__(self, config=TextConfig()):
        super().__init__()
        self.config, dim = config, config.text_dim
        self.byte = nn.Embedding(256, dim, padding_idx=0)
        self.spell = nn.Conv1d(
            dim, dim, 3, padding=1
        )  # three neighbouring bytes: a letter in its place
        self.position = nn.Embedding(config.words, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    def tokens(self, prompts):
        """Prompts -> bytes, 0 behind the last: [B, words, bytes], on the encoder's device. Case and punctuation do not count."""
        c = self.config
        rows = torch.zeros(len(prompts), c.words, c.bytes, dtype=torch.long)
        for row, prompt in zip(rows, prompts):
            for slot, word in zip(row, prompt.lower().replace(",", " ").replace(".", " ").split()):
                letters = list(word.encode())[: c.bytes]
                slot[: len(letters)] = torch.tensor(letters)
        return rows.to(self.position.weight.device)

    def forward(self, prompts):
        """A list of B prompts -> [B, words, text_dim]. Words beyond the limit are cut off."""
        tokens = self.tokens(prompts)
        letters = self.spell(
            self.byte(tokens).flatten(0, 1).transpose(1, 2)
        )  # [B * words, dim, bytes]
        word = (
            nn.functional.gelu(letters).mean(-1).unflatten(0, tokens.shape[:2]) * 4
            + self.position.weight
        )
        return self.norm(word + self.mlp(word)) * (tokens[..., :1] > 0)
