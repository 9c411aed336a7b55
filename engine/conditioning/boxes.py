"""Paths of boxes: the contract that editors, files and the command share, read and checked.

``{"version": 1, "frames": N, "tracks": [{"id": "a", "keyframes": [{"frame": 0, "x": ..., "y": ...,
"w": ..., "h": ..., "ease": "linear"}, ...]}, ...]}``: a track is one subject's path; x and y are a
box's top left corner and w and h its size, in shares of the picture's width and height, so that
paths stay where they are whatever size the picture has. A key frame's ease says how its box becomes
the next one's. Before the first key frame and after the last one a box stays as it is there.

Key frames may come in any order. Boxes may reach beyond the picture, as those of subjects that come
in or leave do; some of each must be inside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LayerLoomError

VERSION = 1
LINEAR, SMOOTH, HOLD = "linear", "smooth", "hold"
EASE_IN, EASE_OUT, EASE_IN_OUT = "ease_in", "ease_out", "ease_in_out"
EASES = (LINEAR, EASE_IN, EASE_OUT, EASE_IN_OUT, SMOOTH, HOLD)
# More is a mistake, or an attack on whoever draws them.
MOST_FRAMES = 4096
MOST_TRACKS = 16
LONGEST_NAME = 64
# How far from the picture a corner may be, in sides of the picture.
_FARTHEST = 4.0
_KEY_SHAPE = '{"frame": 0, "x": 0.1, "y": 0.3, "w": 0.2, "h": 0.2, "ease": "linear"}'
_SHAPE = '{"version": 1, "frames": 16, "tracks": [{"id": "a", "keyframes": [...]}]}'


@dataclass(frozen=True)
class Key:
    """A box at a frame: top left corner and size in shares of the picture's width and height."""

    frame: int
    x: float
    y: float
    w: float
    h: float
    ease: str = LINEAR


@dataclass(frozen=True)
class Track:
    """One subject's path; ``keys`` in the order of their frames, at least one, no frame twice."""

    id: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class BoxPaths:
    """Paths through a clip of so many frames, one a subject; earlier subjects lie in front."""

    frames: int
    tracks: tuple[Track, ...] = ()

    def require(self) -> BoxPaths:
        """The paths themselves.

        Raises:
            LayerLoomError: there is none.
        """
        if not self.tracks:
            raise LayerLoomError(
                "There are no boxes: draw one in the editor, or give at least one track with a "
                "key frame."
            )
        return self

    def only(self, number: int) -> BoxPaths:
        """Of the subjects, counted from 1, one alone; 0 for all.

        Raises:
            LayerLoomError: there is no such subject.
        """
        if not 0 <= number <= len(self.tracks):
            raise LayerLoomError(
                f"There is no subject {number}; there are {len(self.tracks)}: give 1 to "
                f"{len(self.tracks)}, or 0 for all."
            )
        return replace(self, tracks=self.tracks[number - 1 : number]) if number else self

    def retimed(self, frames: int) -> BoxPaths:
        """The same paths through a clip of another length.

        First and last frame stay first and last. Where key frames fall together, the one that
        moved least stays, the earlier one of equals.

        Raises:
            LayerLoomError: the length is out of range.
        """
        check_frames(frames)
        if frames == self.frames:
            return self
        tracks = tuple(replace(t, keys=_retimed(t.keys, self.frames, frames)) for t in self.tracks)
        return BoxPaths(frames, tracks)

    def joined(self, other: BoxPaths) -> BoxPaths:
        """These subjects and, behind them, those of other paths in as many frames as these have.

        Raises:
            LayerLoomError: too many subjects together.
        """
        taken = {track.id for track in self.tracks}
        added = []
        for track in other.retimed(self.frames).tracks:
            name = _free_name(track.id, taken)
            taken.add(name)
            added.append(replace(track, id=name))
        tracks = self.tracks + tuple(added)
        _refuse_many(len(tracks))
        return BoxPaths(self.frames, tracks)

    def to_json(self) -> str:
        """The contract's text, which ``parse_boxes`` reads back."""
        tracks = [{"id": t.id, "keyframes": [dict(vars(k)) for k in t.keys]} for t in self.tracks]
        return json.dumps({"version": VERSION, "frames": self.frames, "tracks": tracks})


