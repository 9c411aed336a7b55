"""What reusing given layers costs in quality and saves in time, on held-out sprite scenes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..conditioning.layers import GIVEN
from ..reuse import GivenReuse
from ..training.sprite_world import prompts
from .layered import MEASURES, Layers, held_out_scenes, mean_scores, scene_layers, score_clip

TASKS = tuple(task for task, given in GIVEN.items() if given)
FULL = "full attention"


class ReusingPipeline(Protocol):
    """What ``evaluate_reuse`` asks of a pipeline: ``BatchPipeline`` with a choice of reuse."""

    def generate_batch(
        self,
        task: str,
        prompts: list[tuple[str, str, str]],
        given: Layers,
        seed: int,
        reuse: GivenReuse | None,
    ) -> Layers:
        """Return all four layers, the given ones as they are."""
        ...


def variants(refreshes: Sequence[int | None]) -> dict[str, GivenReuse | None]:
    """Names and settings: as trained, given layers isolated, and kept with each refresh."""
    found: dict[str, GivenReuse | None] = {FULL: None, "isolated": GivenReuse(keep=False)}
    for refresh in refreshes:
        name = "kept" if refresh is None else f"kept, every {refresh}"
        found[name] = GivenReuse(refresh=refresh)
    return found


def evaluate_reuse(
    pipeline: ReusingPipeline,
    compared: Mapping[str, GivenReuse | None],
    *,
    scenes: int = 16,
    seed: int = 0,
    batch: int = 8,
    frames: int = 8,
    size: tuple[int, int] = (96, 96),
    tasks: Sequence[str] = TASKS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores by task and variant, as ``evaluate`` measures them, with seconds a scene.

    Variants take turns on every batch, so that other work on the machine slows all of them alike;
    on a CPU, ``clock`` = ``time.process_time`` leaves most of it out. ``seconds`` is the whole
    call, autoencoder included; ``speed`` is that of ``FULL``, if it is compared, over it.
    """
    held_out = held_out_scenes(scenes, seed)
    wording = [prompts(scene, random.Random(scene.caption)) for scene in held_out]
    truth = scene_layers(held_out, frames, size)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    done, total = 0, len(tasks) * len(compared) * scenes
    for task in tasks:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
        seconds = dict.fromkeys(compared, 0.0)
        for start in range(0, scenes, batch):
            part = slice(start, start + batch)
            given = {name: truth[name][part] for name in GIVEN[task]}
            for name, reuse in compared.items():
                begun = clock()
                made = pipeline.generate_batch(
                    task, wording[part], given, seed + start, reuse=reuse
                )
                seconds[name] += clock() - begun
                made = {**made, **given}
                for index in range(len(made["alpha"])):
                    layers = {layer: clip[index] for layer, clip in made.items()}
                    true = {layer: clip[start + index] for layer, clip in truth.items()}
                    scene = held_out[start + index]
                    rows[name].append(score_clip(MEASURES[task], layers, true, scene))
                    done += 1
                    if progress is not None:
                        progress(done, total)
        result[task] = {}
        for name in compared:
            result[task][name] = {**mean_scores(rows[name]), "seconds": seconds[name] / scenes}
            if FULL in compared:
                result[task][name]["speed"] = seconds[FULL] / seconds[name]
    return result


def as_markdown(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One table a task: a row a variant, a column a measure."""
    tables = []
    for task, rows in result.items():
        names = list(next(iter(rows.values())))
        lines = [f"| {task} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for variant, scores in rows.items():
            cells = (f"{scores[name]:.4g}" for name in names)
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
