"""An animator's checkpoint as what another stage's starter begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.dynamicrafter import DynamiCrafterCheckpoint, from_store
from ..checkpoints.dynamicrafter_detect import FAMILY
from ..checkpoints.identified import stated
from ..checkpoints.reader import open_tensors
from ..errors import LayerLoomError
from .moving_world import WORDS

# What an animator's UNet has of its own: image attention and the embedding of its number.
OWN = ("_ip.", "fps_embedding.")
TEMPORAL_TRANSFORMERS = ("temp_attentions.", "transformer_in.")

Inputs = Callable[[Tensor, Tensor], Tensor]
"""The first convolution of the stage's weights for noisy latents and for the picture's."""


def with_mask(noisy: Tensor, picture: Tensor) -> Tensor:
    """A region animator's inputs: a mask comes between the two, and has no effect at first."""
    return torch.cat([noisy, 0 * noisy[:, :1], picture], dim=1)


def without_picture(noisy: Tensor, picture: Tensor) -> Tensor:
    """Inputs of a network that makes clips of words."""
    return noisy


class AnimatorStart:
    """Stands where the stage's own checkpoint would, for an animator's starter.

    Image attention and the embedding of the animator's number are left out.

    Args:
        checkpoint: an animator's, with its words and autoencoder.
        tokens: words of a prompt, at least the animator's.
        inputs: makes the first convolution; ``with_mask`` or ``without_picture``.
        transformers: keep the temporal transformers; not where motion modules take their place.

    Attributes:
        checkpoint: as given.
        metadata: the autoencoder and the words, of which there are more.

    Raises:
        LayerLoomError: it is not a starter's, or it lacks words of sprite world.
    """

    def __init__(
        self,
        checkpoint: DynamiCrafterCheckpoint,
        tokens: int,
        inputs: Inputs,
        transformers: bool = True,
    ):
        self.checkpoint, self._inputs, self._transformers = checkpoint, inputs, transformers
        self.store, self.info = checkpoint.store, checkpoint.info
        told = checkpoint.metadata
        channels = self.info.unet["out_channels"]
        if not told.get("vae") or not told.get("text_encoder"):
            raise LayerLoomError(
                f"{self.store.name} brings no starter's autoencoder and words along, which other "
                "starters are trained with; start from an animator's starter."
            )
        if self.info.unet["in_channels"] != 2 * channels:
            raise LayerLoomError(
                f"{self.store.name} does not read its picture's latents yet; start from a later "
                "phase of the animator."
            )
        missing = sorted(set(WORDS) - set(told["text_encoder"]["vocabulary"]))
        if missing:
            raise LayerLoomError(
                f"{self.store.name} does not know the word {missing[0]!r} that clips are told "
                "with; train the animator again."
            )
        words = {**told["text_encoder"], "tokens": tokens}
        self.metadata: dict[str, Any] = {"vae": told["vae"], "text_encoder": words}

    def check(self) -> None:
        self.checkpoint.check()

    @property
    def left_out(self) -> Sequence[str]:
        """Marks of the names that are not taken over."""
        return OWN if self._transformers else (*OWN, *TEMPORAL_TRANSFORMERS)

    @property
    def unet(self) -> dict[str, Any]:
        """``VideoUNet`` keywords of what is kept."""
        half = torch.empty(1, self.info.unet["out_channels"], 1, 1, device="meta")
        kept = {
            **self.info.unet,
            "in_channels": self._inputs(half, half).shape[1],
            "image_attention": False,
            "scalar_embeddings": (),
        }
        if not self._transformers:
            kept |= {"temporal_transformer": False, "initial_temporal_transformer": False}
        return kept

    def part_state(self, part: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        state = self.checkpoint.part_state(part, dtype)
        if part == "unet":
            state = {k: v for k, v in state.items() if not any(m in k for m in self.left_out)}
            noisy, picture = state["conv_in.weight"].chunk(2, dim=1)
            state["conv_in.weight"] = self._inputs(noisy, picture)
        if part == "text_encoder":
            places, tokens = state["position.weight"], self.metadata["text_encoder"]["tokens"]
            # Further places begin as the last one.
            further = places[-1:].expand(max(0, tokens - len(places)), -1)
            state["position.weight"] = torch.cat([places, further])[:tokens]
        return state


def open_animator(
    path: Path, tokens: int, inputs: Inputs, transformers: bool = True
) -> AnimatorStart | None:
    """The start if the file is an animator's in our own format, None if it is not.

    Folders are published models' layouts.
    """
    if path.is_dir():
        return None
    store = open_tensors(path)
    if stated(store).get("family") != FAMILY:
        return None
    return AnimatorStart(from_store(store), tokens, inputs, transformers)


def starter_parts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Words and autoencoder that a starter brings along, as the stages' ``Foundation`` has them."""
    words, vae = metadata["text_encoder"], metadata["vae"]
    return {
        "words": {k: words[k] for k in ("tokens", "dim", "vocabulary")},
        "vae": {k: v for k, v in vae.items() if k != "kind"},
    }
