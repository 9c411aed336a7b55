"""The starters' text encoder: a word list, an embedding a word and one a position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PADDING, UNKNOWN = 0, 1


class WordTokenizer:
    """Words of a fixed vocabulary to ids; ids 0 and 1 are padding and unknown."""

    def __init__(self, vocabulary: Sequence[str], tokens: int):
        self.tokens = tokens
        self.ids = {word: i + 2 for i, word in enumerate(vocabulary)}

    def words(self, text: str) -> list[str]:
        """Lower-case words and numbers of a prompt; punctuation is dropped."""
        return re.findall(r"[a-z0-9]+", text.lower())

    def unknown_words(self, text: str) -> list[str]:
        """The prompt's words that the vocabulary does not hold."""
        return [word for word in self.words(text) if word not in self.ids]

    def __call__(self, text: str) -> torch.Tensor:
        """Ids [tokens] of one prompt, cut or padded to length."""
        ids = [self.ids.get(word, UNKNOWN) for word in self.words(text)][: self.tokens]
        return torch.tensor(ids + [PADDING] * (self.tokens - len(ids)))


class WordEncoder(nn.Module):
    """Features [..., tokens, dim] of word ids [..., tokens]: word plus position."""

    def __init__(self, *, vocabulary: int, tokens: int, dim: int = 64, operations: Any = None):
        super().__init__()
        operations = operations or nn
        self.word = operations.Embedding(vocabulary + 2, dim)
        self.position = operations.Embedding(tokens, dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        order = torch.arange(ids.shape[-1], device=ids.device)
        return self.word(ids) + self.position(order)
