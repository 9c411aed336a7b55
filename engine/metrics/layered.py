"""Scores of a layered pipeline on held-out sprite scenes: its four tasks, ceiling and baseline."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..conditioning.layers import GIVEN, RGBA
from ..training.sprite_world import Scene, prompts, render, scene_at
from .sprite_checks import (
    alpha_iou,
    classify_background,
    classify_colour,
    classify_direction,
    classify_shape,
    psnr,
    recompose,
)

TASKS = tuple(GIVEN)
LAYERS = RGBA
_LABELS = ("shape", "direction", "colour", "pattern", "background_colour")
# What is read from each task's own output; labels of given layers would only score the input.
MEASURES: dict[str, tuple[str, ...]] = {
    "generate": ("blended_db", *_LABELS),
    "foreground": ("blended_db", "pattern", "background_colour"),
    "background": ("blended_db", "shape", "direction", "colour"),
    "decompose": ("alpha_iou", "background_db", "recomposed_db", "shape", "direction", "colour"),
    "ceiling": ("blended_db", *_LABELS, "alpha_iou", "background_db", "recomposed_db"),
}
_MOTION_LEVEL = 0.12  # change from the median, 0..1, that the decompose baseline calls sprite

Layers = dict[str, np.ndarray]


class BatchPipeline(Protocol):
    """What ``evaluate`` asks of a pipeline; batches are uint8 [B, F, H, W, 3], alpha [B, F, H, W].

    Foreground is straight colour. ``None`` for steps or guidance means the pipeline's own choice.
    """

    def generate_batch(
        self,
        task: str,
        prompts: list[tuple[str, str, str]],
        given: Layers,
        seed: int,
        steps: int | None,
        guidance: float | None,
    ) -> Layers:
        """Return all four layers, the given ones as they are."""
        ...

    def reconstruct(self, layers: Layers) -> Layers:
        """Return the layers after the autoencoder's encoding and decoding."""
        ...


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Return the first ``count`` scenes of set ``seed`` with colour-shape pairs never trained."""
    return [scene_at(seed, index, held_out=True) for index in range(count)]


def scene_layers(scenes: Sequence[Scene], frames: int, size: tuple[int, int]) -> Layers:
    """Render scenes to uint8 layers: [B, F, H, W, 3] and alpha [B, F, H, W]."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in LAYERS}
    for start in range(0, len(scenes), 16):  # floats of few clips at a time: memory
        rendered = render(scenes[start : start + 16], frames, size)
        for name in LAYERS:
            clip = (getattr(rendered, name) * 255).round().to(torch.uint8)
            parts[name].append(clip.permute(0, 1, 3, 4, 2).numpy())
    layers = {name: np.concatenate(clips) for name, clips in parts.items()}
    layers["alpha"] = layers["alpha"][..., 0]
    return layers


def read_labels(layers: Layers, wanted: Sequence[str] = _LABELS) -> dict[str, str | None]:
    """Classify one clip's layers; None where a strict classifier refuses."""
    labels: dict[str, str | None] = {}
    if "shape" in wanted:
        labels["shape"], _ = classify_shape(layers["alpha"])
    if "direction" in wanted:
        labels["direction"] = classify_direction(layers["alpha"])
    if "colour" in wanted:
        labels["colour"] = classify_colour(layers["foreground"], layers["alpha"])
    if "pattern" in wanted or "background_colour" in wanted:
        labels["pattern"], labels["background_colour"] = classify_background(layers["background"])
    return labels


def score_clip(measures: Sequence[str], layers: Layers, truth: Layers, scene: Scene) -> dict:
    """Score one clip: dB and IoU as they are, labels 1.0 where right and 0.0 where not.

    ``layers`` are those the pipeline was given and made. blended_db: blended against the exact
    composite of these layers. recomposed_db: that composite against the true blended clip.
    alpha_iou and background_db: against the true layers.
    """
    labels = read_labels(layers, measures)
    composite = recompose(layers["foreground"], layers["alpha"], layers["background"])
    scores: dict[str, float] = {}
    for measure in measures:
        if measure == "blended_db":
            scores[measure] = psnr(layers["blended"], composite)
        elif measure == "recomposed_db":
            scores[measure] = psnr(truth["blended"], composite)
        elif measure == "background_db":
            scores[measure] = psnr(layers["background"], truth["background"])
        elif measure == "alpha_iou":
            scores[measure] = alpha_iou(layers["alpha"], truth["alpha"])
        else:
            scores[measure] = float(labels[measure] == getattr(scene, measure))
    return scores


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the clips' scores, to four places."""
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def _clip(layers: Layers, index: int) -> Layers:
    return {name: clip[index] for name, clip in layers.items()}


