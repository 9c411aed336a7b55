"""Run a benchmark's cases one after another within a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .cases import AnyCase
from .environment import describe
from .probes import Clock
from .protocol import Protocol, Row, Step
from .report import CaseResult, Report

Progress = Callable[[int, int, str], None]
"""(steps done, all steps, what is being done)."""
RunCase = Callable[[Any, Sequence[str], Sequence[str], Clock, Protocol, int, Step], list[Row]]
"""(case, candidates, baselines, clock, protocol, cases left, progress) to the case's rows."""


@dataclass(frozen=True)
class Suite:
    """What to run.

    Attributes:
        benchmark: "attention", "block" or "unet".
        command: a command line that measures the same, for the report.
        cases: of one device.
        names: candidates, as `run_case` knows them.
        baselines: names of candidates that ratios are taken to.
        rounds, seed: see `Protocol`.
        budget: seconds for everything; None for no limit.
        threads: of the CPU; None for torch's choice.
        clock: "wall", or "cpu" for processor time.
        dense_flops: operations of a case if nothing were skipped.
    """

    benchmark: str
    command: str
    cases: Sequence[AnyCase]
    names: Sequence[str]
    baselines: tuple[str, ...]
    rounds: int
    seed: int = 0
    budget: float | None = None
    threads: int | None = None
    clock: str = "wall"
    dense_flops: Callable[[Any], int] = lambda case: case.dense_flops

    @property
    def steps(self) -> int:
        return len(self.cases) * (self.rounds + 2)

    def run(self, device: torch.device, run_case: RunCase, progress: Progress) -> Report:
        """Measure every case."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        # Kernels outside torch start on the current card.
        card = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with card:
                return self._run(device, run_case, progress)
        finally:
            torch.set_num_threads(before)

    def _run(self, device: torch.device, run_case: RunCase, progress: Progress) -> Report:
        environment = describe(device)
        deadline = None if self.budget is None else time.monotonic() + self.budget
        protocol = Protocol(self.rounds, self.seed, deadline)
        settings = {
            "rounds": self.rounds,
            "seed": self.seed,
            "budget": self.budget,
            "clock": self.clock,
        }
        report = Report(self.benchmark, self.command, environment, settings)
        clock = Clock(device, busy=self.clock == "cpu")
        clock.warm_up()
        done = 0
        for index, case in enumerate(self.cases):
            place = f"{case.title} ({index + 1} of {len(self.cases)})"

            def step(count: int, what: str, place: str = place) -> None:
                nonlocal done
                done += count
                progress(done, self.steps, f"{place}: {what}" if what else place)

            left = len(self.cases) - index
            rows = run_case(case, self.names, self.baselines, clock, protocol, left, step)
            result = CaseResult(case, self.dense_flops(case), rows, self.baselines)
            report.results.append(result)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return report
