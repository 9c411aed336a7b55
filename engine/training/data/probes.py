"""Looks through clips frame by frame without keeping them: length, size, transparency, greys."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...media import read_clip
from .fingerprints import stamp

# Lossy video moves the ends of a matte's range by a few levels.
NEARLY = 3


@dataclass(frozen=True)
class Probe:
    """What a clip's files hold.

    frames, height, width: of the whole clip. fps: frames a second.
    alpha: smallest and largest transparency value, 0..255, or None where all is opaque.
    greys: smallest and largest colour value, 0..255.
    box: (left, top, right, bottom) in pixels of all that the clip shows as a matte, in any frame.
    """

    frames: int
    height: int
    width: int
    fps: float
    alpha: tuple[int, int] | None
    greys: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def matte(self) -> tuple[int, int]:
        """The range of values as a matte: transparency where there is any, else brightness."""
        return self.greys if self.alpha is None else self.alpha


def probe(path: Path, what: str) -> Probe:
    """Read a clip to its end.

    Raises:
        LayerLoomError: as ``media.read_clip``.
    """
    alpha, greys = _Range(), _Range()
    size = [0, 0]

    def look(picture: np.ndarray) -> np.ndarray:
        size[:] = picture.shape[:2]
        # Colour by colour: numpy is ten times slower along an axis of three.
        red, green, blue = (np.ascontiguousarray(picture[..., i]) for i in range(3))
        lows = np.minimum(np.minimum(red, green), blue)
        greys.add(lows, np.maximum(np.maximum(red, green), blue))
        if picture.shape[-1] == 4:
            matte = np.ascontiguousarray(picture[..., 3])
            alpha.add(matte, matte)
        return picture[:1, :1]

    clip = read_clip(path, what, min_frames=1, each=look)
    transparent = alpha.low <= alpha.high and alpha.low < 255
    return Probe(
        frames=len(clip.frames),
        height=size[0],
        width=size[1],
        fps=clip.fps,
        alpha=(alpha.low, alpha.high) if transparent else None,
        greys=(greys.low, greys.high),
        box=(alpha if transparent else greys).box or (0, 0, size[1], size[0]),
    )


class _Range:
    """The values a matte takes, and the box of what it does not hide."""

    def __init__(self):
        self.low, self.high = 255, 0
        self.box: tuple[int, int, int, int] | None = None

    def add(self, lows: np.ndarray, highs: np.ndarray) -> None:
        self.low = min(self.low, int(lows.min()))
        self.high = max(self.high, int(highs.max()))
        shown = highs > NEARLY
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        if not len(rows):
            return
        found = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        old = self.box or found
        self.box = (*map(min, old[:2], found[:2]), *map(max, old[2:], found[2:]))


class ProbeStore:
    """Probes of a folder's clips, kept in a file so that a second look costs nothing.

    file: where; None keeps them in memory. A clip whose files changed is looked at again.
    look: makes a probe of (path, what), a dataclass ``kind`` of plain values; None is ``probe``.
    """

    def __init__(
        self,
        folder: Path,
        file: Path | None = None,
        look: Callable[[Path, str], Any] | None = None,
        kind: type = Probe,
    ):
        self.folder, self.file, self.look, self.kind = folder, file, look or probe, kind
        self._entries: dict[str, dict] = {}
        self._changed = False
        try:
            self._entries = json.loads(file.read_text(encoding="utf-8")) if file else {}
        except (OSError, ValueError):
            pass  # missing or cut off: everything is looked at again
        if not isinstance(self._entries, dict):
            self._entries = {}

    def get(self, path: Path, what: str) -> Any:
        """The probe of a clip; raises as ``look`` does."""
        key = path.relative_to(self.folder).as_posix()
        try:
            now = stamp(path)
        except OSError:
            return self.look(path, what)  # which says what is wrong
        entry = self._entries.get(key)
        if isinstance(entry, dict) and entry.get("stamp") == now:
            values = entry["probe"].items()
            return self.kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})
        found = self.look(path, what)
        self._entries[key] = {"stamp": now, "probe": asdict(found)}
        self._changed = True
        return found

    def save(self) -> None:
        """Write what is new, whole or not at all; a place that cannot be written to is no harm."""
        if self.file is None or not self._changed:
            return
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(self._entries), encoding="utf-8")
            os.replace(partial, self.file)
            self._changed = False
        except OSError:
            partial.unlink(missing_ok=True)
