"""Clicks on a picture: the contract that editors, files and the command share, read and checked.

``{"version": 1, "points": [{"x": 0..1, "y": 0..1, "label": 1 | 0}, ...], "boxes": [[x0, y0, x1,
y1], ...]}``: shares of the picture's width and height, from its top left corner, so that clicks
stay on the object whatever size the picture has. Label 1 is what is wanted, 0 what is not.
``[{"x": ..., "y": ...}, ...]`` in pixels, as other packs' point editors write it, is read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LayerLoomError

VERSION = 1
# More is a mistake, or an attack on whoever serves masks.
MOST = 256
Size = tuple[int, int]
_SHAPE = '{"version": 1, "points": [{"x": 0.5, "y": 0.5, "label": 1}], "boxes": []}'


@dataclass(frozen=True)
class Click:
    """A point in shares of width and height, 0..1; ``label`` 1 wants what is there, 0 does not."""

    x: float
    y: float
    label: int = 1


@dataclass(frozen=True)
class Clicks:
    """What selects one region.

    boxes: (x0, y0, x1, y1) in shares of width and height, top left corner first.
    """

    points: tuple[Click, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()

    @property
    def selects(self) -> bool:
        """Whether there is something to look for: a point of label 1, or a box."""
        return bool(self.boxes) or any(point.label for point in self.points)

    def require(self) -> Clicks:
        """The clicks themselves.

        Raises:
            LayerLoomError: they select nothing.
        """
        if not self.selects:
            raise LayerLoomError(
                "The clicks select nothing: there is no point on what is wanted (label 1) and no "
                "box; add one of them."
            )
        return self

    def pixels(self, size: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points [N, 2] (x, y), labels [N] and boxes [M, 4] in pixels of a picture (height, width).

        Whole numbers are the pixels' centres, as segment-anything counts.
        """
        height, width = size
        scale = np.array([width, height], dtype=np.float64)
        points = np.array([(p.x, p.y) for p in self.points], dtype=np.float64).reshape(-1, 2)
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        labels = np.array([p.label for p in self.points], dtype=np.int64)
        return points * scale - 0.5, labels, boxes * np.tile(scale, 2) - 0.5

    def to_json(self) -> str:
        """The contract's text, which ``parse_clicks`` reads back."""
        points = [{"x": p.x, "y": p.y, "label": p.label} for p in self.points]
        return json.dumps({"version": VERSION, "points": points, "boxes": list(self.boxes)})


