"""`layerloom bench`: measure attention, blocks and the video UNet on this machine."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import DeviceOption, JsonOption, QuietOption, progress_bar, say
from .errors import LayerLoomError

if TYPE_CHECKING:
    import torch

    from ..kernels.bench.cases import AnyCase, Shape
    from ..kernels.bench.suite import RunCase, Suite

bench_app = typer.Typer(rich_markup_mode=None, help="Measure attention and networks here.")

CLOCKS = ("wall", "cpu")
DTYPES = ("float32", "bfloat16", "float16")
# Seconds, rounds and heads that suit two cores, and a card.
CPU_BUDGET, CUDA_BUDGET = 90.0, 1500.0
CPU_ROUNDS, CUDA_ROUNDS = 7, 20
CPU_HEADS = 2
CPU_BLOCK_HEADS = 8
CUDA_SHAPES = ("B", "rgb", "preview")

ShapesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="A, B, rgb, preview, starter, tiny, or LAYERSxFRAMESxHEIGHTxWIDTH[+TEXT]; "
        "default: preview on a CPU, A,B,rgb,preview on CUDA.",
    ),
]
MasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="full, prompt_isolated, layer_isolated, blended_sees_all, each with +bias or +window "
        "if wanted, or window.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="float32, bfloat16, float16; default: float32 on a CPU, bfloat16 on CUDA.",
    ),
]
BatchOption = Annotated[int, typer.Option(help="Sequences at a time.")]
HeadsOption = Annotated[
    int | None, typer.Option(help="Heads; default: the shape's on CUDA, fewer on a CPU.")
]
RoundsOption = Annotated[
    int | None,
    typer.Option(help=f"Samples of each candidate; default: {CPU_ROUNDS}, on CUDA {CUDA_ROUNDS}."),
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")]
ClockOption = Annotated[
    str,
    typer.Option(help="wall, or cpu: processor time, for a machine that other work shares."),
]
SeedOption = Annotated[int, typer.Option(help="Of inputs, order and sampled queries.")]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Fewer rounds and cases rather than more time, 0 for no limit; default: "
        f"{CPU_BUDGET:.0f}, on CUDA {CUDA_BUDGET:.0f}.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Also write tables, JSON and a plot there.")
]


@bench_app.callback()
def bench_root() -> None:
    """Measure attention and networks here."""


@bench_app.command("attention")
def attention(
    shapes: ShapesOption = None,
    masks: MasksOption = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Backends, auto (the policy's choice), and baselines: sdpa (joined segments), "
            "sdpa-cudnn, sdpa-masked, flex, flash-attn; a name given twice is a control.",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="NAME,...", help="Candidates that ratios are taken to.")
    ] = "sdpa,sdpa-masked",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch: BatchOption = 1,
    heads: HeadsOption = None,
    rounds: RoundsOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    clock: ClockOption = "wall",
    budget: BudgetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure segment attention against torch's: time, error, memory.

    One process, candidates in turn, ratios round by round.
    """
    wanted = _Wanted(shapes, masks, dtype, batch, heads, rounds, seed, threads, clock, budget)
    place = _device(device)
    from ..kernels.bench import attention as bench

    names = _given("--backends", bench.candidate_names, place, _split(backends, "--backends"))
    few = ("full", "blended_sees_all", "blended_sees_all+bias")
    suite = wanted.attention_suite(
        "attention", place, names, baseline, ("A", *CUDA_SHAPES), few, CPU_HEADS
    )
    _measure(suite, bench.run_case, place, out, as_json, quiet)


