"""The video UNet's attention and feed-forward layers, on tokens [B, N, C]."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ...kernels import Attention

if TYPE_CHECKING:
    from .video_blocks import BlockSettings, Conditions


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Torch's own attention on [B, H, N, D]."""
    return functional.scaled_dot_product_attention(q, k, v, scale=scale)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, attention: Attention
) -> torch.Tensor:
    """Multi-head attention of q [B, N, C] over k, v [B, M, C]: [B, N, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = attention(q, k, v, q.shape[-1] ** -0.5)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of tokens [B, N, C] among themselves."""

    def __init__(self, dim: int, heads: int, settings: BlockSettings):
        super().__init__()
        self.heads = heads
        self.to_q = settings.linear(dim, dim, bias=False)
        self.to_k = settings.linear(dim, dim, bias=False)
        self.to_v = settings.linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([settings.linear(dim, dim)])

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        out = attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads, run.attention)
        return self.to_out[0](out)


class CrossAttention(nn.Module):
    """Attention of each frame's tokens to the text and, in DynamiCrafter, to the image.

    The two streams share the query and are added: ``text + scale * (tanh(alpha) + 1) * image``,
    the gate alpha learnt a layer where there is one (arXiv 2310.12190, equation 2).
    """

    def __init__(self, dim: int, heads: int, settings: BlockSettings):
        super().__init__()
        self.heads = heads
        self.to_q = settings.linear(dim, dim, bias=False)
        self.to_k = settings.linear(settings.context_dim, dim, bias=False)
        self.to_v = settings.linear(settings.context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([settings.linear(dim, dim)])
        if settings.image_attention:
            self.to_k_ip = settings.linear(settings.context_dim, dim, bias=False)
            self.to_v_ip = settings.linear(settings.context_dim, dim, bias=False)
        self.alpha = (
            nn.Parameter(torch.zeros((), device=settings.device, dtype=settings.dtype))
            if settings.image_gate
            else None
        )

    def forward(self, x: torch.Tensor, run: Conditions, image_scale: float) -> torch.Tensor:
        """``x`` [B * T, N, C]."""
        q = self.to_q(x)
        out = self._over(q, self.to_k(run.text), self.to_v(run.text), run)
        if run.image is not None and image_scale:
            image = self._over(q, self.to_k_ip(run.image), self.to_v_ip(run.image), run)
            if self.alpha is not None:
                image = image * (self.alpha.to(image).tanh() + 1)
            out = out + image * image_scale
        return self.to_out[0](out)

    def _over(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Conditions
    ) -> torch.Tensor:
        # Keys of a whole clip serve all its frames: the frames join the query's token axis, so
        # that they are projected once and not once a frame.
        joined = q.reshape(k.shape[0], -1, q.shape[-1])
        return attend(joined, k, v, self.heads, run.attention).reshape(q.shape)


class PhraseAttention(CrossAttention):
    """Attention of a motion module's tokens to the motion phrase.

    The new layer of Follow-Your-Click's motion-augmented module (arXiv 2403.08268, section 3.4).
    Its output starts at zero, so that a motion module without it is what training begins from.
    """

    def __init__(self, dim: int, heads: int, settings: BlockSettings):
        super().__init__(dim, heads, replace(settings, image_attention=False, image_gate=False))
        for parameter in self.to_out[0].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, run: Conditions) -> torch.Tensor:
        """``x`` [B * H * W, T, C], places of a clip one after the other."""
        out = self._over(self.to_q(x), self.to_k(run.phrase), self.to_v(run.phrase), run)
        return self.to_out[0](out)


class GatedProjection(nn.Module):
    """Linear to twice the width, one half gated by the other's GELU (erf form)."""

    def __init__(self, dim: int, out: int, settings: BlockSettings):
        super().__init__()
        self.proj = settings.linear(dim, 2 * out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """The token-wise MLP, four times as wide inside (``net.1`` is diffusers' dropout slot)."""

    def __init__(self, dim: int, settings: BlockSettings):
        super().__init__()
        inner, outer = GatedProjection(dim, 4 * dim, settings), settings.linear(4 * dim, dim)
        self.net = nn.ModuleList([inner, nn.Identity(), outer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))
