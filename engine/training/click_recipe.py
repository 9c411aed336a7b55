"""Builds the stage of clicked regions from a recipe; or rehearses that on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.click_save import save_click
from ..conditioning.frame_codec import FrameCodec, StarterFrameCodec
from ..errors import LayerLoomError
from ..models.starter_text import WordTokenizer
from .animate_card import frame_preview_fit
from .autoencoder import SpriteData
from .card import below
from .click import ClickNetwork, ClickStage, ClickTask
from .click_foundation import (
    ClickSampling,
    ClickText,
    Foundation,
    Recipe,
    build_network,
    lay_click_foundation,
)
from .data.click_sprites import ClickSource, open_click_sprites
from .data.clips import ClipParts
from .distributed import Processes
from .settings import TrainingSettings, settings_from

Progress = Callable[[str, int, int, Mapping[str, float]], None]
TRAINABLE = ("all", "temporal")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ClickCard:
    """Settings of an exported checkpoint, as ``save_click`` takes them.

    codec: the starter's autoencoder; None for the published one, which goes along where the start
    holds it, as the text encoder does.
    """

    foundation: Foundation
    codec: StarterFrameCodec | None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint in half precision of a ``ClickNetwork``'s state."""
        found = self.foundation
        states = {"unet": below(state, "unet.")}
        if self.codec is not None:
            states["vae"] = self.codec.model.state_dict()
            states["text_encoder"] = below(state, "text_encoder.")
        else:
            inside = [part for part in found.start.info.parts if part != "unet"]
            states |= {part: found.start.part_state(part) for part in inside}
        save_click(
            path,
            states,
            settings=found.settings,
            unet=found.unet,
            vae=None if found.vae is None else {"kind": "starter", **found.vae},
            text_encoder=None if found.words is None else {"kind": "words", **found.words},
            metadata=self.metadata,
            half=True,
        )


def check_click(recipe: Recipe) -> None:
    """Check the tables of a recipe as far as nothing needs to be opened."""
    for name, kind in (("task", ClickTask), ("text", ClickText), ("sampling", ClickSampling)):
        if name in recipe:
            settings_from(recipe[name], kind)
    if recipe.get("trainable", "all") not in TRAINABLE:
        raise LayerLoomError(
            f"The recipe's trainable is {recipe['trainable']!r}; give one of "
            f"{', '.join(TRAINABLE)}."
        )


def build_click_stage(
    recipe: Recipe,
    settings: TrainingSettings,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> ClickStage:
    """The stage with its data encoded."""
    found = lay_click_foundation(recipe)
    task = settings_from(recipe["task"], ClickTask)
    network = build_network(found, recipe.get("trainable", "all"), TYPES[settings.frozen])
    codec = found.codec(processes.device)
    source = _data(recipe, found, codec, folder, processes, progress, note)
    phase = {"steps": settings.steps, "batch": settings.batch, **asdict(task)}
    middle = (found.unet.get("motion_modules") or {}).get("middle")
    metadata: dict[str, Any] = {
        "phases": [*found.phases, phase],
        "motion": "v2" if middle else "v1",
    }
    starter = isinstance(codec, StarterFrameCodec)
    if starter:
        sprites = SpriteData(size=found.settings.height, world="moving")
        metadata["preview"] = frame_preview_fit(codec.model.cpu(), sprites)
    note(_report(network, settings))
    tokenizer = empty = None
    if found.words is not None:
        tokenizer = WordTokenizer(found.words["vocabulary"], found.words["tokens"])
    else:
        empty = source.empty
    card = ClickCard(found, codec if starter else None, metadata)
    return ClickStage(network, source, task, settings.batch, found.settings, card, tokenizer, empty)


def rehearse_click(recipe: Recipe, settings: TrainingSettings) -> list[str]:
    """Check all that a recipe names on the meta device; lines with what would be trained."""
    found = lay_click_foundation(recipe)
    settings_from(recipe["task"], ClickTask)
    lines = []
    if found.words is None:
        from .data.click_folder import look_at_click_folder

        lines = look_at_click_folder(recipe["data"], found.settings, found.multiple)
    else:
        codec = found.codec(torch.device("cpu"))
        open_click_sprites(recipe["data"], _parts(found, codec, Path()))
    network = build_network(found, recipe.get("trainable", "all"), device="meta")
    return [*lines, _report(network, settings)]


def _parts(found: Foundation, codec: FrameCodec, folder: Path) -> ClipParts:
    size = (found.settings.height, found.settings.width)
    return ClipParts(codec, found.settings.frames, size, found.multiple, folder)


def _data(
    recipe: Recipe,
    found: Foundation,
    codec: FrameCodec,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> ClickSource:
    parts = _parts(found, codec, folder)
    step = (lambda done, total: progress("encoding", done, total, {})) if progress else None
    source: ClickSource
    # The first process reads the clips; the others find what it noted.
    if not processes.main:
        processes.wait()
    if found.words is None:
        from .data.click_folder import open_click_folder

        source = open_click_folder(recipe["data"], parts, found.text(processes.device))
    else:
        source = open_click_sprites(recipe["data"], parts)
    if processes.main:
        processes.wait()
    for line in source.describe():
        note(line)
    source.encode(step, processes.rank, processes.count)
    processes.wait()
    source.release()
    return source


def _report(network: ClickNetwork, settings: TrainingSettings) -> str:
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return f"{count:,} weights, {trained:,} trained; {settings.batch} clips a step and process."
