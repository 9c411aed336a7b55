"""Sprite world for clicks: still pictures of one to four sprites, and what is asked of them.

Sprites are of any size and angle and may touch. A picture is asked in several ways (``WAYS``); each
asking has three answers: what is meant, that and what touches it, all sprites.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .sprite_prompts import COLOURS, SHAPES, RandomSource, choose
from .sprite_world import CIRCUMRADIUS, HELD_OUT_PAIRS, Scene, placed, render, sample_scene

MOST_SPRITES = 4
# Half the width of a sprite, about, in shorter sides; the clips' own are 0.145 to 0.193.
SIZE_RANGE = (0.09, 0.22)
# Nearest that two sprites come, as shares of their sizes' sum; 1 is about touching.
SPACING = (0.75, 1.6)
# Sprites of one colour must not look like one.
APART = 1.6
# Chances: the background is what is clicked; a further point wants the same, or another one.
BACKGROUND_CLICKS = 0.1
SAME, ANOTHER = 0.4, 0.3
# A pixel is a sprite's where so much of it shows.
SHOWS = 0.5
BACKGROUND = MOST_SPRITES


@dataclass(frozen=True)
class Way:
    """How a picture is asked: so many points, with a box or without."""

    points: int
    box: bool = False


WAYS = (Way(1), Way(1), Way(2), Way(3), Way(0, True), Way(1, True))


@dataclass(frozen=True)
class Asking:
    """Clicks on a picture and their answers.

    points: (x, y, label) in shares of width and height. box: (x0, y0, x1, y1), or None.
    answers: three sets of sprite numbers; ``BACKGROUND`` alone is everything else.
    """

    points: tuple[tuple[float, float, int], ...]
    box: tuple[float, float, float, float] | None
    answers: tuple[frozenset[int], frozenset[int], frozenset[int]]


@dataclass(frozen=True)
class DrawnPictures:
    """Pictures [B, 3, H, W] in 0..1, and what of each sprite shows, [B, ``MOST_SPRITES``, h, w]."""

    pictures: torch.Tensor
    visible: torch.Tensor

    def answer(self, row: int, sprites: frozenset[int]) -> torch.Tensor:
        """The share of each pixel [h, w] that belongs to these sprites, or to the background."""
        shown = self.visible[row]
        if BACKGROUND in sprites:
            return (1 - shown.sum(0)).clamp(0, 1)
        return shown[sorted(sprites)].sum(0).clamp(0, 1)


def picture_at(seed: int, index: int, held_out: bool = False) -> tuple[Scene, ...]:
    """Sprites of picture ``index`` of the endless set ``seed``, the lowest first.

    The first one's background is the picture's. With ``held_out`` all are of colour-shape pairs
    that are never drawn without it.
    """
    rng = random.Random(f"segment world {seed} {index} {held_out}")
    wanted = 1 + int(rng.random() * MOST_SPRITES)
    spacing = SPACING[0] + (SPACING[1] - SPACING[0]) * rng.random()
    sprites: list[Scene] = []
    for _ in range(12 * MOST_SPRITES):
        if len(sprites) == wanted:
            break
        ground = sprites[0].background_colour if sprites else None
        sprite = _sprite(rng, held_out, ground)
        if all(_clear(sprite, other, spacing) for other in sprites):
            sprites.append(sprite)
    return tuple(sprites)


def _sprite(rng: RandomSource, held_out: bool, ground: str | None) -> Scene:
    scene = sample_scene(rng, held_out)
    if scene.colour == ground:
        pairs = [
            (colour, shape)
            for colour in COLOURS
            for shape in SHAPES
            if colour != ground and ((colour, shape) in HELD_OUT_PAIRS) == held_out
        ]
        colour, shape = choose(rng, pairs)
        scene = replace(scene, colour=colour, shape=shape)
    low, high = SIZE_RANGE
    size = low * (high / low) ** float(rng.random())
    angle = 2 * math.pi * float(rng.random())
    scene = replace(
        scene, direction="still", size=size, growth=1.0, angle=angle, turn=0.0, change="none"
    )
    return placed(scene, size * CIRCUMRADIUS[scene.shape], rng)


def _clear(one: Scene, other: Scene, spacing: float) -> bool:
    needed = max(spacing, APART) if one.colour == other.colour else spacing
    return math.dist(one.start, other.start) >= needed * (one.size + other.size)


@torch.no_grad()
def draw_pictures(
    scenes: Sequence[Sequence[Scene]], size: tuple[int, int], small: tuple[int, int]
) -> DrawnPictures:
    """Draw pictures of ``size`` (height, width), and their sprites' parts at the size ``small``."""
    flat = [sprite for sprites in scenes for sprite in sprites]
    first = np.cumsum([0, *(len(sprites) for sprites in scenes)])[:-1]
    full = render(flat, 1, size)
    alpha = render(flat, 1, small).alpha[:, 0, 0]
    pictures = full.background[first, 0].clone()
    visible = torch.zeros(len(scenes), MOST_SPRITES, *small)
    for number in range(MOST_SPRITES):
        rows = [row for row, sprites in enumerate(scenes) if len(sprites) > number]
        if not rows:
            continue
        drawn = first[rows] + number
        pictures[rows] = torch.lerp(pictures[rows], full.foreground[drawn, 0], full.alpha[drawn, 0])
        # What lies above hides what is below.
        visible[rows, :number] *= 1 - alpha[drawn, None]
        visible[rows, number] = alpha[drawn]
    return DrawnPictures(pictures, visible)


