"""What a checkpoint's motion and content adapters do, on held-out sprite scenes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.nn import functional as F

from ..conditioning.layers import GIVEN
from ..training.sprite_world import prompts
from .layered import (
    MEASURES,
    BatchPipeline,
    Layers,
    held_out_scenes,
    mean_scores,
    scene_layers,
    score_clip,
)
from .motion import frame_change, matte_flow
from .sprite_checks import as_float

STRENGTHS = tuple(index / 6 for index in range(7))
CONTENT_TASKS = ("generate", "decompose")
_BAND = 5  # pixels: an outline's neighbourhood

OpenWith = Callable[[Mapping[str, float]], BatchPipeline]
Progress = Callable[[int, int], None]


def alpha_edge_error(alpha: np.ndarray, truth: np.ndarray) -> float:
    """Mean error of a matte near the true outline, in levels of 255; uint8 [F, H, W] each.

    The band is where the truth changes by more than half within 5x5 pixels.
    """
    true = as_float(truth)[:, None]
    highest = F.max_pool2d(true, _BAND, 1, _BAND // 2)
    lowest = -F.max_pool2d(-true, _BAND, 1, _BAND // 2)
    band = highest - lowest > 0.5
    error = (as_float(alpha)[:, None] - true).abs()
    return float(error[band].mean()) * 255 if bool(band.any()) else 0.0


class _Scenes:
    """Held-out scenes with their captions and layers, made into layers batch by batch."""

    def __init__(self, count: int, seed: int, frames: int, size: tuple[int, int]):
        self.scenes = held_out_scenes(count, seed)
        self.words = [prompts(scene, random.Random(scene.caption)) for scene in self.scenes]
        self.truth = scene_layers(self.scenes, frames, size)
        self.seed = seed

    def made(self, pipeline: BatchPipeline, task: str, batch: int) -> list[Layers]:
        """One clip's layers a scene; the noise depends on the scene alone."""
        found: list[Layers] = []
        for start in range(0, len(self.scenes), batch):
            part = slice(start, start + batch)
            given = {name: self.truth[name][part] for name in GIVEN[task]}
            layers = pipeline.generate_batch(
                task, self.words[part], given, self.seed + start, None, None
            )
            count = len(layers["alpha"])
            found += [{k: clip[index] for k, clip in layers.items()} for index in range(count)]
        return found

    def true(self, index: int) -> Layers:
        return {name: clip[index] for name, clip in self.truth.items()}


def evaluate_motion(
    open_with: OpenWith,
    *,
    scenes: int = 16,
    seed: int = 0,
    batch: int = 8,
    frames: int = 8,
    size: tuple[int, int] = (96, 96),
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generated clips' motion at strengths of the motion adapter.

    ``flow``: ``matte_flow`` of the alpha, pixels a frame. ``change``: ``frame_change`` of the
    blended clip. ``left``: the last strength's flow over the first's. ``spearman``: rank
    correlation of strength and stillness (the flow's negative), mean over scenes and of the means.
    """
    from scipy.stats import spearmanr

    held_out = _Scenes(scenes, seed, frames, size)
    flows, changes = [], []
    for done, strength in enumerate(strengths):
        clips = held_out.made(open_with({"motion": strength}), "generate", batch)
        flows.append([matte_flow(clip["alpha"]) for clip in clips])
        changes.append([frame_change(clip["blended"]) for clip in clips])
        if progress is not None:
            progress(done + 1, len(strengths))
    table = np.array(flows)
    means = table.mean(1)
    ranks = [float(spearmanr(strengths, -column).statistic) for column in table.T]
    return {
        "strengths": list(strengths),
        "flow": [round(float(value), 4) for value in means],
        "change": [round(float(np.mean(row)), 3) for row in changes],
        "left": round(float(means[-1] / max(means[0], 1e-9)), 4),
        "spearman": round(float(spearmanr(strengths, -means).statistic), 4),
        "spearman_by_scene": round(float(np.nanmean(ranks)), 4),
    }


def evaluate_content(
    open_with: OpenWith,
    *,
    scenes: int = 64,
    seed: int = 0,
    batch: int = 8,
    frames: int = 8,
    size: tuple[int, int] = (96, 96),
    progress: Progress | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by task without and with the content adapter, others at their default.

    As ``evaluate`` measures them, and ``alpha_edge_error`` where the true matte is known.
    """
    held_out = _Scenes(scenes, seed, frames, size)
    result: dict[str, dict[str, dict[str, float]]] = {task: {} for task in CONTENT_TASKS}
    runs = [(task, on) for task in CONTENT_TASKS for on in (0.0, 1.0)]
    for done, (task, on) in enumerate(runs):
        clips = held_out.made(open_with({"content": on}), task, batch)
        rows = []
        for index, clip in enumerate(clips):
            truth = held_out.true(index)
            row = score_clip(MEASURES[task], clip, truth, held_out.scenes[index])
            if task == "decompose":
                row["alpha_edge_error"] = alpha_edge_error(clip["alpha"], truth["alpha"])
            rows.append(row)
        result[task]["with" if on else "without"] = mean_scores(rows)
        if progress is not None:
            progress(done + 1, len(runs))
    return result
