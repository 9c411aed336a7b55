"""Scores of a region animator that moves two sprites at once, each by a phrase and a strength."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..click_request import ClickRequest, Region
from ..training.click_world import (
    GAP,
    ClickScene,
    click_scene_at,
    path_of,
    plain_phrase,
    reach,
)
from ..training.sprite_prompts import DIRECTIONS
from ..training.sprite_world import SPRITE_RGB, Scene, render
from .animate import mean_scores, spearman
from .click import MARGIN, Clicker, as_bytes, way_gone
from .cut_out import NEAREST
from .sprite_checks import as_float, classify_direction

# Two ways in one frame have less room than one.
STRENGTHS = (4.5, 9.0)
_MOMENTS = 16


@dataclass(frozen=True, eq=False)
class Pair:
    """One clip to be made of two regions, and what is true.

    scenes, strengths: of both sprites. frames: the true clip, uint8 [T, H, W, 3]. background:
    uint8 [H, W, 3]. masks: bool [2, H, W] in the first frame. own: bool [H, W], where either of
    them truly is at any time.
    """

    scenes: tuple[Scene, Scene]
    strengths: tuple[float, float]
    frames: np.ndarray
    background: np.ndarray
    masks: np.ndarray
    own: np.ndarray

    @property
    def request(self) -> ClickRequest:
        regions = [
            Region(mask.astype(np.float32), plain_phrase(ClickScene(scene, scene, 0)), strength)
            for mask, scene, strength in zip(self.masks, self.scenes, self.strengths, strict=True)
        ]
        return ClickRequest(self.frames[0], tuple(regions))


def pairs(count: int, seed: int, frames: int, size: tuple[int, int]) -> list[Pair]:
    """The first ``count`` pairs of colour-shape pairs that were never trained; see ``_moving``."""
    made, index = [], 0
    while len(made) < count:
        rng = random.Random(f"clicked pair {seed} {index}")
        moving = _moving(click_scene_at(seed, index, True, STRENGTHS[0]), rng)
        index += 1
        if moving is None:
            continue
        scenes, strengths = moving
        batch = [render([scene], frames, size) for scene in scenes]
        clip = torch.lerp(batch[0].blended, batch[1].foreground, batch[1].alpha)[0]
        reached = torch.stack([part.alpha[0, :, 0].amax(0) for part in batch]).amax(0)
        own = functional.max_pool2d(reached[None], 2 * MARGIN + 1, 1, MARGIN)[0] > 0
        made.append(
            Pair(
                scenes,
                strengths,
                as_bytes(clip),
                as_bytes(batch[0].background[0, 0]),
                torch.stack([part.masks[0, 0] for part in batch]).numpy(),
                own.numpy(),
            )
        )
    return made


def _moving(
    scene: ClickScene, rng: random.Random
) -> tuple[tuple[Scene, Scene], tuple[float, float]] | None:
    """Directions and strengths for both sprites that keep them inside and apart, if there are."""
    strengths = tuple(rng.uniform(*STRENGTHS) for _ in range(2))
    ways = [(a, b) for a in DIRECTIONS[:-1] for b in DIRECTIONS[:-1] if a != b]
    rng.shuffle(ways)
    for directions in ways:
        first, second = (
            replace(part, direction=direction, path=path_of(strength))
            for part, direction, strength in zip(
                (scene.meant, scene.other), directions, strengths, strict=True
            )
        )
        if _inside(first) and _inside(second) and _apart(first, second):
            return (first, second), strengths
    return None


def _inside(scene: Scene) -> bool:
    ends = [start + step for start, step in zip(scene.start, scene.travel, strict=True)]
    return all(reach(scene) <= end <= 1 - reach(scene) for end in ends)


def _apart(first: Scene, second: Scene) -> bool:
    for moment in range(_MOMENTS + 1):
        places = [
            [
                start + step * moment / _MOMENTS
                for start, step in zip(s.start, s.travel, strict=True)
            ]
            for s in (first, second)
        ]
        if math.dist(*places) <= reach(first) + reach(second) + GAP / 2:
            return False
    return True


def split(clip: np.ndarray, background: np.ndarray, scenes: Sequence[Scene]) -> list[torch.Tensor]:
    """Alpha [T, H, W] of each sprite: what is not background, told apart by their colours."""
    frames, behind = as_float(clip), as_float(background)
    apart = (frames - behind).norm(dim=-1)
    colours = [torch.tensor(SPRITE_RGB[scene.colour]) for scene in scenes]
    distances = torch.stack([(frames - colour).norm(dim=-1) for colour in colours])
    nearest = distances.argmin(0)
    return [
        (apart / (colour - behind).norm(dim=-1).clamp(min=NEAREST)).clamp(max=1)
        * (nearest == index)
        for index, colour in enumerate(colours)
    ]


def score_pair(clip: np.ndarray, pair: Pair) -> dict[str, Any]:
    """Scores of one clip uint8 [T, H, W, 3].

    direction: the share of the two that go where their phrase says. both: 1.0 where both do.
    background_change: mean change from the first frame where neither truly is, in levels of 255.
    ways: how far each went, as a strength.
    """
    alphas = split(clip, pair.background, pair.scenes)
    right = [
        classify_direction(alpha) == scene.direction
        for alpha, scene in zip(alphas, pair.scenes, strict=True)
    ]
    change = np.abs(clip[1:].astype(np.float64) - clip[0])
    return {
        "direction": sum(right) / 2,
        "both": float(all(right)),
        "background_change": float(change[:, ~pair.own].mean()),
        "ways": [way_gone(alpha) for alpha in alphas],
    }


def evaluate_pairs(
    pipeline: Clicker | None,
    *,
    scenes: int = 32,
    seed: int = 0,
    batch: int = 8,
    frames: int = 16,
    size: tuple[int, int] = (96, 96),
    settings: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score both sprites moving at once; "ceiling" is what the autoencoder makes of true clips.

    With ``pipeline`` None there is the ceiling alone, of the true clips themselves.
    """
    wanted = pairs(scenes, seed, frames, size)
    if pipeline is not None:
        coded = pipeline.reconstruct(np.stack([pair.background for pair in wanted]))
        wanted = [replace(p, background=b) for p, b in zip(wanted, coded, strict=True)]
    result: dict[str, Any] = {}
    for number, name in enumerate(("ceiling", "clicked")[: 1 + (pipeline is not None)]):
        rows, ways = [], []
        for start in range(0, scenes, batch):
            part = wanted[start : start + batch]
            for clip, pair in zip(
                _clips(pipeline, name, part, seed + start, settings), part, strict=True
            ):
                row = score_pair(clip, pair)
                ways += row.pop("ways")
                rows.append(row)
            if progress is not None:
                progress(number * scenes + len(rows), (1 + (pipeline is not None)) * scenes)
        asked = [strength for pair in wanted for strength in pair.strengths]
        result[name] = {**mean_scores(rows), "strength_rank": spearman(asked, ways)}
    return result


def _clips(
    pipeline: Clicker | None,
    name: str,
    part: Sequence[Pair],
    seed: int,
    settings: dict[str, Any] | None,
) -> np.ndarray:
    if pipeline is None:
        return np.stack([pair.frames for pair in part])
    if name == "ceiling":
        return np.stack([pipeline.reconstruct(pair.frames) for pair in part])
    asked = [
        replace(pair.request, seed=seed + index, **(settings or {}))
        for index, pair in enumerate(part)
    ]
    return pipeline.generate_batch(asked)
