"""Guidance formulas: how strongly classifier-free guidance pulls at each step.

A guidance takes (step_index from 0, timestep fed to the network, total_steps) and gives the scale
g of  v = v_uncond + g (v_cond - v_uncond).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import LayerLoomError

Guidance = Callable[[int, int, int], float]

GUIDANCE_NAMES = ("constant", "dynamic", "dynamic-released")
# What guidance of subjects along boxes leaves out: the text alone, or subjects and boxes too.
DROPS = ("text", "all")


def constant(scale: float) -> Guidance:
    """The same scale at every step."""

    def at(step_index: int, timestep: int, total_steps: int) -> float:
        return float(scale)

    return at


def dynamic_as_released(scale: float = 6.0, num_steps: int = 50, exponent: int = 5) -> Guidance:
    """LayerFlow's dynamic guidance exactly as its released code evaluates it.

    g = 1 + scale (1 - cos(pi ((total_steps - t) / num_steps)^exponent)) / 2, t the raw timestep.
    Since t runs over 999 .. 19 and not over step counts, g jumps about within [1, 1 + scale] (mean
    3.8 for scale 6 and 50 steps). `num_steps` is a setting of its own in the released code, 50
    even when fewer steps are taken. Python floats, because the cosine's argument is huge.
    """
    if not isinstance(exponent, int):
        raise ValueError("exponent must be an int: the base is negative for most timesteps")

    def at(step_index: int, timestep: int, total_steps: int) -> float:
        progress = (total_steps - int(timestep)) / num_steps
        return 1 + scale * (1 - math.cos(math.pi * progress**exponent)) / 2

    return at


def dynamic_smooth(scale: float, exponent: float = 5.0) -> Guidance:
    """Guidance that rises from 1 at the first step to `scale` at the last, late and smoothly.

    g = 1 + (scale - 1) (1 - cos(pi p^exponent)) / 2 with p = step_index / (total_steps - 1), so p
    runs over 0 .. 1; a single step gets p = 1. This is what the released formula aims at, with the
    step in place of the raw timestep and the top at `scale` instead of 1 + scale, so that `scale`
    means the same as for `constant`. Low early guidance leaves layout and motion free.
    """

    def at(step_index: int, timestep: int, total_steps: int) -> float:
        progress = step_index / (total_steps - 1) if total_steps > 1 else 1.0
        return 1 + (scale - 1) * (1 - math.cos(math.pi * progress**exponent)) / 2

    return at


def guidance(name: str, scale: float, steps: int) -> Guidance:
    """The guidance of a name: "constant", "dynamic" (smooth) or "dynamic-released".

    scale: a finite number of 0 or more; 1 means no guidance. steps: the steps that will be taken,
    which "dynamic-released" divides by.
    Raises LayerLoomError for an unknown name or an unusable scale.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise LayerLoomError(
            f"guidance is {scale}, but it must be a number of 0 or more; 6 is a usual value"
        )
    if name == "constant":
        return constant(scale)
    if name == "dynamic":
        return dynamic_smooth(scale)
    if name == "dynamic-released":
        return dynamic_as_released(scale, num_steps=steps)
    raise LayerLoomError(
        f"there is no guidance named {name!r}; choose one of {', '.join(GUIDANCE_NAMES)}"
    )
