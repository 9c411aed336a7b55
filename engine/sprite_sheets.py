"""Lays the frames of a clip out in grids, from which a browser shows any frame exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class SpriteSheets:
    """Pictures holding a clip's frames, row by row.

    pictures: RGB or RGBA, `per_sheet` frames each (the last one may hold fewer).
    width, height: of one frame in pixels. columns: frames a row.
    """

    pictures: list[Image.Image]
    frames: int
    width: int
    height: int
    columns: int
    per_sheet: int

    def save(self, folder: Path, stem: str) -> list[str]:
        """Write the sheets as lossless WebP; returns the file names."""
        names = []
        for index, picture in enumerate(self.pictures):
            names.append(f"{stem}_{index}.webp")
            # Least effort: these files live for one session, and the run waits for them.
            picture.save(folder / names[-1], "WEBP", lossless=True, quality=0, method=0)
        return names


def sprite_sheets(
    frames: np.ndarray,
    alpha: np.ndarray | None = None,
    *,
    max_frame: int = 512,
    max_sheet: int = 4096,
) -> SpriteSheets:
    """Sheets of frames uint8 [F, H, W, 3] or grey [F, H, W], with alpha uint8 [F, H, W] if given.

    max_frame: longer side of a frame in pixels; larger ones are scaled down.
    max_sheet: longest side of a sheet in pixels (browsers and GPUs have limits).
    """
    count, height, width = frames.shape[:3]
    scale = min(1.0, max_frame / max(height, width))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    columns = min(count, max(1, max_sheet // width))
    rows = min(math.ceil(count / columns), max(1, max_sheet // height))
    per_sheet = columns * rows
    pictures = []
    for start in range(0, count, per_sheet):
        cells = range(start, min(count, start + per_sheet))
        size = (columns * width, math.ceil(len(cells) / columns) * height)
        sheet = Image.new("RGB" if alpha is None else "RGBA", size)
        for cell, index in enumerate(cells):
            picture = _picture(frames, alpha, index)
            if picture.size != (width, height):
                # Pillow weighs the colours of RGBA pictures with their alpha here.
                picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (cell % columns * width, cell // columns * height))
        pictures.append(sheet)
    return SpriteSheets(pictures, count, width, height, columns, per_sheet)


def _picture(frames: np.ndarray, alpha: np.ndarray | None, index: int) -> Image.Image:
    if alpha is not None:
        return Image.fromarray(np.dstack([frames[index], alpha[index]]))
    return Image.fromarray(frames[index]).convert("RGB")
