"""The measuring protocol: candidates interleaved in shuffled rounds, ratios round by round."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .environment import free_memory
from .probes import Clock, look_inside, quiet_collector

FEWEST_ROUNDS = 3
Judge = Callable[[str, Any], float]
"""(what a candidate computes, its result) to the largest error over the largest expected value."""
Step = Callable[[int, str], None]
"""Progress: (steps done since the last call, what comes next)."""


@dataclass(frozen=True)
class Prepared:
    """A candidate ready to run.

    Attributes:
        call: the timed call.
        held: tensors made for it beforehand (a dense mask); they count in its memory.
        flops: operations of one call where only the preparation knows them.
    """

    call: Callable[[], Any]
    held: tuple[Tensor, ...] = ()
    flops: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        name: unique in its case.
        prepare: one-time work, timed apart; returns what is timed.
        flops: operations that one call executes.
        computes: which function of the case it computes, for the judge.
        reason: why it cannot run here; empty if it can.
        needs: bytes it takes beside the inputs, as far as known beforehand.
    """

    name: str
    prepare: Callable[[], Prepared] | None = None
    flops: int = 0
    computes: str = "masked"
    reason: str = ""
    needs: int = 0


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of some numbers."""

    median: float
    q1: float
    q3: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        if len(numbers) == 1:
            return cls(*[numbers[0]] * 5)
        q1, median, q3 = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, q1, q3, min(numbers), max(numbers))


@dataclass
class Row:
    """What was found out about one candidate; numbers are None where it did not come so far.

    Attributes:
        status: "measured", "unavailable" (a reason known beforehand), "failed" or "skipped".
        times: seconds a call, one a round; `calls_per_sample` calls make one of them.
        ratios: baseline name to the spread of (baseline's time / this one's) of each round, so
            above 1 is faster than the baseline.
        setup, cold: seconds of the preparation and of the first call.
        flops_per_second, dense_flops_per_second: by the median time; executed operations, and
            those of the whole unmasked problem.
        error: largest error over the largest expected value.
        held_bytes, peak_bytes: made beforehand, and the most that one call added.
    """

    candidate: str
    computes: str
    status: str = "measured"
    reason: str = ""
    times: list[float] = field(default_factory=list)
    time: Spread | None = None
    ratios: dict[str, Spread] = field(default_factory=dict)
    calls_per_sample: int = 1
    setup: float | None = None
    cold: float | None = None
    flops_per_second: float | None = None
    dense_flops_per_second: float | None = None
    error: float | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    operators: tuple[str, ...] = ()
    device_kernel: str = ""

    @property
    def memory(self) -> int | None:
        """Bytes beside the inputs: held and peak together."""
        if self.peak_bytes is None or self.held_bytes is None:
            return None
        return self.peak_bytes + self.held_bytes


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        rounds: samples of every candidate.
        seed: of the order within the rounds, the inputs and the sampled rows.
        deadline: `time.monotonic()` at which to come to an end; None for no limit. A case that
            was begun is finished with ``FEWEST_ROUNDS`` rounds; a candidate too slow for them is
            left out.
    """

    rounds: int = 10
    seed: int = 0
    deadline: float | None = None

    def seconds_left(self, cases_left: int) -> float:
        """This case's share of the time that is left."""
        if self.deadline is None:
            return math.inf
        return (self.deadline - time.monotonic()) / max(1, cases_left)


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number after one that comes again."""
    return [
        f"{name}#{names[:index].count(name) + 1}" if name in names[:index] else name
        for index, name in enumerate(names)
    ]


@torch.no_grad()
def measure(
    candidates: Sequence[Candidate],
    baselines: Sequence[str],
    dense_flops: int,
    device: torch.device,
    clock: Clock,
    protocol: Protocol,
    cases_left: int,
    judge: Judge,
    step: Step,
) -> list[Row]:
    """Measure the candidates of one case against each other.

    First each in turn: preparation, first call (the cold start, judged), a warm call. Then rounds:
    every candidate once, in a new random order, no garbage collection. Last a watched call of each
    for memory and kernels. Whatever a candidate raises becomes its row's reason.

    Takes `protocol.rounds` + 2 steps of progress.

    Args:
        baselines: names of candidates that ratios are taken to.
        dense_flops: operations of the unmasked problem.
        cases_left: this case and those that come after it, for the share of the time.
    """
    started = time.monotonic()
    seconds = protocol.seconds_left(cases_left)
    rows = {candidate.name: Row(candidate.name, candidate.computes) for candidate in candidates}
    ready: dict[str, Prepared] = {}
    warm: dict[str, float] = {}
    for candidate in candidates:
        row = rows[candidate.name]
        if candidate.reason:
            row.status, row.reason = "unavailable", candidate.reason
        elif seconds <= 0:
            row.status, row.reason = "skipped", "the time budget was used up"
        elif reason := _too_large(candidate, device):
            row.status, row.reason = "skipped", reason
        else:
            step(0, f"first call of {candidate.name}")
            prepared = _first_calls(candidate, row, clock, judge, warm)
            if prepared is not None:
                ready[candidate.name] = prepared
                row.held_bytes = sum(x.untyped_storage().nbytes() for x in prepared.held)
    left = seconds - (time.monotonic() - started)
    # The fewest rounds and the watched call of any one candidate must fit into the case's share;
    # what compilers took of it is not held against the others.
    slowest = seconds / (FEWEST_ROUNDS + 1)
    fastest = min(warm, key=warm.get, default=None)
    for name in [name for name in warm if warm[name] > slowest and name != fastest]:
        rows[name].status = "skipped"
        rows[name].reason = f"too slow for the time budget: a call takes {warm[name]:.3g} s"
        del warm[name], ready[name]
    step(1, "rounds")
    _rounds(ready, rows, warm, clock, protocol, left, step)
    for name, prepared in ready.items():
        row = rows[name]
        if row.status != "measured":
            continue
        try:
            inside = look_inside(prepared.call, device)
        except Exception as error:
            _fail(row, error, device)
            continue
        row.peak_bytes, row.operators = inside.peak_bytes, inside.operators
        row.device_kernel = inside.device_kernel
    for candidate in candidates:
        _finish(rows[candidate.name], candidate, ready, rows, baselines, dense_flops)
    step(1, "")
    return list(rows.values())


def _first_calls(
    candidate: Candidate, row: Row, clock: Clock, judge: Judge, warm: dict[str, float]
) -> Prepared | None:
    try:
        row.setup, prepared = clock.once(candidate.prepare)
        row.cold, result = clock.once(prepared.call)
        row.error = _judged(judge, candidate.computes, result)
        del result
        seconds, _ = clock.once(prepared.call)
    except Exception as error:
        # Compilers, drivers and optional packages raise what they like.
        _fail(row, error, clock.device)
        return None
    warm[candidate.name] = seconds
    row.calls_per_sample = clock.repeats(seconds)
    return prepared


def _judged(judge: Judge, computes: str, result: Any) -> float | None:
    """The error, or None where working out the expected values takes too much memory."""
    try:
        error = judge(computes, result)
    except torch.OutOfMemoryError:
        return None
    if not math.isfinite(error):
        raise ValueError("the result is not finite")
    return error


def _rounds(
    ready: dict[str, Prepared],
    rows: dict[str, Row],
    warm: dict[str, float],
    clock: Clock,
    protocol: Protocol,
    seconds: float,
    step: Step,
) -> None:
    order = list(ready)
    shuffle = random.Random(protocol.seed).shuffle
    end = time.monotonic() + seconds - sum(warm.values())
    done = 0
    with quiet_collector():
        for done in range(1, protocol.rounds + 1):
            shuffle(order)
            for name in order:
                row = rows[name]
                if row.status != "measured":
                    continue
                try:
                    row.times.append(clock.sample(ready[name].call, row.calls_per_sample))
                except Exception as error:
                    _fail(row, error, clock.device)
            step(1, f"round {done} of {protocol.rounds}")
            if done >= FEWEST_ROUNDS and time.monotonic() > end:
                break
    step(protocol.rounds - done, "memory")


def _finish(
    row: Row,
    candidate: Candidate,
    ready: dict[str, Prepared],
    rows: dict[str, Row],
    baselines: Sequence[str],
    dense_flops: int,
) -> None:
    if row.status != "measured":
        row.times = []
        return
    row.time = Spread.of(row.times)
    flops = ready[row.candidate].flops
    flops = candidate.flops if flops is None else flops
    row.flops_per_second = flops / row.time.median
    row.dense_flops_per_second = dense_flops / row.time.median
    for name in baselines:
        base = rows.get(name)
        if base is not None and base.status == "measured":
            pairs = zip(base.times, row.times, strict=True)
            row.ratios[name] = Spread.of([theirs / own for theirs, own in pairs])


def _too_large(candidate: Candidate, device: torch.device) -> str:
    """Why a candidate would not fit: a CPU's system kills what takes too much, raising nothing."""
    free = free_memory(device) if device.type == "cpu" else None
    if free is None or candidate.needs <= free:
        return ""
    return f"needs {candidate.needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _fail(row: Row, error: Exception, device: torch.device) -> None:
    row.status = "failed"
    small = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if small or "can't allocate memory" in str(error):
        row.reason = "out of memory"
    else:
        lines = str(error).strip().splitlines() or [""]
        row.reason = f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            # The error before it left the device unusable; the rows to come will say so.
            pass