def parse_boxes(value: str | Mapping[str, Any], frames: int | None = None) -> BoxPaths:
    """Read paths from text or from what JSON makes of it; no tracks are allowed.

    frames: the length of the clip that is meant; paths of another length are retimed. None keeps
        their own.

    Raises:
        LayerLoomError: malformed, of another version, not a number, outside the picture, without
            area, or with more key frames than frames.
    """
    if frames is not None:
        check_frames(frames)
    if isinstance(value, str):
        value = _decoded(value)
    if not isinstance(value, Mapping):
        raise LayerLoomError(f"The boxes are {shown(value)}; write {_SHAPE}.")
    unknown = sorted(str(key) for key in set(value) - {"version", "frames", "tracks"})
    if unknown:
        raise LayerLoomError(f"The boxes have an entry {unknown[0][:40]!r}; write {_SHAPE}.")
    if value.get("version", VERSION) != VERSION:
        raise LayerLoomError(
            f"The boxes are of version {shown(value['version'])}; this LayerLoom reads version "
            f"{VERSION}: update it."
        )
    tracks = _list(value, "tracks", "The boxes'")
    _refuse_many(len(tracks))
    own = value.get("frames", frames)
    if own is None:
        raise LayerLoomError(f"The boxes do not say for how many frames they are; write {_SHAPE}.")
    check_frames(own)
    paths = BoxPaths(int(own), tuple(_track(track, int(own)) for track in tracks))
    names = [track.id for track in paths.tracks]
    for name in names:
        if names.count(name) > 1:
            raise LayerLoomError(f"Two tracks are called {name!r}; give each an id of its own.")
    return paths if frames is None else paths.retimed(frames)


def check_frames(frames: Any) -> None:
    """Raise LayerLoomError for a length of a clip that paths cannot have."""
    if not _is_whole(frames) or not 1 <= frames <= MOST_FRAMES:
        raise LayerLoomError(
            f"The number of frames is {shown(frames)}; give a whole number from 1 to {MOST_FRAMES}."
        )


def check_key(key: Key, what: str) -> Key:
    """The key frame itself.

    what: how messages name it.

    Raises:
        LayerLoomError: no area, wholly outside the picture, or absurdly far from it.
    """
    text = f"{key.x:g},{key.y:g},{key.w:g},{key.h:g}"
    if key.w <= 0 or key.h <= 0:
        raise LayerLoomError(
            f"{what} has a box without area ({text}); give a width and a height above 0."
        )
    inside = key.x < 1 and key.y < 1 and key.x + key.w > 0 and key.y + key.h > 0
    corners = (key.x, key.y, key.x + key.w, key.y + key.h)
    if not inside or max(map(abs, corners)) > _FARTHEST:
        raise LayerLoomError(
            f"{what} has a box outside the picture ({text}); give shares of its width and height, "
            "0 to 1, with some of the box inside."
        )
    return key


def read_key(text: str) -> tuple[int, float, float, float, float, str]:
    """``FRAME:X,Y,W,H`` or ``FRAME:X,Y,W,H:EASE`` as frame, x, y, w, h and ease.

    Raises:
        LayerLoomError: anything else.
    """
    frame, _, rest = text.partition(":")
    box, _, ease = rest.partition(":")
    try:
        number, numbers = int(frame), [float(part) for part in box.split(",")]
    except ValueError:
        number, numbers = -1, []
    ease = ease.strip() or LINEAR
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or number < 0:
        raise LayerLoomError(
            f"The box {text!r} is not of the form FRAME:X,Y,W,H; write 0:40,60,32,32 for a box of "
            "32x32 pixels at 40,60 in the first frame."
        )
    if ease not in EASES:
        raise LayerLoomError(f"The box {text!r} has an unknown ease; give {', '.join(EASES)}.")
    return number, *numbers, ease


def pixel_track(
    name: str,
    keys: Sequence[tuple[int, float, float, float, float, str]],
    frames: int,
    size: tuple[int, int],
) -> Track:
    """A track from key frames in pixels of a picture of ``size`` (height, width).

    keys: as ``read_key`` gives them.

    Raises:
        LayerLoomError: as for ``parse_boxes``.
    """
    height, width = size
    check_frames(frames)
    made = [
        Key(frame, x / width, y / height, w / width, h / height, ease)
        for frame, x, y, w, h, ease in keys
    ]
    return Track(name, _ordered(made, name, frames))


