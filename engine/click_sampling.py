"""The regions' conditions, and the one prediction that sampling makes of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .models.follow_your_click import ClickSettings, FollowYourClick, affinity
from .sampling.ddim import Predictor

# Latent positions over which one region's say gives way to another's.
SOFTNESS = 1.0


@dataclass(frozen=True, eq=False)
class RegionConditions:
    """What the network is told of one region of each of B clips.

    Attributes:
        mask: [B, 1, h, w] of 0 and 1.
        caption, phrase: text features [B, L, D].
        strength: [B].
    """

    mask: Tensor
    caption: Tensor
    phrase: Tensor
    strength: Tensor


def territories(masks: Tensor) -> Tensor:
    """How much each region says about each place, [R, ..., h, w] of masks of that shape.

    A region's prediction moves what is inside its mask and leaves all else where it is, so of
    several predictions each is right about its own neighbourhood: things move out of their masks.
    A place therefore belongs to the region it is nearest to, by steps in eight directions; half
    way between two the shares cross over softly, and inside both they are equal. Shares sum to 1.
    """
    if len(masks) == 1:
        return torch.ones_like(masks)
    shares = (-_distances(masks) / SOFTNESS).double().softmax(0)
    return shares.to(masks)


def _distances(masks: Tensor) -> Tensor:
    """Steps to the nearest place of a mask, 0 inside; where there is none, more than any."""
    reached = (masks > 0).float().flatten(0, -3)[:, None]
    distance = torch.zeros_like(reached)
    for _ in range(max(masks.shape[-2:])):
        distance += 1 - reached
        reached = functional.max_pool2d(reached, 3, stride=1, padding=1)
    return distance.reshape(masks.shape)


def region_predictor(
    network: FollowYourClick,
    regions: Sequence[RegionConditions],
    picture: Tensor,
    no_text: Tensor,
    guidance: float,
    stride: float,
    together: bool,
) -> Predictor:
    """The guided prediction for clips [B, C, T, h, w] with any number of regions.

    Every region is a pass of its own: its mask, phrase and strength, the same picture. Guidance
    drops the text alone (mask, picture and strength are in both branches), and the regions'
    predictions (noise or v: linear in the clean clip either way) are blended as latents by
    ``territories``. One region is plain classifier-free guidance.

    Args:
        picture: its latent [B, C, h, w].
        no_text: features [B, L, D] of the negative prompt.
        together: all passes in one batch.
    """
    shares = territories(torch.stack([region.mask for region in regions]))[:, :, :, None]
    settings, dtype = network.settings, no_text.dtype
    passes = [(region, guided) for region in regions for guided in (True, False)]
    if guidance == 1:
        passes = passes[::2]

    def run(x: Tensor, timestep: int, chosen: Sequence[tuple[RegionConditions, bool]]) -> Tensor:
        rows = len(chosen) * x.shape[0]
        masks = torch.cat([_channel(region, x.shape[2], settings) for region, _ in chosen])
        out = network(
            x.to(dtype).repeat(len(chosen), 1, 1, 1, 1),
            torch.full((rows,), timestep, device=x.device),
            torch.cat([region.caption if text else no_text for region, text in chosen]),
            mask=masks,
            picture=picture.repeat(len(chosen), 1, 1, 1),
            strength=torch.cat([region.strength for region, _ in chosen]),
            stride=torch.full((rows,), stride, device=x.device),
            phrase=torch.cat([region.phrase if text else no_text for region, text in chosen]),
        )
        return out.float().unflatten(0, (len(chosen), x.shape[0]))

    def predict(x: Tensor, timestep: int, index: int) -> Tensor:
        if together:
            made = run(x, timestep, passes)
        else:
            made = torch.cat([run(x, timestep, [each]) for each in passes])
        if guidance != 1:
            made = torch.lerp(made[1::2], made[::2], guidance)
        return (shares * made).sum(0)

    return predict


def _channel(region: RegionConditions, frames: int, settings: ClickSettings) -> Tensor:
    """The mask channel; PIA's says how like the picture each frame is, everywhere."""
    if settings.reads_regions:
        return region.mask
    rows = torch.stack([affinity(float(s), frames) for s in region.strength]).to(region.mask)
    return rows[:, None, :, None, None].expand(-1, -1, -1, *region.mask.shape[-2:])
