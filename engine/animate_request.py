"""What one clip shall be made of, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import LayerLoomError

# The image stream's gate: which of the spatial transformers it is set in.
GATE_LAYERS = ("all", "middle")


@dataclass(frozen=True)
class AnimateRequest:
    """What one run shall make. None leaves a setting to the checkpoint.

    Attributes:
        image: first frame, uint8 [H, W, 3].
        prompt: what happens; not empty.
        negative: what shall not; "" is the unconditional text of the training.
        end: last frame, of any size; None leaves the end open.
        loop: the clip goes back to its first frame; excludes ``end``.
        key_images: frames to pass through on the way, in order; they need ``end`` or ``loop``.
        motion: frame stride or frames a second, as the checkpoint reads it.
        gate, gate_layers: factor on the image stream (1 as trained), of "all" layers or "middle".
        text_scale, image_scale, rescale: guidance, see ``StreamGuidance``.
        frames: of the result, or of each piece between two images.
        overlap: frames that windows of a long clip share; None is half of a window.
        width, height: size of the result in pixels.
        steps, spacing, eta: see ``engine.sampling.ddim``.
        exact_first_frame: given images' frames are kept as their latents (a blend in every step).
        fps: frames a second of the file.
        seed: same seed, same clip.
    """

    image: np.ndarray
    prompt: str
    negative: str = ""
    end: np.ndarray | None = None
    loop: bool = False
    key_images: Sequence[np.ndarray] = ()
    motion: float | None = None
    gate: float = 1.0
    gate_layers: str = "all"
    text_scale: float | None = None
    image_scale: float | None = None
    rescale: float | None = None
    frames: int | None = None
    overlap: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    exact_first_frame: bool = False
    fps: float | None = None
    seed: int = 0

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """All given images in the order they are passed through."""
        return (self.image, *self.key_images, *(() if self.end is None else (self.end,)))

    def validate(self) -> None:
        """Raise LayerLoomError for what is wrong whatever the checkpoint."""
        if not self.prompt.strip():
            raise LayerLoomError("The prompt is empty; say what the clip shows.")
        if self.loop and self.end is not None:
            raise LayerLoomError(
                "A loop ends on its first image, so it takes no end image; leave one of them out."
            )
        if len(self.key_images) and not self.loop and self.end is None:
            raise LayerLoomError(
                "Images to pass through need an end image or a loop; give the last one as the end."
            )
        for picture in self.images:
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise LayerLoomError(
                    f"An image is {picture.dtype} of shape {tuple(picture.shape)}; give uint8 of "
                    "height x width x 3."
                )
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and side < 1:
                raise LayerLoomError(f"The {name} is {side}; give a number of pixels above 0.")
        if self.motion is not None and not 0 < self.motion < 1000:
            raise LayerLoomError(f"The motion is {self.motion:g}; give a number above 0.")
        check_gate(self.gate, self.gate_layers)


@dataclass(frozen=True)
class AnimateResult:
    """frames: uint8 [T, H, W, 3]. keys: (frame, index of the given image) pairs of the result.

    settings: what the run was made with, for the record.
    """

    frames: np.ndarray
    keys: tuple[tuple[int, int], ...]
    fps: float
    settings: dict[str, Any]
    seconds_per_step: float


def check_gate(strength: float, layers: str) -> None:
    """Raise LayerLoomError for a gate that cannot be set."""
    if not 0 <= strength <= 10:
        raise LayerLoomError(
            f"The gate is {strength:g}; give a number from 0 (no image stream) to 10, 1 as trained."
        )
    if layers not in GATE_LAYERS:
        raise LayerLoomError(
            f"The gate's layers are {layers!r}; give one of {', '.join(GATE_LAYERS)}."
        )
