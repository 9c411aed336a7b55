"""Paths of boxes from what is there already: two boxes, a line, masks, other packs' values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import LayerLoomError
from .box_paths import Size, pixel_boxes, thinned
from .boxes import (
    LINEAR,
    MOST_TRACKS,
    BoxPaths,
    Key,
    Track,
    check_frames,
    check_key,
    parse_boxes,
    shown,
)

# Below this a mask is outside.
_HALF = 0.5
# Side of a box around a point that has no size of its own, in shares of the picture.
POINT_BOX = 0.25
_BOX_SHAPE = '{"x": 10, "y": 20, "width": 64, "height": 48}'
_NAMES = "abcdefghijklmnopqrstuvwxyz"
Shares = tuple[float, float, float, float]


def between(
    first: Shares, last: Shares, frames: int, ease: str = LINEAR, name: str = "a"
) -> BoxPaths:
    """From a box in the first frame to one in the last; (x, y, w, h) in shares of the picture.

    Raises:
        LayerLoomError: a box without area or outside the picture.
    """
    check_frames(frames)
    keys = [Key(0, *first, ease), Key(frames - 1, *last)][: min(frames, 2)]
    for key in keys:
        check_key(key, f"Key frame {key.frame} of track {name!r}")
    return BoxPaths(frames, (Track(name, tuple(keys)),))


def along(
    first: Shares, path: Sequence[tuple[float, float]], frames: int, name: str = "a"
) -> BoxPaths:
    """A box that moves along a drawn line at an even pace, its size kept.

    first: the box (x, y, w, h) of the first frame; the line is moved to begin in its middle.
    path: points (x, y). All in shares of the picture; paces are even in shares, too. Where the
    line leaves the picture, the box's middle stays at its border.

    Raises:
        LayerLoomError: a line of fewer than two different points, or no numbers.
    """
    check_frames(frames)
    x, y, w, h = first
    points = np.array(path, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise LayerLoomError("The path holds something that is no point; give pairs of numbers.")
    steps = np.hypot(*np.diff(points, axis=0).T)
    if not steps.sum() > 0:
        raise LayerLoomError("The path has no length; give at least two different points.")
    reached = np.concatenate([[0.0], np.cumsum(steps)])
    asked = np.linspace(0, reached[-1], frames)
    middle = np.array([x + w / 2, y + h / 2])
    places = np.stack([np.interp(asked, reached, side) for side in points.T], axis=1)
    places = np.clip(places - points[0] + middle, 0, 1)
    keys = tuple(Key(f, px - w / 2, py - h / 2, w, h) for f, (px, py) in enumerate(places.tolist()))
    check_key(keys[0], f"Key frame 0 of track {name!r}")
    return BoxPaths(frames, (thinned(Track(name, keys)),))


def from_masks(masks: np.ndarray, smooth: int = 0, name: str = "a", keep: float = 0.0) -> BoxPaths:
    """The path of what a clip of masks [F, H, W] (0..1 or bool) shows, e.g. a tracked subject.

    In frames without it the box goes on evenly between those with it. smooth: frames on either
    side whose boxes are averaged. keep: tolerance within which key frames are left out, in shares
    of the picture; 0 keeps one a frame unless a straight line gives it exactly.

    Raises:
        LayerLoomError: no clip of masks, all of them empty, or smooth out of range.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or 0 in masks.shape:
        raise LayerLoomError(
            f"The masks have the shape {shown(masks.shape)}; give one mask a frame: frames, "
            "height, width."
        )
    check_frames(len(masks))
    if not 0 <= smooth <= len(masks):
        raise LayerLoomError(
            f"smooth is {smooth}; give 0 (as tracked) to {len(masks)}, the number of frames."
        )
    inside = masks if masks.dtype == bool else masks >= _HALF
    corners = _extents(inside)
    if not np.isfinite(corners).any():
        raise LayerLoomError(
            "All masks are empty: nothing in them is as bright as one half; mark what is to be "
            "followed in white."
        )
    height, width = masks.shape[1:]
    shares = _filled(corners) / np.array([width, height, width, height])
    return BoxPaths(len(masks), (_track(name, _smoothed(shares, smooth), keep),))


