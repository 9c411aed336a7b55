"""Overlapping temporal windows over a whole network, fused into one prediction at every step.

A network that was made for so many frames is run on windows of that many frames, and where windows
overlap their predictions are averaged (Bar-Tal et al. 2023, arXiv 2302.08113, applied to time).
The windows move from step to step, so that no frame is at a border throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayerLoomError

# The golden ratio's fraction: its multiples fill a unit interval as evenly as can be.
_TURN = 0.6180339887498949


@dataclass(frozen=True)
class Window:
    """A run of frames that the network sees at once.

    Attributes:
        start, stop: frames start .. stop - 1 of the clip.
        weights: of each frame against other windows', all above 0.
        piece: which conditions it belongs to, where a clip is made of several.
    """

    start: int
    stop: int
    weights: tuple[float, ...]
    piece: int = 0

    def take(self, clip: Tensor, dim: int) -> Tensor:
        """The window's frames of a tensor that holds the whole clip along `dim`."""
        return clip.narrow(dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class SlidingWindows:
    """Windows of one length over a clip of any length.

    Attributes:
        length: frames a window; shorter clips are one window of their own length.
        overlap: frames that neighbours share at least, 1 .. length - 1.
    """

    length: int = 16
    overlap: int = 8

    def check(self) -> None:
        """Raise LayerLoomError for windows that cannot cover a clip without a seam."""
        if self.length < 2:
            raise LayerLoomError(f"A window of {self.length} frames is too short; give 2 or more.")
        if not 1 <= self.overlap < self.length:
            raise LayerLoomError(
                f"Windows of {self.length} frames cannot overlap by {self.overlap}; give 1 to "
                f"{self.length - 1} frames."
            )

    def at(self, frames: int, step: int) -> list[Window]:
        """The windows over a clip of `frames` at a sampling step, in order; every frame is in one.

        Windows at both ends of the clip are moved inwards, never cut, so that all are `length`
        frames long, as the network knows them.
        """
        self.check()
        if frames <= self.length:
            return [Window(0, frames, (1.0,) * frames)]
        stride, last = self.length - self.overlap, frames - self.length
        shift = int(stride * (step * _TURN % 1))
        starts = {min(max(start, 0), last) for start in range(shift - stride, frames, stride)}
        return [self._window(start, frames) for start in sorted(starts)]

    def _window(self, start: int, frames: int) -> Window:
        """One whose say rises and falls over the overlap, so that it never sets in at once.

        Where the clip itself begins or ends there is nothing to cross over to, and no ramp.
        """
        ramp, weights = self.overlap + 1, []
        for i in range(self.length):
            rise = i + 1 if start > 0 else ramp
            fall = self.length - i if start + self.length < frames else ramp
            weights.append(min(rise, fall, ramp) / ramp)
        return Window(start, start + self.length, tuple(weights))


def chained_windows(pieces: int, length: int) -> list[Window]:
    """Windows of a clip whose pieces each end on the frame that the next one starts with.

    Piece i covers the frames i (length - 1) .. (i + 1) (length - 1), both ends included, so the
    whole has pieces (length - 1) + 1 frames: none is made twice and none is left out.
    """
    stride = length - 1
    weights = (1.0,) * length
    return [Window(i * stride, i * stride + length, weights, i) for i in range(pieces)]


def fuse(
    windows: Sequence[Window], predict: Callable[[Window], Tensor], frames: int, dim: int
) -> Tensor:
    """Run `predict` on each window and average where they overlap, by their weights.

    predict: gives the window's frames along `dim`; other sides are the same for all windows.
    The average is a running one, so that equal predictions come out as they are, to the bit.
    Raises ValueError when a frame is in no window.
    """
    if len(windows) == 1 and windows[0].stop - windows[0].start == frames:
        return predict(windows[0])
    result, total = None, torch.zeros(frames, dtype=torch.float64)
    for window in windows:
        part = predict(window)
        span = slice(window.start, window.stop)
        weights = torch.tensor(window.weights, dtype=torch.float64)
        total[span] += weights
        if result is None:
            sides = [*part.shape]
            sides[dim] = frames
            result = part.new_zeros(sides)
        share = (weights / total[span]).to(part)
        share = share.reshape([-1 if side == dim % part.ndim else 1 for side in range(part.ndim)])
        there = window.take(result, dim)
        there.copy_(torch.lerp(there, part, share))
    if not bool((total > 0).all()):
        missing = int((total == 0).nonzero()[0])
        raise ValueError(f"frame {missing} of {frames} is in no window")
    return result


def frame_shares(windows: Sequence[Window], frames: int) -> Tensor:
    """How much each window says about each frame, float64 [windows, frames]; columns sum to 1."""
    shares = torch.zeros(len(windows), frames, dtype=torch.float64)
    for row, window in zip(shares, windows, strict=True):
        row[window.start : window.stop] = torch.tensor(window.weights, dtype=torch.float64)
    return shares / shares.sum(dim=0)
