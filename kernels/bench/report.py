"""Benchmark results as JSON and as Markdown tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import AnyCase
from .environment import sentence
from .protocol import Row, Spread

FORMAT = 1


@dataclass
class CaseResult:
    """The rows of one case, and what the case is in numbers."""

    case: AnyCase
    dense_flops: int
    rows: list[Row]
    baselines: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return {
            **self.case.record(),
            "dense_flops": self.dense_flops,
            "baselines": list(self.baselines),
            "rows": [{**asdict(row), "memory": row.memory} for row in self.rows],
        }


@dataclass
class Report:
    """One run of a benchmark.

    Attributes:
        benchmark: "attention", "block" or "unet".
        command: a command line that measures the same.
        environment: from `environment.describe`.
        settings: rounds, seed, budget.
        notes: sentences for the reader.
    """

    benchmark: str
    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[CaseResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All of it in types that JSON has; times in seconds, memory in bytes."""
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "command": self.command,
            "environment": self.environment,
            "settings": self.settings,
            "notes": self.notes,
            "cases": [result.record() for result in self.results],
        }

    def json(self) -> str:
        return json.dumps(self.record(), indent=1, allow_nan=False)

    def markdown(self) -> str:
        lines = [
            f"# layerloom bench {self.benchmark}",
            "",
            f"{sentence(self.environment)}.",
            "",
            f"`{self.command}`",
            "",
        ]
        for note in self.notes:
            lines += [note, ""]
        lines += [_legend(self.settings), ""]
        for result in self.results:
            lines += [*_table(result), ""]
        return "\n".join(lines)


def _legend(settings: dict[str, Any]) -> str:
    clock = "processor time" if settings.get("clock") == "cpu" else "wall time"
    return (
        f"Medians of {clock}, quartiles in brackets. A ratio is the baseline's time over the row's "
        "in the same round: above 1 is faster than the baseline. TFLOP/s: executed, then counted "
        "as if nothing were skipped. Error: the largest against float64 on sampled queries, "
        "relative to the largest expected value. MiB: what is made beforehand and the most that "
        "one call adds, beside the inputs. Setup and first call are wall time."
    )


def _table(result: CaseResult) -> list[str]:
    lines = [f"## {result.case.title}", "", f"{result.case.description}.", ""]
    measured = [row for row in result.rows if row.status == "measured"]
    if measured:
        baselines = [name for name in result.baselines if any(name in r.ratios for r in measured)]
        head = ["candidate", "ms", *(f"x {name}" for name in baselines), "TFLOP/s", "dense"]
        head += ["error", "MiB", "setup ms", "first call ms", "rounds", "kernel"]
        body = [_cells(row, baselines) for row in measured]
        lines += [_line(head), _line(["---"] * len(head)), *(_line(cells) for cells in body)]
    out = [row for row in result.rows if row.status != "measured"]
    if out:
        lines += [""] if measured else []
        lines += [f"- {row.candidate}, {row.status}: {row.reason}" for row in out]
    return lines


def _cells(row: Row, baselines: Sequence[str]) -> list[str]:
    name = row.candidate + (" (full attention)" if row.computes == "full" else "")
    ratios = [_spread(row.ratios.get(base), 1.0, ".2f") for base in baselines]
    kernel = ", ".join(
        op.removeprefix("aten::").lstrip("_").removeprefix("scaled_dot_product_")
        for op in row.operators
    )
    kernel = "; ".join(part for part in (kernel, row.device_kernel[:60]) if part)
    return [
        name,
        _spread(row.time, 1e3, ".4g"),
        *ratios,
        _number(row.flops_per_second, 1e-12, ".3g"),
        _number(row.dense_flops_per_second, 1e-12, ".3g"),
        _number(row.error, 1.0, ".1e"),
        _number(row.memory, 2**-20, ",.1f"),
        _milliseconds(row.setup),
        _milliseconds(row.cold),
        str(len(row.times)),
        kernel or "-",
    ]


def _spread(spread: Spread | None, factor: float, form: str) -> str:
    if spread is None:
        return "-"
    median, q1, q3 = (format(x * factor, form) for x in (spread.median, spread.q1, spread.q3))
    return median if median == q1 == q3 else f"{median} ({q1}..{q3})"


def _number(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value * factor, form)


def _milliseconds(seconds: float | None) -> str:
    return _number(seconds, 1e3, ".3g" if seconds is not None and seconds < 0.1 else ",.0f")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
