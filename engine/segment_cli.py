"""`layerloom segment`: points and boxes on a picture to a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import DeviceOption, QuietOption, say


def segment(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The mask to write, a PNG.")],
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y[,0|1]", help="In pixels; 1 is wanted (default), 0 is not. Repeatable."
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,X1,Y1", help="A box around what is wanted. Repeatable."),
    ] = None,
    choose: Annotated[
        int | None, typer.Option(metavar="N", help="Candidate 0, 1 or 2; default: the best.")
    ] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Also write all three, FILE-0.png and so on.")
    ] = False,
    dilate: Annotated[
        int, typer.Option(metavar="N", help="Grow the mask by N pixels; below 0 shrink it.")
    ] = 0,
    feather: Annotated[
        float, typer.Option(metavar="N", help="Let its edge fade over N pixels.")
    ] = 0.0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Segment-anything checkpoint (ViT-B, L or H); default: the starter."),
    ] = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Turn points and boxes on a picture into a mask of what they mean."""
    from .segment_job import SegmentJob

    job = SegmentJob(
        image=image,
        out=out,
        points=tuple(point or ()),
        boxes=tuple(box or ()),
        choose=choose,
        candidates=candidates,
        dilate=dilate,
        feather=feather,
        checkpoint=checkpoint,
        device=device,
    )
    report = job.run(note=lambda text: None if quiet else say(text))
    typer.echo(report.summary())
