"""What an exported animation checkpoint says beside its weights, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.dynamicrafter import DynamiCrafterCheckpoint
from ..checkpoints.dynamicrafter_save import save_dynamicrafter
from ..models.dynamicrafter import Variant
from ..models.starter_autoencoder import SPATIAL_FACTOR, StarterAutoencoder
from .autoencoder import SpriteData
from .card import below
from .sprite_world import render

PARTS = ("unet", "image_projector", "text_encoder", "image_encoder")


@dataclass(frozen=True)
class AnimateCard:
    """Settings of an exported checkpoint, as ``save_dynamicrafter`` takes them.

    Attributes:
        autoencoder, vae: the starter's own and its settings; None for the published one.
        start, frozen: what was begun with, and names ("unet...") that were not trained: they are
            written as the start stores them, and its autoencoder goes along.
    """

    variant: Variant
    unet: Mapping[str, Any]
    image_projector: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    image_encoder: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None
    autoencoder: StarterAutoencoder | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    start: DynamiCrafterCheckpoint | None = None
    frozen: frozenset[str] = frozenset()

    def write(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint in half precision of an ``AnimateNetwork``'s state."""
        whole = {**state, **self._untouched(state)}
        states = {part: below(whole, f"{part}.") for part in PARTS}
        if self.autoencoder is not None:
            states["vae"] = self.autoencoder.state_dict()
        elif self.start is not None and "vae" in self.start.plan:
            states["vae"] = self.start.part_state("vae")
        save_dynamicrafter(
            path,
            {part: tensors for part, tensors in states.items() if tensors},
            variant=self.variant,
            unet=self.unet,
            image_projector=self.image_projector,
            vae=self.vae,
            text_encoder=self.text_encoder,
            image_encoder=self.image_encoder,
            metadata=self.metadata,
            half=True,
        )

    def _untouched(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name in self.frozen if self.start is not None else ():
            part, _, rest = name.partition(".")
            source = self.start.plan.get(part, {}).get(rest)
            tensor = source.read(self.start.store) if source else None
            if tensor is not None and tensor.shape == state[name].shape:
                found[name] = tensor
        return found


@torch.no_grad()
def frame_preview_fit(
    autoencoder: StarterAutoencoder, data: SpriteData, scenes: int = 64
) -> dict[str, list]:
    """``card.preview_fit`` for an autoencoder that codes frame by frame, of opaque scenes."""
    size = (data.size, data.size)
    clip = render([data.scene(i) for i in range(scenes)], 2, size).blended * 2 - 1
    latents = autoencoder.encode(clip).movedim(2, -1).flatten(0, -2)
    means = nn.functional.avg_pool2d(clip.flatten(0, 1), SPATIAL_FACTOR)
    colours = means.movedim(1, -1).flatten(0, -2)
    columns = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    fit = torch.linalg.lstsq(columns, colours).solution
    rounded = [[round(value, 4) for value in row] for row in fit.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}
