"""Which part of a step's batch a process computes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """The parts ``own`` of a step's ``count`` equal parts, each ``batch`` samples of a stage.

    Every process draws the whole step from the same generator and keeps its own parts, so many
    processes, many passes a step and one large batch see the same samples.
    """

    own: Sequence[int] = (0,)
    count: int = 1

    def rows(self, batch: int) -> list[slice]:
        """Rows of each own part in what was drawn for all."""
        return [slice(part * batch, (part + 1) * batch) for part in self.own]


WHOLE = Shares()
