"""One run of `layerloom segment`: checks the options, asks the segmenter, writes the masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .conditioning.clicks import Clicks, pixel_clicks, read_box, read_point
from .errors import LayerLoomError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SegmentReport:
    """What a run wrote. chosen: the candidate's number; scores: of all three; share: of the picture
    that the mask covers, 0..1."""

    files: list[Path]
    chosen: int
    scores: list[float]
    share: float

    def summary(self) -> str:
        """Two lines for a person."""
        names = ", ".join(path.name for path in self.files)
        scores = ", ".join(f"{score:.2f}" for score in self.scores)
        return (
            f"Wrote {names} to {self.files[0].parent}\n"
            f"Candidate {self.chosen} (scores {scores}), {self.share:.1%} of the picture"
        )


@dataclass(frozen=True)
class SegmentJob:
    """The options of `layerloom segment`, by the same names."""

    image: Path
    out: Path
    points: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    choose: int | None = None
    candidates: bool = False
    dilate: int = 0
    feather: float = 0.0
    checkpoint: Path | None = None
    device: str | None = None

    def check(self) -> None:
        """Raise LayerLoomError for whatever shows before a file is read or a model loaded."""
        if self.out.suffix.lower() != ".png":
            raise LayerLoomError(f"--out {self.out} must end in .png; choose such a name.")
        if not self.points and not self.boxes:
            raise LayerLoomError(
                "There is nothing to look for; give --point X,Y on what is wanted, or a --box."
            )
        if self.choose is not None and self.choose not in (0, 1, 2):
            raise LayerLoomError(f"--choose is {self.choose}; give candidate 0, 1 or 2.")
        if self.checkpoint is not None and not self.checkpoint.exists():
            raise LayerLoomError(f"--checkpoint {self.checkpoint} does not exist; check the path.")

    def run(self, note: Callable[[str], None]) -> SegmentReport:
        """Do the work and write the files, all of them or none.

        Errors: LayerLoomError, before anything is written except for a disk that fills up.
        """
        self.check()
        points = [read_point(text) for text in self.points]
        boxes = [read_box(text) for text in self.boxes]
        from .conditioning.pictures import read_picture

        picture = read_picture(self.image)
        if self.out.exists() and self.out.samefile(self.image):
            raise LayerLoomError(f"--out {self.out} is the picture itself; choose another name.")
        clicks = pixel_clicks(points, boxes, picture.pixels.shape[:2]).require()
        if picture.transparent:
            note("The image has transparent parts; they are taken as black.")
        return self._segment(picture.pixels, clicks)

    def _segment(self, pixels, clicks: Clicks) -> SegmentReport:
        # After the checks: loading torch takes seconds.
        from .conditioning.masks import check_refinement, refine, write_mask
        from .conditioning.segmenter import Segmenter
        from .staging import StagedFolder

        check_refinement(self.dilate, self.feather)
        names = [f"{self.out.stem}-{number}.png" for number in range(3) if self.candidates]
        with StagedFolder(self.out.parent, (self.out.name, *names)) as staged:
            segmenter = Segmenter.open(self.checkpoint, self.device)
            found = segmenter.masks(segmenter.embed(pixels), clicks)
            chosen = found.best if self.choose is None else self.choose
            mask = refine(found.mask(chosen), self.dilate, self.feather).cpu()
            share = _covered(mask, self.dilate)
            write_mask(staged.path(self.out.name), mask)
            for name, candidate in zip(names, found.masks if names else (), strict=True):
                write_mask(staged.path(name), refine(candidate, self.dilate, self.feather).cpu())
        return SegmentReport(staged.files, chosen, found.scores.tolist(), share)


def _covered(mask: torch.Tensor, dilation: int) -> float:
    share = float((mask >= 0.5).float().mean())
    if not share:
        raise LayerLoomError(
            f"Nothing is left of the mask after --dilate {dilation}; shrink or feather it less."
        )
    return share
