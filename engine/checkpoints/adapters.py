"""Low-rank adapters (LoRA): folding them into the weights and taking them out again."""

from __future__ import annotations

import torch


def lora_delta(a: torch.Tensor, b: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """``scale * B A`` in float32 (or float64): what strength 1 adds to a weight [out, in].

    Args:
        a: [rank, in].
        b: [out, rank].
        scale: alpha / rank; None is LayerFlow's 1 / rank.
    """
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (b.to(kind) @ a.to(kind)) * (1 / a.shape[0] if scale is None else scale)


def fold(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """``W + strength * B A / rank`` (LayerFlow, arXiv 2506.04228; LoRA, arXiv 2106.09685).

    Computed in float32 or wider and rounded once to the weight's own type. ``weight`` is not
    changed; strength 0 returns it as it is.
    """
    if strength == 0:
        return weight
    delta = lora_delta(a, b)
    return (weight.to(delta.dtype) + strength * delta).to(weight.dtype)


def unfold(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """The weight before ``fold`` with the same strength.

    Exact up to rounding of the weight's type; to move a strength, fold the original weight anew.
    """
    return fold(weight, a, b, -strength)
