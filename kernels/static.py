"""Find the segments whose states do not depend on noisy ones, and leave out their queries."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .layout import SequenceLayout

if TYPE_CHECKING:
    from .plan import QueryGroup

Stretch = tuple[int, int]


def find_static(layout: SequenceLayout, groups: Collection[QueryGroup]) -> tuple[int, ...]:
    """Indices of the largest set of clean and text segments whose queries see only this set.

    Text is as given as a clean layer is. Found by leaving out, until nothing changes, segments
    that see something else. What counts is what a token really sees: a frame window may close a
    set that visibility leaves open.
    """
    sees: dict[int, set[int]] = {index: set() for index in range(len(layout.segments))}
    for group in groups:
        seen = {index for run in group.runs for index in _touched(layout, run.start, run.stop)}
        for start, stop in group.queries:
            for index in _touched(layout, start, stop):
                sees[index] |= seen
    static = {
        index
        for index, segment in enumerate(layout.segments)
        if segment.length > 0 and (segment.clean or segment.kind == "text")
    }
    while True:
        closed = {index for index in static if sees[index] <= static}
        if closed == static:
            return tuple(sorted(static))
        static = closed


def token_runs(layout: SequenceLayout, chosen: Collection[int]) -> tuple[Stretch, ...]:
    """The (start, stop) stretches of tokens that the `chosen` segments fill."""
    names = {layout.segments[index].name for index in chosen}
    runs = layout.runs(lambda segment: int(segment.name in names))
    return tuple((start, stop) for start, stop, inside in runs if inside)


def compacted(stretches: Collection[Stretch], kept: Collection[Stretch]) -> tuple[Stretch, ...]:
    """The part of some token stretches that lies in `kept`, as rows of the kept tokens alone."""
    rows: list[Stretch] = []
    for start, stop in stretches:
        offset = 0
        for first, last in kept:
            a, b = max(start, first), min(stop, last)
            if a < b:
                row = offset + a - first
                if rows and rows[-1][1] == row:
                    row, _ = rows.pop()
                rows.append((row, offset + b - first))
            offset += last - first
    return tuple(rows)


def _touched(layout: SequenceLayout, start: int, stop: int) -> list[int]:
    """Indices of the segments that have tokens in [start, stop)."""
    return [
        index
        for index, span in enumerate(layout.slices)
        if max(start, span.start) < min(stop, span.stop)
    ]
