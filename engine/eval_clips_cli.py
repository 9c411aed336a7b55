"""`layerloom eval clips`: the papers' measures of clips that lie in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import DeviceOption, QuietOption, progress_bar, require
from .errors import LayerLoomError


def eval_clips(
    folder: Annotated[
        Path, typer.Argument(help="Results of `layerloom trajectory`, one or many folders.")
    ],
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CLIP ViT-B/32, a folder of transformers.")
    ] = None,
    dino: Annotated[
        Path | None, typer.Option(metavar="DIR", help="DINO ViT-S/16, a folder of transformers.")
    ] = None,
    raft: Annotated[
        Path | None, typer.Option(metavar="FILE", help="torchvision's RAFT, for dynamic degree.")
    ] = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure clips of subjects along boxes as DreamVideo-2 does and print JSON.

    CLIP gives likeness to the prompt, to the subjects and over time; DINO likeness to the subjects;
    RAFT whether a clip moves; boxes that were found beside a clip how well it keeps to its path.
    """
    from .metrics.results import FOUND, evaluate_results, find_results

    for path, what in ((clip, "folder of CLIP"), (dino, "folder of DINO"), (raft, "RAFT")):
        if path is not None:
            require(path, what)
    places = find_results(folder)
    known = [p for place in places for p in place.glob(f"{FOUND}*")]
    if clip is None and dino is None and raft is None and not known:
        raise LayerLoomError(
            "There is nothing to measure with: give --clip, --dino or --raft, or put the boxes "
            f"that a detector found beside the clips as {FOUND}.json."
        )
    from .conditioning.flow import RaftFlow
    from .metrics.likeness import ClipLikeness, DinoLikeness
    from .metrics.subject_clips import clip_scores

    likeness = None if clip is None else ClipLikeness.open(clip, device)
    twin = None if dino is None else DinoLikeness.open(dino, device)
    flow = None if raft is None else RaftFlow.open(raft, device)
    with progress_bar("Measuring", quiet) as advance:
        scores = evaluate_results(
            folder, lambda read: clip_scores(read, likeness, twin, flow), progress=advance
        )
    typer.echo(json.dumps(scores, indent=2))
