"""Masks of the subjects of a person's clips: which file is whose, and the box a frame of each.

``masks/`` holds a clip for each of ``clips/``, white where the subject is: ``masks/dog.webm`` for
``clips/dog.mp4``. Of several subjects each has its own, the foremost first: ``masks/dog_1.webm``,
``masks/dog_2.webm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...conditioning.box_paths import track_masks
from ...conditioning.box_sources import from_bounding_boxes
from ...media import read_clip
from .buckets import Size, cover_box
from .layout import READABLE
from .probes import Probe
from .problems import Problem
from .reading import as_matte

MASKS = "masks"
# From this level on a mask is inside, as everywhere.
_HALF = 128
# How much the shapes of a clip and of its masks may differ, as a share.
_ALIKE = 0.02
Box = Sequence[float]


@dataclass(frozen=True)
class Sight:
    """What a clip of masks shows.

    frames, height, width: of the clip. boxes: (x0, y0, x1, y1) in pixels of what is inside, for
    each frame, None where nothing is.
    """

    frames: int
    height: int
    width: int
    boxes: tuple[Box | None, ...]

    def at(self, number: int) -> Box | None:
        """The box in a frame; a single mask holds for all."""
        return self.boxes[0 if self.frames == 1 else number]


def sight(path: Path, what: str) -> Sight:
    """Read a clip of masks to its end.

    Raises:
        LayerLoomError: as ``media.read_clip``.
    """
    boxes: list[Box | None] = []
    size = [0, 0]

    def look(picture: np.ndarray) -> np.ndarray:
        size[:] = picture.shape[:2]
        inside = mask_of(picture) >= _HALF
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = None
        if len(rows):
            corners = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            box = tuple(int(corner) for corner in corners)
        boxes.append(box)
        return picture[:1, :1]

    read_clip(path, what, min_frames=1, each=look)
    return Sight(len(boxes), size[0], size[1], tuple(boxes))


def mask_of(picture: np.ndarray) -> np.ndarray:
    """A mask uint8 [H, W] of a picture: its transparency where it has any, else its brightness."""
    opaque = picture.shape[-1] == 3 or bool((picture[..., 3] == 255).all())
    return as_matte(picture, not opaque)


def match_masks(
    folder: Path, clips: Sequence[str]
) -> tuple[dict[str, tuple[Path, ...]], list[Problem]]:
    """The masks of each clip, the foremost subject's first, and every fault.

    clips: names such as "clips/dog.mp4".
    """
    place = folder / MASKS
    entries = [
        entry
        for entry in (sorted(place.iterdir()) if place.is_dir() else [])
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in READABLE)
    ]
    problems: list[Problem] = []
    stems: dict[str, Path] = {}
    for entry in entries:
        stem = _stem(entry)
        if stem in stems:
            text = f"is a second mask beside {stems[stem].name}; keep one of them"
            problems.append(Problem(f"{MASKS}/{entry.name}", text))
        stems.setdefault(stem, entry)
    owners = {name: _stem(folder / name) for name in clips}
    found: dict[str, tuple[Path, ...]] = {}
    left = set(stems)
    for name, stem in owners.items():
        several = []
        while (numbered := f"{stem}_{len(several) + 1}") in stems and numbered not in set(
            owners.values()
        ):
            several.append(numbered)
        names = [stem] if stem in stems else several
        left -= set(names)
        found[name] = tuple(stems[each] for each in names)
        if not names:
            text = f"has no mask; add {MASKS}/{stem}.webm, white where its subject is"
            problems.append(Problem(name, text))
    for stem in sorted(left):
        text = "belongs to no clip; name it as its clip, or take it out"
        problems.append(Problem(f"{MASKS}/{stems[stem].name}", text))
    return found, problems


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def check_sight(seen: Sight, clip: Probe) -> str | None:
    """What is wrong with masks of a clip, if anything is."""
    if seen.frames not in (1, clip.frames):
        return f"has {seen.frames} frames and its clip {clip.frames}; give one mask a frame"
    shapes = seen.width / seen.height, clip.width / clip.height
    if abs(shapes[0] / shapes[1] - 1) > _ALIKE:
        return (
            f"is {seen.width}x{seen.height} and its clip {clip.size}; give masks of the clip's "
            "shape"
        )
    if not any(seen.boxes):
        return "is empty in every frame; mark the subject in white, or take the clip out"
    return None


def boxes_within(seen: Sight, numbers: Sequence[int], bucket: Size) -> list[Box | None]:
    """Boxes (x0, y0, x1, y1) of some frames in pixels of a bucket, None where nothing is in it.

    Boxes may reach beyond the bucket, which shows the clip's middle, but no further than a side.
    """
    left, top, right, bottom = cover_box((seen.height, seen.width), bucket)
    height, width = bucket
    across, down = width / (right - left), height / (bottom - top)
    made: list[Box | None] = []
    for number in numbers:
        box = seen.at(number)
        if box is not None:
            x0, x1 = ((x - left) * across for x in (box[0], box[2]))
            y0, y1 = ((y - top) * down for y in (box[1], box[3]))
            inside = x0 < width and y0 < height and x1 > 0 and y1 > 0
            box = (max(x0, -width), max(y0, -height), min(x1, 2 * width), min(y1, 2 * height))
            box = box if inside else None
        made.append(box)
    return made


def box_clip(boxes: Sequence[Box | None], size: Size) -> np.ndarray:
    """Masks bool [T, H, W] of boxes a frame; where there is none, of what is between its next."""
    listed = [
        []
        if box is None
        else [{"x": box[0], "y": box[1], "width": box[2] - box[0], "height": box[3] - box[1]}]
        for box in boxes
    ]
    return track_masks(from_bounding_boxes(listed, size, len(listed)), size)[0]
