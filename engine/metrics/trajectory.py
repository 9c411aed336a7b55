"""Scores of subjects along boxes on held-out scenes of sprite world, after DreamVideo-2's measures.

The paper (arXiv 2410.13830, section 4.1) finds boxes with a detector; sprites are found by their
colours, which the backgrounds do not have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..conditioning.boxes import BoxPaths
from ..training.sprite_prompts import COLOURS
from ..training.sprite_world import SPRITE_RGB, background_tones
from ..training.trajectory_world import (
    TrajectoryScene,
    plain_caption,
    portraits,
    render_trajectories,
    scene_paths,
    sprite_boxes,
    trajectory_scene_at,
)
from ..trajectory_request import Subject, TrajectoryRequest
from .animate import mean_scores
from .sprite_checks import as_float, classify_background, classify_colour, classify_shape

# Frames that the shape is judged in: the fit of a template takes a tenth of a second.
SHAPE_FRAMES = 4
# Share of three by three pixels that must be sprite for the middle one to count: tips do, specks
# of a pixel or two do not.
SOLID = 0.32
# Distance that a frame without the subject counts for, in sides of the frame.
LOST = 0.5


class Director(Protocol):
    """What ``evaluate_trajectories`` asks of a pipeline."""

    def generate_batch(self, requests: Sequence[TrajectoryRequest]) -> np.ndarray:
        """Clips uint8 [B, T, H, W, 3]; the first request's settings hold for all."""
        ...

    def reconstruct(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] after the autoencoder's encoding and decoding."""
        ...


@dataclass(frozen=True, eq=False)
class Trial:
    """One clip to be made: what is asked, and one clip that answers it.

    boxes: [S, F, 4] as (x0, y0, x1, y1) in shares. subjects: of pictures and masks. frames: uint8
    [T, H, W, 3].
    """

    scene: TrajectoryScene
    boxes: np.ndarray
    subjects: tuple[Subject, ...]
    frames: np.ndarray

    @property
    def request(self) -> TrajectoryRequest:
        paths = BoxPaths(self.scene.frames, scene_paths(torch.from_numpy(self.boxes)))
        return TrajectoryRequest(self.subjects, paths, plain_caption(self.scene))


def trials(
    count: int, seed: int, frames: int, size: tuple[int, int], subjects: int = 1
) -> list[Trial]:
    """The first ``count`` trials, of colour-shape pairs that were never trained.

    The prompt names the background alone: colour and shape are in the subjects' pictures.
    """
    made = []
    for start in range(0, count, 16):  # floats of few clips at a time: memory
        scenes = [
            trajectory_scene_at(seed, index, frames, True, subjects)
            for index in range(start, min(start + 16, count))
        ]
        clips = render_trajectories(scenes, size).clips.movedim(2, -1)
        clips, boxes = (clips * 255).round().to(torch.uint8).numpy(), sprite_boxes(scenes).numpy()
        for row, scene in enumerate(scenes):
            frame = random.Random(f"portrait {seed} {start + row}").randrange(frames)
            pictures, outlines = portraits([scene], frame, size)
            given = tuple(Subject(*pair) for pair in zip(pictures[0], outlines[0], strict=True))
            made.append(Trial(scene, boxes[row], given, clips[row]))
    return made


def find_sprites(clip: np.ndarray, scene: TrajectoryScene) -> Tensor:
    """How much of each pixel is each of the scene's S sprites, [S, F, H, W] in 0..1.

    A pixel is as much sprite as it is nearer to the sprite's colour than to the background's tones.
    One sprite alone may have any colour but the background's; of two, each has its own.
    """
    frames, looks = as_float(clip), [actor.looks for actor in scene.actors]
    other = _apart_from_line(frames, *background_tones(looks[0].background_colour))
    if len(looks) == 1:
        names = [c for c in COLOURS if c != looks[0].background_colour]
        near = torch.stack([_apart(frames, SPRITE_RGB[name]) for name in names]).amin(0)
        return (other / (other + near).clamp(min=1e-6))[None]
    near = torch.stack([_apart(frames, SPRITE_RGB[each.colour]) for each in looks])
    shares = []
    for number in range(len(looks)):
        rest = torch.cat([near[:number], near[number + 1 :], other[None]]).amin(0)
        shares.append(rest / (rest + near[number]).clamp(min=1e-6))
    return torch.stack(shares)


def _apart(frames: Tensor, colour: Sequence[float]) -> Tensor:
    return (frames - torch.tensor(colour)).norm(dim=-1)


