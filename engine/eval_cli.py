"""`layerloom eval`: scores of checkpoints on held-out scenes of sprite world, and of clips."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import CheckpointOption, DeviceOption, JsonOption, QuietOption, progress_bar, require
from .errors import LayerLoomError
from .eval_clips_cli import eval_clips

eval_app = typer.Typer(
    rich_markup_mode=None, help="Score a checkpoint on held-out scenes, or clips in a folder."
)
eval_app.command("clips")(eval_clips)
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16; default: as for a single run."),
]


def _dtype(name: str | None) -> Any:
    import torch

    if name not in (None, "float32", "bfloat16", "float16"):
        raise LayerLoomError(f"--dtype is {name!r}; use float32, bfloat16 or float16.")
    return name and getattr(torch, name)


@eval_app.callback()
def eval_root() -> None:
    """Score a checkpoint on held-out scenes, or clips in a folder."""


@eval_app.command("layered")
def eval_layered(
    checkpoint: CheckpointOption = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = 128,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score all four tasks on held-out sprite scenes and print JSON."""
    if scenes < 1:
        raise LayerLoomError(f"--scenes is {scenes}; at least 1 is needed.")
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .layered import LayeredPipeline
    from .metrics.layered import evaluate

    pipeline = LayeredPipeline.open(checkpoint, device=device, dtype=_dtype(dtype))
    with progress_bar("Scoring", quiet) as advance:
        scores = evaluate(
            pipeline,
            scenes=scenes,
            seed=seed,
            frames=pipeline.sequence().frames,
            size=pipeline.native_size,
            progress=advance,
        )
    typer.echo(json.dumps(scores, indent=2))


