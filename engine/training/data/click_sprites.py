"""Sprite world's clicked scenes as a source of clips: latents kept, masks and phrases drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from ...models.follow_your_click import latent_mask
from ..click_world import ClickScene, caption, click_scene_at, phrase, render_clicks
from ..settings import settings_from
from ..sprite_world import render
from .clips import ClipParts
from .moving_sprites import MovingClips, MovingSprites
from .source import Pick, Progress

# Pixels by which a mask may be larger than the sprite: no segmenter is exact.
LOOSE = 2


class ClickBatch(NamedTuple):
    """Clips of one size, on the CPU.

    latents: [B, T, C, h, w] bfloat16. captions, phrases: B texts, or their features [B, L, D].
    mask: [B, 1, h, w] of 0 and 1, what is meant. strength: [B], mean flow inside it as
    ``click_world.strength_of`` counts it.
    """

    latents: torch.Tensor
    captions: list[str] | torch.Tensor
    phrases: list[str] | torch.Tensor
    mask: torch.Tensor
    strength: torch.Tensor


class ClickSource(Protocol):
    """Clips, each with a region that moves; draws depend on the generator's state alone.

    empty: features [L, D] of no text, where texts are features.
    """

    empty: torch.Tensor | None

    def describe(self) -> list[str]: ...

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None: ...

    def release(self) -> None: ...

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]: ...

    def load(self, picks: Sequence[Pick]) -> ClickBatch: ...


def open_click_sprites(table: Mapping[str, Any], parts: ClipParts) -> ClickSprites:
    """The source of a table's entries; LayerLoomError names an entry that is wrong."""
    return ClickSprites(settings_from({"returning": 0.0, **table}, MovingClips), parts)


class ClickSprites(MovingSprites):
    """Two sprites a clip, one of them meant; nothing returns."""

    world = "click"
    empty = None

    def load(self, picks: Sequence[Pick]) -> ClickBatch:
        """What the picks stand for: the same pick gives the same texts and mask.

        The mask is of the first frame, a little larger than the sprite at times.
        """
        scenes = [self._scene(pick.index) for pick in picks]
        captions, phrases, masks = [], [], []
        first = render([scene.meant for scene in scenes], 1, self.sizes[0]).masks
        sides = tuple(side // self.parts.codec.spatial_factor for side in self.sizes[0])
        for scene, pick, mask in zip(scenes, picks, first, strict=True):
            rng = random.Random(pick.wording)
            captions.append(caption(scene, rng))
            phrases.append(phrase(scene, rng))
            loose = rng.randint(0, LOOSE)
            grown = functional.max_pool2d(mask.float(), 2 * loose + 1, 1, loose)
            masks.append(latent_mask(grown, sides))
        strength = torch.tensor([scene.strength for scene in scenes])
        return ClickBatch(self.latents(picks), captions, phrases, torch.stack(masks), strength)

    def _scene(self, index: int) -> ClickScene:
        return click_scene_at(self.clips.seed, index)

    def _render(self, indices: Sequence[int]) -> torch.Tensor:
        scenes = [self._scene(index) for index in indices]
        return render_clicks(scenes, self.frames, self.sizes[0]).clips
