"""An animator's checkpoint as what a region animator begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoints.dynamicrafter import DynamiCrafterCheckpoint, from_store
from ..checkpoints.dynamicrafter_detect import FAMILY
from ..checkpoints.identified import stated
from ..checkpoints.reader import open_tensors
from ..errors import LayerLoomError
from .click_world import TOKENS
from .moving_world import WORDS

# What an animator's UNet has of its own: image attention and the embedding of its number.
OWN = ("_ip.", "fps_embedding.")
TEMPORAL_TRANSFORMERS = ("temp_attentions.", "transformer_in.")


class AnimatorStart:
    """Stands where a ``ClickCheckpoint`` would, for an animator's starter.

    Both read the noisy latents and the picture's; a mask comes between them, and has no effect at
    first. Image attention and the embedding of the animator's number are left out, and temporal
    transformers too where motion modules take their place.

    Args:
        checkpoint: an animator's, with its words and autoencoder.
        transformers: keep the temporal transformers.

    Attributes:
        checkpoint: as given.
        metadata: the autoencoder and the words, of which there are more.

    Raises:
        LayerLoomError: it is not a starter's, or its words are not those of clicks.
    """

    def __init__(self, checkpoint: DynamiCrafterCheckpoint, transformers: bool):
        self.checkpoint, self._transformers = checkpoint, transformers
        self.store, self.info = checkpoint.store, checkpoint.info
        told = checkpoint.metadata
        channels = self.info.unet["out_channels"]
        if not told.get("vae") or not told.get("text_encoder"):
            raise LayerLoomError(
                f"{self.store.name} brings no starter's autoencoder and words along, which region "
                "animators are trained with; start from an animator's starter."
            )
        if self.info.unet["in_channels"] != 2 * channels:
            raise LayerLoomError(
                f"{self.store.name} does not read its picture's latents yet; start from a later "
                "phase of the animator."
            )
        missing = sorted(set(WORDS) - set(told["text_encoder"]["vocabulary"]))
        if missing:
            raise LayerLoomError(
                f"{self.store.name} does not know the word {missing[0]!r} that clicks are told "
                "with; train the animator again."
            )
        words = {**told["text_encoder"], "tokens": TOKENS}
        self.metadata: dict[str, Any] = {"vae": told["vae"], "text_encoder": words}

    def check(self) -> None:
        self.checkpoint.check()

    @property
    def unet(self) -> dict[str, Any]:
        """``VideoUNet`` keywords of what is kept."""
        kept = {**self.info.unet, "image_attention": False}
        if not self._transformers:
            kept |= {"temporal_transformer": False, "initial_temporal_transformer": False}
        return kept

    def part_state(self, part: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        state = self.checkpoint.part_state(part, dtype)
        if part == "unet":
            left = OWN if self._transformers else (*OWN, *TEMPORAL_TRANSFORMERS)
            state = {k: v for k, v in state.items() if not any(mark in k for mark in left)}
            noisy, picture = state["conv_in.weight"].chunk(2, dim=1)
            state["conv_in.weight"] = torch.cat([noisy, 0 * noisy[:, :1], picture], dim=1)
        if part == "text_encoder":
            places = state["position.weight"]
            # Captions of two sprites are longer; further places begin as the last one.
            further = places[-1:].expand(max(0, TOKENS - len(places)), -1)
            state["position.weight"] = torch.cat([places, further])[:TOKENS]
        return state


def open_animator(path: Path, transformers: bool) -> AnimatorStart | None:
    """The start if the file is an animator's in our own format, None if it is not."""
    store = open_tensors(path)
    if stated(store).get("family") != FAMILY:
        return None
    return AnimatorStart(from_store(store), transformers)
