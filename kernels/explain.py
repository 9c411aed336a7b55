"""Say in words and numbers what an attention plan computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .layout import SequenceLayout

if TYPE_CHECKING:
    from .plan import AttentionPlan


def explain(plan: AttentionPlan) -> str:
    """A table for people: which tokens see which, and what share of full attention that is."""
    whole = max(1, plan.layout.length**2)
    rows = [("queries", "tokens", "sees", "keys", "work")]
    for group in plan.groups:
        sees = ", ".join(
            _keys(plan.layout, run.start, run.stop) + (f" {run.bias:+g}" if run.bias else "")
            for run in group.runs
        )
        work = group.query_length * group.key_length / whole
        rows.append(
            (
                _queries(plan, group.queries),
                f"{group.query_length:,}",
                sees or "nothing (output 0)",
                f"{group.key_length:,}",
                f"{work:.1%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    right_aligned = (False, True, False, True, True)
    lines = [
        f"{plan.layout.length:,} tokens, {plan.heads} heads x {plan.head_dim}, "
        f"{str(plan.dtype).removeprefix('torch.')}: {plan.flop_fraction:.1%} of full "
        f"attention, {plan.flops / 1e12:.3g} TFLOP a block"
    ]
    if plan.dropped:
        names = " + ".join(plan.layout.segments[index].name for index in plan.dropped)
        left = plan.layout.length - plan.query_length
        lines.append(f"keys and values known, no queries: {names} ({left:,} tokens)")
    for row in rows:
        cells = zip(row, widths, right_aligned, strict=True)
        lines.append(
            "  ".join(
                text.rjust(width) if right else text.ljust(width) for text, width, right in cells
            ).rstrip()
        )
    return "\n".join(lines)


def _keys(layout: SequenceLayout, start: int, stop: int) -> str:
    return "everything" if (start, stop) == (0, layout.length) else _names(layout, start, stop)


def _queries(plan: AttentionPlan, stretches: Collection[tuple[int, int]]) -> str:
    layout = plan.query_layout
    if tuple(stretches) == ((0, plan.layout.length),):
        return "everything"
    return ", ".join(_names(layout, start, stop) for start, stop in stretches)


def _names(layout: SequenceLayout, start: int, stop: int) -> str:
    """The segments in [start, stop); frames in brackets where it holds only some."""
    names = []
    for segment, span in zip(layout.segments, layout.slices, strict=True):
        first, last = max(start, span.start), min(stop, span.stop)
        if first >= last:
            continue
        name = segment.name
        if (first, last) != (span.start, span.stop) and segment.grid is not None:
            size = segment.grid[1] * segment.grid[2]
            name += f"[{(first - span.start) // size}:{(last - span.start) // size}]"
        names.append(name)
    return " + ".join(names)
