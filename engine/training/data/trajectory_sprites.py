"""Sprite world's paths as a source of clips: latents kept, captions, boxes and pictures drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ...clips import as_signed
from ...conditioning.box_paths import track_masks
from ...conditioning.boxes import BoxPaths
from ...conditioning.subjects import on_white
from ...errors import LayerLoomError
from ..settings import settings_from
from ..trajectory_world import (
    TrajectoryScene,
    caption,
    portraits,
    render_trajectories,
    scene_paths,
    sprite_boxes,
    trajectory_scene_at,
)
from .clips import ClipParts
from .fingerprints import network_of
from .moving_sprites import MovingClips, MovingSprites
from .source import Pick
from .sprites import WORDINGS


@dataclass(frozen=True)
class TrajectoryClips(MovingClips):
    """The ``[data]`` table for paths: that of ``MovingClips``, where nothing returns, and shares.

    pairs: the share of clips, and of steps, with two sprites. named: the share of captions that
    say what the sprites are. stars: the share of draws that are sure to show a star, whose tips
    take longest to learn; the rest is drawn as it comes.
    """

    returning: float = 0.0
    pairs: float = 0.25
    named: float = 0.5
    stars: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("pairs", "named", "stars"):
            if not 0 <= getattr(self, name) <= 1:
                raise LayerLoomError(
                    f"The recipe's data.{name} is {getattr(self, name)}; give a share from 0 to 1."
                )

    @property
    def single(self) -> int:
        """How many clips have one sprite; those after them have two."""
        return self.scenes - round(self.scenes * self.pairs)


class TrajectoryBatch(NamedTuple):
    """Clips of one size with S sprites each, on the CPU.

    latents: [B, T, C, h, w] bfloat16. captions: B texts, or their features [B, L, D]. masks: boxes
    as pixels [B, S, T, H, W] of 0 and 1. subjects: latents [B, S, C, h, w] of the subjects'
    pictures on white.
    """

    latents: torch.Tensor
    captions: list[str] | torch.Tensor
    masks: torch.Tensor
    subjects: torch.Tensor


def open_trajectory_sprites(table: Mapping[str, Any], parts: ClipParts) -> TrajectorySprites:
    """The source of a table's entries; LayerLoomError names an entry that is wrong."""
    return TrajectorySprites(settings_from(dict(table), TrajectoryClips), parts)


class TrajectorySprites(MovingSprites):
    """One or two sprites a clip; all clips of a step have as many."""

    clips: TrajectoryClips

    @property
    def world(self) -> str:
        """Tells the clips from those of another world, and of another share of pairs."""
        return f"trajectory {self.clips.single} "

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        single, every = self.clips.single, len(self)
        several = bool(torch.rand((), generator=generator) < self.clips.pairs)
        low, high = (single, every) if several and single < every else (0, single)
        if low == high:
            low, high = single, every
        indices = torch.randint(low, high, (batch,), generator=generator)
        if self.clips.stars:
            stars = self._stars[(self._stars >= low) & (self._stars < high)]
            sure = torch.rand(batch, generator=generator) < self.clips.stars
            others = torch.rand(batch, generator=generator)
            if len(stars):
                indices = torch.where(sure, stars[(others * len(stars)).long()], indices)
        wordings = torch.randint(WORDINGS, (batch,), generator=generator)
        return [Pick(*pair) for pair in zip(indices.tolist(), wordings.tolist(), strict=True)]

    @cached_property
    def _stars(self) -> torch.Tensor:
        """Indices of the clips that show a star."""
        looks = [[actor.looks.shape for actor in self._scene(i).actors] for i in range(len(self))]
        found = [i for i, shapes in enumerate(looks) if "star" in shapes]
        return torch.tensor(found, dtype=torch.long)

    @torch.no_grad()
    def load(self, picks: Sequence[Pick]) -> TrajectoryBatch:
        """What the picks stand for: the same pick gives the same caption and pictures."""
        scenes = [self._scene(pick.index) for pick in picks]
        rngs = [random.Random(pick.wording) for pick in picks]
        texts = [
            caption(scene, rng, rng.random() < self.clips.named)
            for scene, rng in zip(scenes, rngs, strict=True)
        ]
        size = self.sizes[0]
        masks = [
            track_masks(BoxPaths(self.frames, scene_paths(boxes)), size)
            for boxes in sprite_boxes(scenes)
        ]
        # The subject as it is in a random frame of the clip, cut out.
        frame = rngs[0].randrange(self.frames)
        pictures, outlines = portraits(scenes, frame, size)
        cut = np.stack(
            [
                on_white(image, outline, size)
                for images, shapes in zip(pictures, outlines, strict=True)
                for image, outline in zip(images, shapes, strict=True)
            ]
        )
        generator = torch.Generator().manual_seed(picks[0].wording)
        device = next(network_of(self.parts.codec).parameters()).device
        latents = self.parts.codec.encode(as_signed(cut).to(device), generator).float().cpu()
        return TrajectoryBatch(
            self.latents(picks),
            texts,
            torch.from_numpy(np.stack(masks)).float(),
            latents.unflatten(0, (len(scenes), -1)),
        )

    def _scene(self, index: int) -> TrajectoryScene:
        count = 1 if index < self.clips.single else 2
        return trajectory_scene_at(self.clips.seed, index, self.frames, count=count)

    def _render(self, indices: Sequence[int]) -> torch.Tensor:
        scenes = [self._scene(index) for index in indices]
        single = [s for s in scenes if len(s.actors) == 1]
        several = [s for s in scenes if len(s.actors) > 1]
        # Single ones have the lower indices, so the order is kept.
        parts = [render_trajectories(s, self.sizes[0]).clips for s in (single, several) if s]
        return torch.cat(parts)
