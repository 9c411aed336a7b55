"""`layerloom trajectory`: subjects of pictures go along paths of boxes, in a new clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .console import CheckpointOption, DeviceOption, QuietOption, progress_bar, say

_ORDER = "layerloom.order"
_GROUPED = ("subject", "mask", "point", "box")


class InOrder(TyperCommand):
    """A command that keeps the order in which options that belong together were given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options, _, order = self.make_parser(ctx).parse_args(args=list(args))
        values = {name: iter(options.get(name) or ()) for name in _GROUPED}
        given = [parameter.name for parameter in order if parameter.name in _GROUPED]
        ctx.meta[_ORDER] = [(name, next(values[name])) for name in given]
        return super().parse_args(ctx, args)


def trajectory(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(metavar="SUBJECT", help="A picture of who goes.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the clip shows.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FRAME:X,Y,W,H[:EASE]",
            help="Where the subject is, in pixels of the clip; frames from 0. Repeatable.",
        ),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="White is the subject before it. One a subject."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y[,0|1]", help="Click on the subject instead. Repeatable."),
    ] = None,
    subject: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="One more subject, behind the others; its options follow it."
        ),
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="All boxes, as the editor saves them.")
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What it shall not show.")] = "",
    reference_weight: Annotated[
        float | None,
        typer.Option(
            metavar="L", help="How much subjects count outside of boxes; published: 0.75."
        ),
    ] = None,
    segmenter: Annotated[
        Path | None, typer.Option(metavar="FILE", help="segment-anything weights; default: ours.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames; default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: as trained.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: as trained.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; published: 50.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance by the text; published: 9.")] = (
        None
    ),
    guidance_drops: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="What guidance leaves out to compare with: text, or all (subjects and boxes too).",
        ),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 0,
    checkpoint: CheckpointOption = None,
    base: Annotated[
        Path | None,
        typer.Option(help="ModelScope's text-to-video, file or folder, for what is missing."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="VAE file or folder, if the checkpoint holds none.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="OpenCLIP ViT-H/14 text encoder, likewise.")
    ] = None,
    arrays: Annotated[bool, typer.Option("--arrays", help="Also write video.npz.")] = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Let subjects of pictures go along paths of boxes."""
    from .trajectory_job import TrajectoryJob, group_options

    job = TrajectoryJob(
        subjects=tuple(group_options(image, context.meta[_ORDER])),
        prompt=prompt,
        out=out,
        boxes=boxes,
        negative=negative,
        reference_weight=reference_weight,
        segmenter=segmenter,
        frames=frames,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        guidance_drops=guidance_drops,
        fps=fps,
        seed=seed,
        checkpoint=checkpoint,
        base=base,
        vae=vae,
        text_encoder=text_encoder,
        arrays=arrays,
        device=device,
    )
    job.check()
    with progress_bar("Loading", quiet) as advance:
        report = job.run(
            note=lambda text: None if quiet else say(text),
            progress=lambda title, done, total: advance(done, total, title),
        )
    typer.echo(report.summary())
