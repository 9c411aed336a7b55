"""Scores of an animation pipeline on held-out sprite scenes: all modes, ceiling and baseline."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ..animate_request import AnimateRequest
from ..training.moving_world import PATH_PER_MOTION, moving_scene_at, plain_caption
from ..training.sprite_world import CIRCUMRADIUS, DIRECTIONS, Scene, render
from .cut_out import cut_out
from .sprite_checks import classify_colour, classify_direction, classify_shape, psnr

MODES = ("animate", "turned", "interpolate", "loop")
# From how far a sprite moves in a clip: the classifier calls a way under 0.09 still.
MOTIONS = (2.0, 3.0, 4.0, 5.0)
# A loop goes half of its way out, and that must not look still.
LOOP_MOTION = 5.0
TRADE_SCALES = (1.0, 2.0, 4.0)
GATES = (0.0, 0.5, 1.0, 2.0)
# Less than this of a sprite's alpha is the autoencoder's noise.
HAZE = 0.3
# Of a sprite's alpha: pixels this opaque show its colour alone.
OPAQUE = 0.9


class Animator(Protocol):
    """What ``evaluate_animation`` asks of a pipeline."""

    def generate_batch(self, requests: Sequence[AnimateRequest]) -> np.ndarray:
        """Clips uint8 [B, T, H, W, 3]; the first request's settings hold for all."""
        ...

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] after the autoencoder's encoding and decoding."""
        ...


@dataclass(frozen=True)
class Trial:
    """One clip to be made: what is asked, and what is true.

    scene: as it should come out. motion: how far it is told to move. frames: the true clip, uint8
    [T, H, W, 3]. background: uint8 [H, W, 3], what sprites are told from.
    """

    scene: Scene
    motion: float
    frames: np.ndarray
    background: np.ndarray

    @property
    def prompt(self) -> str:
        return plain_caption(self.scene)


