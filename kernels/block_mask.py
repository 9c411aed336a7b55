"""A plan in FlexAttention's terms: a BlockMask and a score_mod from the segment table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import AttentionPlan

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def to_block_mask(
    plan: AttentionPlan, device: torch.device | str | None = None, block_size: int = 128
) -> Any:
    """The plan's visibility as a `torch.nn.attention.flex_attention.BlockMask`.

    Rows and columns of the mask are constant over stretches of tokens (segments, or their frames),
    so the visible pairs of a block follow from the stretches' overlaps with its rows and columns:
    a product of small matrices, where torch's `create_block_mask` looks at all N x N pairs. The
    result is the same. Biases are in `score_mod`.

    Raises:
        ImportError: this torch has no FlexAttention.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = plan.device if device is None else torch.device(device)
    rows, columns, table = _table(plan)
    visible = ~torch.isneginf(table)
    in_rows = _overlaps(rows, block_size)
    in_columns = _overlaps(columns, block_size)
    # Integers below 2^53: exact.
    pairs = in_rows @ visible.double() @ in_columns.T
    full = pairs == block_size**2
    kinds = [_ordered((pairs > 0) & ~full, device), _ordered(full, device)]

    row_of, column_of = _ids(rows, device), _ids(columns, device)
    visible = visible.to(device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[row_of[query], column_of[key]]

    return BlockMask.from_kv_blocks(
        *kinds[0],
        *kinds[1],
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(rows[-1], columns[-1]),
    )


def score_mod(plan: AttentionPlan, device: torch.device | str | None = None) -> ScoreMod | None:
    """What adds the plan's biases to FlexAttention's scaled scores; None where all are zero."""
    if all(run.bias == 0 for group in plan.groups for run in group.runs):
        return None
    device = plan.device if device is None else torch.device(device)
    rows, columns, table = _table(plan)
    # Hidden pairs are the block mask's; a finite number keeps them from making NaN.
    table = table.masked_fill(torch.isneginf(table), 0.0).to(device)
    row_of, column_of = _ids(rows, device), _ids(columns, device)

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[row_of[query], column_of[key]]

    return add_bias


def _table(plan: AttentionPlan) -> tuple[list[int], list[int], Tensor]:
    """Bounds of the stretches of q's rows and of the tokens, and the bias between two stretches.

    [R, C] float32, -inf where the row's stretch does not see the column's.
    """
    rows = _bounds(plan.query_length, (pair for group in plan.groups for pair in group.queries))
    columns = _bounds(
        plan.layout.length, ((r.start, r.stop) for group in plan.groups for r in group.runs)
    )
    row_at = {start: index for index, start in enumerate(rows)}
    column_at = {start: index for index, start in enumerate(columns)}
    table = torch.full((len(rows) - 1, len(columns) - 1), -math.inf)
    for group in plan.groups:
        for start, stop in group.queries:
            here = table[row_at[start] : row_at[stop]]
            for run in group.runs:
                here[:, column_at[run.start] : column_at[run.stop]] = run.bias
    return rows, columns, table


def _bounds(length: int, stretches: Iterable[tuple[int, int]]) -> list[int]:
    return sorted({0, length}.union(*stretches))


def _ids(bounds: list[int], device: torch.device) -> Tensor:
    """[tokens] int32: the stretch each token is in."""
    sizes = torch.tensor(bounds).diff()
    return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes).to(device)


def _overlaps(bounds: list[int], block_size: int) -> Tensor:
    """[blocks, stretches] float64: tokens that a block of the sequence shares with a stretch."""
    edges = torch.tensor(bounds)
    first = torch.arange(0, bounds[-1], block_size)[:, None]
    last = first + block_size
    shared = torch.minimum(edges[1:], last) - torch.maximum(edges[:-1], first)
    return shared.clamp(min=0).double()


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of marked blocks a row [1, 1, R] and their columns, the marked ones first."""
    marked = blocks.to(torch.int32)
    columns = marked.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    number = marked.sum(dim=-1, dtype=torch.int32)
    return number.to(device)[None, None], columns.to(device)[None, None]
