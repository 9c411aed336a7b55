"""Where given images belong in a clip: animated, interpolated, looped, or a chain of these."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayerLoomError
from ..sampling.windows import SlidingWindows, Window, chained_windows

MODES = ("animate", "interpolate", "loop")


@dataclass(frozen=True)
class ClipPlan:
    """Which frames the network makes and which images they start from.

    A clip of several pieces has one frame for each image between two pieces: it is the last of one
    and the first of the next, made once.

    Attributes:
        mode: "animate" (from a first image on), "interpolate" (from each image to the next) or
            "loop" (and from the last back to the first).
        frames: frames the network makes.
        kept: frames of the result; a loop leaves out the last, which shows the first again.
        pieces: how many pieces the clip has.
        length: frames a piece, both ends counted.
        keys: (frame, image) of each frame that an image is given for, in order.
    """

    mode: str
    frames: int
    kept: int
    pieces: int
    length: int
    keys: tuple[tuple[int, int], ...]

    def windows(self, sliding: SlidingWindows, step: int) -> list[Window]:
        """What the network sees at once at a sampling step.

        A piece between two images is seen whole, since both hold it; a clip that only starts from
        one is covered by sliding windows.
        """
        if self.mode == "animate":
            return sliding.at(self.frames, step)
        return chained_windows(self.pieces, self.length)

    def first_image(self, piece: int) -> int:
        """The image whose tokens a piece sees: its first, as the weights were trained."""
        return self.keys[piece][1]


def clip_plan(images: int, loop: bool, frames: int | None, trained: int) -> ClipPlan:
    """The plan for a number of images.

    images: 1 to animate, more to pass through one after the other; loop: back to the first.
    frames: of the result for one piece (of each piece in a chain, both of its ends counted, the
        closing one of a loop not); None makes pieces of `trained` frames.
    Raises LayerLoomError where a clip is too short to hold its images.
    """
    if frames is not None and frames < 1:
        raise LayerLoomError(f"A clip of {frames} frames cannot be made; give 1 or more.")
    if images == 1 and not loop:
        count = frames or trained
        return ClipPlan("animate", count, count, 1, count, ((0, 0),))
    length = trained if frames is None else frames + loop
    if length < 2 + (loop and images == 1):
        raise LayerLoomError(
            f"{frames} frames are too few to go from one image to the next; give 2 or more."
        )
    pieces = images if loop else images - 1
    total = pieces * (length - 1) + 1
    keys = tuple((piece * (length - 1), piece % images) for piece in range(pieces + 1))
    mode = "loop" if loop else "interpolate"
    return ClipPlan(mode, total, total - loop, pieces, length, keys)