def touching(visible: torch.Tensor) -> torch.Tensor:
    """Which sprites of [B, N, h, w] touch or hide one another: bool [B, N, N]."""
    shown = (visible > SHOWS).float()
    grown = torch.nn.functional.max_pool2d(shown, 3, stride=1, padding=1)
    return torch.einsum("bihw,bjhw->bij", grown, shown) >= 2


def ask(way: Way, visible: np.ndarray, touches: np.ndarray, rng: random.Random) -> Asking:
    """Draw clicks in one way.

    visible: [N, h, w], what of each sprite shows. touches: bool [N, N].
    """
    shown = visible > SHOWS
    sprites = [number for number in range(len(shown)) if shown[number].any()]
    if way.box:
        return _ask_by_box(way, shown, sprites, rng)
    ground = ~shown.any(0)
    if way.points == 1 and rng.random() < BACKGROUND_CLICKS and ground.any():
        return Asking((_point(ground, 1, rng),), None, (frozenset((BACKGROUND,)),) * 3)
    first = rng.choice(sprites)
    wanted, unwanted = {first}, set()
    points = [_point(shown[first], 1, rng)]
    while len(points) < way.points:
        chance = rng.random()
        free = [number for number in sprites if number not in wanted | unwanted]
        if chance < SAME:
            points.append(_point(shown[rng.choice(sorted(wanted))], 1, rng))
        elif chance < SAME + ANOTHER and free:
            other = rng.choice(free)
            wanted.add(other)
            points.append(_point(shown[other], 1, rng))
        elif free and (rng.random() < 0.7 or not ground.any()):
            other = rng.choice(free)
            unwanted.add(other)
            points.append(_point(shown[other], 0, rng))
        else:
            points.append(_point(ground if ground.any() else shown[first], 0, rng))
    near = {number for number in sprites if touches[sorted(wanted), number].any()}
    answers = (wanted, (wanted | near) - unwanted, set(sprites) - unwanted)
    return Asking(tuple(points), None, tuple(map(frozenset, answers)))


def _ask_by_box(way: Way, shown: np.ndarray, sprites: Sequence[int], rng: random.Random) -> Asking:
    """A loose box around one sprite or two; a point in it wants one of them, or leaves one out."""
    several = len(sprites) > 1 and rng.random() < 0.3
    box = _box(shown[rng.sample(sprites, 2 if several else 1)].any(0), rng)
    inside = np.zeros(shown.shape[1:], bool)
    height, width = inside.shape
    rows = slice(round(box[1] * height), round(box[3] * height))
    inside[rows, round(box[0] * width) : round(box[2] * width)] = True
    wanted = [n for n in sprites if (shown[n] & inside).sum() * 2 >= shown[n].sum()]
    points = []
    for _ in range(way.points):
        clicked = rng.choice(wanted)
        label = 0 if len(wanted) > 1 and rng.random() < 0.5 else 1
        points.append(_point(shown[clicked], label, rng))
        if not label:
            wanted.remove(clicked)
    return Asking(tuple(points), box, (frozenset(wanted),) * 3)


def _box(shown: np.ndarray, rng: random.Random) -> tuple[float, float, float, float]:
    """A box around [h, w], its sides up to 5 % too far in or 15 % too far out."""
    height, width = shown.shape
    ys, xs = shown.any(1).nonzero()[0], shown.any(0).nonzero()[0]
    x0, x1, y0, y1 = xs[0] / width, (xs[-1] + 1) / width, ys[0] / height, (ys[-1] + 1) / height
    far = [rng.uniform(-0.05, 0.15) for _ in range(4)]
    across, along = x1 - x0, y1 - y0
    return (
        float(max(0.0, x0 - far[0] * across)),
        float(max(0.0, y0 - far[1] * along)),
        float(min(1.0, x1 + far[2] * across)),
        float(min(1.0, y1 + far[3] * along)),
    )


def _point(shown: np.ndarray, label: int, rng: random.Random) -> tuple[float, float, int]:
    """Somewhere on [h, w], evenly."""
    height, width = shown.shape
    y, x = divmod(int(rng.choice(shown.ravel().nonzero()[0])), width)
    return (x + rng.random()) / width, (y + rng.random()) / height, label
