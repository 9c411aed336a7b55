"""Builds the stage of subjects along boxes from a recipe; or rehearses that on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.dreamvideo_detect import ADDITIONS, NETWORKS
from ..checkpoints.dreamvideo_save import save_trajectory
from ..conditioning.frame_codec import FrameCodec, StarterFrameCodec
from ..errors import LayerLoomError
from ..models.starter_text import WordTokenizer
from .animate_card import frame_preview_fit
from .autoencoder import SpriteData
from .card import below
from .data.clip_folder import CaptionedClips
from .data.clips import ClipParts
from .data.subject_folder import (
    SubjectFolder,
    look_at_subject_folder,
    open_subject_folder,
)
from .data.trajectory_sprites import (
    TrajectoryClips,
    TrajectorySprites,
    open_trajectory_sprites,
)
from .distributed import Processes
from .settings import TrainingSettings, settings_from
from .trajectory import TrajectoryNetwork, TrajectoryStage, TrajectoryTask
from .trajectory_foundation import (
    TRAINABLE,
    Foundation,
    Recipe,
    TrajectorySampling,
    TrajectoryText,
    build_network,
    lay_trajectory_foundation,
)

Progress = Callable[[str, int, int, Mapping[str, float]], None]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrajectoryCard:
    """Settings of an exported checkpoint, as ``save_trajectory`` takes them.

    codec: the starter's autoencoder; None for the published one, which stays outside.
    base: the file holds the base; else it has the additions alone, which stand on the start.
    """

    foundation: Foundation
    codec: StarterFrameCodec | None
    base: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint in half precision of a ``TrajectoryNetwork``'s state."""
        found = self.foundation
        video = below(state, "video.")
        parts = NETWORKS if self.base else ADDITIONS
        states = {part: below(video, f"{part}.") for part in parts}
        states = {part: tensors for part, tensors in states.items() if tensors}
        if self.codec is not None:
            states["vae"] = self.codec.model.state_dict()
            states["text_encoder"] = below(state, "text_encoder.")
        save_trajectory(
            path,
            states,
            **found.network,
            settings=found.settings,
            vae=None if found.vae is None else {"kind": "starter", **found.vae},
            text_encoder=None if found.words is None else {"kind": "words", **found.words},
            metadata=self.metadata,
            half=True,
        )


def check_trajectory(recipe: Recipe) -> None:
    """Check the tables of a recipe as far as nothing needs to be opened."""
    for name, kind in (
        ("task", TrajectoryTask),
        ("text", TrajectoryText),
        ("sampling", TrajectorySampling),
    ):
        if name in recipe:
            settings_from(recipe[name], kind)
    data = {key: value for key, value in recipe["data"].items() if key != "kind"}
    folder = recipe["data"].get("kind") == "folder"
    settings_from(data, CaptionedClips if folder else TrajectoryClips)
    if recipe.get("trainable", "all") not in TRAINABLE:
        raise LayerLoomError(
            f"The recipe's trainable is {recipe['trainable']!r}; give one of "
            f"{', '.join(TRAINABLE)}."
        )
    for name in ("reference", "placed_reference"):
        if not isinstance(recipe.get(name, False), bool):
            raise LayerLoomError(f"The recipe's {name} is {recipe[name]!r}; give true or false.")


def build_trajectory_stage(
    recipe: Recipe,
    settings: TrainingSettings,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> TrajectoryStage:
    """The stage with its data encoded."""
    found = lay_trajectory_foundation(recipe)
    task = settings_from(recipe["task"], TrajectoryTask)
    network = build_network(found, recipe.get("trainable"), TYPES[settings.frozen])
    codec = found.codec(processes.device)
    source = _data(recipe, found, codec, folder, processes, progress, note)
    phase = {"steps": settings.steps, "batch": settings.batch, **asdict(task)}
    metadata: dict[str, Any] = {"phases": [*found.phases, phase]}
    note(_report(network, settings))
    rest = (network, source, task, settings.batch, found.settings)
    if isinstance(source, SubjectFolder):
        base = any(p.requires_grad for p in network.video.unet.parameters())
        card = TrajectoryCard(found, None, base, metadata)
        return TrajectoryStage(*rest, card, empty=source.empty)
    sprites = SpriteData(size=found.settings.height, world="moving")
    metadata["preview"] = frame_preview_fit(codec.model.cpu(), sprites)
    codec.model.to(processes.device)
    tokenizer = WordTokenizer(found.words["vocabulary"], found.words["tokens"])
    return TrajectoryStage(*rest, TrajectoryCard(found, codec, metadata=metadata), tokenizer)


def rehearse_trajectory(recipe: Recipe, settings: TrainingSettings) -> list[str]:
    """Check all that a recipe names on the meta device; lines with what would be trained."""
    found = lay_trajectory_foundation(recipe)
    settings_from(recipe["task"], TrajectoryTask)
    lines = []
    if found.words is None:
        lines = look_at_subject_folder(recipe["data"], found.settings, found.multiple)
    else:
        codec = found.codec(torch.device("cpu"))
        open_trajectory_sprites(recipe["data"], _parts(found, codec, Path()))
    network = build_network(found, recipe.get("trainable"), device="meta")
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
) -> TrajectorySprites | SubjectFolder:
    step = (lambda done, total: progress("encoding", done, total, {})) if progress else None
    parts = _parts(found, codec, folder)
    source: TrajectorySprites | SubjectFolder
    # The first process reads the clips; the others find what it noted.
    if not processes.main:
        processes.wait()
    if found.words is None:
        source = open_subject_folder(recipe["data"], parts, found.text(processes.device))
    else:
        source = open_trajectory_sprites(recipe["data"], parts)
    if processes.main:
        processes.wait()
    for line in source.describe():
        note(line)
    source.encode(step, processes.rank, processes.count)
    processes.wait()
    if isinstance(source, SubjectFolder):
        source.release()
    return source


def _report(network: TrajectoryNetwork, settings: TrainingSettings) -> str:
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return f"{count:,} weights, {trained:,} trained; {settings.batch} clips a step and process."
