"""Puts the picture itself back where nothing was asked to move."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .conditioning.masks import refine

# A pixel has changed where a channel differs by more than this, of 255.
CHANGED = 24
# Around what moves: pixels kept as they were made, and over which they fade into the picture.
MARGIN, FEATHER = 3, 6


def moving_area(frames: np.ndarray, still: np.ndarray, mask: np.ndarray) -> Tensor:
    """Where a region moves at any time, float [H, W] of 0 and 1.

    The mask, and what changes and hangs together with it: what moves leaves its mask. A change
    elsewhere, which nobody asked for, is left out.

    Args:
        frames: uint8 [T, H, W, 3].
        still: uint8 [H, W, 3], the picture as the autoencoder shows it.
        mask: bool [H, W], all regions.
    """
    differs = np.abs(frames.astype(np.int16) - still).max(-1) > CHANGED
    inside = torch.from_numpy(mask)[None, None].float()
    able = torch.maximum(torch.from_numpy(differs.any(0))[None, None].float(), inside)
    # Single pixels of the autoencoder's noise are no bridge.
    able = torch.maximum(functional.avg_pool2d(able, 3, 1, 1).gt(0.5).float(), inside)
    area = inside
    for _ in range(sum(mask.shape)):
        grown = functional.max_pool2d(area, 3, 1, 1) * able
        if torch.equal(grown, area):
            break
        area = grown
    return area[0, 0]


def hold_still(
    frames: np.ndarray, picture: np.ndarray, still: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] whose background is the picture's, to the pixel.

    Arguments as for ``moving_area``; picture: uint8 [H, W, 3] at the frames' size. The join is
    feathered; a shadow or a reflection that hangs together with the region stays with it.
    """
    area = refine(moving_area(frames, still, mask), MARGIN, FEATHER).numpy()[..., None]
    mixed = picture + area * (frames.astype(np.float32) - picture)
    return np.where(area == 0, picture, np.rint(mixed)).clip(0, 255).astype(np.uint8)
