"""Guidance by two conditions, image and text, and the rescale that keeps its contrast in hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import LayerLoomError


@dataclass(frozen=True)
class StreamGuidance:
    """How strongly the image and the text pull, after DynamiCrafter (arXiv 2310.12190).

    e = e(0, 0) + image (e(img, 0) - e(0, 0)) + text (e(img, txt) - e(img, 0)); with image and text
    equal this is plain classifier-free guidance, e(0, 0) + s (e(img, txt) - e(0, 0)), in two
    forwards instead of three.

    Attributes:
        text, image: the scales, finite and 0 or more; 1 and 1 is no guidance.
        rescale: share of the guided prediction whose spread is set back to the conditional one's
            (Lin et al. 2023, arXiv 2305.08891, section 3.4), 0 to 1.
    """

    text: float = 7.5
    image: float = 7.5
    rescale: float = 0.0

    def check(self) -> None:
        """Raise LayerLoomError for a scale or rescale that cannot be used."""
        for name, scale in (("text", self.text), ("image", self.image)):
            if not (math.isfinite(scale) and scale >= 0):
                raise LayerLoomError(
                    f"The {name} scale is {scale:g}; give a number of 0 or more, 1 for no guidance."
                )
        if not 0 <= self.rescale <= 1:
            raise LayerLoomError(
                f"The guidance rescale is {self.rescale:g}; give a number from 0 to 1."
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """Forwards that are needed: "both" (image and text), and "image" and "none" if they count.

        "image" has the empty text, "none" the empty image's tokens as well.
        """
        needed = ["both"]
        if self.image != self.text:
            needed.append("image")
        if self.image != 1:
            needed.append("none")
        return tuple(needed)

    def combine(self, both: Tensor, image: Tensor | None, none: Tensor | None) -> Tensor:
        """The guided prediction; a branch that `branches` does not name may be None."""
        start = none if none is not None else image
        out = both if start is None else start
        if none is not None and image is not None:
            out = out + self.image * (image - none)
        # Without the image branch the two scales are one, and the text's covers both.
        if start is not None:
            out = out + self.text * (both - (image if image is not None else none))
        return rescale_spread(out, both, self.rescale)


def rescale_spread(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Set `share` of a prediction's spread back to the conditional one's.

    The standard deviation is the unbiased one over everything but the batch, frames included.
    """
    if not share:
        return guided
    dims = tuple(range(1, guided.ndim))
    spread = guided.std(dim=dims, keepdim=True)
    wanted = conditional.std(dim=dims, keepdim=True)
    # A constant prediction has no spread to set back: dividing by it would give NaN.
    usable = spread > 0
    factor = (wanted / spread.where(usable, 1.0)).where(usable, 1.0)
    return share * (guided * factor) + (1 - share) * guided
