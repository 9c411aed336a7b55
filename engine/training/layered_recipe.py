"""Builds the layered stages, base and adapters, from a recipe; or rehearses that on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..conditioning.layers import RGBA
from ..errors import LayerLoomError
from ..models.starter_text import WordTokenizer
from ..sampling.schedules import layerflow_schedule
from .adapter import AdapterStage, adapted_network, other_adapters
from .autoencoder import SpriteData
from .card import Card, preview_fit
from .data.source import DataParts, LatentSource, open_data
from .distributed import Processes
from .estimate import report, table, work_of
from .foundation import Foundation, Lazy, lay_foundation
from .layered import LayeredStage, LayeredTask, tasks_of
from .networks import LayeredNetwork, build_network
from .pixel_loss import PixelLoss
from .preview import Preview
from .settings import (
    AdapterSettings,
    PreviewSettings,
    TrainingSettings,
    settings_from,
)

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Progress = Callable[[str, int, int, Mapping[str, float]], None]
Built = tuple[LayeredStage, tuple[int, Preview] | None]


def build_layered_stage(
    recipe: Mapping[str, Any],
    settings: TrainingSettings,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> Built:
    """The stage with its data encoded, and its preview (how often, what draws it)."""
    found = lay_foundation(recipe, processes.device)
    task = settings_from(recipe["task"], LayeredTask)
    network = _network(recipe, settings, found)
    tokenizer = None
    if found.words:
        tokenizer = WordTokenizer(found.words["vocabulary"], found.words["tokens"])
    card = _card(recipe, settings, found, task, network)
    if found.autoencoder is not None:
        found.autoencoder.to(processes.device)
    source = _data(recipe, found, folder, processes, progress, note)
    pixels = _pixels(task, found)
    rest = {"tokenizer": tokenizer, "schedule": _schedule(found), "pixels": pixels}
    if recipe["stage"] == "lora":
        adapter = settings_from(recipe["adapter"], AdapterSettings)
        stage = AdapterStage(network, adapter, source, task, settings.batch, card, **rest)
    else:
        stage = LayeredStage(network, source, task, settings.batch, card, **rest)
    preview = None
    if "preview" in recipe:
        wanted = settings_from(recipe["preview"], PreviewSettings)
        bf16 = settings.precision == "bf16"
        preview = (wanted.every, Preview(stage, found.codec, wanted, found.text, bf16))
    for part in (found.text, None if preview else found.codec):
        if isinstance(part, Lazy):
            part.release()
    for line in report(
        work_of(network, _tokens(found, source.sizes[0]), settings.batch),
        settings,
        processes.count,
        processes.device.type,
    ):
        note(line)
    return stage, preview


def rehearse(recipe: Mapping[str, Any], settings: TrainingSettings) -> list[str]:
    """Check all that a recipe names on the meta device; lines with the estimate and a table.

    Nothing is encoded, written or kept in memory; the frozen autoencoder and text encoder are
    looked at without being loaded.
    """
    found = lay_foundation(recipe, torch.device("cpu"))
    settings_from(recipe["task"], LayeredTask)
    if "preview" in recipe:
        settings_from(recipe["preview"], PreviewSettings)
    network = _network(recipe, settings, found, device="meta")
    sizes, lines = _look_at_data(recipe, found)
    work = work_of(network, _tokens(found, sizes[0]), settings.batch)
    device = settings.device or "cuda"
    lines += report(work, settings, device=device.split(":")[0])
    return [*lines, "On one card, without what a preview needs:", *table(work, settings)]


def _network(
    recipe: Mapping[str, Any],
    settings: TrainingSettings,
    found: Foundation,
    device: str | None = None,
) -> LayeredNetwork:
    if recipe["stage"] == "layered":
        return build_network(
            found.transformer,
            found.word_encoder,
            found.start,
            recipe.get("trainable", "all"),
            TYPES[settings.frozen],
            device,
        )
    adapter = settings_from(recipe["adapter"], AdapterSettings)
    if found.start is None:
        raise LayerLoomError("A lora stage needs start = a checkpoint whose weights stay frozen.")
    others = other_adapters(found.start, adapter)
    frozen = TYPES[settings.frozen]
    base = build_network(found.transformer, found.word_encoder, found.start, None, frozen, device)
    return adapted_network(base, adapter, others, settings.seed, frozen)


def _card(
    recipe: Mapping[str, Any],
    settings: TrainingSettings,
    found: Foundation,
    task: LayeredTask,
    network: LayeredNetwork,
) -> Card:
    trained_with: dict[str, Any] = asdict(task)
    metadata = {**found.metadata, "trained_with": trained_with}
    adapters = {}
    if recipe["stage"] == "lora":
        # The base's own notes stay; an adapter's are beside them.
        adapter = settings_from(recipe["adapter"], AdapterSettings)
        earlier = found.metadata.get("adapters_trained_with") or {}
        entry = {**asdict(adapter), **trained_with, "steps": settings.steps}
        metadata["trained_with"] = found.metadata.get("trained_with")
        metadata["adapters_trained_with"] = {**earlier, adapter.name: entry}
        start = found.start
        adapters = {
            name: (start.lora(name), start.adapter_scales[name])
            for name in start.info.adapters
            if name != adapter.name
        }
    else:
        metadata["tasks"] = list(tasks_of(task))
    if found.autoencoder is not None and "preview" not in metadata:
        metadata["preview"] = preview_fit(found.autoencoder, _scenes(recipe))
    weights = network.transformer.named_parameters()
    return Card(
        variant=found.variant,
        transformer=found.transformer,
        sequence=found.sequence,
        sampling=found.sampling,
        metadata=metadata,
        words=found.words,
        autoencoder=found.autoencoder,
        autoencoder_config=found.autoencoder_config,
        adapters=adapters,
        start=found.start,
        frozen=frozenset(name for name, p in weights if not p.requires_grad),
    )


def _scenes(recipe: Mapping[str, Any]) -> SpriteData:
    table = recipe["data"]
    if table.get("kind", "sprites") != "sprites":
        return SpriteData()
    return SpriteData(**{k: v for k, v in table.items() if k in ("frames", "size", "seed")})


def _pixels(task: LayeredTask, found: Foundation) -> PixelLoss | None:
    if not task.pixel_weights:
        return None
    if found.autoencoder is None:
        raise LayerLoomError(
            "The recipe's task.pixel_weights needs a starter's small autoencoder; leave it out."
        )
    unknown = sorted(set(task.pixel_weights) - set(RGBA))
    if unknown:
        raise LayerLoomError(
            f"The recipe's task.pixel_weights names {unknown[0]!r}; layers are {', '.join(RGBA)}."
        )
    return PixelLoss(found.autoencoder, task.pixel_weights, task.pixel_edge_weight)


def _schedule(found: Foundation) -> Any:
    return layerflow_schedule(**(found.sampling.get("schedule") or {}))


def _table(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The [data] table; older recipes name the number of scenes outside it."""
    table = dict(recipe["data"])
    if "scenes" in recipe:
        table["scenes"] = recipe["scenes"]
    return table