def split_by_median(blended: np.ndarray) -> Layers:
    """Decompose a clip [F, H, W, 3] without learning: what differs from the median moved."""
    background = np.median(blended, axis=0).astype(np.uint8)
    change = np.abs(blended.astype(np.int16) - background).max(-1)
    alpha = np.where(change > _MOTION_LEVEL * 255, 255, 0).astype(np.uint8)
    backgrounds = np.broadcast_to(background, blended.shape)
    return {"foreground": blended, "alpha": alpha, "background": backgrounds, "blended": blended}


def _baseline(task: str, truth: Layers, index: int, rng: random.Random) -> Layers:
    """Layers a task would return without any model: those of other held-out scenes."""
    if task == "decompose":
        return split_by_median(truth["blended"][index])
    count = len(truth["blended"])
    sprite, scenery, scene = (rng.randrange(count) for _ in range(3))
    source = {"foreground": sprite, "alpha": sprite, "background": scenery, "blended": scene}
    source.update(dict.fromkeys(GIVEN[task], index))
    return {name: truth[name][source[name]] for name in LAYERS}


def evaluate(
    pipeline: BatchPipeline | None,
    *,
    scenes: int = 128,
    seed: int = 0,
    batch: int = 16,
    steps: int | None = None,
    guidance: float | Mapping[str, float] | None = None,
    frames: int = 8,
    size: tuple[int, int] = (96, 96),
    tasks: Sequence[str] = TASKS,
    baseline: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a pipeline on held-out sprite scenes; returns a dictionary that JSON can hold.

    ``size`` is (height, width). ``guidance`` may differ by task. The result has ``settings``,
    ``tasks`` and ``baseline`` (each by task) and ``ceiling``: what the autoencoder makes of the
    true layers. With ``pipeline`` None, ``ceiling`` scores the true layers themselves, which
    shows what the measures allow. dB are means over clips, capped at 60; labels are shares of
    clips that are right. ``progress`` gets (clips done, clips in all).
    """
    held_out = held_out_scenes(scenes, seed)
    wording = [prompts(scene, random.Random(scene.caption)) for scene in held_out]
    truth = scene_layers(held_out, frames, size)
    rounds = len(tasks) * (baseline + (pipeline is not None)) + 1
    done = 0

    def score(task: str, layers: Layers, index: int) -> dict:
        nonlocal done
        scores = score_clip(MEASURES[task], layers, _clip(truth, index), held_out[index])
        done += 1
        if progress is not None:
            progress(done, rounds * scenes)
        return scores

    result: dict[str, Any] = {
        "settings": {
            "scenes": scenes,
            "seed": seed,
            "frames": frames,
            "height": size[0],
            "width": size[1],
            "steps": steps,
            "guidance": dict(guidance) if isinstance(guidance, Mapping) else guidance,
        },
        "tasks": {},
        "baseline": {},
    }
    rows = []
    for start in range(0, scenes, batch):
        made = {name: clip[start : start + batch] for name, clip in truth.items()}
        if pipeline is not None:
            made = pipeline.reconstruct(made)
        rows += [score("ceiling", _clip(made, i), start + i) for i in range(len(made["alpha"]))]
    result["ceiling"] = mean_scores(rows)
    for task in tasks if pipeline is not None else ():
        rows = []
        scale = guidance.get(task) if isinstance(guidance, Mapping) else guidance
        for start in range(0, scenes, batch):
            given = {name: truth[name][start : start + batch] for name in GIVEN[task]}
            made = pipeline.generate_batch(
                task, wording[start : start + batch], given, seed + start, steps, scale
            )
            made = {**made, **given}  # given layers are judged as given, whatever came back
            rows += [score(task, _clip(made, i), start + i) for i in range(len(made["alpha"]))]
        result["tasks"][task] = mean_scores(rows)
    if baseline:
        rng = random.Random(seed)
        for task in tasks:
            rows = [score(task, _baseline(task, truth, i, rng), i) for i in range(scenes)]
            result["baseline"][task] = mean_scores(rows)
    return result