def _apart_from_line(frames: Tensor, first: Sequence[float], last: Sequence[float]) -> Tensor:
    """Distance of colours [..., 3] from all mixtures of two."""
    a, b = torch.tensor(first), torch.tensor(last)
    along = ((frames - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
    return (frames - a - along[..., None] * (b - a)).norm(dim=-1)


def found_boxes(alpha: Tensor) -> list[tuple[float, float, float, float] | None]:
    """Boxes (x0, y0, x1, y1) in shares of what alpha [F, H, W] shows; None where it shows nothing.

    Specks do not count (``SOLID``).
    """
    hard = (alpha > 0.5).float()
    around = functional.avg_pool2d(hard[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    solid = (hard > 0) & (around >= SOLID)
    height, width = alpha.shape[-2:]
    boxes: list[tuple[float, float, float, float] | None] = []
    for frame in solid:
        rows, columns = frame.any(1).nonzero()[:, 0], frame.any(0).nonzero()[:, 0]
        if not len(rows):
            boxes.append(None)
            continue
        x0, x1 = float(columns[0]) / width, float(columns[-1] + 1) / width
        boxes.append((x0, float(rows[0]) / height, x1, float(rows[-1] + 1) / height))
    return boxes


def box_scores(found: Sequence[Sequence[float] | None], asked: np.ndarray) -> tuple[float, float]:
    """Mean intersection over union, and mean distance of centres in shares of the frame.

    A frame without the subject counts 0 and ``LOST``.
    """
    overlaps, distances = [], []
    for box, wanted in zip(found, asked.tolist(), strict=True):
        if box is None:
            overlaps.append(0.0)
            distances.append(LOST)
            continue
        common = _area(
            (
                max(box[0], wanted[0]),
                max(box[1], wanted[1]),
                min(box[2], wanted[2]),
                min(box[3], wanted[3]),
            )
        )
        overlaps.append(common / max(_area(box) + _area(wanted) - common, 1e-9))
        dx, dy = (box[i] + box[i + 2] - wanted[i] - wanted[i + 2] for i in (0, 1))
        distances.append(float(np.hypot(dx, dy)) / 2)
    return float(np.mean(overlaps)), float(np.mean(distances))


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def score_clip(clip: np.ndarray, trial: Trial) -> dict[str, float]:
    """Scores of one clip uint8 [T, H, W, 3], means over its subjects; labels 1.0 where right.

    miou, least_miou: the boxes found against those asked, of all subjects and of the worst; of
    several, miou_1 is the foremost one's. What stands before a subject costs it overlap. cd:
    distance of centres. colour, shape: as in the subject's picture; the shape is judged where
    nothing stands before it. background: its pattern and colour are as the prompt says;
    background_colour: the latter.
    """
    shares = find_sprites(clip, trial.scene)
    rows: dict[str, list[float]] = {"miou": [], "cd": [], "colour": [], "shape": []}
    for number, (alpha, asked) in enumerate(zip(shares, trial.boxes, strict=True)):
        looks = trial.scene.actors[number].looks
        overlap, distance = box_scores(found_boxes(alpha), asked)
        rows["miou"].append(overlap)
        rows["cd"].append(distance)
        solid = torch.where(alpha > 0.5, 1.0, 0.0)
        rows["colour"].append(float(classify_colour(clip, solid) == looks.colour))
        clear = [f for f in range(len(clip)) if _is_clear(trial.boxes, number, f)]
        if clear:
            chosen = np.linspace(0, len(clear) - 1, min(SHAPE_FRAMES, len(clear))).astype(int)
            seen = alpha[[clear[index] for index in chosen]]
            rows["shape"].append(float(classify_shape(seen)[0] == looks.shape))
    scores = {name: float(np.mean(values)) for name, values in rows.items() if values}
    scores["least_miou"] = min(rows["miou"])
    if len(rows["miou"]) > 1:
        scores |= {f"miou_{place}": value for place, value in enumerate(rows["miou"], start=1)}
    first = trial.scene.actors[0].looks
    pattern, colour = classify_background(*_background(clip, shares))
    scores["background"] = float((pattern, colour) == (first.pattern, first.background_colour))
    scores["background_colour"] = float(colour == first.background_colour)
    return scores


def _is_clear(boxes: np.ndarray, number: int, frame: int) -> bool:
    """Whether no other subject's box touches this one's in a frame."""
    own = boxes[number, frame]
    others = np.delete(boxes[:, frame], number, axis=0)
    return not any(
        own[0] < b[2] and b[0] < own[2] and own[1] < b[3] and b[1] < own[3] for b in others
    )


def _background(clip: np.ndarray, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The clip's background as one frame [1, H, W, 3], and where it is ever seen, bool [H, W].

    The median of those frames that show no sprite at a place.
    """
    hidden = functional.max_pool2d(shares.amax(0)[:, None], 5, 1, 2)[:, 0] > 0.3
    frames = torch.where(hidden[..., None], torch.nan, as_float(clip))
    return frames.nanmedian(0).values.nan_to_num(0.0)[None], ~hidden.all(0)


def evaluate_trajectories(
    pipeline: Director | None,
    *,
    scenes: int = 128,
    seed: int = 0,
    batch: int = 16,
    frames: int = 16,
    size: tuple[int, int] = (96, 96),
    subjects: int = 1,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a pipeline on held-out scenes of so many subjects; a dictionary that JSON can hold.

    ``settings`` are entries of ``TrajectoryRequest`` for all clips. The result has "settings",
    "ceiling" (what the autoencoder makes of true clips; with ``pipeline`` None the true clips
    themselves, which shows what the measures allow), "baseline" (the true first frame, standing
    still) and "trajectory", the pipeline's scores.
    """
    given = dict(settings or {})
    wanted = trials(scenes, seed, frames, size, subjects)
    makers: dict[str, Callable[[Sequence[Trial], int], np.ndarray]] = {
        "ceiling": lambda part, start: _coded(pipeline, part),
        "baseline": lambda part, start: np.stack([t.frames[:1].repeat(frames, 0) for t in part]),
    }
    if pipeline is not None:
        makers["trajectory"] = lambda part, start: pipeline.generate_batch(
            [
                replace(trial.request, seed=seed + start + index, **given)
                for index, trial in enumerate(part)
            ]
        )
    result: dict[str, Any] = {
        "settings": {
            "scenes": scenes,
            "subjects": subjects,
            "seed": seed,
            "frames": frames,
            "height": size[0],
            "width": size[1],
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
        result[name] = mean_scores(rows)
    return result


def _coded(pipeline: Director | None, part: Sequence[Trial]) -> np.ndarray:
    if pipeline is None:
        return np.stack([trial.frames for trial in part])
    return np.stack([pipeline.reconstruct(trial.frames) for trial in part])