def _data(
    recipe: Mapping[str, Any],
    found: Foundation,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> LatentSource:
    parts = DataParts(
        codec=found.codec,
        sequence=found.sequence,
        size=found.size,
        multiple=found.multiple,
        cache=folder,
        text=found.text,
    )

    def step(phase: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(phase, done, total, {})) if progress else None

    # The first process reads the clips; the others find what it noted.
    if not processes.main:
        processes.wait()
    source = open_data(_table(recipe), parts, step("checking"))
    if processes.main:
        processes.wait()
    for line in source.describe():
        note(line)
    source.encode(step("encoding"), processes.rank, processes.count)
    processes.wait()
    return source


def _look_at_data(
    recipe: Mapping[str, Any], found: Foundation
) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """Sizes of the data's buckets and lines about it, with nothing written."""
    table = _table(recipe)
    if table.get("kind", "sprites") != "folder":
        parts = DataParts(found.codec, found.sequence, found.size, found.multiple, Path())
        source = open_data(table, parts)
        return source.sizes, source.describe()
    from .data.dataset import LayeredFolder
    from .data.plan import FolderClips

    table.pop("kind")
    dataset = LayeredFolder(
        settings_from(table, FolderClips),
        frames=found.sequence.frames,
        size=found.size,
        multiple=found.multiple,
    )
    buckets = dataset.report.buckets
    sizes = tuple(sorted(buckets, key=lambda size: -size[0] * size[1]))
    lines = [f"{table['path']}: {len(dataset)} samples in {len(buckets)} sizes."]
    return sizes, [*lines, *dataset.report.notes]


def _tokens(found: Foundation, size: tuple[int, int]) -> int:
    """Tokens of one sample: all prompts, and every layer's patches."""
    frames = sum(found.sequence.latent_frames(layer) for layer in found.sequence.layers)
    rows, columns = (side // found.multiple for side in size)
    return found.prompt_tokens + frames * rows * columns