def _decoded(text: str) -> Any:
    if not text.strip():
        return {"version": VERSION, "frames": 1}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise LayerLoomError(f"The boxes are not JSON{where}; write {_SHAPE}.") from None


def _list(value: Mapping[str, Any], name: str, whose: str) -> Sequence[Any]:
    found = value.get(name, ())
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise LayerLoomError(f"{whose} {name} are {shown(found)}, not a list; write {_SHAPE}.")
    return found


def _refuse_many(count: int) -> None:
    if count > MOST_TRACKS:
        raise LayerLoomError(f"There are {count} tracks of boxes; give at most {MOST_TRACKS}.")


def _track(track: Any, frames: int) -> Track:
    if not isinstance(track, Mapping) or not set(track) <= {"id", "keyframes"}:
        raise LayerLoomError(f"A track of boxes is {shown(track)}; write {_SHAPE}.")
    name = track.get("id")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise LayerLoomError(
            f"A track's id is {shown(name)}; give a name of at most {LONGEST_NAME} characters."
        )
    keys = _list(track, "keyframes", f"Track {name!r}: its")
    if len(keys) > frames:
        raise LayerLoomError(
            f"Track {name!r} has {len(keys)} key frames and the clip {frames} frames; give at most "
            "one a frame."
        )
    return Track(name, _ordered([_key(key, name) for key in keys], name, frames))


def _key(key: Any, name: str) -> Key:
    needed = {"frame", "x", "y", "w", "h"}
    if not isinstance(key, Mapping) or not needed <= set(key) <= needed | {"ease"}:
        raise LayerLoomError(f"A key frame of track {name!r} is {shown(key)}; write {_KEY_SHAPE}.")
    for field in ("x", "y", "w", "h"):
        if not _is_number(key[field]):
            raise LayerLoomError(
                f"A key frame of track {name!r} has {field} = {shown(key[field])}; give a number."
            )
    if not _is_whole(key["frame"]):
        raise LayerLoomError(
            f"A key frame of track {name!r} has frame = {shown(key['frame'])}; give a whole number."
        )
    ease = key.get("ease", LINEAR)
    if ease not in EASES:
        raise LayerLoomError(
            f"A key frame of track {name!r} has ease {shown(ease)}; give {', '.join(EASES)}."
        )
    return Key(int(key["frame"]), *(float(key[field]) for field in ("x", "y", "w", "h")), ease)


def _ordered(keys: list[Key], name: str, frames: int) -> tuple[Key, ...]:
    if not keys:
        raise LayerLoomError(f"Track {name!r} has no key frames; give at least one, or drop it.")
    keys = sorted(keys, key=lambda key: key.frame)
    for before, key in zip([None, *keys], keys, strict=False):
        if not 0 <= key.frame < frames:
            raise LayerLoomError(
                f"Track {name!r} has a key frame {key.frame}, and the clip's frames go from 0 to "
                f"{frames - 1}; give one of them."
            )
        if before and before.frame == key.frame:
            raise LayerLoomError(
                f"Track {name!r} has two key frames at frame {key.frame}; give one a frame."
            )
        check_key(key, f"Key frame {key.frame} of track {name!r}")
    return tuple(keys)


def _retimed(keys: tuple[Key, ...], old: int, new: int) -> tuple[Key, ...]:
    scale = (new - 1) / (old - 1) if old > 1 else 0.0
    best: dict[int, tuple[float, Key]] = {}
    for key in keys:
        place = key.frame * scale
        frame = math.floor(place + 0.5)
        moved = abs(place - frame)
        if frame not in best or moved < best[frame][0]:
            best[frame] = (moved, replace(key, frame=frame))
    return tuple(best[frame][1] for frame in sorted(best))


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        ending = f" {number}"
        free = name[: LONGEST_NAME - len(ending)] + ending
        number += 1
    return free


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # A whole number of hundreds of digits.
        return False


def shown(value: Any) -> str:
    """A short look at what was given, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."
