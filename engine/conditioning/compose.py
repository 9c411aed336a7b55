"""Lays a foreground with alpha over any other clip: position, scale and length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import LayerLoomError

LENGTHS = ("foreground", "background", "longest", "shortest")
REPEATS = ("loop", "hold")


def place_foreground(
    foreground: torch.Tensor,
    alpha: torch.Tensor,
    background: torch.Tensor,
    *,
    x: float = 0.5,
    y: float = 0.5,
    scale: float = 1.0,
    length: str = "foreground",
    repeat: str = "loop",
    on_frame: Callable[[], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite [N, Hb, Wb, 3] and the alpha used [N, Hb, Wb], both in [0, 1] on the CPU.

    foreground: straight colour [F, H, W, C >= 3]; alpha: [F or 1, H, W], 1 is opaque;
    background: [G, Hb, Wb, C >= 3]; all in [0, 1].
    x, y: where the foreground's centre goes, as shares of the background's width and height;
    outside 0..1 is allowed. scale: 1 fits the foreground inside the background.
    length: whose number of frames the result has, see `LENGTHS`. repeat: a clip that is too short
    starts again ("loop") or keeps its last frame ("hold").
    on_frame: called after each frame.
    Errors: LayerLoomError where alpha and foreground differ in size or number of frames.
    """
    alpha = _matching_alpha(foreground, alpha)
    if len(foreground) == 0 or len(background) == 0:
        raise LayerLoomError("A clip without frames cannot be composited; connect other images.")
    height, width = background.shape[1:3]
    inner = _inner_size(foreground.shape[1:3], (height, width), scale)
    top, left = round(y * height - inner[0] / 2), round(x * width - inner[1] / 2)
    rows = slice(max(0, top), min(height, top + inner[0]))
    columns = slice(max(0, left), min(width, left + inner[1]))
    seen = rows.start < rows.stop and columns.start < columns.stop
    part = (rows.start - top, rows.stop - top, columns.start - left, columns.stop - left)

    count = frame_count(len(foreground), len(background), length)
    image = torch.empty(count, height, width, 3)
    mask = torch.zeros(count, height, width)
    placed: dict[int, torch.Tensor] = {}
    for index in range(count):
        image[index] = background[_frame(index, len(background), repeat), :, :, :3]
        if seen:
            source = _frame(index, len(foreground), repeat)
            if source not in placed:
                colour = foreground[source, :, :, :3].float().cpu()
                cover = alpha[source, :, :, None].float().cpu().clamp(0, 1)
                # Premultiplied, so that colours under transparent pixels stay out of the edges.
                whole = torch.cat([colour * cover, cover], dim=-1).permute(2, 0, 1)
                placed[source] = _resized_part(whole, inner, part).permute(1, 2, 0)
            layer = placed[source]
            cover = layer[..., 3:].clamp(0, 1)
            colour = layer[..., :3].clamp(min=0).minimum(cover)
            image[index, rows, columns] = colour + (1 - cover) * image[index, rows, columns]
            mask[index, rows, columns] = cover[..., 0]
        if on_frame is not None:
            on_frame()
    return image, mask


def layer_bytes(
    foreground: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    background: torch.Tensor | None = None,
    blended: torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The layers that are given as files hold them, by name and in this order.

    Colours [F, H, W, C >= 3] in [0, 1] become uint8 [F, H, W, 3], alpha [F or 1, H, W] becomes
    uint8 [F, H, W]. A foreground of four channels brings its own alpha where none is given.
    """
    if foreground is not None:
        if alpha is None and foreground.shape[-1] == 4:
            alpha = foreground[..., 3]
        if alpha is not None:
            alpha = _matching_alpha(foreground, alpha)
    layers = {"foreground": foreground, "background": background, "blended": blended}
    given = {name: _bytes(clip[..., :3]) for name, clip in layers.items() if clip is not None}
    if alpha is not None:
        given["alpha"] = _bytes(alpha[None] if alpha.ndim == 2 else alpha)
    order = ("foreground", "alpha", "background", "blended")
    return {name: given[name] for name in order if name in given}


def frame_count(foreground: int, background: int, length: str) -> int:
    """Frames of a composite of clips that long; ``length`` is one of `LENGTHS`."""
    if length not in LENGTHS:
        raise LayerLoomError(f"Unknown length {length!r}: use one of {', '.join(LENGTHS)}.")
    return {
        "foreground": foreground,
        "background": background,
        "longest": max(foreground, background),
        "shortest": min(foreground, background),
    }[length]


def _bytes(clip: torch.Tensor) -> np.ndarray:
    return (clip.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _matching_alpha(foreground: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    alpha = alpha[None] if alpha.ndim == 2 else alpha
    if alpha.shape[1:] != foreground.shape[1:3]:
        raise LayerLoomError(
            f"The alpha is {alpha.shape[2]}x{alpha.shape[1]} and the foreground"
            f" {foreground.shape[2]}x{foreground.shape[1]}; connect the alpha that belongs to the"
            " foreground."
        )
    if len(alpha) == 1:
        alpha = alpha.expand(len(foreground), -1, -1)
    if len(alpha) != len(foreground):
        raise LayerLoomError(
            f"The alpha has {len(alpha)} frames and the foreground {len(foreground)}; connect the"
            " alpha that belongs to the foreground, or a single mask for all frames."
        )
    return alpha


def _inner_size(size: tuple[int, int], outer: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width in pixels of the foreground on the background."""
    factor = scale * min(outer[0] / size[0], outer[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _frame(index: int, count: int, repeat: str) -> int:
    if repeat not in REPEATS:
        raise LayerLoomError(f"Unknown repeat {repeat!r}: use one of {', '.join(REPEATS)}.")
    return index % count if repeat == "loop" else min(index, count - 1)


def _resized_part(
    picture: torch.Tensor, size: tuple[int, int], part: tuple[int, int, int, int]
) -> torch.Tensor:
    """Rows and columns ``part`` (top, bottom, left, right) of [C, H, W] resized to ``size``."""
    top, bottom, left, right = part
    if tuple(picture.shape[1:]) == size:
        return picture[:, top:bottom, left:right]
    if size[0] <= picture.shape[1] and size[1] <= picture.shape[2]:
        small = F.interpolate(
            picture[None], size=size, mode="bicubic", antialias=True, align_corners=False
        )
        return small[0, :, top:bottom, left:right]
    # Magnified: only what is seen is computed, for the whole could be larger than memory.
    y = (torch.arange(top, bottom) + 0.5) / size[0] * 2 - 1
    x = (torch.arange(left, right) + 0.5) / size[1] * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    return F.grid_sample(
        picture[None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[0]