def from_bounding_boxes(value: Any, size: Size, frames: int) -> BoxPaths:
    """Paths from the host's BOUNDING_BOX: ``{"x", "y", "width", "height"}`` in pixels.

    One box, or a list of them, or a list of such lists, one a frame. A list of as many boxes as
    there are frames (more than one) is one subject's path; one of another length are subjects that
    stay where they are. Lists a frame are retimed where they are not ``frames`` many; boxes with
    the same "label" belong together where labels tell all boxes of each frame apart, else those
    at the same place of their lists. Frames without a subject's box are filled in between.

    size: (height, width) of the picture that the pixels are of.

    Raises:
        LayerLoomError: anything else, or no box at all.
    """
    check_frames(frames)
    if isinstance(value, Mapping):
        value = [[value]]
    elif not isinstance(value, Sequence) or isinstance(value, str):
        raise LayerLoomError(f"The bounding boxes are {shown(value)}; give {_BOX_SHAPE}.")
    elif value and all(isinstance(entry, Mapping) for entry in value):
        one_path = 1 < len(value) == frames
        value = [[box] for box in value] if one_path else [list(value)]
    subjects = _sorted_out(value)
    if not subjects:
        raise LayerLoomError(
            "There are no bounding boxes in any frame; give at least one, or look for something "
            "else."
        )
    if len(subjects) > MOST_TRACKS:
        raise LayerLoomError(
            f"There are {len(subjects)} bounding boxes in a frame; give at most {MOST_TRACKS}, one "
            "for each subject."
        )
    height, width = size
    scale = np.array([width, height, width, height])
    names = [_name(number) for number in range(len(subjects))]
    tracks = []
    for found, name in zip(subjects, names, strict=True):
        corners = np.full((len(value), 4), np.nan)
        for frame, box in found.items():
            corners[frame] = box
        tracks.append(_track(name, _filled(corners) / scale))
    return BoxPaths(len(value), tuple(tracks)).retimed(frames)


def to_bounding_boxes(paths: BoxPaths, size: Size) -> list[list[dict[str, Any]]]:
    """The host's BOUNDING_BOX: a list a frame of boxes in pixels, labelled with the tracks' ids."""
    boxes = [pixel_boxes(track, paths.frames, size).tolist() for track in paths.tracks]
    return [
        [
            {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "label": track.id}
            for track, (x0, y0, x1, y1) in zip(paths.tracks, at_frame, strict=True)
        ]
        for at_frame in (list(zip(*boxes, strict=True)) if boxes else [[]] * paths.frames)
    ]


def from_tracks(value: Any, size: Size, frames: int, least: float = POINT_BOX) -> BoxPaths:
    """Paths from tracks of points in pixels, as other packs' editors and trackers give them.

    ``{"track_path": [T, N, 2], "track_visibility": [T, N]}`` (TRACKS) is one subject: the box
    around all its visible points. ``[{"x", "y"}, ...]``, one point a frame, or a list of such lists
    (also as text) are as many subjects. least: a box's smallest side in shares of the picture.

    size: (height, width) of the picture that the pixels are of.

    Raises:
        LayerLoomError: anything else, no numbers, or no visible point inside the picture.
    """
    check_frames(frames)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise LayerLoomError(
                'The tracks are not JSON; write [{"x": 10, "y": 20}, ...], one point a frame.'
            ) from None
    if isinstance(value, Mapping) and "track_path" in value:
        groups = [_tensor_points(value)]
    else:
        groups = [points[:, None] for points in _listed_points(value)]
    if len(groups) > MOST_TRACKS:
        raise LayerLoomError(
            f"There are {len(groups)} tracks of points; give at most {MOST_TRACKS}, one for each "
            "subject."
        )
    height, width = size
    tracks, lengths = [], {len(points) for points in groups}
    longest = max(lengths)
    for number, points in enumerate(groups):
        corners = _point_boxes(points / np.array([width, height]), least)
        track = _track(_name(number), _filled(corners))
        tracks += BoxPaths(len(points), (track,)).retimed(longest).tracks
    return BoxPaths(longest, tuple(tracks)).retimed(frames)


