"""Sprite world for clicks: two sprites over a background, one of which is meant and moves.

A phrase says what it does, a number how far (``strength``); the other one stands still. Masks and
flow are exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .sprite_prompts import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    RandomSource,
    background_phrases,
    choose,
    direction_phrases,
)
from .sprite_world import CIRCUMRADIUS, HELD_OUT_PAIRS, RenderedBatch, Scene, render, sample_scene

# Mean flow inside the mask, in pixels a frame pair of a 16-frame clip whose shorter side has 512:
# the range that Follow-Your-Click finds useful ends at 16, which two sprites have no room for.
STRENGTH_RANGE = (4.0, 14.0)
REFERENCE_SIDE, REFERENCE_PAIRS = 512, 15
# Two sprites need room to move: smaller than the layered ones.
SMALLER = 0.8
# Words of a prompt.
TOKENS = 20
# Free space between the sprites at any time, in shorter sides.
GAP = 0.04
_MARGIN = 0.012
_TRIES = 200
_VERBS = ("moving", "moves", "drifting", "gliding", "sliding", "going")
_VERB_WEIGHTS = (0.45, 0.2, 0.1, 0.1, 0.1, 0.05)
_REST = ("standing still", "stands still", "not moving")


def path_of(strength: float) -> float:
    """Length of the way over a clip, in shorter sides, that has this mean flow."""
    return strength * REFERENCE_PAIRS / REFERENCE_SIDE


def strength_of(flow: float, side: int, pairs: int) -> float:
    """The strength of a mean flow in pixels a frame pair, at ``side`` pixels and so many pairs."""
    return flow * REFERENCE_SIDE / side * pairs / REFERENCE_PAIRS


@dataclass(frozen=True)
class ClickScene:
    """A clip: the sprite that is meant, which moves, and the other, which does not.

    Both scenes have one background. ``strength`` is the number that belongs to the way.
    """

    meant: Scene
    other: Scene
    strength: float


def click_scene(
    rng: RandomSource,
    held_out: bool = False,
    strength: float | None = None,
    direction: str | None = None,
) -> ClickScene:
    """Draw a clip; ``strength`` None draws it evenly from ``STRENGTH_RANGE``.

    Without ``held_out`` neither sprite is one of ``HELD_OUT_PAIRS``, with it both are. Colours of
    sprites and background differ, and the sprites never touch.
    """
    low, high = STRENGTH_RANGE
    drawn = low + (high - low) * float(rng.random())
    strength = drawn if strength is None else strength
    moving = DIRECTIONS[:-1]
    for _ in range(_TRIES):
        base = sample_scene(rng, held_out)
        way = choose(rng, moving) if direction is None else direction
        colours = [c for c in COLOURS if c not in (base.colour, base.background_colour)]
        pairs = [
            (colour, shape)
            for colour in colours
            for shape in SHAPES
            if ((colour, shape) in HELD_OUT_PAIRS) == held_out
        ]
        if not pairs:
            continue
        colour, shape = choose(rng, pairs)
        meant = _plain(base, direction=way, path=path_of(strength))
        other = _plain(base, colour=colour, shape=shape, direction="still", path=0.0)
        placed = _place(meant, other, rng)
        if placed is not None:
            return ClickScene(*placed, strength)
    raise RuntimeError("two sprites found no room")


def click_scene_at(
    seed: int,
    index: int,
    held_out: bool = False,
    strength: float | None = None,
    direction: str | None = None,
) -> ClickScene:
    """Clip ``index`` of the endless set ``seed``: the same whatever was drawn before."""
    rng = random.Random(f"click world {seed} {index} {held_out}")
    return click_scene(rng, held_out, strength, direction)


def _plain(scene: Scene, **changes) -> Scene:
    size = SMALLER * scene.size * scene.growth
    return replace(scene, size=size, change="none", growth=1.0, turn=0.0, returns=False, **changes)


def reach(scene: Scene) -> float:
    """The sprite's radius in shorter sides."""
    return scene.size * CIRCUMRADIUS[scene.shape]


