"""Reads lists of layers that a person writes, such as "7-9, 12:0.5"."""

from __future__ import annotations

import re

from ..errors import LayerLoomError

# The largest factor that a layer takes, as for the whole image stream.
STRONGEST = 10.0
_ENTRY = re.compile(r"(\d+)(?:\s*-\s*(\d+))?(?:\s*:\s*(\d*\.?\d+))?")


def layer_strengths(text: str, count: int, strength: float) -> tuple[float, ...]:
    """A factor for each of ``count`` layers, counted from 1; 1 for those that are not listed.

    text: layers and ranges apart by commas, each with a strength of its own behind a colon or with
        ``strength``; what comes later wins.
    Raises LayerLoomError for anything else, a layer that is not there, or a factor out of range.
    """
    factors = [1.0] * count
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise LayerLoomError("No layers are listed; write them as 7-9 or 1, 4, 12:0.5.")
    for entry in entries:
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise LayerLoomError(
                f"The list of layers has {entry!r}; write them as 7-9 or 1, 4, 12:0.5."
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= count:
            raise LayerLoomError(
                f"The list of layers has {entry!r}, but they are numbered 1 to {count}."
            )
        factor = strength if found[3] is None else float(found[3])
        if not 0 <= factor <= STRONGEST:
            raise LayerLoomError(
                f"The strength {factor:g} of layers {entry!r} is out of range; give 0 to "
                f"{STRONGEST:g}."
            )
        factors[first - 1 : last] = [factor] * (last - first + 1)
    return tuple(factors)
