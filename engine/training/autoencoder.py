"""Stage: the starters' autoencoders, trained on the layers of sprite world."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conditioning.layers import RGBA, premultiply
from ..errors import LayerLoomError
from ..models.starter_autoencoder import SPATIAL_FACTOR, TEMPORAL_FACTOR, StarterAutoencoder
from .moving_world import moving_scene_at
from .shares import WHOLE, Shares
from .sprite_world import RenderedBatch, Scene, render, scene_at


@dataclass(frozen=True)
class SpriteData:
    """The ``[data]`` table: clip length, frame side and the seed of the scenes.

    ``world`` is "layers" (``sprite_world``) or "moving" (``moving_world``, the animator's).
    """

    frames: int = 8
    size: int = 96
    seed: int = 1
    # Not in the marks that tell stale caches of layers.
    world: str = field(default="layers", repr=False)

    def __post_init__(self):
        if self.world not in ("layers", "moving"):
            raise LayerLoomError(
                f"The recipe's data.world is {self.world!r}; use layers or moving."
            )
        for name, factor in (("frames", TEMPORAL_FACTOR), ("size", SPATIAL_FACTOR)):
            value = getattr(self, name)
            if value < factor or value % factor:
                raise LayerLoomError(
                    f"The recipe's {name} is {value}; it must be a multiple of {factor}."
                )

    def scene(self, index: int) -> Scene:
        """Scene ``index`` of the set."""
        if self.world == "moving":
            return moving_scene_at(self.seed, index).scene
        return scene_at(self.seed, index)


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
    """Reconstruct random groups of frames of random layers through a noisy bottleneck.

    A group is as many frames as the network folds into one latent, four or one.

    ``noise`` is the largest standard deviation added to the standardised latents; each group
    draws its own between 0 and it. ``motion_weight`` is the extra weight of pixels that change
    within a group: sprites are small and their moving edges are the hard part. ``edge_weight`` is
    that of pixels beside which the colour changes, for networks that see one frame at a time.
    ``shares`` says how often each layer is drawn.
    """

    hidden = (".up.", ".down.", ".conv1.", ".conv2.")
    blocks = ()
    groups_per_clip = 2

    def __init__(
        self,
        network: StarterAutoencoder,
        config: Mapping[str, Any],
        data: SpriteData,
        batch: int,
        noise: float,
        motion_weight: float,
        shares: Mapping[str, float],
        edge_weight: float = 0.0,
    ):
        self.network = network.to(memory_format=torch.channels_last)
        self.config, self.data, self.batch = dict(config), data, batch
        self.noise, self.motion_weight, self.edge_weight = noise, motion_weight, edge_weight
        self.shares = torch.tensor([float(shares[layer]) for layer in RGBA])

    def groups(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Groups of G frames [count, G, 3, H, W] in [-1, 1], a few from each of many clips."""
        data, each = self.data, self.groups_per_clip
        first = int(torch.randint(2**40, (), generator=generator))
        scenes = [data.scene(first + i) for i in range(-(-count // each))]
        clips = layer_clips(render(scenes, data.frames, (data.size, data.size)))
        stacked = torch.stack([clips[layer] for layer in RGBA], dim=1)
        stacked = stacked.unflatten(2, (-1, self.network.temporal_factor))
        rows = torch.arange(len(scenes)).repeat_interleave(each)[:count]
        layer = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        part = torch.randint(stacked.shape[2], (count,), generator=generator)
        return stacked[rows, layer, part]

    def draw(
        self, generator: torch.Generator, shares: Shares = WHOLE
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Groups and the noise of their latents, a pair a share."""
        count, side = self.batch * shares.count, self.data.size // SPATIAL_FACTOR
        clip = self.groups(generator, count)
        level = torch.rand(count, 1, 1, 1, generator=generator) * self.noise
        shape = (count, self.network.latent_channels, side, side)
        noise = level * torch.randn(shape, generator=generator)
        return [(clip[rows], noise[rows]) for rows in shares.rows(self.batch)]

    def loss(
        self, drawn: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        device = self.network.latent_mean.device
        clip, noise = (tensor.to(device) for tensor in drawn)
        codes = self.network.encode_groups(clip)
        out = self.network.decode(self.network.bottleneck(codes, noise)[:, None])
        error = out.float() - clip
        change = (clip.amax(1, keepdim=True) - clip.amin(1, keepdim=True)).amax(2, keepdim=True)
        weight = 1 + self.motion_weight * (change > 0.1)
        if self.edge_weight:
            weight = weight + self.edge_weight * edges(clip)
        square = error.square()
        # MSE over [-1, 1] is 4 times that over [0, 1], the range PSNR is quoted in.
        psnr = -10 * torch.log10(square.mean() / 4).item()
        return (weight * (error.abs() + 2 * square)).mean(), {"psnr": psnr}

    def export(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        from ..checkpoints.save import save_tensors

        save_tensors(path, state, {"autoencoder": json.dumps(self.config)})


def edges(clip: torch.Tensor) -> torch.Tensor:
    """Where [B, F, 3, H, W] in [-1, 1] changes among a pixel's neighbours: [B, F, 1, H, W]."""
    frames = clip.flatten(0, 1)
    high = nn.functional.max_pool2d(frames, 3, stride=1, padding=1)
    low = -nn.functional.max_pool2d(-frames, 3, stride=1, padding=1)
    return ((high - low).amax(1, keepdim=True) > 0.25).unflatten(0, clip.shape[:2])


def load_autoencoder(path: Path) -> tuple[dict[str, Any], StarterAutoencoder]:
    """The config and the network that an autoencoder stage exported."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise LayerLoomError(
            f"The recipe names the autoencoder {path}, which does not exist; train it first."
        )
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["autoencoder"])
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, KeyError, SafetensorError) as error:
        raise LayerLoomError(
            f"The recipe names {path}, which is not an autoencoder that LayerLoom trained."
        ) from error
    model = StarterAutoencoder(**config)
    model.load_state_dict(state)
    return config, model.to(memory_format=torch.channels_last)
