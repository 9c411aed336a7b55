"""The video UNet's blocks: residual, spatial and temporal layers on frames [B * T, C, H, W].

Parameter names follow diffusers' ``UNet3DConditionModel`` and ``UNetMotionModel``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ...kernels import Attention
from .video_attention import (
    CrossAttention,
    FeedForward,
    PhraseAttention,
    SelfAttention,
    plain_attention,
)

__all__ = ["CrossAttention", "plain_attention"]

# GroupNorm eps of residual and temporal convolution blocks, and of transformers (golden files).
RESIDUAL_EPS, TRANSFORMER_EPS = 1e-5, 1e-6


class Site(NamedTuple):
    """An attention of a spatial transformer, as it is met in a forward.

    layer: the transformer's index in forward order. cross: its cross-attention, else its
    self-attention. size: (height, width) of the frames there; tokens are rows after each other.
    """

    layer: int
    cross: bool
    size: tuple[int, int]


AfterAttention = Callable[[Site, torch.Tensor], torch.Tensor]
"""(where, an attention's output [B * T, N, C]) -> what takes its place."""


@dataclass(frozen=True)
class Conditions:
    """What all blocks of one forward share.

    Attributes:
        frames: T; a batch of B clips is B * T frames, clip after clip.
        time: SiLU of the time embedding [B, E], with scalar embeddings added.
        text: text features [B, L, D].
        image: image tokens, [B, N, D] that all frames see, or [B * T, N, D] frame by frame.
        image_scales: factor of the image stream in each spatial transformer, in forward order.
        attention: (q, k, v, scale), each [B, H, N, D].
        phrase: features of the motion phrase [B, L, D]; read by motion modules made for it.
        after_attention: sees and may replace what spatial transformers' attentions give.
    """

    frames: int
    time: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor | None
    image_scales: tuple[float, ...]
    attention: Attention
    phrase: torch.Tensor
    after_attention: AfterAttention | None = None


@dataclass(frozen=True)
class MotionSettings:
    """AnimateDiff's motion modules (arXiv 2307.04725): temporal transformers with positions.

    Attributes:
        heads: attention heads, whatever the width.
        middle: one in the middle block too (v2); v1 and v3 have none there.
        norm_over_frames: GroupNorm statistics over all frames (diffusers) or frame by frame
            (the original code).
        phrase: cross-attention to the motion phrase after the two self-attentions
            (Follow-Your-Click's motion-augmented module).
    """

    heads: int = 8
    middle: bool = True
    norm_over_frames: bool = False
    phrase: bool = False


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of one network share, and the maker of their layers.

    Attributes are the constructor keywords of ``VideoUNet`` of the same names; ``time_dim`` is
    the time embedding's width.
    """

    time_dim: int
    context_dim: int
    head_dim: int | None
    num_heads: int | None
    norm_groups: int
    linear_projection: bool
    temporal_convolution: bool
    temporal_transformer: bool
    motion: MotionSettings | None
    image_attention: bool
    image_gate: bool
    norm_over_frames: bool
    device: Any
    dtype: torch.dtype | None
    operations: Any

    def heads(self, channels: int) -> int:
        """Attention heads at a width."""
        return self.num_heads or channels // self.head_dim

    def linear(self, inside: int, outside: int, bias: bool = True) -> nn.Module:
        return self.operations.Linear(
            inside, outside, bias=bias, device=self.device, dtype=self.dtype
        )

    def conv(self, inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Module:
        return self.operations.Conv2d(
            inside,
            outside,
            kernel,
            stride=stride,
            padding=kernel // 2,
            device=self.device,
            dtype=self.dtype,
        )

    def time_conv(self, channels: int) -> nn.Module:
        """Convolution over three frames at one place."""
        return self.operations.Conv3d(
            channels,
            channels,
            (3, 1, 1),
            padding=(1, 0, 0),
            device=self.device,
            dtype=self.dtype,
        )

    def group_norm(self, channels: int, eps: float) -> nn.Module:
        return self.operations.GroupNorm(
            self.norm_groups, channels, eps=eps, device=self.device, dtype=self.dtype
        )

    def layer_norm(self, channels: int) -> nn.Module:
        return self.operations.LayerNorm(channels, device=self.device, dtype=self.dtype)


def apply_norm(norm: nn.Module, x: torch.Tensor, frames: int, over_frames: bool) -> torch.Tensor:
    """GroupNorm of frames [B * T, C, H, W], its statistics a frame's or the whole clip's."""
    if not over_frames:
        return norm(x)
    clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
    return norm(clip).transpose(1, 2).flatten(0, 1)


class Residual(nn.Module):
    """Two convolutions with the time embedding between them."""

    def __init__(self, channels: int, out: int, settings: BlockSettings):
        super().__init__()
        self.norm_over_frames = settings.norm_over_frames
        self.norm1 = settings.group_norm(channels, RESIDUAL_EPS)
        self.conv1 = settings.conv(channels, out, 3)
        self.time_emb_proj = settings.linear(settings.time_dim, out)
        self.norm2 = settings.group_norm(out, RESIDUAL_EPS)
        self.conv2 = settings.conv(out, out, 3)
        self.conv_shortcut = settings.conv(channels, out, 1) if channels != out else None

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        norm = (run.frames, self.norm_over_frames)
        h = self.conv1(functional.silu(apply_norm(self.norm1, x, *norm)))
        # The time is a clip's, not a frame's: projected once for all frames.
        time = self.time_emb_proj(run.time)[:, None, :, None, None]
        h = (h.unflatten(0, (-1, run.frames)) + time).flatten(0, 1)
        h = self.conv2(functional.silu(apply_norm(self.norm2, h, *norm)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class TemporalConvolution(nn.Module):
    """Four convolutions over time, as in ModelScope's text-to-video (arXiv 2308.06571)."""

    def __init__(self, channels: int, settings: BlockSettings):
        super().__init__()
        for stage in range(1, 5):
            # From the second stage on there is a slot for dropout, which shifts the names.
            slot = [nn.Identity()] * (stage > 1)
            norm, conv = settings.group_norm(channels, RESIDUAL_EPS), settings.time_conv(channels)
            self.add_module(f"conv{stage}", nn.Sequential(norm, nn.SiLU(), *slot, conv))

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        clip = x.unflatten(0, (-1, run.frames)).transpose(1, 2)
        h = self.conv4(self.conv3(self.conv2(self.conv1(clip))))
        return x + h.transpose(1, 2).flatten(0, 1)


class SpatialBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the conditions, MLP."""

    def __init__(self, dim: int, settings: BlockSettings):
        super().__init__()
        heads = settings.heads(dim)
        self.norm1 = settings.layer_norm(dim)
        self.attn1 = SelfAttention(dim, heads, settings)
        self.norm2 = settings.layer_norm(dim)
        self.attn2 = CrossAttention(dim, heads, settings)
        self.norm3 = settings.layer_norm(dim)
        self.ff = FeedForward(dim, settings)

    def forward(
        self, x: torch.Tensor, run: Conditions, layer: int, size: tuple[int, int]
    ) -> torch.Tensor:
        """``x`` [B * T, N, C] of the transformer that is ``layer``, frames of ``size``."""
        after = run.after_attention or _as_it_is
        x = x + after(Site(layer, False, size), self.attn1(self.norm1(x), run))
        out = self.attn2(self.norm2(x), run, run.image_scales[layer])
        x = x + after(Site(layer, True, size), out)
        return x + self.ff(self.norm3(x))


def _as_it_is(site: Site, x: torch.Tensor) -> torch.Tensor:
    return x


class SpatialTransformer(nn.Module):
    """Attention within each frame; ``index`` counts these layers in forward order."""

    def __init__(self, channels: int, settings: BlockSettings, index: int):
        super().__init__()
        self.index, self.width = index, channels
        self.linear_projection = settings.linear_projection
        self.norm = settings.group_norm(channels, TRANSFORMER_EPS)
        self.proj_in = self._projection(channels, settings)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(channels, settings)])
        self.proj_out = self._projection(channels, settings)

    def _projection(self, channels: int, settings: BlockSettings) -> nn.Module:
        if self.linear_projection:
            return settings.linear(channels, channels)
        return settings.conv(channels, channels, 1)

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        h, (height, width) = self.norm(x), x.shape[2:]
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, run, self.index, (height, width))
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + (h if self.linear_projection else self.proj_out(h))


def frame_positions(frames: int, dim: int) -> torch.Tensor:
    """Sine-cosine positions [T, dim], sines at even channels (AnimateDiff)."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(frames)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class TemporalBlock(nn.Module):
    """Self-attention over the frames of one place, twice, and MLP.

    phrase: attention to the motion phrase before the MLP.
    """

    def __init__(
        self, dim: int, heads: int, settings: BlockSettings, positions: bool, phrase: bool
    ):
        super().__init__()
        self.positions = positions
        self.norm1 = settings.layer_norm(dim)
        self.attn1 = SelfAttention(dim, heads, settings)
        self.norm2 = settings.layer_norm(dim)
        self.attn2 = SelfAttention(dim, heads, settings)
        self.phrase_norm = settings.layer_norm(dim) if phrase else None
        self.phrase_attn = PhraseAttention(dim, heads, settings) if phrase else None
        self.norm3 = settings.layer_norm(dim)
        self.ff = FeedForward(dim, settings)

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        """``x`` [B * H * W, T, C]."""
        places = frame_positions(*x.shape[1:]).to(x) if self.positions else 0
        x = x + self.attn1(self.norm1(x) + places, run)
        x = x + self.attn2(self.norm2(x) + places, run)
        if self.phrase_attn is not None:
            x = x + self.phrase_attn(self.phrase_norm(x), run)
        return x + self.ff(self.norm3(x))


class TemporalTransformer(nn.Module):
    """Attention over time at each place; with positions it is a motion module."""

    def __init__(
        self,
        channels: int,
        dim: int,
        heads: int,
        settings: BlockSettings,
        positions: bool = False,
        norm_over_frames: bool = True,
        phrase: bool = False,
    ):
        super().__init__()
        self.norm_over_frames = norm_over_frames
        self.norm = settings.group_norm(channels, TRANSFORMER_EPS)
        self.proj_in = settings.linear(channels, dim)
        block = TemporalBlock(dim, heads, settings, positions, phrase)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = settings.linear(dim, channels)

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        h = apply_norm(self.norm, x, run.frames, self.norm_over_frames)
        h = h.unflatten(0, (-1, run.frames)).permute(0, 3, 4, 1, 2)
        places = h.shape[:3]
        h = self.proj_in(h.flatten(0, 2))
        for block in self.transformer_blocks:
            h = block(h, run)
        h = self.proj_out(h).unflatten(0, places)
        return x + h.permute(0, 3, 4, 1, 2).flatten(0, 1)


class Resample(nn.Module):
    """Halves a side by a strided convolution, or enlarges to a size and convolves."""

    def __init__(self, channels: int, settings: BlockSettings, down: bool):
        super().__init__()
        self.conv = settings.conv(channels, channels, 3, stride=2 if down else 1)

    def forward(self, x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
        if size is not None:
            x = functional.interpolate(x, size=size, mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by the temporal and attention layers.

    ``inputs`` are the residual blocks' input widths. ``resample`` is "downsamplers",
    "upsamplers" or None.
    """

    def __init__(
        self,
        inputs: list[int],
        channels: int,
        attends: bool,
        settings: BlockSettings,
        indices: Iterator[int],
        resample: str | None,
    ):
        super().__init__()
        count, s = len(inputs), settings
        self.resnets = nn.ModuleList(Residual(width, channels, s) for width in inputs)
        self.temp_convs = nn.ModuleList(
            TemporalConvolution(channels, s) for _ in range(count * s.temporal_convolution)
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(channels, s, next(indices)) for _ in range(count * attends)
        )
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(channels, channels, s.heads(channels), s)
            for _ in range(count * attends * s.temporal_transformer)
        )
        self.motion_modules = nn.ModuleList(
            motion_module(channels, s) for _ in range(count * (s.motion is not None))
        )
        self.downsamplers = nn.ModuleList(
            [Resample(channels, s, down=True)] if resample == "downsamplers" else []
        )
        self.upsamplers = nn.ModuleList(
            [Resample(channels, s, down=False)] if resample == "upsamplers" else []
        )

    def layer(self, index: int, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        """One residual block and what follows it."""
        x = self.resnets[index](x, run)
        for layers in (self.temp_convs, self.attentions, self.temp_attentions, self.motion_modules):
            if layers:
                x = layers[index](x, run)
        return x


def down_levels(
    channels: Sequence[int],
    layers: int,
    attention_levels: Sequence[bool],
    settings: BlockSettings,
    indices: Iterator[int],
) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the widths of what it leaves for the way up, first to last.

    channels: width of each resolution. layers: residual blocks a resolution.
    """
    made, width, skips = nn.ModuleList(), channels[0], [channels[0]]
    for level, wide in enumerate(channels):
        inputs = [width] + [wide] * (layers - 1)
        resample = "downsamplers" if level < len(channels) - 1 else None
        made.append(Level(inputs, wide, attention_levels[level], settings, indices, resample))
        skips += [wide] * (layers + (resample is not None))
        width = wide
    return made, skips


def go_down(levels: nn.ModuleList, h: torch.Tensor, run: Conditions) -> list[torch.Tensor]:
    """``h`` and what every layer of the way down makes of it; the last goes on to the middle."""
    skips = [h]
    for level in levels:
        for index in range(len(level.resnets)):
            skips.append(level.layer(index, skips[-1], run))
        for resample in level.downsamplers:
            skips.append(resample(skips[-1]))
    return skips


class Middle(nn.Module):
    """The lowest resolution: residual, attention and temporal layers, residual."""

    def __init__(self, channels: int, settings: BlockSettings, indices: Iterator[int]):
        super().__init__()
        s = settings
        self.resnets = nn.ModuleList(Residual(channels, channels, s) for _ in range(2))
        self.temp_convs = nn.ModuleList(
            TemporalConvolution(channels, s) for _ in range(2 * s.temporal_convolution)
        )
        self.attentions = nn.ModuleList([SpatialTransformer(channels, s, next(indices))])
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(channels, channels, s.heads(channels), s)
            for _ in range(s.temporal_transformer)
        )
        self.motion_modules = nn.ModuleList(
            motion_module(channels, s) for _ in range(s.motion is not None and s.motion.middle)
        )

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, run)
            if self.temp_convs:
                x = self.temp_convs[index](x, run)
            if index == 0:
                for layers in (self.attentions, self.temp_attentions, self.motion_modules):
                    for layer in layers:
                        x = layer(x, run)
        return x


def motion_module(channels: int, settings: BlockSettings) -> TemporalTransformer:
    """A motion module of a width."""
    motion = settings.motion
    return TemporalTransformer(
        channels,
        channels,
        motion.heads,
        settings,
        positions=True,
        norm_over_frames=motion.norm_over_frames,
        phrase=motion.phrase,
    )
