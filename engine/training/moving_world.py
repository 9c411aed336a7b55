"""Sprite world for animation: opaque clips whose motion a caption and a number tell.

A clip is a scene of sprite world, blended: a sprite keeps its size and angle and goes straight in
one of eight directions, or out and back, or stays. The number (``motion``) is the length of its
way over the clip.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .sprite_prompts import (
    VOCABULARY,
    RandomSource,
    choose,
    foreground_phrase,
    prompts,
    tokenise,
)
from .sprite_world import CIRCUMRADIUS, Scene, placed, sample_scene

# The range of ``motion``, and the way over the clip for each unit of it, in shorter sides.
MOTION_RANGE = (1.0, 6.0)
PATH_PER_MOTION = 0.06
# Sprites are larger than the layered ones: their outlines must pass an autoencoder that sees one
# frame at a time.
LARGER = 1.15
# From here on a caption may say "quickly", below it "slowly".
FAST = 3.5
# Words of a prompt, and those that the layered starter's vocabulary lacks.
TOKENS = 16
WORDS: tuple[str, ...] = (*VOCABULARY, "again", "back", "forth", "returns", "returning")

_BACK = ("and back", "and back again", "and returns")


@dataclass(frozen=True)
class MovingScene:
    """A scene and its ``motion``, which says nothing where the sprite stands still."""

    scene: Scene
    motion: float


def moving_scene(
    rng: RandomSource, held_out: bool = False, returning: float = 0.0, motion: float | None = None
) -> MovingScene:
    """Draw a clip; ``returning`` is the share of sprites that come back to where they began.

    ``motion`` None draws it evenly from ``MOTION_RANGE``. Colours and shapes are kept apart as in
    ``sample_scene``.
    """
    scene = sample_scene(rng, held_out)
    low, high = MOTION_RANGE
    drawn = low + (high - low) * float(rng.random())
    back = float(rng.random()) < returning
    if motion is None:
        motion = drawn
    largest = LARGER * scene.size * scene.growth
    scene = replace(
        scene,
        size=largest,
        change="none",
        growth=1.0,
        turn=0.0,
        path=PATH_PER_MOTION * motion,
        speed="fast" if motion > FAST else "slow",
        returns=back and scene.direction != "still",
    )
    return MovingScene(placed(scene, largest * CIRCUMRADIUS[scene.shape], rng), motion)


def moving_scene_at(
    seed: int,
    index: int,
    held_out: bool = False,
    returning: float = 0.0,
    motion: float | None = None,
) -> MovingScene:
    """Clip ``index`` of the endless set ``seed``: the same whatever was drawn before."""
    rng = random.Random(f"moving world {seed} {index} {held_out}")
    return moving_scene(rng, held_out, returning, motion)


def frozen(scene: Scene, frame: int, frames: int) -> Scene:
    """One frame of a clip of ``frames`` as a scene that stands still."""
    time = frame / max(1, frames - 1)
    way = 1 - abs(2 * time - 1) if scene.returns else time
    # The way is in shorter sides and the start in shares of each side: square frames alone agree.
    x, y = (start + step * way for start, step in zip(scene.start, scene.travel, strict=True))
    return replace(scene, start=(x, y), path=0.0, returns=False)


def caption(scene: Scene, rng: RandomSource) -> str:
    """What a person may write: the sprite and its motion, also the background, or motion alone.

    At most ``TOKENS`` words, all of ``WORDS``; the direction is always named.
    """
    tail = f" {choose(rng, _BACK, (0.6, 0.2, 0.2))}" if scene.returns else ""
    room = TOKENS - len(tokenise(tail)) - 2
    kind = choose(rng, ("sprite", "scene", "motion"), (0.5, 0.25, 0.25))
    if kind == "scene" and not tail:
        return prompts(scene, rng)[2]
    text = foreground_phrase(scene, rng, room)
    if kind == "motion":
        text = text.split(scene.shape, 1)[1].lstrip(" ,")
    return text + tail


def plain_caption(scene: Scene, direction: str | None = None) -> str:
    """The sprite and a direction (the scene's own unless given) in the plainest words."""
    moved = replace(scene, direction=direction or scene.direction)
    where = "standing still" if moved.direction == "still" else f"moving {_words(moved.direction)}"
    return f"a {scene.colour} {scene.shape} {where}" + (" and back" if scene.returns else "")


def _words(direction: str) -> str:
    from .sprite_prompts import direction_phrases

    return direction_phrases(direction)[0]
