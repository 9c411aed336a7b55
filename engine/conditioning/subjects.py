"""Pictures of subjects as the network reads them: cut out, on white, in the middle."""

from __future__ import annotations

import math

import numpy as np

from .pictures import Size

# The most that a subject takes of either side of its picture. The paper (arXiv 2410.13830) says
# "blank background" alone; a fixed place and size leave place and size to the boxes.
SHARE = 0.75
WHITE = 255
_HALF = 0.5


def on_white(image: np.ndarray, mask: np.ndarray | None, size: Size) -> np.ndarray:
    """A subject in the middle of a white picture uint8 [h, w, 3] of ``size`` (height, width).

    What the mask leaves is cut out and scaled, its shape kept, until a side takes ``SHARE`` of the
    picture's.

    Args:
        image: uint8 [H, W, 3].
        mask: of what is the subject, [H, W] in 0..1, inside from 0.5 on (somewhere); None is all
            of the picture.
    """
    from PIL import Image

    if mask is None:
        mask = np.ones(image.shape[:2], np.float32)
    weight = np.clip(np.asarray(mask, np.float32), 0, 1)
    # Masks that networks make are nowhere quite empty: what is below does not widen the cut.
    inside = weight >= _HALF
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part = weight[place][..., None]
    cut = np.rint(image[place] * part + WHITE * (1 - part)).astype(np.uint8)
    tall, wide = cut.shape[:2]
    scale = SHARE * min(size[0] / tall, size[1] / wide)
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in (tall, wide))
    scaled = Image.fromarray(cut).resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.full((*size, 3), WHITE, np.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(scaled)
    return canvas
