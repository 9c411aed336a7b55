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
    detector: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Grounding DINO, a folder of transformers; with --name."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What a subject is called: cat. One a subject."),
    ] = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure clips of subjects along boxes as DreamVideo-2 does and print JSON.

    CLIP gives likeness to the prompt, to the subjects and over time; DINO likeness to the subjects;
    RAFT whether a clip moves; boxes that a detector finds, or that lie beside a clip, how well it
    keeps to its path.
    """
    from .metrics.results import FOUND, evaluate_results, find_results

    given = ((clip, "folder of CLIP"), (dino, "folder of DINO"), (raft, "RAFT"))
    for path, what in (*given, (detector, "folder of Grounding DINO")):
        if path is not None:
            require(path, what)
    if (detector is None) != (not name):
        raise LayerLoomError(
            "--detector and --name go together: say what each subject is called, in their order."
        )
    places = find_results(folder)
    known = [p for place in places for p in place.glob(f"{FOUND}*")]
    if not (clip or dino or raft or detector or known):
        raise LayerLoomError(
            "There is nothing to measure with: give --clip, --dino, --raft or --detector, or put "
            f"the boxes that a detector found beside the clips as {FOUND}.json."
        )
    from .conditioning.flow import RaftFlow
    from .metrics.detector import Detector, detected
    from .metrics.likeness import ClipLikeness, DinoLikeness
    from .metrics.subject_clips import SubjectClip, clip_scores

    likeness = None if clip is None else ClipLikeness.open(clip, device)
    twin = None if dino is None else DinoLikeness.open(dino, device)
    flow = None if raft is None else RaftFlow.open(raft, device)
    finder = None if detector is None else Detector.open(detector, device)

    def score(read: SubjectClip) -> dict[str, float]:
        found = read if finder is None else detected(read, finder, name)
        return clip_scores(found, likeness, twin, flow)

    with progress_bar("Measuring", quiet) as advance:
        scores = evaluate_results(folder, score, progress=advance)
    typer.echo(json.dumps(scores, indent=2))
