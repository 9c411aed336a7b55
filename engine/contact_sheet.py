"""Draws layers as one picture: a sheet of frames, and an animation of the layers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_BACKDROP = (24, 26, 31)
_INK = (222, 225, 231)
_FAINT = (139, 145, 157)
_CHECKERS = (np.float32(204), np.float32(245))
_GAP = 6
_MARGIN = 14


def contact_sheet(
    layers: Mapping[str, np.ndarray],
    alpha: np.ndarray | None = None,
    *,
    columns: int = 6,
    cell_width: int = 160,
) -> Image.Image:
    """A row a layer, a column a moment, both labelled.

    layers: name -> frames uint8 [F, H, W, 3] in the order of the rows, all of one shape.
    alpha: uint8 [F, H, W]; "foreground" is then shown over a checkerboard, and a row "alpha"
    follows it.
    columns: at most that many frames, evenly spaced, first and last among them.
    cell_width: pixels; clips are scaled to about that width.
    """
    rows = _rows(layers, alpha)
    count, height, width = next(iter(rows.values())).shape[:3]
    moments = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    size = _scaled(width, height, cell_width)
    font, small = _font(15), _font(12)
    label_width = max(math.ceil(font.getlength(name)) for name in rows)
    left = _MARGIN + label_width + _MARGIN
    top = _MARGIN + 18
    sheet = Image.new(
        "RGB",
        (
            left + len(moments) * (size[0] + _GAP) - _GAP + _MARGIN,
            top + len(rows) * (size[1] + _GAP) - _GAP + _MARGIN,
        ),
        _BACKDROP,
    )
    draw = ImageDraw.Draw(sheet)
    for column, moment in enumerate(moments):
        x = left + column * (size[0] + _GAP)
        draw.text((x + size[0] // 2, top - 7), f"{moment + 1}", _FAINT, small, anchor="ms")
    for row, (name, frames) in enumerate(rows.items()):
        y = top + row * (size[1] + _GAP)
        draw.text((_MARGIN, y + size[1] // 2), name, _INK, font, anchor="lm")
        for column, moment in enumerate(moments):
            sheet.paste(_resize(frames[moment], size), (left + column * (size[0] + _GAP), y))
    return sheet


def animated_webp(
    path: str | Path,
    layers: Mapping[str, np.ndarray],
    alpha: np.ndarray | None = None,
    *,
    fps: float = 8.0,
    cell_width: int = 192,
) -> None:
    """Write the layers side by side as an endless animated WebP, each with its name below.

    Arguments as for `contact_sheet`; fps in frames a second.
    """
    rows = _rows(layers, alpha)
    count, height, width = next(iter(rows.values())).shape[:3]
    size = _scaled(width, height, cell_width)
    font = _font(15)
    pictures = []
    for index in range(count):
        picture = Image.new(
            "RGB",
            (2 * _MARGIN + len(rows) * (size[0] + _GAP) - _GAP, 2 * _MARGIN + size[1] + 20),
            _BACKDROP,
        )
        draw = ImageDraw.Draw(picture)
        for column, (name, frames) in enumerate(rows.items()):
            x = _MARGIN + column * (size[0] + _GAP)
            picture.paste(_resize(frames[index], size), (x, _MARGIN))
            place = (x + size[0] // 2, _MARGIN + size[1] + 20)
            draw.text(place, name, _INK, font, anchor="ms")
        pictures.append(picture)
    pictures[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=90,
        method=6,
    )


def over_checkerboard(frames: np.ndarray, alpha: np.ndarray, square: int = 8) -> np.ndarray:
    """Straight frames uint8 [F, H, W, 3] over a grey checkerboard, squares in pixels."""
    rows, columns = np.indices(frames.shape[1:3]) // square
    board = np.where((rows + columns) % 2, *_CHECKERS)[..., None]
    weight = alpha[..., None].astype(np.float32) / 255
    return np.rint(frames * weight + board * (1 - weight)).astype(np.uint8)


def _rows(layers: Mapping[str, np.ndarray], alpha: np.ndarray | None) -> dict[str, np.ndarray]:
    rows: dict[str, np.ndarray] = {}
    for name, frames in layers.items():
        if name == "foreground" and alpha is not None:
            rows[name] = over_checkerboard(frames, alpha, max(4, frames.shape[2] // 16))
            rows["alpha"] = np.repeat(alpha[..., None], 3, axis=-1)
        else:
            rows[name] = frames
    return rows


def _scaled(width: int, height: int, cell_width: int) -> tuple[int, int]:
    """Cell size in pixels: a whole multiple where the clip is smaller, so pixels stay square."""
    scale = cell_width / width
    if scale > 1:
        scale = max(1, round(scale))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
