"""Turn a segment mask into a few contiguous key/value runs a group of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .block_mask import ScoreMod, score_mod, to_block_mask
from .explain import explain
from .layout import SegmentMask, SequenceLayout, require_grid
from .static import compacted, find_static, token_runs


@dataclass(frozen=True)
class KeyRun:
    """Tokens `start` to `stop` that a query group sees, with one additive bias."""

    start: int
    stop: int
    bias: float = 0.0


@dataclass(frozen=True)
class QueryGroup:
    """All queries with the same visible keys: `queries` are (start, stop) stretches of rows of q.

    These are tokens of the sequence, but in a plan `without_static`, where q has fewer rows.
    """

    queries: tuple[tuple[int, int], ...]
    runs: tuple[KeyRun, ...]

    @property
    def query_length(self) -> int:
        return sum(stop - start for start, stop in self.queries)

    @property
    def key_length(self) -> int:
        return sum(run.stop - run.start for run in self.runs)

    @property
    def by_bias(self) -> tuple[tuple[float, tuple[KeyRun, ...]], ...]:
        """The runs sorted into one tuple a bias, in order of first appearance."""
        sorted_runs: dict[float, list[KeyRun]] = {}
        for run in self.runs:
            sorted_runs.setdefault(run.bias, []).append(run)
        return tuple((bias, tuple(runs)) for bias, runs in sorted_runs.items())


@dataclass(frozen=True)
class AttentionPlan:
    """What one segmented self-attention computes; hashable, made once a run.

    `dropped` are the segments that q has no rows for (`without_static`); keys and values are
    those of the whole sequence in any case.
    """

    layout: SequenceLayout
    mask: SegmentMask | None
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    groups: tuple[QueryGroup, ...]
    dropped: tuple[int, ...] = ()

    @property
    def query_layout(self) -> SequenceLayout:
        """The segments that the rows of q stand for, in order."""
        if not self.dropped:
            return self.layout
        kept = (s for i, s in enumerate(self.layout.segments) if i not in self.dropped)
        return SequenceLayout(tuple(kept))

    @property
    def query_length(self) -> int:
        """Rows of q."""
        segments = self.layout.segments
        return self.layout.length - sum(segments[index].length for index in self.dropped)

    @property
    def static_segments(self) -> tuple[int, ...]:
        """Indices of the clean and text segments whose states depend on no noisy segment.

        The largest set of them whose queries see only tokens of this set: as long as their inputs
        stay the same, so do their keys and values in every block.
        """
        return self.dropped or find_static(self.layout, self.groups)

    @property
    def static_runs(self) -> tuple[tuple[int, int], ...]:
        """The (start, stop) stretches of tokens of the static segments."""
        return token_runs(self.layout, self.static_segments)

    @property
    def dynamic_runs(self) -> tuple[tuple[int, int], ...]:
        """The (start, stop) stretches of tokens of all other segments."""
        static = self.static_segments
        others = (index for index in range(len(self.layout.segments)) if index not in static)
        return token_runs(self.layout, tuple(others))

    def without_static(self) -> AttentionPlan:
        """The same attention for the other segments' queries alone.

        q then holds the tokens of `dynamic_runs` one after another, [B, H, query_length, D]; keys
        and values are still those of the whole sequence. The plan itself where nothing is static.
        """
        static = self.static_segments
        if self.dropped or not static:
            return self
        kept = self.dynamic_runs
        groups = ((compacted(group.queries, kept), group.runs) for group in self.groups)
        return replace(
            self,
            groups=tuple(QueryGroup(queries, runs) for queries, runs in groups if queries),
            dropped=static,
        )

    def take_queries(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rows of q among all tokens on axis `dim`: `x` itself, or without the static ones."""
        if not self.dropped:
            return x
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.dynamic_runs]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts or [x.narrow(dim, 0, 0)], dim=dim)

    @property
    def kv_runs(self) -> tuple[tuple[KeyRun, ...], ...]:
        """The visible key/value runs, one tuple a query group."""
        return tuple(group.runs for group in self.groups)

    @property
    def is_full(self) -> bool:
        """Whether it is plain attention of all rows of q over the whole sequence, without bias."""
        rows, whole = self.query_length, self.layout.length
        return self.groups == (QueryGroup(((0, rows),), (KeyRun(0, whole),)),)

    @property
    def flop_fraction(self) -> float:
        """Share of full attention's work that is left, 0 to 1."""
        pairs = sum(group.query_length * group.key_length for group in self.groups)
        return pairs / max(1, self.layout.length**2)

    @property
    def flops(self) -> int:
        """Floating-point operations of Q K^T and P V for one batch element."""
        pairs = sum(group.query_length * group.key_length for group in self.groups)
        return 4 * pairs * self.heads * self.head_dim

    def to_dense_mask(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        queries: slice | Tensor = slice(None),
    ) -> Tensor:
        """Additive mask [queries, N]: the bias where a key is visible, -inf where it is not.

        `queries` are rows of q. Built token by token from the mask, not from the runs, so that it
        can check them.
        """
        segment = self.layout.segment_ids(device)
        rows = self.take_queries(segment, 0)[queries]
        if self.mask is None:
            return torch.zeros(len(rows), len(segment), dtype=dtype, device=device)
        size = len(self.layout.segments)
        pairs = [self.mask.pair(query, key) for query in range(size) for key in range(size)]
        table = torch.tensor(
            [-math.inf if bias is None else bias for bias in pairs], dtype=dtype, device=device
        ).view(size, size)
        dense = table[rows[:, None], segment[None, :]]
        if self.mask.frame_window is not None:
            frame = self.layout.frame_ids(device)
            own = self.take_queries(frame, 0)[queries, None]
            distance = (own - frame[None, :]).abs()
            video = (own >= 0) & (frame[None, :] >= 0)
            dense = dense.masked_fill(video & (distance > self.mask.frame_window), -math.inf)
        return dense

    def to_block_mask(self, device: torch.device | str | None = None, block_size: int = 128) -> Any:
        """FlexAttention's BlockMask of the same visibility; `score_mod` has the biases."""
        return to_block_mask(self, device, block_size)

    def score_mod(self, device: torch.device | str | None = None) -> ScoreMod | None:
        """FlexAttention's `score_mod` for the biases; None where there are none."""
        return score_mod(self, device)

    def explain(self) -> str:
        """A table for people: which tokens see which, and what share of the work that is."""
        return explain(self)


