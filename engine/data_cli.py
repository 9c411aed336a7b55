"""`layerloom data`: check a folder of training samples, make samples of videos and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import JsonOption, QuietOption, progress_bar, say
from .errors import LayerLoomError

if TYPE_CHECKING:
    from .training.data.check import FolderReport
    from .training.data.plan import FolderClips

data_app = typer.Typer(rich_markup_mode=None, help="Samples of your own to train on.")

# CogVideoX-2B with LayerFlow's sequence; its sides divide by the VAE's 8 times the patch's 2.
FRAMES, WIDTH, HEIGHT, MULTIPLE = 16, 720, 480, 16


@data_app.callback()
def data_root() -> None:
    """Samples of your own to train on."""


@data_app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of samples.")],
    frames: Annotated[int, typer.Option(help="Frames a layer that shall be trained on.")] = FRAMES,
    width: Annotated[int, typer.Option(help="Pixels.")] = WIDTH,
    height: Annotated[int, typer.Option(help="Pixels.")] = HEIGHT,
    fps: Annotated[float, typer.Option(help="Leave out frames down to this rate; 0: none.")] = 0.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is wrong in which file, and what training would draw.

    Exits with 1 if there is a problem. Nothing is written.
    """
    from .training.data.check import check_folder
    from .training.data.plan import TEMPORAL_FACTOR, FolderClips

    if frames < TEMPORAL_FACTOR or frames % TEMPORAL_FACTOR:
        raise LayerLoomError(
            f"--frames is {frames}; it must be a multiple of {TEMPORAL_FACTOR} above 0."
        )
    for option, side in (("width", width), ("height", height)):
        if side < MULTIPLE:
            raise LayerLoomError(f"--{option} is {side}; at least {MULTIPLE} pixels are needed.")
    if not 0 <= fps < 1000:
        raise LayerLoomError(f"--fps is {fps:g}; give frames a second, or 0 for all frames.")
    settings = FolderClips(path=str(folder), frames=frames, width=width, height=height, fps=fps)
    with progress_bar("Reading clips", quiet) as advance:
        report = check_folder(folder, settings, MULTIPLE, progress=advance)
    if as_json:
        typer.echo(json.dumps(report.record(settings), indent=2))
    else:
        _print(report, settings)
    if report.layout.problems:
        raise typer.Exit(1)


def _print(report: FolderReport, settings: FolderClips) -> None:
    counts = [f"{number} {kind}" for kind, number in report.counts.items() if number]
    typer.echo(f"{report.layout.folder}: {', '.join(counts) or 'no samples'}")
    buckets = [f"{width}x{height} {n}" for (height, width), n in report.buckets.items()]
    if buckets:
        typer.echo(f"Drawn at {settings.frames} frames: {', '.join(buckets)}")
        latents, text = report.cache_bytes(settings.frames)
        typer.echo(
            f"Encoded once they take {_size(latents)}, and {_size(text)} for the texts with T5-XXL"
        )
    for note in report.notes:
        typer.echo(f"Note: {note}")
    problems = report.layout.problems
    for problem in problems:
        typer.echo(f"{problem}.")
    found = {0: "No problems", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
    typer.echo(f"{found} found.")


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


@data_app.command("from-video")
def from_video(
    video: Annotated[Path, typer.Argument(metavar="FILE", help="A video, or a picture.")],
    mask: Annotated[
        Path,
        typer.Option(metavar="FILE", help="White where the foreground is; a clip or a picture."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of samples to add it to.")],
    foreground: Annotated[str | None, typer.Option(help="What the foreground shows.")] = None,
    background: Annotated[str | None, typer.Option(help="What the background shows.")] = None,
    blended: Annotated[str | None, typer.Option(help="The whole scene in words.")] = None,
    name: Annotated[str | None, typer.Option(help="The sample's; default: the file's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Read at most so many frames.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Make a sample of a video and a mask: foreground, alpha, background.

    What lies behind the mask is an approximation: the median over time of what other frames show
    there, and colours from around where no frame shows anything.
    """
    from .training.data.from_video import MOST_FRAMES, VideoJob

    most = MOST_FRAMES if frames is None else frames
    job = VideoJob(video, mask, out, name, most, foreground, background, blended)
    job.check()
    with progress_bar("Reading", quiet) as advance:
        lines = job.run(lambda title, done, total: advance(done, total, title))
    typer.echo(lines[0])
    for line in lines[1:]:
        if not quiet:
            say(line)
