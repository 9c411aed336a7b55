"""The starters' image encoder: a few convolutions that turn a picture into patch tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PATCH = 16


class StarterImageEncoder(nn.Module):
    """Tokens [B, (size / 16)^2, dim] of pictures [B, 3, H, W] in [-1, 1].

    Pictures of another size are squeezed to ``size`` x ``size``, as CLIP's are.

    Args:
        size: side of the pictures it was trained on, in pixels; divides by 16.
        dim: width of a token.
        width: channels at 4x4 pixels a position, doubled at 8x8.
    """

    def __init__(self, *, size: int, dim: int, width: int = 24, operations: Any = None):
        super().__init__()
        operations = operations or nn
        if size < PATCH or size % PATCH:
            raise ValueError(f"size is {size}; it must be a multiple of {PATCH}")
        self.size = size
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            operations.Conv2d(3 * 16, width, 3, padding=1),
            nn.SiLU(),
            operations.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            operations.Conv2d(2 * width, dim, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn((size // PATCH) ** 2, dim) * 0.02)
        self.norm = operations.LayerNorm(dim)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        if pictures.shape[-2:] != (self.size, self.size):
            pictures = nn.functional.interpolate(
                pictures, (self.size, self.size), mode="bilinear", antialias=True
            )
        tokens = self.layers(pictures).flatten(2).transpose(1, 2)
        return self.norm(tokens + self.position.to(tokens))
