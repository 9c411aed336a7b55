"""Between the host's tensors and the engine's pictures of boxes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...engine.conditioning.box_preview import plate
from ...engine.frames import resize
from .pictures import as_pixels, keep_for_editor

# Of a clip that an editor shows: frames, and pixels of their longer side.
_MOST, _SIDE = 64, 384


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


def keep_clip_for_editor(image: torch.Tensor, frames: int) -> dict[str, Any] | None:
    """The first so many frames of an IMAGE on one small sheet, for an editor; None of one frame.

    What ``keep_for_editor`` says, and "columns" and "rows" of the sheet, the "count" of frames that
    are on it, row by row, and of how many "frames" they are, evenly taken.
    """
    frames = min(frames, len(image))
    if frames < 2:
        return None
    count = min(frames, _MOST)
    scale = min(1.0, _SIDE / max(image.shape[1:3]))
    height, width = (max(1, round(side * scale)) for side in image.shape[1:3])
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for place, number in enumerate(np.linspace(0, frames - 1, count).round().astype(int)):
        small = Image.fromarray(as_pixels(image[number : number + 1])).resize((width, height))
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = np.asarray(small)
    kept = keep_for_editor(sheet, lossless=False)
    return {**kept, "columns": columns, "rows": rows, "count": count, "frames": frames}


def as_frames(pixels: np.ndarray) -> torch.Tensor:
    """An IMAGE [F, H, W, 3] of frames uint8."""
    return torch.from_numpy(pixels).float() / 255


def masks_of(inside: np.ndarray) -> torch.Tensor:
    """A MASK [F, H, W] of 0 and 1 from booleans."""
    return torch.from_numpy(inside).float()
