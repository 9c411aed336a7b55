"""What given layers see, and whether every step computes them or an earlier one's are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels import SegmentKVCache
from .conditioning.layers import GIVEN
from .errors import LayerLoomError

# Holds every published LayerFlow task at its trained size, both branches of guidance (5.9 GiB).
MEMORY_GIB = 8.0
# Steps after which given layers are computed anew unless told otherwise: on the starter this costs
# next to nothing in quality, where 10 begins to and never does (docs/kernels.md).
REFRESH_EVERY = 5


@dataclass(frozen=True)
class GivenReuse:
    """Given layers and prompts see nothing but each other, and are then the same at every step.

    All but the time step is the same, to be exact: published weights modulate given layers with
    it, so keeping them is an approximation (docs/kernels.md).

    Attributes:
        keep: use keys and values of an earlier step; False computes them at every step.
        refresh: compute them anew after so many steps; None is never.
        memory: most GiB to keep them in; where they need more, every step computes them.
    """

    keep: bool = True
    refresh: int | None = None
    memory: float = MEMORY_GIB

    def check(self, task: str) -> None:
        """Raise LayerLoomError for what cannot be."""
        if not GIVEN.get(task):
            raise LayerLoomError(
                "There is nothing to reuse, since no layer is given; give a clip or leave reuse "
                "off."
            )
        if self.refresh is not None and self.refresh < 1:
            raise LayerLoomError(
                f"Given layers cannot be computed anew after {self.refresh} steps; give 1 or more."
            )
        if not (math.isfinite(self.memory) and self.memory > 0):
            raise LayerLoomError(
                f"{self.memory:g} GiB is no memory to reuse given layers in; give more than 0."
            )

    def cache(self) -> SegmentKVCache | None:
        """A cache for one run, or None where nothing is kept."""
        return SegmentKVCache(int(self.memory * 2**30), self.refresh) if self.keep else None

    def record(self, cache: SegmentKVCache | None) -> dict[str, float | None]:
        """What a run's record says: what was asked, and how much memory it took."""
        return {
            "keep": self.keep,
            "refresh_every": self.refresh,
            "memory_gib": self.memory,
            "held_bytes": 0 if cache is None else cache.held_bytes,
        }
