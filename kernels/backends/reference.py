"""Segment attention written out in plain torch: the oracle the other backends are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import AttentionPlan
from . import Attention, Backend, Constraints

QUERY_CHUNK = 1024
"""Query rows whose scores are held at a time: bounds memory at QUERY_CHUNK * N a head."""


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    return_lse: bool,
    attention: Attention | None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T * scale + dense mask) v, accumulated in float32 or better.

    The host's `attention` is not used: this is what it would be compared with.
    """
    outs, lses = [], []
    for start in range(0, max(1, q.shape[2]), QUERY_CHUNK):
        rows = slice(start, min(start + QUERY_CHUNK, q.shape[2]))
        bias = None
        if plan.mask is not None:
            bias = plan.to_dense_mask(q.device, accumulator(q.dtype), rows)
        out, lse = attend_explicit(q[:, :, rows], k, v, scale, bias)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if return_lse else None


def attend_explicit(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores: [B, H, N, D] and [B, H, N].

    A query whose keys are all hidden (bias -inf) gets 0 and -inf, with zero gradients.
    """
    wide = accumulator(q.dtype)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
        hidden = torch.isneginf(scores).all(dim=-1, keepdim=True)
        # A row of -inf alone would make softmax (and its gradient) NaN.
        probabilities = scores.masked_fill(hidden, 0.0).softmax(dim=-1).masked_fill(hidden, 0.0)
        lse = scores.masked_fill(hidden, 0.0).logsumexp(dim=-1)
        lse = lse.masked_fill(hidden.squeeze(-1), -torch.inf)
    else:
        probabilities = scores.softmax(dim=-1)
        lse = scores.logsumexp(dim=-1)
    return (probabilities @ v.to(wide)).to(v.dtype), lse


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys into attention over their union.

    With weights w_i = exp(lse_i - lse), lse = log sum_i exp(lse_i): out = sum_i w_i out_i (the
    rescaling of Milakov and Gimelshein, arXiv:1805.02867). Where every lse is -inf the output is
    0 and the lse -inf.

    Args:
        outs: [B, H, N, D] each.
        lses: [B, H, N] each, natural logarithm.

    Raises:
        ValueError: no states, or not one lse an output.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"expected one lse an output, got {len(outs)} and {len(lses)}")
    stacked = torch.stack(tuple(lses))
    peak = stacked.amax(dim=0)
    safe = peak.masked_fill(torch.isneginf(peak), 0.0)
    weights = (stacked - safe).exp()
    total = weights.sum(dim=0)
    inverse = torch.where(total > 0, 1.0 / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    merged = (weights[0] * inverse).unsqueeze(-1) * outs[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        merged = merged + (weight * inverse).unsqueeze(-1) * out
    return merged.to(outs[0].dtype), total.log() + safe


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _probe() -> str | None:
    return None


BACKEND = Backend("reference", Constraints(), _probe, segment_attention)
