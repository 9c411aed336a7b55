"""The layered video transformer: CogVideoX-style joint attention over one packed segment sequence.

Text segments come first, then one video segment a layer; they stay packed in one buffer through
all blocks. Parameter names follow diffusers' ``CogVideoXTransformer3DModel``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels import (
    Attention,
    AttentionPlan,
    Segment,
    SegmentKVCache,
    SegmentMask,
    SequenceLayout,
    adaln_modulate,
    gated_residual,
    modulate,
    plan_attention,
    qk_norm,
    segment_attention,
)

# Rows of an AdaLN modulation tensor [B, 2, C].
VIDEO_ROW, TEXT_ROW = 0, 1
# Layers that prompts describe, in the prompts' order.
PROMPTED = ("foreground", "background", "blended")
Runs = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class LayerSegment:
    """A run of latent frames on the time axis: one layer, or the given part of one.

    ``clean`` latents are given: the network reads them and returns nothing for them.
    """

    name: str
    frames: int
    clean: bool = False


def sincos_1d(dim: int, positions: torch.Tensor) -> torch.Tensor:
    """Sine-cosine table ``[len(positions), dim]`` in float64, base 10000, sines first."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_3d(
    dim: int,
    frames: int,
    height: int,
    width: int,
    spatial_interpolation: float = 1.875,
    temporal_interpolation: float = 1.0,
) -> torch.Tensor:
    """Absolute 3D positions ``[frames * height * width, dim]``, a quarter time, the rest space.

    The spatial part lists width before height; the time index runs on over the concatenated
    clip (CogVideoX, arXiv 2408.06072, section 2.2; LayerFlow keeps it).
    """
    spatial = dim // 4 * 3
    time = sincos_1d(dim - spatial, torch.arange(frames) / temporal_interpolation)
    across = sincos_1d(spatial // 2, torch.arange(width) / spatial_interpolation)
    down = sincos_1d(spatial // 2, torch.arange(height) / spatial_interpolation)
    grid = (frames, height, width)
    parts = (
        time[:, None, None].expand(*grid, -1),
        across[None, None].expand(*grid, -1),
        down[None, :, None].expand(*grid, -1),
    )
    return torch.cat(parts, dim=-1).flatten(0, 2).float()


def timestep_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding ``[B, dim]`` of timesteps ``[B]`` (0..999), cosines first."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear on the sinusoidal timestep: ``[B, C]`` to ``[B, time_embed_dim]``."""

    def __init__(self, dim: int, out: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        self.linear_1 = operations.Linear(dim, out, device=device, dtype=dtype)
        self.linear_2 = operations.Linear(out, out, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class PatchEmbed(nn.Module):
    """Latent patches, projected text and absolute positions, packed into one ``[B, N, C]``."""

    def __init__(
        self,
        dim: int,
        in_channels: int,
        patch_size: int,
        text_dim: int,
        spatial_interpolation: float,
        temporal_interpolation: float,
        position_table: tuple[int, int, int, int] | None,
        device=None,
        dtype=None,
        operations: Any = nn,
    ):
        super().__init__()
        self.dim = dim
        self.patch_size = patch_size
        self.interpolation = (spatial_interpolation, temporal_interpolation)
        self.position_table = tuple(position_table) if position_table else None
        self.proj = operations.Conv2d(
            in_channels, dim, patch_size, stride=patch_size, device=device, dtype=dtype
        )
        self.text_proj = operations.Linear(text_dim, dim, device=device, dtype=dtype)
        if self.position_table:
            text, frames, height, width = self.position_table
            size = text + frames * height * width
            self.pos_embedding = nn.Parameter(torch.zeros(1, size, dim, device=device, dtype=dtype))

    def positions(self, text: int, grid: tuple[int, int, int], like: torch.Tensor) -> torch.Tensor:
        """Positions ``[1, text + video, C]``: from the stored table where it covers the clip.

        A clip of another frame size than the table's gets computed sin-cos positions with zeros
        on text, as the published model was initialised with.
        """
        table = self.position_table
        frames, height, width = grid
        fits = table and table[0] == text and table[1] >= frames and table[2:] == (height, width)
        if fits:
            stored = self.pos_embedding[:, : text + frames * height * width]
            return stored.to(device=like.device, dtype=like.dtype)
        computed = torch.zeros(1, text + frames * height * width, self.dim)
        computed[0, text:] = sincos_3d(self.dim, frames, height, width, *self.interpolation)
        return computed.to(device=like.device, dtype=like.dtype)

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor, layer_embedding: torch.Tensor | None
    ) -> torch.Tensor:
        """``latents`` [B, T, C_in, H, W], ``text`` [B, P, L, D] -> packed ``[B, P*L + T*h*w, C]``.

        ``layer_embedding`` [P, C] is added to each prompt's tokens after their projection.
        """
        batch, frames = latents.shape[:2]
        video = self.proj(latents.flatten(0, 1))
        height, width = video.shape[-2:]
        video = video.flatten(2).transpose(1, 2).reshape(batch, -1, self.dim)
        words = self.text_proj(text)
        if layer_embedding is not None:
            words = words + layer_embedding[:, None]
        words = words.flatten(1, 2)
        positions = self.positions(words.shape[1], (frames, height, width), video)
        packed = torch.cat([words, video], dim=1)
        return packed + positions


class LayerEmbedding(nn.Module):
    """LayerFlow's prompt index embedding: Linear(1, C) then LayerNorm, on the scalars 0, 1, 2."""

    def __init__(self, dim: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        self.proj = operations.Linear(1, dim, device=device, dtype=dtype)
        self.norm = operations.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, count: int, like: torch.Tensor) -> torch.Tensor:
        index = torch.arange(count, device=like.device, dtype=like.dtype)
        return self.norm(self.proj(index[:, None]))


def is_plain(norm: nn.Module, x: torch.Tensor) -> bool:
    """Whether a LayerNorm is no more than its weights, as they are, for ``x``.

    Kernels may then take the weights; a host's layer casts, streams or patches them in `forward`,
    and hooks may do the same.
    """
    if type(norm) is not nn.LayerNorm or "forward" in norm.__dict__:
        return False
    if norm._forward_hooks or norm._forward_pre_hooks:
        return False
    weights = (norm.weight, norm.bias)
    return all(w is None or (w.device == x.device and w.dtype == x.dtype) for w in weights)


class ModulatedNorm(nn.Module):
    """AdaLN-zero: one LayerNorm, and shift, scale, gate for video and text tokens apart."""

    def __init__(
        self, time_dim: int, dim: int, eps: float, device=None, dtype=None, operations: Any = nn
    ):
        super().__init__()
        self.linear = operations.Linear(time_dim, 6 * dim, device=device, dtype=dtype)
        self.norm = operations.LayerNorm(dim, eps=eps, device=device, dtype=dtype)

    def forward(
        self, hidden: torch.Tensor, time: torch.Tensor, runs: Runs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised and modulated ``hidden`` [B, N, C], and the gate [B, 2, C] of its residual."""
        rows = self.linear(time).unflatten(-1, (2, 3, hidden.shape[-1]))
        shift, scale, gate = rows.unbind(2)
        norm = self.norm
        if is_plain(norm, hidden):
            weights = (norm.weight, norm.bias)
            return adaln_modulate(hidden, *weights, shift, scale, runs, norm.eps), gate
        return modulate(norm(hidden), shift, scale, runs), gate


class JointAttention(nn.Module):
    """Multi-head attention over the packed sequence, with LayerNorm on queries and keys."""

    def __init__(self, heads: int, head_dim: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        dim, kwargs = heads * head_dim, {"device": device, "dtype": dtype}
        self.heads = heads
        self.norm_q = operations.LayerNorm(head_dim, eps=1e-6, **kwargs)
        self.norm_k = operations.LayerNorm(head_dim, eps=1e-6, **kwargs)
        self.to_q = operations.Linear(dim, dim, **kwargs)
        self.to_k = operations.Linear(dim, dim, **kwargs)
        self.to_v = operations.Linear(dim, dim, **kwargs)
        self.to_out = nn.ModuleList([operations.Linear(dim, dim, **kwargs)])

    def forward(
        self,
        x: torch.Tensor,
        plan: AttentionPlan,
        attention: Attention | None = None,
        kv_cache: SegmentKVCache | None = None,
        cache_key: int | None = None,
    ) -> torch.Tensor:
        heads = (self.heads, x.shape[-1] // self.heads)
        q, k = self.to_q(x).unflatten(-1, heads), self.to_k(x).unflatten(-1, heads)
        norms = (self.norm_q, self.norm_k)
        if is_plain(self.norm_q, q) and is_plain(self.norm_k, k):
            weights = [weight for norm in norms for weight in (norm.weight, norm.bias)]
            q, k = qk_norm(q.transpose(1, 2), k.transpose(1, 2), *weights, self.norm_q.eps)
        else:
            q, k = (norm(part).transpose(1, 2) for norm, part in zip(norms, (q, k), strict=True))
        v = self.to_v(x).unflatten(-1, heads).transpose(1, 2)
        kept = {"kv_cache": kv_cache, "cache_key": cache_key}
        out = segment_attention(q, k, v, plan, attention=attention, **kept)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GELUProjection(nn.Module):
    """Linear then GELU in its tanh form."""

    def __init__(self, dim: int, out: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        self.proj = operations.Linear(dim, out, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The token-wise MLP, four times as wide inside (``net.1`` is diffusers' dropout slot)."""

    def __init__(self, dim: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        inner = GELUProjection(dim, 4 * dim, device, dtype, operations)
        outer = operations.Linear(4 * dim, dim, device=device, dtype=dtype)
        self.net = nn.ModuleList([inner, nn.Identity(), outer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Modulated attention and modulated MLP, each with a gated residual."""

    def __init__(
        self, heads: int, head_dim: int, time_dim: int, device=None, dtype=None, operations=nn
    ):
        super().__init__()
        dim, rest = heads * head_dim, (device, dtype, operations)
        self.norm1 = ModulatedNorm(time_dim, dim, 1e-5, *rest)
        self.attn1 = JointAttention(heads, head_dim, *rest)
        self.norm2 = ModulatedNorm(time_dim, dim, 1e-5, *rest)
        self.ff = FeedForward(dim, *rest)

    def forward(
        self,
        hidden: torch.Tensor,
        time: torch.Tensor,
        runs: Runs,
        plan: AttentionPlan,
        attention: Attention | None = None,
        kv_cache: SegmentKVCache | None = None,
        cache_key: int | None = None,
    ) -> torch.Tensor:
        x, gate = self.norm1(hidden, time, runs)
        x = self.attn1(x, plan, attention, kv_cache, cache_key)
        hidden = gated_residual(hidden, x, gate, runs)
        x, gate = self.norm2(hidden, time, runs)
        return gated_residual(hidden, self.ff(x), gate, runs)


class OutputNorm(nn.Module):
    """The last modulated LayerNorm: shift and scale from the time embedding."""

    def __init__(
        self, time_dim: int, dim: int, eps: float, device=None, dtype=None, operations: Any = nn
    ):
        super().__init__()
        self.linear = operations.Linear(time_dim, 2 * dim, device=device, dtype=dtype)
        self.norm = operations.LayerNorm(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = self.linear(time)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class LayeredTransformer(nn.Module):
    """Denoises several video layers at once (LayerFlow, arXiv 2506.04228, on CogVideoX-2B).

    The defaults are CogVideoX-2B's numbers. ``position_table`` = (text tokens, latent frames,
    patch rows, patch columns) keeps a stored position table; without it positions are computed.
    ``layer_embedding`` adds LayerFlow's prompt index to the text tokens. ``clean_embedding`` adds
    a learnt vector to the tokens of given layers (ours; off in published weights).
    ``output_norm_eps`` is 1e-6 in LayerFlow and 1e-5 in diffusers' CogVideoX.
    ``operations`` is the namespace layers are built from: ``torch.nn`` or the host's.
    """

    def __init__(
        self,
        *,
        num_layers: int = 30,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int = 16,
        time_embed_dim: int = 512,
        text_embed_dim: int = 4096,
        patch_size: int = 2,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        layer_embedding: bool = False,
        clean_embedding: bool = False,
        position_table: tuple[int, int, int, int] | None = None,
        output_norm_eps: float = 1e-6,
        device=None,
        dtype=None,
        operations: Any = None,
    ):
        super().__init__()
        operations = operations or nn
        rest = (device, dtype, operations)
        self.heads, self.head_dim = num_attention_heads, attention_head_dim
        self.dim = num_attention_heads * attention_head_dim
        self.patch_size, self.out_channels = patch_size, out_channels
        self.patch_embed = PatchEmbed(
            self.dim,
            in_channels,
            patch_size,
            text_embed_dim,
            spatial_interpolation_scale,
            temporal_interpolation_scale,
            position_table,
            *rest,
        )
        self.layer_embedding = LayerEmbedding(self.dim, *rest) if layer_embedding else None
        self.clean_embedding = (
            nn.Parameter(torch.zeros(self.dim, device=device, dtype=dtype))
            if clean_embedding
            else None
        )
        self.time_embedding = TimestepEmbedding(self.dim, time_embed_dim, *rest)
        self.transformer_blocks = nn.ModuleList(
            Block(num_attention_heads, attention_head_dim, time_embed_dim, *rest)
            for _ in range(num_layers)
        )
        self.norm_final = operations.LayerNorm(self.dim, eps=1e-5, device=device, dtype=dtype)
        self.norm_out = OutputNorm(time_embed_dim, self.dim, output_norm_eps, *rest)
        self.proj_out = operations.Linear(
            self.dim, patch_size * patch_size * out_channels, device=device, dtype=dtype
        )

    def layout(
        self, prompts: int, tokens: int, grid: tuple[int, int], segments: Sequence[LayerSegment]
    ) -> SequenceLayout:
        """The packed order: ``prompts`` text segments, then the layers on a ``grid`` of patches."""
        height, width = grid
        text = [
            Segment(f"text{i}", "text", tokens, layer=layer)
            for i, layer in zip(range(prompts), PROMPTED, strict=False)
        ]
        video = [
            Segment(
                name=s.name,
                kind="video",
                length=s.frames * height * width,
                layer=s.name.partition(".")[0],
                grid=(s.frames, height, width),
                clean=s.clean,
            )
            for s in segments
        ]
        return SequenceLayout((*text, *video))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        segments: Sequence[LayerSegment],
        clean: torch.Tensor | None = None,
        attention_mask: Callable[[SequenceLayout], SegmentMask] | SegmentMask | None = None,
        attention: Attention | None = None,
        kv_cache: SegmentKVCache | None = None,
    ) -> torch.Tensor:
        """Predict v for the noisy layers.

        Args:
            latents: noisy latents [B, T_noisy, C, H, W], the noisy segments' frames in order.
            timestep: [B], 0..999, the same for all tokens of a sample, given layers included.
            text: prompt features [B, prompts, tokens, D]; zeros for the unconditional branch.
            segments: the layers in their order on the time axis.
            clean: given latents [B, T_clean, C, H, W], or None when no segment is clean.
            attention_mask: which segment sees which, or what makes the mask of a layout; None is
                full attention, as published.
            attention: a host's own attention, (q, k, v, scale) each [B, H, N, D], used for plain
                attention over the visible tokens.
            kv_cache: computes given layers and prompts at its first step alone, where the mask
                lets them see nothing else (``clean_sees_clean``). Each step modulates them anew
                (AdaLN), so what is kept of another step is an approximation; off by default.
                Inference only; not used under ``torch.compile``.

        Returns:
            [B, T_noisy, C_out, H, W].
        """
        video = merge_clean(latents, clean, segments)
        batch, _, _, height, width = video.shape
        grid = (height // self.patch_size, width // self.patch_size)
        layout = self.layout(text.shape[1], text.shape[2], grid, segments)

        index = self.layer_embedding(text.shape[1], text) if self.layer_embedding else None
        hidden = self.patch_embed(video, text, index)
        if self.clean_embedding is not None:
            marks = [s.clean for s in layout.segments]
            lengths = torch.tensor([s.length for s in layout.segments])
            mark = torch.repeat_interleave(torch.tensor(marks), lengths).to(hidden)
            hidden = hidden + mark[:, None] * self.clean_embedding.to(hidden)

        time = self.time_embedding(timestep_embedding(timestep, self.dim).to(hidden.dtype))
        time = nn.functional.silu(time)
        mask = attention_mask(layout) if callable(attention_mask) else attention_mask
        plan = plan_attention(layout, mask, self.heads, self.head_dim, hidden.dtype, hidden.device)
        if kv_cache is not None and not torch.compiler.is_compiling():
            inputs = (text,) if clean is None else (clean, text)
            plan = kv_cache.begin(plan, len(self.transformer_blocks), inputs, timestep)
            # From here on static tokens are no more: neither attention nor MLP computes them.
            hidden, layout = plan.take_queries(hidden), plan.query_layout
        else:
            kv_cache = None
        runs = layout.runs(lambda s: TEXT_ROW if s.kind == "text" else VIDEO_ROW)
        for index, block in enumerate(self.transformer_blocks):
            hidden = block(hidden, time, runs, plan, attention, kv_cache, index)

        noisy = [
            hidden[:, part]
            for part, segment in zip(layout.slices, layout.segments, strict=True)
            if segment.kind == "video" and not segment.clean
        ]
        hidden = noisy[0] if len(noisy) == 1 else torch.cat(noisy, dim=1)
        hidden = self.proj_out(self.norm_out(self.norm_final(hidden), time))
        patch, (rows, columns) = self.patch_size, grid
        hidden = hidden.reshape(batch, -1, rows, columns, self.out_channels, patch, patch)
        return hidden.permute(0, 1, 4, 2, 5, 3, 6).reshape(
            batch, -1, self.out_channels, height, width
        )


def merge_clean(
    latents: torch.Tensor, clean: torch.Tensor | None, segments: Sequence[LayerSegment]
) -> torch.Tensor:
    """Put given latents at their slots among the noisy ones: [B, T, C, H, W]."""
    if clean is None:
        return latents
    parts, taken = [], {True: 0, False: 0}
    for segment in segments:
        source, start = (clean if segment.clean else latents), taken[segment.clean]
        parts.append(source[:, start : start + segment.frames].to(latents.dtype))
        taken[segment.clean] = start + segment.frames
    return torch.cat(parts, dim=1)
