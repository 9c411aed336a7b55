"""Frame sizes a network can take, by aspect ratio, and which one a picture goes into."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
# Height over width of what cameras and screens have.
_SHAPES = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)
# A shape nearer than this to one that is there already makes no bucket of its own.
_NEAR = math.log(1.1)


def bucket_sizes(size: Size, multiple: int, shapes: bool = True) -> tuple[Size, ...]:
    """Sizes (height, width) of about the area of ``size``, sides dividing by ``multiple``.

    The first is ``size`` itself, rounded. ``shapes``: also others, portrait and landscape.
    """
    first = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
    sizes = [first]
    if not shapes:
        return (first,)
    area = first[0] * first[1]
    for shape in (first[1] / first[0], *_SHAPES):
        height = max(1, round(math.sqrt(area * shape) / multiple))
        width = max(1, math.floor(area / (height * multiple) / multiple + 1e-6))
        found = (height * multiple, width * multiple)
        if abs(_shape(found) - math.log(shape)) < _NEAR and all(
            abs(_shape(found) - _shape(other)) >= _NEAR for other in sizes
        ):
            sizes.append(found)
    return tuple(sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to that of a picture (height, width)."""
    return min(buckets, key=lambda bucket: abs(_shape(bucket) - _shape(size)))


def cover_box(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """The middle part (left, top, right, bottom) of a picture that has the bucket's shape."""
    scale = min(size[0] / bucket[0], size[1] / bucket[1])
    height, width = bucket[0] * scale, bucket[1] * scale
    left, top = (size[1] - width) / 2, (size[0] - height) / 2
    return left, top, left + width, top + height


def _shape(size: Size) -> float:
    return math.log(size[0] / size[1])
