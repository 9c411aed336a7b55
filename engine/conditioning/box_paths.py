"""From key frames to a box a frame, to pixels and to masks; ``web/box_path.mjs`` does the same.

Both do the same operations on the same 64-bit numbers in the same order, so that an editor shows to
the pixel what is computed here.
"""

from __future__ import annotations

import math

import numpy as np

from .boxes import EASE_IN, EASE_IN_OUT, EASE_OUT, HOLD, SMOOTH, BoxPaths, Key, Track

Size = tuple[int, int]
Box = tuple[float, float, float, float]


def box_at(track: Track, frame: float) -> Box:
    """The box (x, y, w, h) of a track at a frame, in shares of the picture.

    ``smooth`` stretches go through their key frames without a corner and never beyond them:
    monotone cubic Hermite curves a coordinate (Fritsch and Butland, 1984).
    """
    keys = track.keys
    if frame <= keys[0].frame:
        return _box(keys[0])
    if frame >= keys[-1].frame:
        return _box(keys[-1])
    at = max(index for index, key in enumerate(keys) if key.frame <= frame)
    before, after = keys[at], keys[at + 1]
    length = after.frame - before.frame
    share = (frame - before.frame) / length
    if before.ease == SMOOTH:
        slopes = zip(_slopes(keys, at), _slopes(keys, at + 1), strict=True)
        return tuple(
            _hermite(a, b, in_slope * length, out_slope * length, share)
            for a, b, (in_slope, out_slope) in zip(_box(before), _box(after), slopes, strict=True)
        )
    eased = _eased(before.ease, share)
    return tuple(a + (b - a) * eased for a, b in zip(_box(before), _box(after), strict=True))


def box_shares(track: Track, frames: int) -> np.ndarray:
    """Boxes (x, y, w, h) of all frames in shares of the picture, float64 [F, 4]."""
    return np.array([box_at(track, frame) for frame in range(frames)], dtype=np.float64)


def pixel_boxes(track: Track, frames: int, size: Size) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) of all frames in pixels, int64 [F, 4], x1 and y1 excluded.

    size: (height, width). Borders are rounded and clamped to the picture; a box keeps a pixel.
    """
    return np.array(
        [_pixels(box_at(track, frame), size) for frame in range(frames)], dtype=np.int64
    )


def box_masks(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Masks bool [F, H, W], true inside of boxes (x0, y0, x1, y1) [F, 4] in pixels."""
    height, width = size
    ys, xs = np.arange(height)[None, :], np.arange(width)[None, :]
    x0, y0, x1, y1 = (boxes[:, side, None] for side in range(4))
    down, across = (ys >= y0) & (ys < y1), (xs >= x0) & (xs < x1)
    return down[:, :, None] & across[:, None, :]


def track_masks(paths: BoxPaths, size: Size) -> np.ndarray:
    """Masks of all subjects, bool [N, F, H, W]; size: (height, width)."""
    masks = [box_masks(pixel_boxes(t, paths.frames, size), size) for t in paths.tracks]
    return np.stack(masks) if masks else np.zeros((0, paths.frames, *size), dtype=bool)


def thinned(track: Track, tolerance: float = 0.002) -> Track:
    """The track without those key frames that straight lines between others put back.

    tolerance: in shares of the picture; no coordinate moves further (Douglas and Peucker, 1973).
    All its key frames must be linear; ends stay.
    """
    keys = track.keys
    kept, open_stretches = {0, len(keys) - 1}, [(0, len(keys) - 1)]
    while open_stretches:
        first, last = open_stretches.pop()
        ends = Track(track.id, (keys[first], keys[last]))
        worst, at = tolerance, None
        for index in range(first + 1, last):
            straight = box_at(ends, keys[index].frame)
            apart = max(abs(a - b) for a, b in zip(straight, _box(keys[index]), strict=True))
            if apart > worst:
                worst, at = apart, index
        if at is not None:
            kept.add(at)
            open_stretches += [(first, at), (at, last)]
    return Track(track.id, tuple(keys[index] for index in sorted(kept)))


def _box(key: Key) -> Box:
    return key.x, key.y, key.w, key.h


def _eased(ease: str, share: float) -> float:
    if ease == HOLD:
        return 0.0
    if ease == EASE_IN:
        return share * share
    if ease == EASE_OUT:
        return share * (2 - share)
    if ease == EASE_IN_OUT:
        return share * share * (3 - 2 * share)
    return share


def _slopes(keys: tuple[Key, ...], at: int) -> Box:
    """Slopes a frame at a key frame of a smooth stretch; stretches of other kinds end the curve."""
    before = _secant(keys, at - 1) if at > 0 and keys[at - 1].ease == SMOOTH else None
    after = _secant(keys, at) if at + 1 < len(keys) and keys[at].ease == SMOOTH else None
    if before is None or after is None:
        return after or before
    left, right = keys[at].frame - keys[at - 1].frame, keys[at + 1].frame - keys[at].frame
    near, far = 2 * right + left, right + 2 * left
    return tuple(
        0.0 if a * b <= 0 else (near + far) / (near / a + far / b)
        for a, b in zip(before, after, strict=True)
    )


def _secant(keys: tuple[Key, ...], at: int) -> Box:
    length = keys[at + 1].frame - keys[at].frame
    return tuple((b - a) / length for a, b in zip(_box(keys[at]), _box(keys[at + 1]), strict=True))


def _hermite(a: float, b: float, slope_a: float, slope_b: float, t: float) -> float:
    """Cubic from a to b, written as a plus the changes so that equal ends give exactly a."""
    rest = 1 - t
    return a + (b - a) * (t * t * (3 - 2 * t)) + t * rest * (rest * slope_a - t * slope_b)


def _pixels(box: Box, size: Size) -> tuple[int, int, int, int]:
    height, width = size
    x, y, w, h = box
    x0, x1 = _borders(x, x + w, width)
    y0, y1 = _borders(y, y + h, height)
    return x0, y0, x1, y1


def _borders(low: float, high: float, side: int) -> tuple[int, int]:
    first = min(max(math.floor(low * side + 0.5), 0), side - 1)
    return first, max(min(math.floor(high * side + 0.5), side), first + 1)
