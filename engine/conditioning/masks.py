"""Masks of what shall move: read from a picture, written, grown or shrunk, their edge softened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import LayerLoomError
from .pictures import read_picture

# Past these a mistyped number is likelier than a wish; in pixels.
MOST_DILATION = 512
MOST_FEATHER = 512
# Share of square steps among cross-shaped ones that makes a regular octagon, the nearest to a disc.
_SQUARES = math.sqrt(2) - 1


def read_mask(path: str | Path, size: tuple[int, int], what: str = "mask") -> np.ndarray:
    """A picture's brightness (or its own transparency) as a mask, float32 [H, W] in 0..1.

    size: (height, width) that it must have.

    Raises:
        LayerLoomError: no picture, of another size, or empty.
    """
    from PIL import Image, ImageOps

    picture = read_picture(path, what)
    if picture.transparent:
        with Image.open(path) as image:
            grey = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3]
    else:
        grey = np.asarray(Image.fromarray(picture.pixels).convert("L"))
    return check_mask(grey.astype(np.float32) / 255, size, f"{what} {path}")


def check_mask(mask: Any, size: tuple[int, int], what: str = "mask") -> Any:
    """The mask [H, W] itself, numbers 0..1, an array or a tensor.

    Raises:
        LayerLoomError: not of ``size`` (height, width), not a number somewhere, or nowhere 0.5.
    """
    height, width = size
    if tuple(mask.shape) != (height, width):
        shown = "x".join(map(str, reversed(mask.shape)))
        raise LayerLoomError(
            f"The {what} is {shown} and the picture is {width}x{height}; give a mask of the "
            "picture's size."
        )
    if not bool((mask == mask).all()):
        raise LayerLoomError(f"The {what} holds values that are no numbers; give values 0 to 1.")
    if not bool((mask >= 0.5).any()):
        raise LayerLoomError(
            f"The {what} is empty: nothing in it is as bright as one half; mark what is meant in "
            "white."
        )
    return mask


def write_mask(path: str | Path, mask: Any) -> None:
    """Write a mask [H, W] in 0..1 as an 8-bit grey PNG.

    Raises:
        LayerLoomError: the file cannot be written.
    """
    from PIL import Image

    from ..checkpoints.save import atomic_file

    levels = np.rint(np.clip(np.asarray(mask, dtype=np.float32), 0, 1) * 255).astype(np.uint8)
    with atomic_file(path, levels.size) as file:
        Image.fromarray(levels).save(file, format="PNG")


def refine(masks: torch.Tensor, dilation: int = 0, feather: float = 0.0) -> torch.Tensor:
    """Masks [..., H, W], bool or 0..1, grown and then softened; float32 of the same shape.

    dilation: pixels by which the outline moves outwards (inwards below 0), the same in all
    directions within a twelfth. feather: pixels over which the edge fades, centred on the outline.

    Raises:
        LayerLoomError: one of them is out of range.
    """
    check_refinement(dilation, feather)
    flat = masks.float().reshape(-1, 1, *masks.shape[-2:])
    # A blurred step goes from 2 % to 98 % over four standard deviations, and to nothing over six.
    sigma = feather / 4
    reach = math.ceil(3 * sigma)
    rows, columns = _busy(flat, max(dilation, 0) + reach + 1)
    part = flat[..., rows, columns]
    if dilation and part.numel():
        part = _grown(part, dilation)
    if feather and part.numel():
        from kornia.filters import gaussian_blur2d

        side = 2 * reach + 1
        part = gaussian_blur2d(part, (side, side), (sigma, sigma), border_type="replicate")
    refined = torch.zeros_like(flat)
    refined[..., rows, columns] = part
    return refined.reshape(masks.shape)


def _busy(masks: torch.Tensor, margin: int) -> tuple[slice, slice]:
    """Rows and columns [N, 1, H, W] outside of which masks are 0, with a margin where there is."""
    slices = []
    for other in (3, 2):
        found = masks.amax((0, 1, other)).nonzero()[:, 0]
        first, last = (int(found[0]), int(found[-1])) if len(found) else (0, -1 - margin)
        slices.append(slice(max(0, first - margin), max(0, last + margin + 1)))
    return slices[0], slices[1]


def check_refinement(dilation: int, feather: float) -> None:
    """Raise LayerLoomError for numbers that ``refine`` does not take."""
    if not -MOST_DILATION <= dilation <= MOST_DILATION:
        raise LayerLoomError(
            f"The dilation is {dilation} pixels; give -{MOST_DILATION} (shrink) to {MOST_DILATION}."
        )
    if not 0 <= feather <= MOST_FEATHER:
        raise LayerLoomError(f"The feather is {feather:g} pixels; give 0 to {MOST_FEATHER}.")


def _grown(masks: torch.Tensor, dilation: int) -> torch.Tensor:
    """Dilation (erosion below 0) of [N, 1, H, W] by a regular octagon, pixel by pixel.

    Steps of one pixel: a large kernel would unfold the picture into as many copies as it has
    cells.
    """
    from kornia.morphology import dilation as dilate
    from kornia.morphology import erosion as erode

    step = dilate if dilation > 0 else erode
    square = masks.new_ones(3, 3)
    cross = masks.new_tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    done = 0
    for taken in range(1, abs(dilation) + 1):
        due = round(taken * _SQUARES)
        masks = step(masks, square if due > done else cross)
        done = due
    return masks
