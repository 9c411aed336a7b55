"""One run of `layerloom trajectory`: checks options, reads subjects and boxes, writes the clip."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .animate_job import AnimateReport
from .conditioning.boxes import BoxPaths, parse_boxes, pixel_track, read_key
from .errors import LayerLoomError
from .sampling.guidance import DROPS
from .versions import made_with

if TYPE_CHECKING:
    from .trajectory import TrajectoryPipeline
    from .trajectory_request import Subject, TrajectoryRequest, TrajectoryResult

_VIDEO, _SHEET, _SUBJECTS = "video.webm", "frames.png", "subjects.png"
_RECORD, _ARRAYS = "run.json", "video.npz"
_PACKAGES = ("layerloom", "torch", "diffusers", "transformers", "segment-anything", "numpy")
_COLUMNS = 8
_TRAINING_STEPS = 1000
_MOST_FPS = 240


@dataclass(frozen=True)
class SubjectOption:
    """One subject as it is asked for: a picture, its mask or points, and its boxes.

    mask: a file. points: of ``read_point``. boxes: ``FRAME:X,Y,W,H`` or ``FRAME:X,Y,W,H:EASE``.
    """

    image: Path
    mask: Path | None = None
    points: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()

    def with_option(self, name: str, value: str) -> SubjectOption:
        """The subject with one more option of its own.

        Raises:
            LayerLoomError: a second mask.
        """
        if name != "mask":
            field = {"box": "boxes", "point": "points"}[name]
            return replace(self, **{field: (*getattr(self, field), value)})
        if self.mask is not None:
            raise LayerLoomError(
                f"The subject {self.image} has two masks; give each subject one, behind it."
            )
        return replace(self, mask=Path(value))


def group_options(image: Path, options: Iterable[tuple[str, str]]) -> list[SubjectOption]:
    """Subjects with the options that follow each of them.

    image: the first subject's picture. options: (name, value) of "subject", "mask", "point" and
    "box", in the order they were given.

    Raises:
        LayerLoomError: two masks for one subject.
    """
    found = [SubjectOption(image)]
    for name, value in options:
        if name == "subject":
            found.append(SubjectOption(Path(value)))
        else:
            found[-1] = found[-1].with_option(name, value)
    return found


@dataclass(frozen=True)
class TrajectoryJob:
    """The options of `layerloom trajectory`, by the same names; None leaves it to the checkpoint.

    subjects: with their masks, points and boxes. boxes: a file of all paths, in their place.
    """

    subjects: tuple[SubjectOption, ...]
    prompt: str
    out: Path
    boxes: Path | None = None
    negative: str = ""
    reference_weight: float | None = None
    segmenter: Path | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_drops: str | None = None
    fps: float | None = None
    seed: int = 0
    checkpoint: Path | None = None
    base: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    arrays: bool = False
    device: str | None = None

    def check(self) -> None:
        """Raise LayerLoomError for whatever shows before a file is read or a model loaded."""
        if not self.prompt.strip():
            raise LayerLoomError("--prompt is empty; say in words what the clip shows.")
        for subject in self.subjects:
            self._check_subject(subject)
        self._check_numbers()
        for option in ("boxes", "segmenter", "checkpoint", "base", "vae", "text_encoder"):
            path = getattr(self, option)
            if path is not None and not path.exists():
                name = option.replace("_", "-")
                raise LayerLoomError(f"--{name} {path} does not exist; check the path.")

    def _check_subject(self, subject: SubjectOption) -> None:
        if not subject.image.exists():
            raise LayerLoomError(
                f"The subject {subject.image} does not exist; give a PNG, JPEG or WebP."
            )
        if subject.mask is not None and not subject.mask.exists():
            raise LayerLoomError(f"--mask {subject.mask} does not exist; check the path.")
        if subject.mask is not None and subject.points:
            raise LayerLoomError(
                f"--mask and --point say the same thing twice of {subject.image}; give one of them."
            )
        if self.boxes is not None and subject.boxes:
            raise LayerLoomError("--boxes and --box say the same thing twice; give one of them.")
        if self.boxes is None and not subject.boxes:
            raise LayerLoomError(
                f"Nothing says where {subject.image} goes; give at least one --box FRAME:X,Y,W,H "
                "behind it, or --boxes FILE."
            )
        for box in subject.boxes:
            read_key(box)
        if subject.points:
            from .conditioning.clicks import read_point

            for point in subject.points:
                read_point(point)

    def _check_numbers(self) -> None:
        for option, low, high, words in (
            ("steps", 1, _TRAINING_STEPS, f"a whole number from 1 to {_TRAINING_STEPS}"),
            ("frames", 1, math.inf, "a whole number from 1 up"),
            ("width", 1, math.inf, "a number of pixels above 0"),
            ("height", 1, math.inf, "a number of pixels above 0"),
            ("guidance", 0, 1000, "a number from 0 up, 1 for no guidance"),
            ("reference_weight", 0, 1, "a number from 0 (in the box alone) to 1 (everywhere)"),
            ("fps", 1e-3, _MOST_FPS, f"frames a second, up to {_MOST_FPS}"),
        ):
            value = getattr(self, option)
            # Written so that NaN is refused.
            if value is not None and not low <= value <= high:
                name = option.replace("_", "-")
                raise LayerLoomError(f"--{name} is {value:g}; give {words}.")
        if self.guidance_drops not in (None, *DROPS):
            raise LayerLoomError(
                f"--guidance-drops is {self.guidance_drops!r}; give one of {', '.join(DROPS)}."
            )
        if not 0 <= self.seed < 2**63:
            raise LayerLoomError(f"--seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")

    def run(
        self, note: Callable[[str], None], progress: Callable[[str, int, int], None]
    ) -> AnimateReport:
        """Do the work and write the files, all of them or none.

        note: told what was resized, retimed or is untrained. progress: called with what is being
        done, how much is done, and of how much.
        Errors: LayerLoomError, before the first step except for a disk that fills up.
        """
        from .media import require_vp9
        from .staging import StagedFolder

        started = time.perf_counter()
        with StagedFolder(self.out, (_VIDEO, _SHEET, _SUBJECTS, _RECORD, _ARRAYS)) as staged:
            notes: list[str] = []
            subjects = tuple(self._subjects(notes))
            drawn = None if self.boxes is None else _read_boxes(self.boxes)
            require_vp9()
            # After the pictures: loading torch takes seconds.
            from .trajectory import TrajectoryPipeline

            pipeline = TrajectoryPipeline.open(
                self.checkpoint, self.base, self.vae, self.text_encoder, device=self.device
            )
            request = self._request(subjects, drawn or self._paths(pipeline))
            notes += pipeline.prepare(request)
            for text in notes:
                note(text)
            result = pipeline.run(request, progress)
            _write(staged.path, result, self.arrays)
            record = self._record(result, notes, time.perf_counter() - started)
            text = json.dumps(record, indent=2, default=str)
            staged.path(_RECORD).write_text(text + "\n", encoding="utf-8")
        return AnimateReport(staged.files, record)

    def _paths(self, pipeline: TrajectoryPipeline) -> BoxPaths:
        """The boxes of --box, in pixels of the result."""
        frames = pipeline.settings.frames if self.frames is None else self.frames
        size = pipeline.output_size(self.width, self.height)
        tracks = (
            pixel_track(subject.image.name, list(map(read_key, subject.boxes)), frames, size)
            for subject in self.subjects
        )
        return BoxPaths(frames, tuple(tracks))

    def _request(self, subjects: tuple[Subject, ...], paths: BoxPaths) -> TrajectoryRequest:
        from .trajectory_request import TrajectoryRequest

        return TrajectoryRequest(
            subjects=subjects,
            paths=paths,
            prompt=self.prompt,
            negative=self.negative,
            reference_weight=self.reference_weight,
            # What a file of boxes is drawn for is what is meant.
            frames=paths.frames if self.frames is None and self.boxes else self.frames,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance=self.guidance,
            guidance_drops=self.guidance_drops,
            fps=self.fps,
            seed=self.seed,
        )

    def _subjects(self, notes: list[str]) -> Iterable[Subject]:
        from .subject_pictures import SubjectReader

        reader = SubjectReader(self.segmenter, self.device, notes)
        for option in self.subjects:
            yield reader.read(option.image, option.mask, option.points)

    def _record(self, result: TrajectoryResult, notes: list[str], seconds: float) -> dict[str, Any]:
        frames, height, width = result.frames.shape[:3]
        return {
            "subjects": [
                {
                    "image": str(option.image),
                    "mask": None if option.mask is None else str(option.mask),
                    "points": list(option.points),
                    "boxes": boxes.tolist(),
                }
                for option, boxes in zip(self.subjects, result.boxes, strict=True)
            ],
            "prompt": self.prompt,
            "negative": self.negative,
            "checkpoint": "starter" if self.checkpoint is None else str(self.checkpoint),
            "seed": self.seed,
            "settings": result.settings,
            "frames": frames,
            "width": width,
            "height": height,
            "fps": float(result.fps),
            "seconds_per_step": float(result.seconds_per_step),
            "seconds": seconds,
            "notes": notes,
            **made_with(_PACKAGES),
        }


def _read_boxes(path: Path) -> BoxPaths:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise LayerLoomError(
            f"--boxes {path} is no text that can be read; give the JSON of the box editor."
        ) from None
    return parse_boxes(text).require()


def _write(path: Callable[[str], Path], result: TrajectoryResult, arrays: bool) -> None:
    import numpy as np

    from .contact_sheet import contact_sheet
    from .media import write_webm

    write_webm(path(_VIDEO), result.frames, result.fps)
    contact_sheet({"video": result.frames}, columns=_COLUMNS).save(path(_SHEET))
    contact_sheet({"subjects": result.subjects}, columns=_COLUMNS).save(path(_SUBJECTS))
    if arrays:
        with path(_ARRAYS).open("wb") as file:
            np.savez_compressed(
                file, video=result.frames, boxes=result.boxes, subjects=result.subjects
            )
