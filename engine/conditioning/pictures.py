"""Pictures a person gives: read from a file, turned upright, fitted to a size the network takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LayerLoomError

_ACCEPTED = "a PNG, JPEG, WebP, GIF, BMP or TIFF"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# A size is worth changing its area by e^0.1 to come e^0.05 closer to a picture's shape.
_AREA_WEIGHT = 0.5
_MOST_AREA = 1.1
Size = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """A picture as a file holds it.

    pixels: uint8 [H, W, 3], over black where it was transparent. name: for messages.
    transparent: whether some of it was. moving: whether the file has more pictures than the first.
    """

    pixels: np.ndarray
    name: str
    transparent: bool = False
    moving: bool = False


def read_picture(path: str | Path, what: str = "image") -> Picture:
    """Read a picture upright (a phone's turned photo too); of an animation, the first.

    what: how messages name it.
    Errors: LayerLoomError for a path that is missing, a folder, empty, damaged or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not path.exists():
        raise LayerLoomError(f"The {what} {path} does not exist; give {_ACCEPTED}.")
    if not path.is_file():
        raise LayerLoomError(f"The {what} {path} is a folder; give {_ACCEPTED}.")
    if path.stat().st_size == 0:
        raise LayerLoomError(f"The {what} {path} is empty; give {_ACCEPTED}.")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            moving = getattr(image, "n_frames", 1) > 1
            upright = _eight_bits(ImageOps.exif_transpose(image))
            rgba = np.asarray(upright.convert("RGBA"))
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise LayerLoomError(
            f"The {what} {path} is not a picture that can be opened; give {_ACCEPTED}."
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise LayerLoomError(
            f"The {what} {path} is damaged or cannot be read ({error}); give {_ACCEPTED}."
        ) from None
    alpha = rgba[..., 3:].astype(np.float32) / 255
    over = np.rint(rgba[..., :3] * alpha).astype(np.uint8)
    return Picture(over, path.name, bool((rgba[..., 3] < 255).any()), moving)


def _eight_bits(image):
    """16-bit grey loses its lower byte instead of clipping."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def fitting_size(picture: Size, native: Size, multiple: int) -> Size:
    """The size in multiples nearest to a picture's shape at about the native area.

    All sizes are (height, width) in pixels. A picture of the native shape gets the native size;
    another trades up to a tenth more area, or less of it, for its own shape.
    """
    height, width = native
    wanted, best, least = math.log(picture[1] / picture[0]), native, math.inf
    for h in range(multiple, 2 * (height + width), multiple):
        for w in range(multiple, 2 * (height + width), multiple):
            area = h * w / (height * width)
            if area > _MOST_AREA:
                break
            cost = abs(math.log(w / h) - wanted) + _AREA_WEIGHT * abs(math.log(area))
            # The native size wins a tie: it is what the weights know best.
            if cost < least - 1e-9 or (abs(cost - least) < 1e-9 and (h, w) == native):
                best, least = (h, w), cost
    return best


def clip_size(
    picture: Size, native: Size, multiple: int, width: int | None, height: int | None
) -> tuple[Size, Size]:
    """The network's and the result's (height, width) for a picture and what is asked for.

    Nothing asked for: the multiple nearest to the picture's shape at about the native area. One
    side asked for: the other follows from the picture. The network's sides are multiples.
    """
    if width is None and height is None:
        size = fitting_size(picture, native, multiple)
        return size, size
    tall, wide = picture
    output = (
        height or max(1, round(width * tall / wide)),
        width or max(1, round(height * wide / tall)),
    )
    return tuple(max(multiple, round(side / multiple) * multiple) for side in output), output


def cover(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Scale a picture uint8 [H, W, 3] to cover (height, width), then cut what hangs over evenly.

    Lanczos; a picture of that size comes back as it is.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    if (height, width) == tuple(size):
        return pixels
    scale = max(size[0] / height, size[1] / width)
    # The part of the picture that is kept, centred, in its own pixels.
    h, w = size[0] / scale, size[1] / scale
    top, left = (height - h) / 2, (width - w) / 2
    fitted = Image.fromarray(pixels).resize(
        (size[1], size[0]),
        Image.Resampling.LANCZOS,
        box=(max(0, left), max(0, top), min(width, left + w), min(height, top + h)),
    )
    return np.array(fitted)


def fitting_note(what: str, picture: Size, size: Size) -> str | None:
    """What a person should know about a picture that is not of the size; None where it is."""
    (height, width), (h, w) = picture, size
    if (height, width) == (h, w):
        return None
    scale = max(h / height, w / width)
    lost = {
        "height": 1 - h / (scale * height),
        "width": 1 - w / (scale * width),
    }
    cut = [f"{share:.0%} of its {side}" for side, share in lost.items() if share >= 0.005]
    text = f"The {what} of {width}x{height} is resized to {w}x{h}"
    return f"{text}, and {cut[0]} is cut off." if cut else f"{text}."


def resizing_note(wanted: Size, size: Size, multiple: int) -> str | None:
    """What a person should know where the network's size is not the one asked for."""
    if wanted == size:
        return None
    return (
        f"{wanted[1]}x{wanted[0]} does not divide by {multiple}: made at {size[1]}x{size[0]} and "
        "resized."
    )
