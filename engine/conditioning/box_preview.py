"""Draws paths of boxes over a clip, for looking at; in the box editor's colours."""

from __future__ import annotations

import numpy as np

from .box_paths import pixel_boxes
from .boxes import BoxPaths

# As in web/box_drawing.mjs.
COLORS = (
    (255, 178, 36),
    (61, 139, 255),
    (31, 191, 99),
    (242, 85, 90),
    (181, 123, 255),
    (24, 184, 196),
    (255, 122, 194),
    (155, 179, 0),
)
PLATE = 58


def plate(size: tuple[int, int]) -> np.ndarray:
    """A picture uint8 [1, H, W, 3] to draw on where there is none; size: (height, width)."""
    return np.full((1, *size, 3), PLATE, np.uint8)


def draw_boxes(paths: BoxPaths, clip: np.ndarray) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] with each subject's box and the way of its middle.

    clip: uint8 [N, H, W, 3]; where it is shorter than the paths, its last frame goes on.
    """
    from PIL import Image, ImageDraw

    size = clip.shape[1:3]
    boxes = [pixel_boxes(track, paths.frames, size) for track in paths.tracks]
    # At least two pixels, a hundredth of a larger picture's side.
    wide = max(2, round(min(size) / 100))
    drawn = []
    for frame in range(paths.frames):
        image = Image.fromarray(clip[min(frame, len(clip) - 1)])
        pen = ImageDraw.Draw(image)
        # Earlier subjects lie in front.
        for number in reversed(range(len(boxes))):
            path, color = boxes[number], COLORS[number % len(COLORS)]
            middles = (path[:, :2] + path[:, 2:]) / 2
            pen.line([tuple(middle) for middle in middles.tolist()], color, max(1, wide // 2))
            x0, y0, x1, y1 = path[frame].tolist()
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=wide)
        drawn.append(np.asarray(image))
    return np.stack(drawn)
