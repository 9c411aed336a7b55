"""An attention plan as small int32 tables, for kernels that walk it on the device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import AttentionPlan


class RunTable(NamedTuple):
    """What each block of query rows sees.

    tiles: [T, 4] int32: first query row, end of the stretch's rows, first run, end of the runs.
        A tile covers at most ``block`` rows; tiles with the most keys come first, so that the last
        ones to start are short.
    runs: [R, 2] int32: start and stop of visible keys; a query group's runs are neighbours.
    biases: [R] float32, added to the scaled scores of the run.
    """

    tiles: Tensor
    runs: Tensor
    biases: Tensor


def run_table(plan: AttentionPlan, block: int, device: torch.device) -> RunTable:
    """The plan's tables for tiles of ``block`` query rows, kept for later calls."""
    if torch.compiler.is_compiling():
        return _build(plan, block, device)
    return _cached(plan, block, device)


def _build(plan: AttentionPlan, block: int, device: torch.device) -> RunTable:
    tiles: list[tuple[int, list[int]]] = []
    runs: list[list[int]] = []
    biases: list[float] = []
    for group in plan.groups:
        first = len(runs)
        runs.extend([run.start, run.stop] for run in group.runs)
        biases.extend(run.bias for run in group.runs)
        for start, stop in group.queries:
            for row in range(start, stop, block):
                tiles.append((group.key_length, [row, stop, first, len(runs)]))
    tiles.sort(key=lambda tile: -tile[0])
    # An empty table still needs a row for a pointer to point at.
    return RunTable(
        torch.tensor([tile for _, tile in tiles], dtype=torch.int32).to(device),
        torch.tensor(runs or [[0, 0]], dtype=torch.int32).to(device),
        torch.tensor(biases or [0.0], dtype=torch.float32).to(device),
    )


_cached = lru_cache(maxsize=32)(_build)
