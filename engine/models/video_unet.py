"""The video UNet: Stable Diffusion's UNet with temporal layers chosen by its settings.

One class for DynamiCrafter and ModelScope (temporal convolutions and transformers) and for Stable
Diffusion 1.5 with motion modules. Parameter names follow diffusers' ``UNet3DConditionModel`` and
``UNetMotionModel``; DynamiCrafter's image stream adds ``attn2.to_k_ip``, ``to_v_ip``, ``alpha``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...kernels import Attention
from .layered_transformer import TimestepEmbedding, timestep_embedding
from .video_blocks import (
    RESIDUAL_EPS,
    AfterAttention,
    BlockSettings,
    Conditions,
    Level,
    Middle,
    MotionSettings,
    SpatialTransformer,
    TemporalTransformer,
    apply_norm,
    down_levels,
    go_down,
    plain_attention,
)

# Heads of the temporal transformer right after the first convolution, in all published weights.
INITIAL_HEADS = 8


class VideoUNet(nn.Module):
    """Predicts noise or v for a clip of latents; the defaults are ModelScope's numbers.

    Args:
        in_channels, out_channels: latent channels; DynamiCrafter concatenates the image's 4.
        block_channels: width of each resolution, halving the side from one to the next.
        layers_per_block: residual blocks a resolution on the way down; one more on the way up.
        attention_levels: which resolutions have transformers; the middle always has.
        context_dim: width of text features and image tokens.
        head_dim, num_heads: width of an attention head, or their number: give one, None the other.
        norm_groups: groups of every GroupNorm.
        linear_projection: spatial transformers project tokens (SD 2), not pixels (SD 1.5).
        temporal_convolution: four convolutions over time after every residual block.
        temporal_transformer: one after every spatial transformer.
        initial_temporal_transformer: one after the first convolution.
        motion_modules: None, or ``MotionSettings`` as a mapping of plain values.
        image_attention: a second cross-attention, to image tokens (DynamiCrafter).
        image_gate: its learnt factor a layer.
        image_tokens_per_frame: so many tokens a frame are each frame's own; any other number of
            tokens is seen by all frames.
        scalar_embeddings: names of numbers added to the time embedding, such as "fps_embedding".
        norm_over_frames: residual blocks and the output take GroupNorm statistics over all frames.
        device, dtype, operations: ``operations`` is the namespace layers are built from,
            ``torch.nn`` or the host's.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        block_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, False),
        context_dim: int = 1024,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        norm_groups: int = 32,
        linear_projection: bool = True,
        temporal_convolution: bool = True,
        temporal_transformer: bool = True,
        initial_temporal_transformer: bool = True,
        motion_modules: Mapping[str, Any] | None = None,
        image_attention: bool = False,
        image_gate: bool = False,
        image_tokens_per_frame: int = 16,
        scalar_embeddings: Sequence[str] = (),
        norm_over_frames: bool = False,
        device=None,
        dtype=None,
        operations: Any = None,
    ):
        super().__init__()
        if (head_dim is None) == (num_heads is None):
            raise ValueError("give head_dim or num_heads, one of the two")
        if len(attention_levels) != len(block_channels):
            raise ValueError("attention_levels must say yes or no for every block_channels entry")
        rest = (device, dtype, operations or nn)
        first = block_channels[0]
        settings = BlockSettings(
            4 * first,
            context_dim,
            head_dim,
            num_heads,
            norm_groups,
            linear_projection,
            temporal_convolution,
            temporal_transformer,
            None if motion_modules is None else MotionSettings(**motion_modules),
            image_attention,
            image_gate,
            norm_over_frames,
            *rest,
        )
        self.channels, self.norm_over_frames = first, norm_over_frames
        self.image_attention = image_attention
        self.image_tokens_per_frame = image_tokens_per_frame
        self.conv_in = settings.conv(in_channels, first, 3)
        self.time_embedding = TimestepEmbedding(first, 4 * first, *rest)
        self.scalar_embeddings = tuple(scalar_embeddings)
        for name in self.scalar_embeddings:
            self.add_module(name, TimestepEmbedding(first, 4 * first, *rest))
        self.transformer_in = None
        if initial_temporal_transformer:
            dim = INITIAL_HEADS * head_dim if head_dim else first
            self.transformer_in = TemporalTransformer(first, dim, INITIAL_HEADS, settings)

        indices = itertools.count()
        self.down_blocks, skips = down_levels(
            block_channels, layers_per_block, attention_levels, settings, indices
        )
        width = block_channels[-1]
        self.mid_block = Middle(width, settings, indices)
        self.up_blocks = nn.ModuleList()
        for level, channels in reversed(list(enumerate(block_channels))):
            inputs = []
            for _ in range(layers_per_block + 1):
                inputs.append(width + skips.pop())
                width = channels
            resample = "upsamplers" if level > 0 else None
            attends = attention_levels[level]
            self.up_blocks.append(Level(inputs, channels, attends, settings, indices, resample))

        self.spatial_count = next(indices)
        self.conv_norm_out = settings.group_norm(first, RESIDUAL_EPS)
        self.conv_out = settings.conv(first, out_channels, 3)

    def spatial_transformers(self) -> list[SpatialTransformer]:
        """The ``spatial_count`` layers in forward order, as ``image_scale`` counts them."""
        found = [m for m in self.modules() if isinstance(m, SpatialTransformer)]
        return sorted(found, key=lambda layer: layer.index)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        *,
        image_context: torch.Tensor | None = None,
        scalars: Mapping[str, torch.Tensor] | None = None,
        image_scale: float | Sequence[float] = 1.0,
        down_residuals: Sequence[torch.Tensor] | None = None,
        mid_residual: torch.Tensor | None = None,
        attention: Attention | None = None,
        phrase: torch.Tensor | None = None,
        after_attention: AfterAttention | None = None,
    ) -> torch.Tensor:
        """One prediction for a clip.

        Args:
            x: latents [B, C_in, T, H, W], given channels concatenated.
            timestep: [B], 0..999.
            context: text features [B, L, D].
            image_context: image tokens [B, N, D]; with N = T * ``image_tokens_per_frame`` each
                frame sees its own, else every frame sees all. None leaves the image stream out.
            scalars: a number a clip, [B], for every name in ``scalar_embeddings``.
            image_scale: factor of the image stream, one for all spatial transformers or one each
                (``spatial_transformers`` gives their order).
            down_residuals: added to the skip connections, first to last, [B * T, C, h, w] each.
            mid_residual: added after the middle block.
            attention: a host's own attention, (q, k, v, scale) each [B, H, N, D].
            phrase: features [B, L, D] of the motion phrase, for motion modules that read one;
                None gives them ``context``.
            after_attention: sees and may replace what spatial transformers' attentions give.

        Returns:
            [B, C_out, T, H, W].
        """
        batch, frames = x.shape[0], x.shape[2]
        run = Conditions(
            frames,
            functional.silu(self._time(timestep, scalars or {}, x.dtype)),
            context,
            self._image_tokens(image_context, frames),
            self._scales(image_scale),
            attention or plain_attention,
            context if phrase is None else phrase,
            after_attention,
        )
        h = self.conv_in(x.transpose(1, 2).flatten(0, 1))
        if self.transformer_in is not None:
            h = self.transformer_in(h, run)
        skips = go_down(self.down_blocks, h, run)
        h = skips[-1]
        if down_residuals is not None:
            skips = [a + b for a, b in zip(skips, down_residuals, strict=True)]
        h = self.mid_block(h, run)
        if mid_residual is not None:
            h = h + mid_residual
        for level in self.up_blocks:
            for index in range(len(level.resnets)):
                h = level.layer(index, torch.cat([h, skips.pop()], dim=1), run)
            for resample in level.upsamplers:
                h = resample(h, skips[-1].shape[2:])
        h = apply_norm(self.conv_norm_out, h, frames, self.norm_over_frames)
        h = self.conv_out(functional.silu(h))
        return h.unflatten(0, (batch, frames)).transpose(1, 2)

    def _time(
        self, timestep: torch.Tensor, scalars: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Time embedding [B, E] with every scalar's embedding added."""
        time = self.time_embedding(timestep_embedding(timestep, self.channels).to(dtype))
        for name in self.scalar_embeddings:
            number = timestep_embedding(scalars[name], self.channels).to(dtype)
            time = time + getattr(self, name)(number)
        return time

    def _image_tokens(self, tokens: torch.Tensor | None, frames: int) -> torch.Tensor | None:
        """Tokens [B, N, D] as they are, or [B * T, n, D] where each frame has its own."""
        if tokens is None:
            return None
        if not self.image_attention:
            raise ValueError("image tokens were given to a network without image_attention")
        if tokens.shape[1] != frames * self.image_tokens_per_frame:
            return tokens
        return tokens.unflatten(1, (frames, -1)).flatten(0, 1)

    def _scales(self, image_scale: float | Sequence[float]) -> tuple[float, ...]:
        count = self.spatial_count
        if not isinstance(image_scale, Sequence):
            return (float(image_scale),) * count
        if len(image_scale) != count:
            raise ValueError(f"image_scale has {len(image_scale)} entries for {count} layers")
        return tuple(float(scale) for scale in image_scale)
