"""DreamVideo-2's motion control: a box encoder over space and time, and a ControlNet a frame.

The ControlNet's parameter names follow diffusers' ``ControlNetModel``, whose network it is but for
what encodes the boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...kernels import Attention
from .layered_transformer import TimestepEmbedding, timestep_embedding
from .video_blocks import (
    BlockSettings,
    Conditions,
    Middle,
    TemporalTransformer,
    down_levels,
    go_down,
    plain_attention,
)

# Stem of ControlNet's own picture encoder (arXiv 2302.05543), and heads over time: the paper
# (arXiv 2410.13830) names the layers and not their widths.
ENCODER: dict[str, Any] = {"widths": (16, 32, 96, 256), "heads": 8}
# Keywords that a ControlNet and its blocks take of their base's.
_NETWORK = ("in_channels", "block_channels", "layers_per_block", "attention_levels")
_BLOCKS = (
    "block_channels",
    "context_dim",
    "head_dim",
    "num_heads",
    "norm_groups",
    "linear_projection",
)


def network_keywords(unet: Mapping[str, Any]) -> dict[str, Any]:
    """``FrameControl`` keywords for a base of these ``VideoUNet`` keywords."""
    return {name: unet[name] for name in _NETWORK if name in unet}


def block_keywords(unet: Mapping[str, Any]) -> dict[str, Any]:
    """``frame_settings`` keywords for a base of these ``VideoUNet`` keywords."""
    return {name: unet[name] for name in _BLOCKS if name in unet}


def frame_settings(
    *,
    block_channels: Sequence[int] = (320, 640, 1280, 1280),
    context_dim: int = 1024,
    head_dim: int | None = 64,
    num_heads: int | None = None,
    norm_groups: int = 32,
    linear_projection: bool = True,
    device=None,
    dtype=None,
    operations: Any = None,
) -> BlockSettings:
    """Settings of blocks as wide as a base's, with nothing that works over time."""
    return BlockSettings(
        time_dim=4 * block_channels[0],
        context_dim=context_dim,
        head_dim=head_dim,
        num_heads=num_heads,
        norm_groups=norm_groups,
        linear_projection=linear_projection,
        temporal_convolution=False,
        temporal_transformer=False,
        motion=None,
        image_attention=False,
        image_gate=False,
        norm_over_frames=False,
        device=device,
        dtype=dtype,
        operations=operations or nn,
    )


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class BoxEncoder(nn.Module):
    """Boxes as pixels, a frame after the other, to features at the latents' resolution.

    Convolutions with SiLU that halve the side, two attentions over time at every place, and a
    convolution to the base's width (arXiv 2410.13830, section 3.3). The attentions know the
    frames' places in time by sines and cosines.

    Args:
        out_channels: width of the base's first resolution.
        settings: of the blocks.
        widths: of the stem; the side is halved from each to the next.
        heads: of the attentions over time.
    """

    def __init__(
        self, out_channels: int, settings: BlockSettings, *, widths: Sequence[int], heads: int
    ):
        super().__init__()
        self.conv_in = settings.conv(1, widths[0], 3)
        self.blocks = nn.ModuleList()
        for inside, outside in itertools.pairwise(widths):
            self.blocks.append(settings.conv(inside, inside, 3))
            self.blocks.append(settings.conv(inside, outside, 3, stride=2))
        last = widths[-1]
        grouped = replace(settings, norm_groups=math.gcd(settings.norm_groups, last))
        self.temporal = TemporalTransformer(last, last, heads, grouped, positions=True)
        self.conv_out = settings.conv(widths[-1], out_channels, 3)

    def forward(self, signal: torch.Tensor, attention: Attention | None = None) -> torch.Tensor:
        """``signal`` [B, T, H, W], 0 inside of boxes and 1 outside, to [B * T, C, h, w]."""
        h = functional.silu(self.conv_in(signal.flatten(0, 1)[:, None]))
        for conv in self.blocks:
            h = functional.silu(conv(h))
        nothing = h.new_zeros(0)  # layers over time read neither time step nor text
        run = Conditions(
            signal.shape[1], nothing, nothing, None, (), attention or plain_attention, nothing
        )
        return self.conv_out(self.temporal(h, run))


class FrameControl(nn.Module):
    """A ControlNet (arXiv 2302.05543) that sees each frame alone: the base's way down and middle.

    Its outputs start at zero, so that the base is what training begins from.

    Args:
        in_channels, block_channels, layers_per_block, attention_levels: the base's.
        settings: of its blocks, see ``frame_settings``.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        block_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, False),
        settings: BlockSettings,
    ):
        super().__init__()
        first, last = block_channels[0], block_channels[-1]
        self.channels = first
        self.conv_in = settings.conv(in_channels, first, 3)
        rest = (settings.device, settings.dtype, settings.operations)
        self.time_embedding = TimestepEmbedding(first, settings.time_dim, *rest)
        indices = itertools.count()
        self.down_blocks, widths = down_levels(
            block_channels, layers_per_block, attention_levels, settings, indices
        )
        self.mid_block = Middle(last, settings, indices)
        self.spatial_count = next(indices)
        self.controlnet_down_blocks = nn.ModuleList(
            _zeroed(settings.conv(width, width, 1)) for width in widths
        )
        self.controlnet_mid_block = _zeroed(settings.conv(last, last, 1))

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        hint: torch.Tensor,
        attention: Attention | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What is added to the base's skip connections, first to last, and after its middle.

        Args:
            x: latents [B, C, T, h, w].
            timestep: [B], 0..999.
            context: text features [B, L, D].
            hint: ``BoxEncoder``'s features [B * T, C, h, w].
            attention: a host's own, see ``VideoUNet``.
        """
        time = self.time_embedding(timestep_embedding(timestep, self.channels).to(x.dtype))
        run = Conditions(
            x.shape[2],
            functional.silu(time),
            context,
            None,
            (1.0,) * self.spatial_count,
            attention or plain_attention,
            context,
        )
        h = self.conv_in(x.transpose(1, 2).flatten(0, 1)) + hint
        skips = go_down(self.down_blocks, h, run)
        middle = self.mid_block(skips[-1], run)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return down, self.controlnet_mid_block(middle)
