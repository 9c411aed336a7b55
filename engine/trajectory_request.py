"""Which subjects shall go where, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conditioning.boxes import BoxPaths
from .conditioning.masks import check_mask
from .errors import LayerLoomError
from .sampling.guidance import DROPS


@dataclass(frozen=True, eq=False)
class Subject:
    """Who goes: a picture uint8 [H, W, 3] and a mask of it [H, W] in 0..1, None for all of it."""

    image: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TrajectoryRequest:
    """What one run shall make. None leaves a setting to the checkpoint.

    Attributes:
        subjects: at least one; where boxes overlap, earlier subjects stand in front.
        paths: the boxes, a track a subject in the same order; retimed to the clip's length.
        prompt: what the clip shows.
        negative: what it shall not show; "" is the unconditional text of the training.
        reference_weight: lambda_M, how much subjects count outside of their boxes, 0..1.
        frames, steps, guidance: of the clip and its sampling.
        guidance_drops: what guidance leaves out to compare with, one of ``DROPS``: the text alone,
            or subjects and boxes too.
        width, height: size of the result in pixels.
        fps: frames a second of the file.
        seed: same seed, same clip.
    """

    subjects: Sequence[Subject]
    paths: BoxPaths
    prompt: str
    negative: str = ""
    reference_weight: float | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_drops: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    seed: int = 0

    def validate(self) -> None:
        """Raise LayerLoomError for what is wrong whatever the checkpoint."""
        self.paths.require()
        if len(self.subjects) != len(self.paths.tracks):
            raise LayerLoomError(
                f"The number of subjects is {len(self.subjects)} and of paths of boxes "
                f"{len(self.paths.tracks)}; give each subject boxes of its own."
            )
        for number, subject in enumerate(self.subjects, 1):
            which = "subject" if len(self.subjects) == 1 else f"subject {number}"
            picture = subject.image
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise LayerLoomError(
                    f"The picture of {which} is {picture.dtype} of shape {tuple(picture.shape)}; "
                    "give uint8 of height x width x 3."
                )
            if subject.mask is not None:
                check_mask(subject.mask, picture.shape[:2], f"mask of {which}")
        weight = self.reference_weight
        if weight is not None and not 0 <= weight <= 1:
            raise LayerLoomError(
                f"The reference weight is {weight:g}; give a number from 0 (the subject counts in "
                "its box alone) to 1 (it counts everywhere)."
            )
        for name in ("width", "height", "frames"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise LayerLoomError(f"The {name} is {number}; give a number above 0.")
        if self.guidance is not None and not 0 <= self.guidance <= 1000:
            raise LayerLoomError(
                f"The guidance is {self.guidance:g}; give a number from 0 up, 1 for none."
            )
        if self.guidance_drops is not None and self.guidance_drops not in DROPS:
            raise LayerLoomError(
                f"What guidance drops is {self.guidance_drops!r}; give one of {', '.join(DROPS)}."
            )


@dataclass(frozen=True)
class TrajectoryResult:
    """frames: uint8 [T, H, W, 3]. boxes: int64 [S, T, 4], x0, y0, x1, y1 in the frames' pixels.

    subjects: uint8 [S, h, w, 3], the pictures as the network saw them. settings: what the run was
    made with, for the record.
    """

    frames: np.ndarray
    boxes: np.ndarray
    subjects: np.ndarray
    fps: float
    settings: dict[str, Any]
    seconds_per_step: float
