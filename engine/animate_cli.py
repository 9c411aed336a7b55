"""`layerloom animate`: a still image to a moving clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import CheckpointOption, DeviceOption, QuietOption, progress_bar, say


def animate(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The first frame.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the clip shows.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")],
    end: Annotated[
        Path | None, typer.Option(metavar="IMAGE", help="The last frame: fill in between.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Come back to the first frame.")] = False,
    via: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGE", help="Pass through this image on the way. Repeatable."),
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What it shall not show.")] = "",
    image_scale: Annotated[
        float | None, typer.Option(metavar="S", help="Guidance by the image; default: the text's.")
    ] = None,
    text_scale: Annotated[
        float | None, typer.Option(metavar="S", help="Guidance by the text; published: 7.5.")
    ] = None,
    rescale: Annotated[
        float | None, typer.Option(help="Guidance rescale, 0 to 1; published: 0.7, 256: 0.")
    ] = None,
    motion: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="256: frame stride 1 to 6, more is faster; others: fps 5 to 30, less is faster.",
        ),
    ] = None,
    gate: Annotated[
        float, typer.Option(metavar="S", help="Factor on the image stream; 1 is as trained.")
    ] = 1.0,
    gate_layers: Annotated[
        str, typer.Option(help="Where the gate works: all, or the middle layers 7 to 9.")
    ] = "all",
    exact_first_frame: Annotated[
        bool,
        typer.Option(
            "--exact-first-frame", help="Keep given images' frames: their latents are blended in."
        ),
    ] = False,
    frames: Annotated[
        int | None,
        typer.Option(metavar="N", help="Frames, of each piece between two images; default: 16."),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Frames that the windows of a long clip share.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: near the trained.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: near the trained.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, exactly.")] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="trailing, uniform, or uniform-released (31 steps where 30 are asked)."),
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise, 0 to 1; published: 1.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 0,
    checkpoint: CheckpointOption = None,
    variant: Annotated[
        str | None,
        typer.Option(help="256, 512, 1024 or 512_interp, where the file does not tell."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="VAE file or folder, if the checkpoint holds none.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="OpenCLIP text encoder, likewise, or its tokenizer.")
    ] = None,
    image_encoder: Annotated[
        Path | None, typer.Option(help="OpenCLIP image encoder, likewise.")
    ] = None,
    arrays: Annotated[bool, typer.Option("--arrays", help="Also write video.npz.")] = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Animate an image: from it on, to an end image, or around and back to it."""
    from .animate_job import AnimateJob

    job = AnimateJob(
        image=image,
        prompt=prompt,
        out=out,
        negative=negative,
        end=end,
        loop=loop,
        via=tuple(via or ()),
        motion=motion,
        gate=gate,
        gate_layers=gate_layers,
        text_scale=text_scale,
        image_scale=image_scale,
        rescale=rescale,
        frames=frames,
        overlap=overlap,
        width=width,
        height=height,
        steps=steps,
        spacing=spacing,
        eta=eta,
        exact_first_frame=exact_first_frame,
        fps=fps,
        seed=seed,
        checkpoint=checkpoint,
        variant=variant,
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
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