def parse_clicks(
    value: str | Mapping[str, Any] | Sequence[Any], size: Size | None = None
) -> Clicks:
    """Read clicks from text or from what JSON makes of it; no points and no boxes are allowed.

    size: (height, width) of the picture, for points in pixels.

    Raises:
        LayerLoomError: malformed, of another version, not a number, or outside the picture.
    """
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, Mapping):
        return _parse_shares(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _parse_pixels(value, size)
    raise LayerLoomError(f"The clicks are {_shown(value)}; write {_SHAPE}.")


def pixel_clicks(
    points: Sequence[Sequence[float]], boxes: Sequence[Sequence[float]], size: Size
) -> Clicks:
    """Clicks from pixels of a picture of ``size`` (height, width), whole numbers being centres.

    points: (x, y) or (x, y, label). boxes: two opposite corners, (x0, y0, x1, y1).

    Raises:
        LayerLoomError: outside the picture, or a box without area.
    """
    height, width = size
    made = []
    for x, y, *label in points:
        if not (0 <= x < width and 0 <= y < height):
            raise LayerLoomError(
                f"The point {x:g},{y:g} lies outside the picture, whose pixels go from 0,0 to "
                f"{width - 1},{height - 1}; give a point inside."
            )
        made.append(_click(x, y, label[0] if label else 1, size))
    corners = []
    for box in boxes:
        x0, y0, x1, y1 = box
        if not all(0 <= x <= width for x in (x0, x1)) or not all(
            0 <= y <= height for y in (y0, y1)
        ):
            raise LayerLoomError(
                f"The box {_listed(box)} goes beyond the picture of {width}x{height} pixels; give "
                "corners inside."
            )
        corners.append(_ordered([x0 / width, y0 / height, x1 / width, y1 / height], _listed(box)))
    return Clicks(tuple(made), tuple(corners))


def read_point(text: str) -> tuple[float, ...]:
    """``X,Y`` or ``X,Y,LABEL`` as (x, y, label).

    Raises:
        LayerLoomError: anything else.
    """
    numbers = _numbers(text)
    if numbers is None or len(numbers) not in (2, 3) or (numbers[2:] or [1])[0] not in (0, 1):
        raise LayerLoomError(
            f"The point {text!r} is not of the form X,Y or X,Y,LABEL; write 40,60 for what is "
            "wanted, or 40,60,0 for what is not, in pixels."
        )
    return (*numbers[:2], int(numbers[2]) if len(numbers) == 3 else 1)


def read_box(text: str) -> tuple[float, ...]:
    """``X0,Y0,X1,Y1`` as numbers.

    Raises:
        LayerLoomError: anything else.
    """
    numbers = _numbers(text)
    if numbers is None or len(numbers) != 4:
        raise LayerLoomError(
            f"The box {text!r} is not of the form X0,Y0,X1,Y1; write 10,20,90,80, in pixels."
        )
    return tuple(numbers)


def _decoded(text: str) -> Any:
    if not text.strip():
        return {"version": VERSION}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise LayerLoomError(f"The clicks are not JSON{where}; write {_SHAPE}.") from None


def _parse_shares(value: Mapping[str, Any]) -> Clicks:
    unknown = sorted(str(key) for key in set(value) - {"version", "points", "boxes"})
    if unknown:
        raise LayerLoomError(f"The clicks have an entry {unknown[0][:40]!r}; write {_SHAPE}.")
    if value.get("version", VERSION) != VERSION:
        raise LayerLoomError(
            f"The clicks are of version {_shown(value['version'])}; this LayerLoom reads version "
            f"{VERSION}: update it."
        )
    points = [_share_point(point) for point in _list(value, "points")]
    return Clicks(tuple(points), tuple(_share_box(box) for box in _list(value, "boxes")))


def _list(value: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = value.get(name, ())
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise LayerLoomError(f"The clicks' {name} are {_shown(found)}, not a list; write {_SHAPE}.")
    _refuse_many(found, name)
    return found


def _refuse_many(found: Sequence[Any], name: str) -> None:
    if len(found) > MOST:
        raise LayerLoomError(
            f"There are {len(found)} {name} among the clicks; give at most {MOST}."
        )


def _share_point(point: Any) -> Click:
    x, y, label = _entries(point)
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise LayerLoomError(
            f"The point ({x:g}, {y:g}) lies outside the picture; give shares of its width and "
            "height, from 0 to 1."
        )
    return Click(x, y, label)


def _share_box(box: Any) -> tuple[float, float, float, float]:
    numbers = [] if isinstance(box, str) or not isinstance(box, Sequence) else list(box)
    if len(numbers) != 4 or not all(map(_is_number, numbers)):
        raise LayerLoomError(
            f"A box among the clicks is {_shown(box)}; write four numbers, [x0, y0, x1, y1]."
        )
    if not all(0 <= number <= 1 for number in numbers):
        raise LayerLoomError(
            f"The box {_listed(numbers)} goes beyond the picture; give shares of its width and "
            "height, from 0 to 1."
        )
    return _ordered([float(number) for number in numbers], _listed(numbers))


def _ordered(box: Sequence[float], shown: str) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    if x0 == x1 or y0 == y1:
        raise LayerLoomError(f"The box {shown} has no area; give two opposite corners.")
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _parse_pixels(value: Sequence[Any], size: Size | None) -> Clicks:
    _refuse_many(value, "points")
    points = [_entries(point) for point in value]
    if not points:
        return Clicks()
    if size is None:
        raise LayerLoomError(
            "The clicks are a list of points in pixels, which need the picture's size; write "
            f"{_SHAPE}."
        )
    # Other editors' points lie anywhere between the borders.
    height, width = size
    for x, y, _ in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise LayerLoomError(
                f"The point ({x:g}, {y:g}) lies outside the picture of {width}x{height} pixels; "
                "give a point inside."
            )
    return Clicks(tuple(_click(x, y, label, size) for x, y, label in points))


def _click(x: float, y: float, label: float, size: Size) -> Click:
    """A point in pixels, kept inside the picture: the last pixel's far half is its border."""
    height, width = size
    return Click(min((x + 0.5) / width, 1.0), min((y + 0.5) / height, 1.0), int(label))


def _entries(point: Any) -> tuple[float, float, int]:
    if not isinstance(point, Mapping) or not {"x", "y"} <= set(point) <= {"x", "y", "label"}:
        raise LayerLoomError(
            f"A point among the clicks is {_shown(point)}; write "
            '{"x": 0.5, "y": 0.5, "label": 1}.'
        )
    label = point.get("label", 1)
    for name in ("x", "y"):
        if not _is_number(point[name]):
            raise LayerLoomError(
                f"A point among the clicks has {name} = {_shown(point[name])}; give a number."
            )
    if not isinstance(label, int | float) or label not in (0, 1):
        raise LayerLoomError(
            f"A point among the clicks has label {_shown(label)}; use 1 for what is wanted and 0 "
            "for what is not."
        )
    return float(point["x"]), float(point["y"]), int(label)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _shown(value: Any) -> str:
    """A short look at what was given, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."
