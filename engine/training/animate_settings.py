"""Settings of an animation recipe's smaller tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LayerLoomError
from ..sampling.latent_schedules import SPACINGS
from ..sampling.schedules import PREDICTIONS
from .settings import settings_from


@dataclass(frozen=True)
class ImageSettings:
    """The ``[image]`` table: the starter's image encoder, see ``StarterImageEncoder``."""

    dim: int = 64
    width: int = 24


@dataclass(frozen=True)
class NoiseSettings:
    """The ``[noise]`` table of a starter: what the network predicts, and whether the noise
    schedule ends in pure noise."""

    prediction: str = "v"
    zero_terminal_snr: bool = True

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise LayerLoomError(
                f"The recipe's noise.prediction is {self.prediction!r}; use "
                f"{' or '.join(PREDICTIONS)}."
            )
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise LayerLoomError(
                "The recipe's noise.prediction 'eps' says nothing at pure noise; set "
                "zero_terminal_snr = false or use v."
            )


@dataclass(frozen=True)
class AnimateSampling:
    """The ``[sampling]`` table: defaults that an exported starter carries.

    motion is the default of the number that tells how far things move.
    """

    steps: int = 20
    eta: float = 0.0
    spacing: str = "trailing"
    text_scale: float = 1.5
    image_scale: float = 1.5
    guidance_rescale: float = 0.0
    frames_per_second: float = 8.0
    motion: int = 3

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> AnimateSampling:
        """Check a table's entries.

        Raises:
            LayerLoomError: an entry is unknown or out of range.
        """
        made = settings_from(dict(table), cls)
        if made.spacing not in SPACINGS or made.steps < 1 or not 0 <= made.eta <= 1:
            raise LayerLoomError(
                f"The recipe's sampling is {dict(table)}; give spacing as one of "
                f"{', '.join(SPACINGS)}, steps from 1 and eta from 0 to 1."
            )
        return made

    @property
    def stored(self) -> dict[str, Any]:
        """As a checkpoint carries it."""
        return asdict(self)