def plan_attention(
    layout: SequenceLayout,
    mask: SegmentMask | None,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> AttentionPlan:
    """Plan the self-attention of one packed sequence.

    Plain integer work, a few milliseconds at most; call it once a run and pass the plan to
    every block. Without a mask, or with one that hides and weighs nothing, it is one group with
    one run. A frame window splits video segments into their frames.

    Raises:
        ValueError: the mask has another number of segments than the layout, or a frame window
            meets a video segment without a grid.
    """
    device = torch.device(device)
    size = len(layout.segments)
    if mask is not None and len(mask.visibility) != size:
        raise ValueError(
            f"the mask is for {len(mask.visibility)} segments, but the layout has {size}"
        )
    groups: dict[tuple[KeyRun, ...], list[tuple[int, int]]] = {}
    blocks = _blocks(layout, mask)
    for query in blocks:
        runs = tuple(_visible_runs(query, blocks, mask))
        stretches = groups.setdefault(runs, [])
        if stretches and stretches[-1][1] == query.start:
            stretches[-1] = (stretches[-1][0], query.stop)
        else:
            stretches.append((query.start, query.stop))
    return AttentionPlan(
        layout=layout,
        mask=mask,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        groups=tuple(QueryGroup(tuple(queries), runs) for runs, queries in groups.items()),
    )


@dataclass(frozen=True)
class _Block:
    """Tokens that share one row of the mask: a segment, or one of its frames."""

    start: int
    stop: int
    segment: int
    frame: int | None


def _blocks(layout: SequenceLayout, mask: SegmentMask | None) -> list[_Block]:
    blocks = []
    clip_frame = 0
    windowed = mask is not None and mask.frame_window is not None
    for index, (segment, span) in enumerate(zip(layout.segments, layout.slices, strict=True)):
        if segment.length == 0:
            continue
        if not windowed or segment.kind != "video":
            blocks.append(_Block(span.start, span.stop, index, None))
            continue
        frames, height, width = require_grid(segment)
        size = height * width
        for frame in range(frames):
            start = span.start + frame * size
            blocks.append(_Block(start, start + size, index, clip_frame + frame))
        clip_frame += frames
    return blocks


def _visible_runs(query: _Block, blocks: list[_Block], mask: SegmentMask | None) -> list[KeyRun]:
    runs: list[KeyRun] = []
    for key in blocks:
        bias = 0.0 if mask is None else mask.pair(query.segment, key.segment)
        if bias is None or _too_far(query, key, mask):
            continue
        if runs and runs[-1].stop == key.start and runs[-1].bias == bias:
            runs[-1] = KeyRun(runs[-1].start, key.stop, bias)
        else:
            runs.append(KeyRun(key.start, key.stop, bias))
    return runs


def _too_far(query: _Block, key: _Block, mask: SegmentMask | None) -> bool:
    if query.frame is None or key.frame is None:
        return False
    return abs(query.frame - key.frame) > mask.frame_window