def trials(
    mode: str, count: int, seed: int, frames: int, size: tuple[int, int], batch: int = 16
) -> list[Trial]:
    """The first ``count`` trials of a mode, of colour-shape pairs that were never trained.

    Every ``batch`` of them has one motion. "turned" asks for another direction than the scene was
    drawn for, so that its place in the picture does not give the direction away; "loop" for one
    out and back.
    """
    scenes, motions = [], []
    for index in range(count):
        motion = LOOP_MOTION if mode == "loop" else MOTIONS[index // batch % len(MOTIONS)]
        returning = 1.0 if mode == "loop" else 0.0
        moving = moving_scene_at(seed, index, True, returning, motion)
        scene = moving.scene
        if mode == "turned":
            scene = turned(scene, random.Random(f"turned {seed} {index}"))
        scenes.append(scene)
        motions.append(motion)
    made = []
    for start in range(0, count, 16):  # floats of few clips at a time: memory
        rendered = render(scenes[start : start + 16], frames, size)
        clips = _bytes(rendered.blended)
        backgrounds = _bytes(rendered.background[:, 0])
        for offset, (clip, background) in enumerate(zip(clips, backgrounds, strict=True)):
            index = start + offset
            made.append(Trial(scenes[index], motions[index], clip, background))
    return made


def turned(scene: Scene, rng: random.Random) -> Scene:
    """The scene in another direction that keeps the sprite inside the frame."""
    reach = scene.size * CIRCUMRADIUS[scene.shape]
    possible = []
    for direction in DIRECTIONS:
        other = replace(scene, direction=direction)
        ends = [start + step for start, step in zip(scene.start, other.travel, strict=True)]
        if direction != scene.direction and all(reach <= end <= 1 - reach for end in ends):
            possible.append(other)
    # Standing still is always possible, but for a scene that stands still and fills the frame.
    return rng.choice(possible) if possible else scene


def _bytes(frames: torch.Tensor) -> np.ndarray:
    return (frames.movedim(-3, -1) * 255).round().to(torch.uint8).numpy()


def requests(
    mode: str, wanted: Sequence[Trial], seed: int, **settings: Any
) -> list[AnimateRequest]:
    """One request a trial; ``settings`` are further entries of ``AnimateRequest``."""
    return [
        AnimateRequest(
            image=trial.frames[0],
            prompt=trial.prompt,
            end=trial.frames[-1] if mode == "interpolate" else None,
            loop=mode == "loop",
            motion=trial.motion,
            seed=seed + index,
            **settings,
        )
        for index, trial in enumerate(wanted)
    ]


def score_clip(mode: str, clip: np.ndarray, trial: Trial) -> dict[str, float]:
    """Scores of one clip; dB against what was given or is true, labels 1.0 where right.

    first_db, end_db: given frames. clip_db: the whole clip. colour, shape: of the sprite in every
    frame through the last. direction: as the prompt says; of a loop, on the way out.
    way: the distance gone over the true one; left out where the sprite shall stand still.
    closed: first and last frame of a loop differ no more than some neighbours do; closing: how
    much they differ, over the neighbours' mean.
    """
    alpha, _ = cut_out(clip, trial.background)
    scene, scores = trial.scene, {}
    scores["first_db"] = psnr(clip[0], trial.frames[0])
    if mode == "interpolate":
        scores["end_db"] = psnr(clip[-1], trial.frames[-1])
    scores["clip_db"] = psnr(clip, trial.frames[: len(clip)])
    solid = torch.where(alpha >= OPAQUE, 1.0, 0.0)
    scores["colour"] = float(classify_colour(clip, solid) == scene.colour)
    scores["shape"] = float(classify_shape(alpha)[0] == scene.shape)
    out = alpha[: (len(trial.frames) + 1) // 2] if mode == "loop" else alpha
    scores["direction"] = float(classify_direction(out) == scene.direction)
    if scene.direction != "still":
        # A loop is measured until the frame before it turns back.
        share = (len(out) - 1) / (len(trial.frames) - 1) if mode == "loop" else 1.0
        scores["way"] = _way(out) / (trial.motion * PATH_PER_MOTION * share)
    if mode == "loop":
        changes = np.abs(np.diff(clip.astype(np.int16), axis=0)).mean((1, 2, 3))
        closing = np.abs(clip[-1].astype(np.int16) - clip[0]).mean()
        scores["closed"] = float(closing <= changes.max() + 1e-6)
        scores["closing"] = float(closing / max(changes.mean(), 1e-6))
    return scores


def _way(alpha: torch.Tensor) -> float:
    """Distance of the centre of mass from first to last frame, in shorter sides."""
    height, width = alpha.shape[-2:]
    centres = []
    for frame in (alpha[0], alpha[-1]):
        frame = torch.where(frame > HAZE, frame, 0.0)
        mass = float(frame.sum())
        if mass < 1:
            return 0.0
        x = float((frame.sum(0) * torch.arange(width)).sum()) / mass
        y = float((frame.sum(1) * torch.arange(height)).sum()) / mass
        centres.append((x, y))
    return math.dist(*centres) / min(height, width)


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means to four places; each over the clips that have the score."""
    names = {name: None for row in rows for name in row}
    return {
        name: round(float(np.mean([row[name] for row in rows if name in row])), 4) for name in names
    }


def motion_rank(rows: Sequence[Mapping[str, float]], wanted: Sequence[Trial]) -> float:
    """Spearman's correlation of the way asked for and the way gone, of sprites that move."""
    pairs = [
        (trial.motion, row["way"] * trial.motion)
        for row, trial in zip(rows, wanted, strict=True)
        if "way" in row
    ]
    return spearman([asked for asked, _ in pairs], [gone for _, gone in pairs])


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, to four places; 0 of fewer than 3 pairs, or where one is even."""
    if len(first) < 3:
        return 0.0
    ranks = [_ranks(values) for values in (first, second)]
    if min(np.std(values) for values in ranks) == 0:
        return 0.0
    return round(float(np.corrcoef(*ranks)[0, 1]), 4)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks, those of equal values their mean."""
    array = np.asarray(values)
    return np.array([((array < v).sum() + ((array <= v).sum() - 1)) / 2 for v in array])


def evaluate_animation(
    pipeline: Animator | None,
    *,
    scenes: int = 128,
    trade_scenes: int = 16,
    seed: int = 0,
    batch: int = 16,
    frames: int = 16,
    size: tuple[int, int] = (96, 96),
    modes: Sequence[str] = MODES,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a pipeline on held-out sprite scenes; returns a dictionary that JSON can hold.

    ``settings`` are entries of ``AnimateRequest`` for all clips. The result has "settings", the
    scores by mode under "modes", "ceiling" (what the autoencoder makes of the true clips; with
    ``pipeline`` None the true clips themselves, which shows what the measures allow), "baseline"
    (the first image repeated; between two images, cut over halfway), and "trade": scores over
    text and image scales and over the image stream's gate, on ``trade_scenes`` turned scenes.
    """
    given = dict(settings or {})
    points = _trade_points() if pipeline is not None and trade_scenes else []
    sides = 2 + (pipeline is not None)
    total = len(modes) * scenes * sides + len(points) * trade_scenes
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    result: dict[str, Any] = {
        "settings": {
            "scenes": scenes,
            "seed": seed,
            "frames": frames,
            "height": size[0],
            "width": size[1],
            "motions": list(MOTIONS),
            **given,
        },
        "modes": {},
        "ceiling": {},
        "baseline": {},
    }
    for mode in modes:
        true = trials(mode, scenes, seed, frames, size, batch)
        coded = _coded(pipeline, true)
        makers = {"ceiling": (_reconstructed(pipeline), coded), "baseline": (_repeated, true)}
        if pipeline is not None:
            makers["modes"] = (_generated(pipeline, seed, given), coded)
        for name, (make, wanted) in makers.items():
            rows = list(_rows(mode, wanted, batch, make, step))
            result[name][mode] = mean_scores(rows)
            if name == "modes" and mode == "animate":
                result[name][mode]["motion_rank"] = motion_rank(rows, wanted)
    if points:
        wanted = _coded(pipeline, trials("turned", trade_scenes, seed, frames, size, batch))
        result["trade"] = []
        for point in points:
            make = _generated(pipeline, seed, {**given, **point})
            rows = list(_rows("turned", wanted, batch, make, step))
            result["trade"].append({**point, **mean_scores(rows)})
    return result


def _trade_points() -> list[dict[str, float]]:
    scales = [
        {"text_scale": text, "image_scale": image}
        for text in TRADE_SCALES
        for image in TRADE_SCALES
    ]
    return [*scales, *({"gate": gate} for gate in GATES)]


Make = Callable[[str, Sequence[Trial], int], np.ndarray]


def _rows(
    mode: str, wanted: Sequence[Trial], batch: int, make: Make, step: Callable[[int], None]
) -> Iterator[dict[str, float]]:
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        clips = make(mode, part, start)
        for clip, trial in zip(clips, part, strict=True):
            yield score_clip(mode, clip, trial)
            step(1)


def _generated(pipeline: Animator, seed: int, settings: Mapping[str, Any]) -> Make:
    def make(mode: str, part: Sequence[Trial], start: int) -> np.ndarray:
        return pipeline.generate_batch(requests(mode, part, seed + start, **settings))

    return make


def _coded(pipeline: Animator | None, wanted: Sequence[Trial]) -> list[Trial]:
    """The trials with backgrounds as the autoencoder shows them, as its clips do."""
    if pipeline is None:
        return list(wanted)
    backgrounds = pipeline.reconstruct(np.stack([trial.background for trial in wanted]))
    pairs = zip(wanted, backgrounds, strict=True)
    return [replace(trial, background=background) for trial, background in pairs]


def _reconstructed(pipeline: Animator | None) -> Make:
    def make(mode: str, part: Sequence[Trial], start: int) -> np.ndarray:
        clips = np.stack([trial.frames[: _kept(mode, trial)] for trial in part])
        if pipeline is None:
            return clips
        return np.stack([pipeline.reconstruct(clip) for clip in clips])

    return make


def _repeated(mode: str, part: Sequence[Trial], start: int) -> np.ndarray:
    clips = []
    for trial in part:
        count = _kept(mode, trial)
        last = trial.frames[-1] if mode == "interpolate" else trial.frames[0]
        halves = [trial.frames[0]] * (count - count // 2) + [last] * (count // 2)
        clips.append(np.stack(halves))
    return np.stack(clips)


def _kept(mode: str, trial: Trial) -> int:
    """Frames of the result: a loop leaves out the last one, which shows the first again."""
    return len(trial.frames) - (mode == "loop")
