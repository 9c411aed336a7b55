"""Clips as bytes and as tensors, and at another size."""

from __future__ import annotations

import numpy as np
import torch

Size = tuple[int, int]
"""(height, width) in pixels."""


def to_unit(clip: np.ndarray, name: str) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] (alpha [B, F, H, W]) to float [B, F, C, H, W] in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(clip)).float() / 255
    return tensor[:, :, None] if name == "alpha" else tensor.movedim(-1, 2)


def to_bytes(clip: torch.Tensor, name: str) -> np.ndarray:
    """The inverse of ``to_unit``, rounded and clamped."""
    scaled = (clip * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    return (scaled[:, :, 0] if name == "alpha" else scaled.movedim(2, -1)).numpy()


def resize(clip: torch.Tensor, size: Size) -> torch.Tensor:
    """Frames [B, F, C, H, W] to another (height, width), bicubic and antialiased."""
    if tuple(clip.shape[-2:]) == tuple(size):
        return clip
    flat = torch.nn.functional.interpolate(
        clip.flatten(0, 1), size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return flat.clamp(0, 1).unflatten(0, clip.shape[:2])
