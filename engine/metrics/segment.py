"""Scores of a segmenter on held-out sprites: overlap by what was clicked, and how long it takes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..conditioning.clicks import Click, Clicks
from ..conditioning.segmenter import Candidates, Embedding
from ..errors import LayerLoomError
from ..training.segment_world import (
    BACKGROUND,
    WAYS,
    Asking,
    Way,
    ask,
    draw_pictures,
    picture_at,
    touching,
)

# Sizes of the pictures (height, width), one after the other: a starter's clip, others' shapes.
SIZES = ((96, 96), (96, 160), (256, 192), (512, 512))
# A mask that overlaps this much is right.
RIGHT = 0.9


class Answering(Protocol):
    """What ``evaluate_segmenter`` asks of a segmenter."""

    def embed(self, picture: np.ndarray) -> Embedding: ...

    def masks(self, embedding: Embedding, clicks: Clicks) -> Candidates: ...


@dataclass(frozen=True)
class Trial:
    """Clicks on a picture and what they mean, bool [H, W]. kind: see ``kind_of``."""

    clicks: Clicks
    meant: torch.Tensor
    kind: str


def trials(seed: int, index: int) -> tuple[np.ndarray, list[Trial]]:
    """Held-out picture ``index``, uint8 [H, W, 3], asked in every way of ``WAYS`` once."""
    size = SIZES[index % len(SIZES)]
    drawn = draw_pictures([picture_at(seed, index, held_out=True)], size, size)
    touches, visible = touching(drawn.visible)[0].numpy(), drawn.visible[0].numpy()
    rng = random.Random(f"held-out asking {seed} {index}")
    made = []
    for way in dict.fromkeys(WAYS):
        asking = ask(way, visible, touches, rng)
        clicks = Clicks(
            tuple(Click(*point) for point in asking.points),
            () if asking.box is None else (asking.box,),
        )
        made.append(Trial(clicks, drawn.answer(0, asking.answers[0]) > 0.5, kind_of(way, asking)))
    pixels = (drawn.pictures[0].movedim(0, -1) * 255).round().to(torch.uint8)
    return pixels.numpy(), made


def kind_of(way: Way, asking: Asking) -> str:
    """ "box" (a box, with a point or without), "background", "negative" (a point says what is not
    meant), "point" (one), or "points" (more)."""
    if way.box:
        return "box"
    if BACKGROUND in asking.answers[0]:
        return "background"
    if any(not label for *_, label in asking.points):
        return "negative"
    return "point" if way.points == 1 else "points"


def evaluate_segmenter(
    segmenter: Answering,
    *,
    pictures: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Means over held-out pictures.

    Of each kind of clicks: "iou", the overlap of the candidate with the best score with what is
    meant; "right", the share of overlaps from ``RIGHT`` up; "best_iou", of the candidate that
    overlaps most; "count". "all" is every kind together. "embed_ms" and "click_ms" are medians.
    """
    rows: list[tuple[str, float, float]] = []
    embedding_times, click_times = [], []
    for index in range(pictures):
        picture, asked = trials(seed, index)
        started = time.perf_counter()
        embedding = segmenter.embed(picture)
        embedding_times.append(time.perf_counter() - started)
        for trial in asked:
            started = time.perf_counter()
            found = segmenter.masks(embedding, trial.clicks)
            with suppress(LayerLoomError):  # an empty answer
                found.mask()
            click_times.append(time.perf_counter() - started)
            masks = found.masks.cpu()
            both = (masks & trial.meant).sum((-2, -1))
            overlaps = both / (masks | trial.meant).sum((-2, -1)).clamp_min(1)
            rows.append((trial.kind, float(overlaps[found.best]), float(overlaps.max())))
        if progress:
            progress(index + 1, pictures)
    kinds = sorted({kind for kind, *_ in rows})
    scores: dict[str, Any] = {"all": _means(rows)}
    scores |= {kind: _means([row for row in rows if row[0] == kind]) for kind in kinds}
    for name, times in (("embed_ms", embedding_times), ("click_ms", click_times)):
        scores[name] = round(1000 * float(np.median(times)), 2)
    return scores


def _means(rows: list[tuple[str, float, float]]) -> dict[str, float]:
    chosen, best = np.array([row[1:] for row in rows]).T
    return {
        "iou": round(float(chosen.mean()), 4),
        "right": round(float((chosen >= RIGHT).mean()), 4),
        "best_iou": round(float(best.mean()), 4),
        "count": len(rows),
    }
