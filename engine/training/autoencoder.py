"""Stage: the starters' autoencoder, trained on the four layers of sprite world."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conditioning.layers import premultiply
from ..models.starter_autoencoder import TEMPORAL_FACTOR, StarterAutoencoder
from .sprite_world import RenderedBatch, render, scene_at


@dataclass(frozen=True)
class SpriteData:
    """The ``[data]`` table: clip length, frame side and the seed of the scenes."""

    frames: int = 8
    size: int = 96
    seed: int = 1


def layer_clips(batch: RenderedBatch) -> dict[str, torch.Tensor]:
    """The four layers as the model sees them, each [B, F, 3, H, W] in [-1, 1]."""
    alpha = batch.alpha
    return {
        "foreground": premultiply(batch.foreground * 2 - 1, alpha),
        "alpha": (alpha * 2 - 1).expand_as(batch.blended),
        "background": batch.background * 2 - 1,
        "blended": batch.blended * 2 - 1,
    }


class AutoencoderStage:
    """Reconstruct random four-frame groups of random layers through a noisy bottleneck.

    ``noise`` is the largest standard deviation added to the standardised latents; each group
    draws its own between 0 and it.
    """

    hidden = (".up.", ".down.")

    def __init__(self, model: dict[str, Any], data: SpriteData, batch: int, noise: float = 0.3):
        self.config, self.data, self.batch, self.noise = model, data, batch, noise
        self.network = StarterAutoencoder(**model).to(memory_format=torch.channels_last)

    def groups(self, generator: torch.Generator) -> torch.Tensor:
        """Four-frame groups [batch, 4, 3, H, W], an equal share from each layer."""
        data, per_clip = self.data, self.data.frames // TEMPORAL_FACTOR
        count = max(1, self.batch // (4 * per_clip))
        first = int(torch.randint(2**40, (), generator=generator))
        scenes = [scene_at(data.seed, first + i) for i in range(count)]
        clips = layer_clips(render(scenes, data.frames, (data.size, data.size)))
        clip = torch.stack(list(clips.values()))
        return clip.reshape(-1, TEMPORAL_FACTOR, *clip.shape[-3:])

    def loss(self, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        clip = self.groups(generator)
        codes = self.network.encode_groups(clip)
        level = torch.rand(len(codes), 1, 1, 1, generator=generator) * self.noise
        noise = level * torch.randn(codes.shape, generator=generator)
        out = self.network.decode(self.network.bottleneck(codes, noise)[:, None])
        error = out.float() - clip
        square = error.square().mean()
        # MSE over [-1, 1] is 4 times that over [0, 1], the range PSNR is quoted in.
        return error.abs().mean() + 2 * square, {"psnr": -10 * torch.log10(square / 4).item()}

    def export(self, path: Path, network: nn.Module) -> None:
        from safetensors.torch import save_file

        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, path, {"autoencoder": json.dumps(self.config)})
