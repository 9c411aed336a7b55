"""Scores of a region animator on held-out scenes of two sprites, one of which is clicked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from ..click_request import ClickRequest, Region
from ..training.click_world import (
    GAP,
    REFERENCE_PAIRS,
    REFERENCE_SIDE,
    STRENGTH_RANGE,
    ClickScene,
    click_scene_at,
    closest,
    plain_phrase,
    reach,
    render_clicks,
)
from ..training.sprite_prompts import DIRECTIONS
from .animate import HAZE, OPAQUE, mean_scores, spearman
from .cut_out import cut_out
from .sprite_checks import classify_colour, classify_direction, classify_shape

# The golden ratio's fraction: its multiples fill the strengths evenly, however many scenes.
_TURN = 0.6180339887498949
# Frames that the shape is judged in: the fit of a template takes a tenth of a second.
SHAPE_FRAMES = 4
# Pixels around the clicked sprite that still count as its own: the autoencoder's blur.
MARGIN = 3


class Clicker(Protocol):
    """What ``evaluate_clicks`` asks of a pipeline."""

    def generate_batch(self, requests: Sequence[ClickRequest]) -> np.ndarray:
        """Clips uint8 [B, T, H, W, 3]; the first request's settings hold for all."""
        ...

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] after the autoencoder's encoding and decoding."""
        ...


@dataclass(frozen=True, eq=False)
class Trial:
    """One clip to be made: what is asked, and what is true.

    scene: as it should come out. frames: the true clip, uint8 [T, H, W, 3]. behind: uint8
    [H, W, 3], all but the clicked sprite. mask, other: bool [H, W], the clicked sprite and the
    other one in the first frame. own: bool [H, W], where the clicked sprite truly is at any time.
    """

    scene: ClickScene
    frames: np.ndarray
    behind: np.ndarray
    mask: np.ndarray
    other: np.ndarray
    own: np.ndarray

    @property
    def request(self) -> ClickRequest:
        region = Region(self.mask.astype(np.float32), plain_phrase(self.scene), self.scene.strength)
        return ClickRequest(self.frames[0], (region,))


def trials(count: int, seed: int, frames: int, size: tuple[int, int]) -> list[Trial]:
    """The first ``count`` trials, of colour-shape pairs that were never trained.

    The direction asked is drawn among those that the sprite has room for, whatever it was placed
    for, so that the picture does not give it away; the strengths fill their range.
    """
    made = []
    for start in range(0, count, 16):  # floats of few clips at a time: memory
        scenes = []
        for index in range(start, min(start + 16, count)):
            low, high = STRENGTH_RANGE
            strength = low + (high - low) * (index * _TURN % 1)
            scene = click_scene_at(seed, index, True, strength)
            scenes.append(_turned(scene, random.Random(f"clicked {seed} {index}")))
        rendered = render_clicks(scenes, frames, size)
        clips, behind = as_bytes(rendered.clips), as_bytes(rendered.other.blended[:, 0])
        reached = rendered.meant.alpha[:, :, 0].amax(1, keepdim=True)
        own = functional.max_pool2d(reached, 2 * MARGIN + 1, 1, MARGIN)[:, 0] > 0
        for row, scene in enumerate(scenes):
            masks = (rendered.masks[row, 0], rendered.other_masks[row, 0], own[row])
            made.append(Trial(scene, clips[row], behind[row], *(mask.numpy() for mask in masks)))
    return made


def _turned(scene: ClickScene, rng: random.Random) -> ClickScene:
    """The scene in any direction that keeps the sprite inside the frame and off the other."""
    possible, radius = [], reach(scene.meant)
    for direction in DIRECTIONS[:-1]:
        meant = replace(scene.meant, direction=direction)
        ends = [start + step for start, step in zip(meant.start, meant.travel, strict=True)]
        inside = all(radius <= end <= 1 - radius for end in ends)
        room = closest(meant.start, meant.travel, scene.other.start) - radius - reach(scene.other)
        if inside and room > GAP / 2:
            possible.append(replace(scene, meant=meant))
    return rng.choice(possible)


def as_bytes(frames: torch.Tensor) -> np.ndarray:
    """Frames [..., 3, H, W] in 0..1 to uint8 [..., H, W, 3]."""
    return (frames.movedim(-3, -1) * 255).round().to(torch.uint8).numpy()


