"""What an exported layered checkpoint says beside its weights, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.load import Checkpoint
from ..checkpoints.lora import LoRA
from ..conditioning.layers import LayerSequence
from ..models.starter_autoencoder import SPATIAL_FACTOR, TEMPORAL_FACTOR, StarterAutoencoder
from .autoencoder import SpriteData, layer_clips
from .sprite_world import render, scene_at

# Entries that `save_checkpoint` writes itself.
OWN_ENTRIES = {
    *("format", "family", "variant", "transformer", "vae", "text_encoder", "sequence"),
    *("sampling", "adapters"),
}


@dataclass(frozen=True)
class Card:
    """Settings of an exported checkpoint; ``save_checkpoint`` says what each is.

    Attributes:
        autoencoder: the starter's own, put inside the file; None for published weights.
        adapters: adapters beside the one being trained, with their default strengths.
        start, frozen: the checkpoint that was begun with and the transformer's weights that were
            not trained: they are written as they were, whatever type they were held in.
    """

    variant: str
    transformer: Mapping[str, Any]
    sequence: LayerSequence
    sampling: Mapping[str, Any]
    metadata: Mapping[str, Any]
    words: Mapping[str, Any] | None = None
    autoencoder: StarterAutoencoder | None = None
    autoencoder_config: Mapping[str, Any] | None = None
    adapters: Mapping[str, tuple[LoRA, float]] = field(default_factory=dict)
    start: Checkpoint | None = None
    frozen: frozenset[str] = frozenset()

    def write(
        self,
        path: Path,
        state: Mapping[str, torch.Tensor],
        adapters: Mapping[str, tuple[LoRA, float]] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint in half precision.

        Args:
            state: "transformer." and "text_encoder." names -> tensor.
            adapters: name -> (adapter, default strength), beside or instead of the card's own.
            notes: further metadata.
        """
        from ..checkpoints.save import save_checkpoint

        parts = {}
        if self.autoencoder is not None:
            parts["vae"] = self.autoencoder.state_dict()
        words = below(state, "text_encoder.")
        if words:
            parts["text_encoder"] = words
        carried = {**self.adapters, **(adapters or {})}
        # What is read back has tuples as lists, as JSON does.
        save_checkpoint(
            path,
            {**below(state, "transformer."), **self._untouched(state)},
            variant=self.variant,
            transformer=json.loads(json.dumps(dict(self.transformer))),
            vae={"kind": "starter", **self.autoencoder_config} if self.autoencoder else None,
            text_encoder={"kind": "words", **self.words} if self.words else None,
            sequence=sequence_entry(self.sequence),
            sampling=dict(self.sampling),
            parts=parts,
            adapters={name: lora.weights for name, (lora, _) in carried.items()},
            adapter_scales={name: scale for name, (_, scale) in carried.items()},
            adapter_alphas={name: lora.alpha for name, (lora, _) in carried.items()},
            metadata={**self.metadata, **(notes or {})},
            half=True,
        )

    def _untouched(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Frozen weights as the start stores them; not those that smaller patches changed."""
        found = {}
        for name in self.frozen if self.start else ():
            source = self.start.plan.transformer.get(name)
            tensor = source.read(self.start.store) if source else None
            if tensor is not None and tensor.shape == state[f"transformer.{name}"].shape:
                found[name] = tensor
        return found


def below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def sequence_entry(sequence: LayerSequence) -> dict[str, Any]:
    """A sequence as a checkpoint stores it: what differs from the defaults, layers and frames."""
    entry: dict[str, Any] = {"layers": list(sequence.layers), "frames": sequence.frames}
    plain = LayerSequence(sequence.layers, sequence.frames)
    for name in ("temporal_factor", "duplicate_first_frame", "decompose_latents"):
        if getattr(sequence, name) != getattr(plain, name):
            entry[name] = getattr(sequence, name)
    return entry


def carried_metadata(start: Checkpoint) -> dict[str, Any]:
    """A start's own notes, which go on into what is trained from it."""
    return {key: value for key, value in start.metadata.items() if key not in OWN_ENTRIES}


@torch.no_grad()
def preview_fit(
    autoencoder: StarterAutoencoder, data: SpriteData, scenes: int = 64
) -> dict[str, list]:
    """Least-squares fit from a latent position's channels to the mean colour of its pixels.

    Returns "factors" [C, 3] and "bias" [3] for colours in [-1, 1], what hosts preview latents
    with.
    """
    size = (data.size, data.size)
    batch = render([scene_at(data.seed, i) for i in range(scenes)], data.frames, size)
    clip = layer_clips(batch)["blended"]
    latents = autoencoder.encode(clip).movedim(2, -1).flatten(0, -2)
    cell = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
    means = nn.functional.avg_pool3d(clip.transpose(1, 2), cell)
    colours = means.movedim(1, -1).flatten(0, -2)
    columns = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    fit = torch.linalg.lstsq(columns, colours).solution
    rounded = [[round(value, 4) for value in row] for row in fit.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}
