"""Between the host's tensors and the engine's pictures of boxes."""

from __future__ import annotations

import numpy as np
import torch

from ...engine.conditioning.box_preview import plate
from ...engine.frames import resize


def clip_to_draw_on(image: torch.Tensor | None, size: tuple[int, int], frames: int) -> np.ndarray:
    """The first so many frames of an IMAGE [N, H, W, C], resized, as uint8 [N, H, W, 3].

    Without one, a grey picture. size: (height, width).
    """
    if image is None:
        return plate(size)
    clip = image[:frames, ..., :3].cpu().float().clamp(0, 1)
    if tuple(clip.shape[1:3]) != tuple(size):
        clip = resize(clip.movedim(-1, 1)[None], size)[0].movedim(1, -1).clamp(0, 1)
    return (clip * 255).round().byte().numpy()


def as_frames(pixels: np.ndarray) -> torch.Tensor:
    """An IMAGE [F, H, W, 3] of frames uint8."""
    return torch.from_numpy(pixels).float() / 255


def masks_of(inside: np.ndarray) -> torch.Tensor:
    """A MASK [F, H, W] of 0 and 1 from booleans."""
    return torch.from_numpy(inside).float()