def score_clip(clip: np.ndarray, trial: Trial) -> dict[str, float]:
    """Scores of one clip uint8 [T, H, W, 3]; labels 1.0 where right.

    energy: of the squared change from the first frame, the share that lies where the clicked
    sprite truly is at any time. other_change, background_change: mean change of the other sprite's
    and the background's pixels from the first frame, in levels of 255. direction: as the phrase
    says. way: the distance gone, as a strength. colour, shape: of the clicked sprite throughout.
    i_mse: error between the picture and the first frame, in squared levels (the paper's I-MSE).
    """
    levels = clip.astype(np.float64)
    change = levels[1:] - levels[0]
    energy = np.square(change).sum((0, 3))
    alpha, _ = cut_out(clip, trial.behind)
    solid = torch.where(alpha >= OPAQUE, 1.0, 0.0)
    rest = ~(trial.own | trial.other)
    scene, few = trial.scene.meant, np.linspace(0, len(alpha) - 1, SHAPE_FRAMES).astype(int)
    return {
        "energy": float(energy[trial.own].sum() / max(energy.sum(), 1e-9)),
        "other_change": float(np.abs(change)[:, trial.other].mean()),
        "background_change": float(np.abs(change)[:, rest].mean()),
        "direction": float(classify_direction(alpha) == scene.direction),
        "way": way_gone(alpha),
        "colour": float(classify_colour(clip, solid) == scene.colour),
        "shape": float(classify_shape(alpha[few])[0] == scene.shape),
        "i_mse": float(np.square(levels[0] - trial.frames[0]).mean()),
    }


def way_gone(alpha: torch.Tensor) -> float:
    """Mean flow of the sprite's middle from first to last frame, as ``strength_of`` counts it."""
    height, width = alpha.shape[-2:]
    centres = []
    for frame in (alpha[0], alpha[-1]):
        seen = torch.where(frame > HAZE, frame, 0.0)
        mass = float(seen.sum())
        if mass < 1:
            return 0.0
        x = float((seen.sum(0) * torch.arange(width)).sum()) / mass
        y = float((seen.sum(1) * torch.arange(height)).sum()) / mass
        centres.append((x, y))
    return math.dist(*centres) / min(height, width) * REFERENCE_SIDE / REFERENCE_PAIRS


def evaluate_clicks(
    pipeline: Clicker | None,
    *,
    scenes: int = 128,
    seed: int = 0,
    batch: int = 16,
    frames: int = 16,
    size: tuple[int, int] = (96, 96),
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a pipeline on held-out scenes; returns a dictionary that JSON can hold.

    ``settings`` are entries of ``ClickRequest`` for all clips. The result has "settings", "clicked"
    (the pipeline's scores), "ceiling" (what the autoencoder makes of the true clips; with
    ``pipeline`` None the true clips themselves, which shows what the measures allow) and
    "baseline" (the picture repeated). "strength_rank" is Spearman's correlation of the strength
    asked and the flow measured, "i_mse_ratio" the error of the first frame over re-encoding's.
    """
    given = dict(settings or {})
    wanted = trials(scenes, seed, frames, size)
    makers: dict[str, Callable[[Sequence[Trial], int], np.ndarray]] = {
        "ceiling": lambda part, start: _coded(pipeline, part),
        "baseline": lambda part, start: np.stack([t.frames[:1].repeat(frames, 0) for t in part]),
    }
    if pipeline is not None:
        makers["clicked"] = lambda part, start: pipeline.generate_batch(
            [
                replace(trial.request, seed=seed + start + index, **given)
                for index, trial in enumerate(part)
            ]
        )
        behind = pipeline.reconstruct(np.stack([trial.behind for trial in wanted]))
        wanted = [replace(t, behind=b) for t, b in zip(wanted, behind, strict=True)]
    result: dict[str, Any] = {
        "settings": {
            "scenes": scenes,
            "seed": seed,
            "frames": frames,
            "height": size[0],
            "width": size[1],
            "strengths": list(STRENGTH_RANGE),
            **given,
        }
    }
    done = 0
    for name, make in makers.items():
        rows = []
        for start in range(0, scenes, batch):
            part = wanted[start : start + batch]
            rows += [score_clip(c, t) for c, t in zip(make(part, start), part, strict=True)]
            done += len(part)
            if progress is not None:
                progress(done, len(makers) * scenes)
        scores = mean_scores(rows)
        asked = [trial.scene.strength for trial in wanted]
        scores["strength_rank"] = spearman(asked, [row["way"] for row in rows])
        result[name] = scores
    if pipeline is not None:
        least = max(result["ceiling"]["i_mse"], 1e-9)
        result["clicked"]["i_mse_ratio"] = round(result["clicked"]["i_mse"] / least, 4)
    return result


def _coded(pipeline: Clicker | None, part: Sequence[Trial]) -> np.ndarray:
    if pipeline is None:
        return np.stack([trial.frames for trial in part])
    return np.stack([pipeline.reconstruct(trial.frames) for trial in part])