def _place(meant: Scene, other: Scene, rng: RandomSource) -> tuple[Scene, Scene] | None:
    """Both with starts such that they stay inside the frame and apart; None where luck runs out."""
    spans = []
    for scene in (meant, other):
        radius = reach(scene) + _MARGIN
        for step in scene.travel:
            spans.append((radius + max(-step, 0.0), 1.0 - radius - max(step, 0.0)))
    if any(low > high for low, high in spans):
        return None
    for _ in range(20):
        x, y, u, v = (low + (high - low) * float(rng.random()) for low, high in spans)
        if closest((x, y), meant.travel, (u, v)) > reach(meant) + reach(other) + GAP:
            return replace(meant, start=(x, y)), replace(other, start=(u, v))
    return None


def closest(
    start: tuple[float, float], travel: tuple[float, float], point: tuple[float, float]
) -> float:
    """Distance of a point from the straight way."""
    dx, dy = point[0] - start[0], point[1] - start[1]
    length = travel[0] ** 2 + travel[1] ** 2
    along = 0.0 if not length else (dx * travel[0] + dy * travel[1]) / length
    along = min(max(along, 0.0), 1.0)
    return math.hypot(dx - along * travel[0], dy - along * travel[1])


def phrase(scene: ClickScene, rng: RandomSource) -> str:
    """A short phrase: what the meant sprite does, its direction always named, itself not."""
    names = direction_phrases(scene.meant.direction)
    where = names[0] if rng.random() < 0.6 else choose(rng, names)
    return f"{choose(rng, _VERBS, _VERB_WEIGHTS)} {where}"


def plain_phrase(scene: ClickScene, direction: str | None = None) -> str:
    """The direction (the scene's own unless given) in the plainest words."""
    return f"moving {direction_phrases(direction or scene.meant.direction)[0]}"


def caption(scene: ClickScene, rng: RandomSource) -> str:
    """The whole clip in words: both sprites, what they do, often the background."""
    meant = f"a {scene.meant.colour} {scene.meant.shape} {phrase(scene, rng)}"
    other = f"a {scene.other.colour} {scene.other.shape}"
    if rng.random() < 0.5:
        other += f" {choose(rng, _REST)}"
    parts = [meant, other]
    if rng.random() < 0.3:
        parts.reverse()
    text = " and ".join(parts)
    if rng.random() < 0.6:
        names = background_phrases(scene.meant.pattern, scene.meant.background_colour)
        text += f" over {names[0]}"
    return " ".join(text.split()[:TOKENS])


@dataclass(frozen=True)
class RenderedClicks:
    """Rendered clips with what is known of both sprites.

    clips: floats [B, F, 3, H, W] in 0..1. meant, other: each sprite alone over the background; of
    the other, which stands still, one frame.
    """

    clips: torch.Tensor
    meant: RenderedBatch
    other: RenderedBatch

    @property
    def masks(self) -> torch.Tensor:
        """The meant sprite's pixels, bool [B, F, H, W]."""
        return self.meant.masks

    @property
    def other_masks(self) -> torch.Tensor:
        """The other sprite's pixels, bool [B, F, H, W]."""
        return self.other.masks.expand_as(self.masks)

    @cached_property
    def strengths(self) -> torch.Tensor:
        """Mean exact flow inside the meant sprite, [B], as ``strength_of`` counts it."""
        flow = self.meant.flow.square().sum(2).sqrt()
        inside = self.masks[:, :-1]
        mean = (flow * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)
        return strength_of(mean, min(flow.shape[-2:]), flow.shape[1])


def render_clicks(
    scenes: Sequence[ClickScene], frames: int, size: tuple[int, int]
) -> RenderedClicks:
    """Clips of ``frames`` at (height, width); the sprites never overlap."""
    meant = render([scene.meant for scene in scenes], frames, size)
    other = render([scene.other for scene in scenes], 1, size)
    clips = torch.lerp(meant.blended, other.foreground.expand_as(meant.blended), other.alpha)
    return RenderedClicks(clips, meant, other)