@bench_app.command("block")
def block(
    shapes: ShapesOption = None,
    masks: MasksOption = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="layerloom, layerloom:BACKEND, diffusers; a name given twice is a control.",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="NAME,...", help="Candidates that ratios are taken to.")
    ] = "diffusers",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch: BatchOption = 1,
    heads: HeadsOption = None,
    rounds: RoundsOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    clock: ClockOption = "wall",
    budget: BudgetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure one transformer block against diffusers' block on the same weights.

    diffusers' block computes full attention whatever the mask.
    """
    wanted = _Wanted(shapes, masks, dtype, batch, heads, rounds, seed, threads, clock, budget)
    place = _device(device)
    from . import bench_block as bench

    names = _given("--backends", bench.candidate_names, _split(backends, "--backends"))
    few = ("full", "blended_sees_all")
    suite = wanted.attention_suite(
        "block", place, names, baseline, CUDA_SHAPES, few, CPU_BLOCK_HEADS
    )
    _measure(
        replace(suite, dense_flops=bench.dense_flops), bench.run_case, place, out, as_json, quiet
    )


@bench_app.command("unet")
def unet(
    width: Annotated[
        int | None,
        typer.Option(
            help="Channels of the first resolution, of four; default: 64, on CUDA the published "
            "320."
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="FRAMESxHEIGHTxWIDTH",
            help="The latents; default: 16x20x32, on CUDA 16x40x64.",
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="layerloom, diffusers; a name given twice is a control.",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="NAME,...", help="Candidates that ratios are taken to.")
    ] = "diffusers",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch: BatchOption = 1,
    rounds: RoundsOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    clock: ClockOption = "wall",
    budget: BudgetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the video UNet against diffusers' UNet3DConditionModel on the same weights."""
    wanted = _Wanted(None, None, dtype, batch, None, rounds, seed, threads, clock, budget)
    place = _device(device)
    from . import bench_unet as bench

    names = _given("--backends", bench.candidate_names, _split(backends, "--backends"))
    on_cpu = place.type == "cpu"
    width = (64 if on_cpu else 320) if width is None else width
    clip = clip or ("16x20x32" if on_cpu else "16x40x64")
    cases = [
        _given("--width or --clip", bench.unet_case, width, clip, number, place, batch)
        for number in wanted.numbers(place)
    ]
    options = {"width": width, "clip": clip}
    suite = wanted.suite("unet", place, names, baseline, cases, options)
    _measure(
        replace(suite, dense_flops=bench.dense_flops),
        bench.run_case,
        place,
        out,
        as_json,
        quiet,
        plotted=False,
    )


