"""`layerloom click`: regions of a still image move, each by a phrase and a strength."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import CheckpointOption, DeviceOption, QuietOption, progress_bar, say


def click(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The first frame.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y[,0|1]", help="Click here, in pixels; 0 is what not to take. Repeatable."
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,X1,Y1", help="Take what is in the box. Repeatable."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="White moves, instead of clicks.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What it does, in a few words.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="S", help="How far it moves; published: 4 to 16.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHERE@TEXT[@S]",
            help="One more region: 'X,Y;X,Y,0' or a mask's file, its phrase, strength. Repeatable.",
        ),
    ] = None,
    caption: Annotated[
        str, typer.Option(metavar="TEXT", help="The whole clip in words; default: the phrase.")
    ] = "",
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What it shall not show.")] = "",
    segmenter: Annotated[
        Path | None, typer.Option(metavar="FILE", help="segment-anything weights; default: ours.")
    ] = None,
    choose: Annotated[
        int | None, typer.Option(help="Which of three answers to a click, 0 to 2; default: best.")
    ] = None,
    dilate: Annotated[int, typer.Option(metavar="N", help="Grow the mask, in pixels.")] = 0,
    feather: Annotated[float, typer.Option(metavar="N", help="Soften its edge, in pixels.")] = 0.0,
    hold_background: Annotated[
        bool,
        typer.Option("--hold-background", help="Put the image back around what moves."),
    ] = False,
    exact_first_frame: Annotated[
        bool,
        typer.Option("--exact-first-frame", help="Keep the first frame: its latent is blended in."),
    ] = False,
    frames: Annotated[int | None, typer.Option(help="Frames; default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: near the trained.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: near the trained.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; published: 50.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance by the text; published: 7.5.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 0,
    checkpoint: CheckpointOption = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Stable Diffusion 1.5, file or folder, for what the checkpoint lacks."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="VAE file or folder, if the checkpoint holds none.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="CLIP ViT-L/14 text encoder, likewise.")
    ] = None,
    arrays: Annotated[bool, typer.Option("--arrays", help="Also write video.npz.")] = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Move what is clicked on in an image, and nothing else."""
    from .click_job import ClickJob

    job = ClickJob(
        image=image,
        prompt=prompt,
        out=out,
        points=tuple(point or ()),
        boxes=tuple(box or ()),
        mask=mask,
        strength=strength,
        regions=tuple(region or ()),
        caption=caption,
        negative=negative,
        segmenter=segmenter,
        choose=choose,
        dilate=dilate,
        feather=feather,
        hold_background=hold_background,
        exact_first_frame=exact_first_frame,
        frames=frames,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
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