def read_path(value: Any, size: Size, frames: int) -> BoxPaths:
    """Paths from any of these: the contract, BOUNDING_BOX, TRACKS, or lists of points.

    size: (height, width) of the picture that pixels are of. frames: the length they shall have.

    Raises:
        LayerLoomError: as the functions above, and as ``parse_boxes``.
    """
    if isinstance(value, str):
        listed = value.lstrip().startswith("[")
        return from_tracks(value, size, frames) if listed else parse_boxes(value, frames)
    inner = value
    while isinstance(inner, Sequence) and not isinstance(inner, str) and inner:
        inner = inner[0]
    if isinstance(inner, Mapping):
        points = set(inner) >= {"x", "y"} and "width" not in inner
        if points or "track_path" in inner:
            return from_tracks(value, size, frames)
        if inner is value and {"tracks", "version"} & set(inner):
            return parse_boxes(value, frames)
    return from_bounding_boxes(value, size, frames)


def _track(name: str, corners: np.ndarray, tolerance: float = 0.0) -> Track:
    """A track of corners (x0, y0, x1, y1) [F, 4] in shares, kept in the picture's reach."""
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    keys = tuple(Key(frame, *box) for frame, box in enumerate(boxes.tolist()))
    for key in keys:
        check_key(key, f"Frame {key.frame} of track {name!r}")
    # What is left of rounding when a straight line is computed.
    return thinned(Track(name, keys), max(tolerance, 1e-9))


def _name(number: int) -> str:
    return _NAMES[number % len(_NAMES)]


def _extents(inside: np.ndarray) -> np.ndarray:
    """Corners (x0, y0, x1, y1) [F, 4] in pixels of what is inside, NaN where nothing is."""
    corners = np.full((len(inside), 4), np.nan)
    for frame, mask in enumerate(inside):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            corners[frame] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return corners


def _filled(corners: np.ndarray) -> np.ndarray:
    """Corners [F, 4] with frames of NaN put between those around them; at the ends, repeated."""
    known = np.flatnonzero(np.isfinite(corners).all(1))
    frames = np.arange(len(corners))
    return np.stack([np.interp(frames, known, side[known]) for side in corners.T], axis=1)


def _smoothed(corners: np.ndarray, reach: int) -> np.ndarray:
    """Means over up to ``reach`` frames on both sides, over fewer at the ends: these stay."""
    count = len(corners)
    reaches = [min(reach, frame, count - 1 - frame) for frame in range(count)]
    return np.stack([corners[f - r : f + r + 1].mean(0) for f, r in enumerate(reaches)])


def _sorted_out(lists: Sequence[Any]) -> list[dict[int, Shares]]:
    """Subjects as frame -> corners in pixels, from a list of boxes a frame."""
    read: list[list[tuple[Any, Shares]]] = []
    for frame, boxes in enumerate(lists):
        if isinstance(boxes, Mapping):
            boxes = [boxes]
        if not isinstance(boxes, Sequence) or isinstance(boxes, str):
            raise LayerLoomError(
                f"The bounding boxes of frame {frame} are {shown(boxes)}; give a list of "
                f"{_BOX_SHAPE}."
            )
        read.append([(_label(box), _corners(box, frame)) for box in boxes])
    labels = [[label for label, _ in boxes] for boxes in read]
    told_apart = all(None not in one and len(set(one)) == len(one) for one in labels)
    subjects: dict[Any, dict[int, Shares]] = {}
    for frame, boxes in enumerate(read):
        for place, (label, box) in enumerate(boxes):
            subjects.setdefault(label if told_apart else place, {})[frame] = box
    return list(subjects.values())


