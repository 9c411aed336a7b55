"""Draws the losses of a run as a picture, while it runs and at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_BACKDROP, _GRID = (24, 26, 31), (52, 56, 66)
_INK, _FAINT = (222, 225, 231), (139, 145, 157)
_DOT, _LINE = (62, 88, 120), (110, 176, 255)
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 34
_ROWS = 4


def loss_plot(
    losses: Sequence[float], steps: int, title: str = "", size: tuple[int, int] = (512, 320)
) -> Image.Image:
    """A picture of the losses so far: a dot a step, and their mean over an eighth of the run.

    The loss of one step depends most on the timesteps that were drawn; the mean shows where it
    goes. ``steps`` is the whole run's length, ``size`` (width, height) in pixels.
    """
    width, height = size
    picture = Image.new("RGB", size, _BACKDROP)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    draw.text((_LEFT, _TOP // 2), title, _INK, font, anchor="lm")
    box = (_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)
    means = running_means(losses, max(5, steps // 8))
    low, high = _range(losses)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = box[0] + (box[2] - box[0]) * step / max(1, steps)
        return x, box[3] - (box[3] - box[1]) * (loss - low) / (high - low)

    for row in range(_ROWS + 1):
        value = low + (high - low) * row / _ROWS
        y = place(0, value)[1]
        draw.line([(box[0], y), (box[2], y)], _GRID)
        draw.text((box[0] - 8, y), f"{value:.3g}", _FAINT, font, anchor="rm")
    for share in (0, 0.5, 1):
        x = place(steps * share, low)[0]
        draw.text((x, box[3] + 8), f"{round(steps * share)}", _FAINT, font, anchor="mt")
    for step, loss in enumerate(losses, start=1):
        x, y = place(step, min(loss, high))
        draw.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], _DOT)
    if len(means) > 1:
        line = [place(step, min(loss, high)) for step, loss in enumerate(means, start=1)]
        draw.line(line, _LINE, width=2, joint="curve")
    return picture


def running_means(losses: Sequence[float], window: int) -> list[float]:
    """For each loss the mean of the last ``window`` ones up to it."""
    total, means = 0.0, []
    for index, loss in enumerate(losses):
        total += loss - (losses[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _range(losses: Sequence[float]) -> tuple[float, float]:
    """The axis: from 0 to a round number above nearly all losses; single outliers go to its top."""
    ordered = sorted(losses) or [1.0]
    highest = max(ordered[int(0.98 * (len(ordered) - 1))], 1e-6)
    unit = 10 ** math.floor(math.log10(highest))
    return 0.0, next(
        unit * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if highest <= unit * step
    )
