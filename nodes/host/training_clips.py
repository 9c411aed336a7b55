"""Layers and prompts that a graph connects for training, as the engine's clips; and their VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...engine.conditioning.layers import LayerSequence
from ...engine.conditioning.prompts import indexed_prompts
from ...engine.errors import LayerLoomError
from ...engine.layered_settings import SPATIAL_FACTOR
from ...engine.training.data.in_memory import GivenClip, given_clip
from .conditioning import encode_clip
from .layered_model import PROMPTS


def collect_clips(
    model,
    positive: Sequence[Any],
    foreground: Sequence[torch.Tensor],
    background: Sequence[torch.Tensor],
    alpha: Sequence[torch.Tensor | None],
    blended: Sequence[torch.Tensor | None],
) -> list[GivenClip]:
    """The clips of connected lists; what is given once serves all.

    Raises:
        LayerLoomError: lists that do not fit together, or layers of one clip that do not.
    """
    lists = {
        "positive": positive,
        "foreground": foreground,
        "background": background,
        "alpha": alpha,
        "blended": blended,
    }
    count = max(len(foreground), len(background))
    for name, entries in lists.items():
        if len(entries) not in (1, count):
            raise LayerLoomError(
                f"{name} has {len(entries)} entries for {count} clips; connect one for all, or one "
                "for each."
            )

    def entry(name: str, number: int) -> Any:
        return lists[name][number if len(lists[name]) > 1 else 0]

    return [
        given_clip(
            f"clip {number + 1}" if count > 1 else "the clip",
            entry("foreground", number),
            entry("alpha", number),
            entry("background", number),
            entry("blended", number),
            prompt_features(model, entry("positive", number)),
            model.model.settings.sequence,
        )
        for number in range(count)
    ]


def prompt_features(model, conditioning) -> torch.Tensor:
    """Features [3, tokens, D] of a CONDITIONING from Layer Prompts.

    Raises:
        LayerLoomError: it comes from elsewhere, or from another text encoder.
    """
    features, extra = conditioning[0]
    if extra.get(PROMPTS) != 3:
        raise LayerLoomError(
            "The conditioning does not come straight from Layer Prompts; connect that node, which "
            "encodes one prompt a layer."
        )
    each = features[0].unflatten(0, (3, -1)).float().cpu()
    # A network that only takes scenes apart reads two of them.
    read = len(indexed_prompts(model.model.settings.tasks[0], "", ""))
    model.model.check_text(each.shape[1] * read, read)
    return each


class HostCodec:
    """The host's VAE as the engine's autoencoder, for the latents that a MODEL takes."""

    spatial_factor = SPATIAL_FACTOR

    def __init__(self, model, vae, sequence: LayerSequence):
        self.model, self.vae, self.sequence = model, vae, sequence
        self.temporal_factor = sequence.temporal_factor

    def encode(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents [1, T, C, h, w] of all layers, joined [1, F, 3, H, W] in [-1, 1]."""
        sequence, settings = self.sequence, self.model.model.settings
        latents = encode_clip(settings, self.vae, clip, sequence, sequence.layers)
        return self.model.model.process_latent_in(latents).transpose(1, 2).float()