@dataclass(frozen=True)
class _Wanted:
    """The options that all benchmarks take, checked as far as possible without torch."""

    shapes: str | None
    masks: str | None
    dtype: str | None
    batch: int
    heads: int | None
    rounds: int | None
    seed: int
    threads: int | None
    clock: str
    budget: float | None

    def __post_init__(self) -> None:
        for option in ("batch", "heads", "rounds", "threads"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise LayerLoomError(f"--{option} is {value}; at least 1 is needed.")
        if self.seed < 0:
            raise LayerLoomError(f"--seed is {self.seed}; it must not be negative.")
        if self.budget is not None and not 0 <= self.budget < math.inf:
            raise LayerLoomError(f"--budget is {self.budget}; give seconds, or 0 for no limit.")
        if self.clock not in CLOCKS:
            raise LayerLoomError(f"--clock is {self.clock}; there are {', '.join(CLOCKS)}.")
        for name in _split(self.dtype, "--dtype") or ():
            if name not in DTYPES:
                raise LayerLoomError(f"--dtype is {name}; there are {', '.join(DTYPES)}.")

    def numbers(self, place: torch.device) -> list[torch.dtype]:
        """The types of numbers to measure."""
        import torch

        default = "float32" if place.type == "cpu" else "bfloat16"
        return [getattr(torch, name) for name in _split(self.dtype, "--dtype") or [default]]

    def attention_suite(
        self,
        benchmark: str,
        place: torch.device,
        names: list[str],
        baseline: str,
        cuda_shapes: Sequence[str],
        cpu_masks: Sequence[str],
        cpu_heads: int,
    ) -> Suite:
        """What these options, and the device's defaults for the rest, ask for."""
        from ..kernels.bench.cases import MASKS, find_shape, product

        on_cpu = place.type == "cpu"
        shapes = _split(self.shapes, "--shapes") or (["preview"] if on_cpu else cuda_shapes)
        masks = _split(self.masks, "--masks") or (cpu_masks if on_cpu else MASKS)
        # Every command's default ends within minutes; the starter is small as it is.
        found = [_given("--shapes", find_shape, name, self.heads) for name in shapes]
        if on_cpu and self.heads is None:
            found = [replace(shape, heads=min(shape.heads, cpu_heads)) for shape in found]
        cases = _given("--masks", product, found, masks, self.numbers(place), place, self.batch)
        options = {"shapes": ",".join(shapes), "masks": ",".join(masks), **_heads(found)}
        return self.suite(benchmark, place, names, baseline, cases, options)

    def suite(
        self,
        benchmark: str,
        place: torch.device,
        names: list[str],
        baseline: str,
        cases: Sequence[AnyCase],
        own: Mapping[str, object],
    ) -> Suite:
        """The cases with these options; ``own`` are the benchmark's, for its command line."""
        from ..kernels.bench.cases import type_name
        from ..kernels.bench.suite import Suite

        on_cpu = place.type == "cpu"
        if self.clock == "cpu" and not on_cpu:
            raise LayerLoomError(f"--clock cpu times nothing on {place}; leave it out.")
        rounds = self.rounds or (CPU_ROUNDS if on_cpu else CUDA_ROUNDS)
        budget = (CPU_BUDGET if on_cpu else CUDA_BUDGET) if self.budget is None else self.budget
        to = list(dict.fromkeys(_split(baseline, "--baseline")))
        options = {
            **own,
            "backends": ",".join(names),
            "baseline": ",".join(to),
            "device": str(place),
            "dtype": ",".join(type_name(number) for number in self.numbers(place)),
            "batch": self.batch,
            "rounds": rounds,
            "seed": self.seed,
            "budget": f"{budget:g}",
        }
        if self.threads is not None:
            options["threads"] = self.threads
        if self.clock != CLOCKS[0]:
            options["clock"] = self.clock
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return Suite(
            benchmark,
            shlex.join(["layerloom", "bench", benchmark, *words]),
            cases,
            names,
            _known_baselines(to, names),
            rounds,
            self.seed,
            budget or None,
            threads=self.threads,
            clock=self.clock,
        )


def _heads(shapes: Sequence[Shape]) -> dict[str, int]:
    """The option that gives all shapes these heads, where there is one."""
    heads = {shape.heads for shape in shapes}
    return {"heads": heads.pop()} if len(heads) == 1 else {}


def _known_baselines(wanted: list[str], names: list[str]) -> tuple[str, ...]:
    """Those that are measured; the first candidate if none is."""
    return tuple(name for name in wanted if name in names) or (names[0],)


def _measure(
    suite: Suite,
    run_case: RunCase,
    place: torch.device,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    plotted: bool = True,
) -> None:
    from ..kernels.bench import plot
    from .staging import StagedFolder

    files = [f"{suite.benchmark}.{kind}" for kind in ("md", "json", "png")]
    if not plotted:
        files.pop()
    elif out is not None and not plot.available():
        files.pop()
        if not quiet:
            say(plot.MISSING)
    with StagedFolder(out, files) if out is not None else nullcontext() as staged:
        from rich.markup import escape

        with progress_bar("Starting", quiet) as advance:

            def progress(done: int, total: int, title: str) -> None:
                advance(done, total, escape(title))

            report = suite.run(place, run_case, progress)
        if staged is not None:
            staged.path(files[0]).write_text(report.markdown(), encoding="utf-8")
            staged.path(files[1]).write_text(report.json() + "\n", encoding="utf-8")
            if len(files) == 3:
                plot.draw(report, staged.path(files[2]))
    typer.echo(report.json() if as_json else report.markdown())
    if out is not None and not quiet:
        say(f"Wrote {', '.join(str(out / name) for name in files)}.")


def _device(name: str | None) -> torch.device:
    """The device to measure on; also keeps the profiler from writing lines of its own."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A tensor knows the card that a plain "cuda" means.
        place = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise LayerLoomError(f"The device {name!r} cannot be used here; try cpu.") from error
    if place.type not in ("cpu", "cuda"):
        raise LayerLoomError(f"--device is {name}; benchmarks know cpu and cuda.")
    return place


def _split(text: str | None, option: str) -> list[str] | None:
    """The names of a comma-separated option; None where it was not given."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise LayerLoomError(f"{option} is {text!r}; give names with commas between them.")
    return names


def _given(option: str, function: Callable, *arguments: object) -> Any:
    """`function(*arguments)`, its ValueError as one about `option`."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise LayerLoomError(f"{option}: {error}.") from error
