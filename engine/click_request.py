"""Which regions of a picture shall move, how, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conditioning.masks import check_mask
from .errors import LayerLoomError

# Every region is a pass through the network of its own.
MOST_REGIONS = 16


@dataclass(frozen=True, eq=False)
class Region:
    """What moves, and how.

    Attributes:
        mask: numbers [H, W] in 0..1 at the picture's own size; 0.5 and more is inside.
        phrase: what it does, in a few words ("turns its head").
        strength: how far it moves, mean optical flow inside the mask; None is the checkpoint's.
    """

    mask: np.ndarray
    phrase: str
    strength: float | None = None


@dataclass(frozen=True, eq=False)
class ClickRequest:
    """What one run shall make. None leaves a setting to the checkpoint.

    Attributes:
        image: first frame, uint8 [H, W, 3].
        regions: at least one; where they overlap, both have a say.
        prompt: what the whole clip shows; "" gives each region its phrase instead.
        negative: what it shall not show; "" is the unconditional text of the training.
        hold_background: outside of what the regions move the picture itself is put back, pixel by
            pixel: a composite, not the network's.
        exact_first_frame: the first frame's latent is kept (a blend in every step).
        frames, steps, guidance: of the clip and its sampling.
        width, height: size of the result in pixels.
        fps: frames a second of the file.
        seed: same seed, same clip.
    """

    image: np.ndarray
    regions: Sequence[Region]
    prompt: str = ""
    negative: str = ""
    hold_background: bool = False
    exact_first_frame: bool = False
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    seed: int = 0

    def validate(self) -> None:
        """Raise LayerLoomError for what is wrong whatever the checkpoint."""
        picture = self.image
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise LayerLoomError(
                f"The image is {picture.dtype} of shape {tuple(picture.shape)}; give uint8 of "
                "height x width x 3."
            )
        if not 1 <= len(self.regions) <= MOST_REGIONS:
            raise LayerLoomError(
                f"There are {len(self.regions)} regions; give 1 to {MOST_REGIONS}."
            )
        for number, region in enumerate(self.regions, 1):
            where = "mask" if len(self.regions) == 1 else f"mask of region {number}"
            check_mask(region.mask, picture.shape[:2], where)
            if not region.phrase.strip():
                raise LayerLoomError(
                    f"The phrase of region {number} is empty; say what it does, 'moves left' say."
                )
            if region.strength is not None and not 0 <= region.strength <= 1000:
                raise LayerLoomError(
                    f"The strength of region {number} is {region.strength:g}; give a number from "
                    "0 up."
                )
        for name in ("width", "height", "frames"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise LayerLoomError(f"The {name} is {number}; give a number above 0.")
        if self.guidance is not None and not 0 <= self.guidance <= 1000:
            raise LayerLoomError(
                f"The guidance is {self.guidance:g}; give a number from 0 up, 1 for none."
            )


@dataclass(frozen=True)
class ClickResult:
    """frames: uint8 [T, H, W, 3]. masks: bool [R, H, W] at the frames' size.

    settings: what the run was made with, for the record.
    """

    frames: np.ndarray
    masks: np.ndarray
    fps: float
    settings: dict[str, Any]
    seconds_per_step: float