def _label(box: Any) -> str | None:
    label = box.get("label") if isinstance(box, Mapping) else None
    return label if isinstance(label, str) and label else None


def _corners(box: Any, frame: int) -> Shares:
    names = ("x", "y", "width", "height")
    if not isinstance(box, Mapping) or not all(_is_finite(box.get(name)) for name in names):
        raise LayerLoomError(
            f"A bounding box of frame {frame} is {shown(box)}; give numbers as in {_BOX_SHAPE}."
        )
    x, y, width, height = (float(box[name]) for name in names)
    if width <= 0 or height <= 0:
        raise LayerLoomError(
            f"A bounding box of frame {frame} is {width:g}x{height:g} pixels large; give a width "
            "and a height above 0."
        )
    return x, y, x + width, y + height


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _tensor_points(value: Mapping[str, Any]) -> np.ndarray:
    """Points [T, N, 2] of TRACKS, NaN where they are hidden."""
    points = _as_array(value["track_path"])
    if points.ndim == 4 and len(points) == 1:
        points = points[0]
    if points.ndim != 3 or points.shape[2] != 2 or 0 in points.shape:
        raise LayerLoomError(
            f"The tracks' points have the shape {shown(points.shape)}; give frames, points, 2."
        )
    check_frames(len(points))
    visible = value.get("track_visibility")
    if visible is not None:
        visible = _as_array(visible)
        if visible.size != points.shape[0] * points.shape[1]:
            raise LayerLoomError(
                f"The tracks have points of the shape {shown(points.shape)} and a visibility of "
                f"{shown(visible.shape)}; give one number a point and frame."
            )
        points = np.where(visible.reshape(points.shape[:2])[..., None] > _HALF, points, np.nan)
    return points


def _as_array(value: Any) -> np.ndarray:
    """Numbers of a tensor on any device, an array or lists."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise LayerLoomError(f"The tracks hold {shown(value)}; give numbers.") from None


def _listed_points(value: Any) -> list[np.ndarray]:
    """Points [T, 2] of each track of a list of tracks, or of one track alone."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise LayerLoomError(
            f'The tracks are {shown(value)}; give [{{"x": 10, "y": 20}}, ...], one point a frame.'
        )
    tracks = [value] if isinstance(value[0], Mapping) else value
    read = []
    for track in tracks:
        listed = isinstance(track, Sequence) and not isinstance(track, str) and track
        if not listed or not all(
            isinstance(p, Mapping) and _is_finite(p.get("x")) and _is_finite(p.get("y"))
            for p in track
        ):
            raise LayerLoomError(
                f'A track is {shown(track)}; give [{{"x": 10, "y": 20}}, ...], one point a frame.'
            )
        check_frames(len(track))
        read.append(np.array([(p["x"], p["y"]) for p in track], dtype=np.float64))
    return read


def _point_boxes(points: np.ndarray, least: float) -> np.ndarray:
    """Corners [T, 4] around points [T, N, 2] in shares; NaN where none is inside the picture."""
    outside = ~((points >= 0) & (points <= 1)).all(2)
    points = np.where(outside[..., None], np.nan, points)
    seen = ~outside.all(1)
    if not seen.any():
        raise LayerLoomError(
            "A track has no visible point inside the picture; give points in pixels of a picture "
            "of this size."
        )
    corners = np.full((len(points), 4), np.nan)
    low, high = np.nanmin(points[seen], axis=1), np.nanmax(points[seen], axis=1)
    more = np.maximum(least - (high - low), 0) / 2
    corners[seen] = np.concatenate([low - more, high + more], axis=1)
    return corners