@eval_app.command("reuse")
def eval_reuse(
    checkpoint: CheckpointOption = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = 16,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    refresh: Annotated[
        list[int] | None,
        typer.Option(metavar="STEPS", help="Refresh after so many; 0 is never. Repeatable."),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What reusing given layers costs and saves, against full attention at every step.

    Scores the three tasks with a given layer as `eval layered` does, and times them: seconds a
    scene, of processor time on a CPU.
    """
    if scenes < 1:
        raise LayerLoomError(f"--scenes is {scenes}; at least 1 is needed.")
    if refresh and min(refresh) < 0:
        raise LayerLoomError(f"--refresh is {min(refresh)}; give a number of steps, 0 for never.")
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .layered import LayeredPipeline
    from .metrics.reuse import as_markdown, evaluate_reuse, variants
    from .reuse import REFRESH_EVERY

    pipeline = LayeredPipeline.open(checkpoint, device=device)
    compared = variants([steps or None for steps in refresh or (REFRESH_EVERY, 10, 0)])
    with progress_bar("Scoring", quiet) as advance:
        scores = evaluate_reuse(
            pipeline,
            compared,
            scenes=scenes,
            seed=seed,
            frames=pipeline.sequence().frames,
            size=pipeline.native_size,
            clock=time.process_time if pipeline.device.type == "cpu" else time.perf_counter,
            progress=advance,
        )
    typer.echo(json.dumps(scores, indent=2) if as_json else as_markdown(scores))


@eval_app.command("adapters")
def eval_adapters(
    checkpoint: CheckpointOption = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes for motion.")] = 16,
    content_scenes: Annotated[int, typer.Option(help="Held-out scenes for content.")] = 64,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """What the motion and content adapters inside a checkpoint do; print JSON.

    Optical flow of generated clips at seven strengths of motion; all scores without and with
    content.
    """
    if min(scenes, content_scenes) < 1:
        raise LayerLoomError(f"--scenes is {min(scenes, content_scenes)}; at least 1 is needed.")
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .layered import LayeredPipeline
    from .metrics.adapters import evaluate_content, evaluate_motion

    wanted = _dtype(dtype)

    def open_with(strengths: Mapping[str, float]) -> LayeredPipeline:
        return LayeredPipeline.open(checkpoint, device=device, adapters=strengths, dtype=wanted)

    first = open_with({})
    missing = [name for name in ("motion", "content") if name not in first.strengths]
    if len(missing) == 2:
        raise LayerLoomError(
            "The checkpoint carries neither a motion nor a content adapter; "
            "give one that does, as `layerloom info` shows."
        )
    measured: dict[str, Any] = {"frames": first.sequence().frames, "size": first.native_size}
    scores: dict[str, Any] = {}
    if "motion" not in missing:
        with progress_bar("Motion", quiet) as advance:
            scores["motion"] = evaluate_motion(
                open_with, scenes=scenes, seed=seed, progress=advance, **measured
            )
    if "content" not in missing:
        with progress_bar("Content", quiet) as advance:
            scores["content"] = evaluate_content(
                open_with, scenes=content_scenes, seed=seed, progress=advance, **measured
            )
    typer.echo(json.dumps(scores, indent=2))


@eval_app.command("animate")
def eval_animate(
    checkpoint: CheckpointOption = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes of each mode.")] = 128,
    trade_scenes: Annotated[
        int, typer.Option(help="Scenes for each pair of scales and each gate; 0 leaves them out.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: its own.")] = None,
    text_scale: Annotated[float | None, typer.Option(help="Guidance by the text.")] = None,
    image_scale: Annotated[float | None, typer.Option(help="Guidance by the image.")] = None,
    exact_first_frame: Annotated[
        bool, typer.Option("--exact-first-frame", help="Blend given images in as latents.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what the two scales trade.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score animation, interpolation and loops on held-out sprite scenes and print JSON.

    "turned" animates against the scene's own place: the text alone tells the direction.
    """
    if scenes < 1 or trade_scenes < 0:
        raise LayerLoomError(
            f"--scenes is {scenes} and --trade-scenes {trade_scenes}; give at least 1 and 0."
        )
    if plot is not None and (plot.suffix.lower() not in (".png", ".webp") or not trade_scenes):
        raise LayerLoomError("--plot names a .png or .webp file and needs --trade-scenes above 0.")
    if plot is not None and not plot.resolve().parent.is_dir():
        raise LayerLoomError(f"The folder of --plot {plot} does not exist; create it first.")
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .animate import AnimatePipeline
    from .metrics.animate import evaluate_animation

    pipeline = AnimatePipeline.open(checkpoint, device=device, dtype=_dtype(dtype))
    settings = {
        "steps": steps,
        "text_scale": text_scale,
        "image_scale": image_scale,
        "exact_first_frame": exact_first_frame,
    }
    with progress_bar("Scoring", quiet) as advance:
        scores = evaluate_animation(
            pipeline,
            scenes=scenes,
            trade_scenes=trade_scenes,
            seed=seed,
            frames=pipeline.settings.variant.frames,
            size=pipeline.settings.native_size,
            settings={name: value for name, value in settings.items() if value is not None},
            progress=advance,
        )
    if plot is not None:
        from .metrics.trade_plot import trade_plot

        trade_plot(scores["trade"]).save(plot)
    typer.echo(json.dumps(scores, indent=2))


@eval_app.command("segment")
def eval_segment(
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Segmenter; default: the starter.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(help="Held-out pictures, asked in five ways each.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score a segmenter's masks of clicks and boxes on held-out sprites and print JSON."""
    if pictures < 1:
        raise LayerLoomError(f"--pictures is {pictures}; at least 1 is needed.")
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .conditioning.segmenter import Segmenter
    from .metrics.segment import evaluate_segmenter

    segmenter = Segmenter.open(checkpoint, device)
    with progress_bar("Scoring", quiet) as advance:
        scores = evaluate_segmenter(segmenter, pictures=pictures, seed=seed, progress=advance)
    typer.echo(json.dumps(scores, indent=2))


@eval_app.command("click")
def eval_click(
    checkpoint: CheckpointOption = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes of two sprites.")] = 128,
    pairs: Annotated[
        int, typer.Option(help="Scenes in which both sprites are clicked; 0 leaves them out.")
    ] = 32,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: its own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance by the text.")] = None,
    hold_background: Annotated[
        bool, typer.Option("--hold-background", help="Put the image back around what moves.")
    ] = False,
    exact_first_frame: Annotated[
        bool, typer.Option("--exact-first-frame", help="Blend the given image in as latents.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score the animation of clicked regions on held-out sprite scenes and print JSON."""
    if scenes < 1 or pairs < 0:
        raise LayerLoomError(
            f"--scenes is {scenes} and --pairs {pairs}; give at least 1 and at least 0."
        )
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .click import ClickPipeline
    from .metrics.click import evaluate_clicks
    from .metrics.click_pairs import evaluate_pairs

    pipeline = ClickPipeline.open(checkpoint, device=device, dtype=_dtype(dtype))
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "hold_background": hold_background or None,
        "exact_first_frame": exact_first_frame or None,
    }
    given: dict[str, Any] = {
        "seed": seed,
        "frames": pipeline.settings.frames,
        "size": pipeline.native_size,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }
    with progress_bar("Scoring", quiet) as advance:
        scores = evaluate_clicks(pipeline, scenes=scenes, progress=advance, **given)
    if pairs:
        with progress_bar("Scoring pairs", quiet) as advance:
            scores["pairs"] = evaluate_pairs(pipeline, scenes=pairs, progress=advance, **given)
    typer.echo(json.dumps(scores, indent=2))


@eval_app.command("trajectory")
def eval_trajectory(
    checkpoint: CheckpointOption = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes of one sprite.")] = 128,
    pairs: Annotated[
        int, typer.Option(help="Scenes of two sprites, each along its path; 0 leaves them out.")
    ] = 32,
    seed: Annotated[int, typer.Option(help="Which scenes.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: its own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance; 1 is none.")] = None,
    guidance_drops: Annotated[
        str | None,
        typer.Option(help="What guidance leaves out: text, or all (subjects and boxes too)."),
    ] = None,
    reference_weight: Annotated[
        float | None, typer.Option(help="What subjects count outside of boxes, 0 to 1.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score subjects along boxes on held-out sprite scenes and print JSON."""
    if scenes < 1 or pairs < 0:
        raise LayerLoomError(
            f"--scenes is {scenes} and --pairs {pairs}; give at least 1 and at least 0."
        )
    if checkpoint is not None:
        require(checkpoint, "checkpoint")
    from .metrics.trajectory import evaluate_trajectories
    from .trajectory import TrajectoryPipeline

    pipeline = TrajectoryPipeline.open(checkpoint, device=device, dtype=_dtype(dtype))
    settings = {
        "steps": steps,
        "guidance": guidance,
        "guidance_drops": guidance_drops,
        "reference_weight": reference_weight,
    }
    given: dict[str, Any] = {
        "seed": seed,
        "frames": pipeline.settings.frames,
        "size": pipeline.native_size,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }
    with progress_bar("Scoring", quiet) as advance:
        scores = evaluate_trajectories(pipeline, scenes=scenes, progress=advance, **given)
    if pairs:
        with progress_bar("Scoring pairs", quiet) as advance:
            scores["pairs"] = evaluate_trajectories(
                pipeline, scenes=pairs, subjects=2, progress=advance, **given
            )
    typer.echo(json.dumps(scores, indent=2))
