"""A picture of a benchmark: speed relative to the baseline, one panel a shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .cases import type_name
from .report import CaseResult, Report

MISSING = (
    "The plot is left out: it needs matplotlib (pip install 'layerloom[bench]'); the tables hold "
    "the same numbers."
)
# Paul Tol's bright scheme: told apart by most eyes, in print too.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#222222")


def available() -> bool:
    """Whether matplotlib is installed; it is loaded only to draw."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Report, path: Path) -> None:
    """Write a PNG: bars of the median ratio to the first baseline, whiskers from q1 to q3."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[CaseResult]] = {}
    for result in report.results:
        if not _bars(result):
            continue
        case = result.case
        title = f"{case.shape.name} ({case.shape.layout.length:,} tokens, {case.shape.heads} heads,"
        panels.setdefault(f"{title} {type_name(case.dtype)})", []).append(result)
    names = list(
        dict.fromkeys(
            row.candidate
            for result in report.results
            for row in result.rows
            if row.status == "measured"
        )
    )
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    bars = {title: sum(len(_bars(r)) + 1 for r in results) for title, results in panels.items()}
    heights = [max(count, 2) for count in bars.values()] or [2]
    figure = Figure(figsize=(8.5, 1.3 + 0.24 * sum(heights) + 0.5 * len(heights)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[
        :, 0
    ]
    for axis, (title, results) in zip(axes, panels.items(), strict=False):
        _panel(axis, title, results, colours)
    first = next((result.baselines[0] for result in report.results if result.baselines), "")
    axes[-1].set_xlabel(
        f"times as fast as {first} ({report.settings['clock']} time), median and quartiles",
        fontsize=8,
    )
    environment = report.environment
    threads = environment["threads"]
    cores = f"{threads} thread" + ("s" if threads > 1 else "")
    where = environment.get("card") or f"{environment['processor']}, {cores}"
    figure.suptitle(
        f"layerloom bench {report.benchmark}: {where}, {environment['date']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, format="png")


def _bars(result: CaseResult) -> list[tuple[str, float, float, float]]:
    """(candidate, median, q1, q3) of everything that has a ratio to the first baseline."""
    found = []
    for row in result.rows:
        ratio = row.ratios.get(result.baselines[0]) if result.baselines else None
        if ratio is not None:
            found.append((row.candidate, ratio.median, ratio.q1, ratio.q3))
    return found


def _panel(axis, title: str, results: list[CaseResult], colours: dict[str, str]) -> None:
    position, ticks, labels, widest = 0.0, [], [], 1.0
    for result in results:
        bars = _bars(result)
        for name, median, q1, q3 in bars:
            axis.barh(position, median, height=0.82, color=colours[name])
            axis.plot([q1, q3], [position, position], color="black", linewidth=1)
            axis.annotate(
                f"{name}  {median:.2f}",
                (max(q3, median), position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
            widest = max(widest, q3)
            position += 1
        ticks.append(position - len(bars) / 2 - 0.5)
        labels.append(f"{result.case.mask}\n{result.case.plan().flop_fraction:.0%} of the work")
        position += 1
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.set_ylim(position - 1.3, -0.7)
    axis.set_xlim(0, widest * 1.35)
    axis.set_title(title, fontsize=8, loc="left")
    axis.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
