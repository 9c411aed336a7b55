"""The element-wise neighbours of segment attention: q/k LayerNorm, AdaLN and gates by segment.

Modulation and gate have two forms. Without autograd they write into memory that is theirs, run by
run, with neither a concatenation nor a gathered [B, N, C] copy of the parameters. With autograd,
or under a compiler, they are functional: split, compute, join, which also runs backward without
a scatter.

On CUDA without autograd one Triton kernel does each of q/k LayerNorm, AdaLN and gate, once it is
compiled; a compiler fuses the plain form itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends.triton import fused
from .layout import needs_graph

Runs = Sequence[tuple[int, int, int]]
"""(start, stop, row) stretches of tokens from 0 to N, as `SequenceLayout.runs` gives them."""


def qk_norm(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of queries and keys over the head size.

    Args:
        q, k: [B, H, N, D].
        weight_q, bias_q, weight_k, bias_k: [D], or None for no affine part.
    """
    if not needs_graph(q, k, weight_q, bias_q, weight_k, bias_k):
        normed = fused.qk_norm(q, k, weight_q, bias_q, weight_k, bias_k, eps)
        if normed is not None:
            return normed
    return _head_norm(q, weight_q, bias_q, eps), _head_norm(k, weight_k, bias_k, eps)


def adaln_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    runs: Runs,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm(x) * (1 + scale_row) + shift_row, the row chosen run by run.

    AdaLN of DiT (Peebles and Xie, arXiv:2212.09748), with a row a kind of segment.

    Args:
        x: [B, N, C].
        weight, bias: [C] of the LayerNorm, or None.
        shift, scale: [B, R, C].
        runs: (start, stop, row) stretches that cover the N tokens.

    Raises:
        ValueError: the runs do not cover the tokens.
    """
    if not needs_graph(x, weight, bias, shift, scale):
        _check_runs(runs, x.shape[1])
        modulated = fused.adaln_modulate(x, weight, bias, shift, scale, runs, eps)
        if modulated is not None:
            return modulated
    return modulate(_layer_norm(x, weight, bias, eps), shift, scale, runs)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor, runs: Runs) -> Tensor:
    """normed * (1 + scale_row) + shift_row: `adaln_modulate` after a LayerNorm made elsewhere.

    `normed` is consumed: without autograd its memory becomes the result.

    Args:
        normed: [B, N, C], fresh from the LayerNorm.
        shift, scale: [B, R, C].
        runs: (start, stop, row) stretches that cover the N tokens.

    Raises:
        ValueError: the runs do not cover the tokens.
    """
    _check_runs(runs, normed.shape[1])
    shift, factor = shift.to(normed.dtype), 1 + scale.to(normed.dtype)
    if not needs_graph(normed, shift, factor):
        for start, stop, row in runs:
            part = normed[:, start:stop]
            torch.addcmul(_row(shift, row), part, _row(factor, row), out=part)
        return normed
    parts = normed.split(_lengths(runs), dim=1)
    return _join(
        [
            torch.addcmul(_row(shift, row), part, _row(factor, row))
            for part, (_, _, row) in zip(parts, runs, strict=True)
        ]
    )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, runs: Runs) -> Tensor:
    """x + gate_row * y, the row chosen run by run.

    `y` is consumed: without autograd its memory becomes the result. `x` is left as it is.

    Args:
        x, y: [B, N, C].
        gate: [B, R, C].
        runs: (start, stop, row) stretches that cover the N tokens.

    Raises:
        ValueError: the runs do not cover the tokens.
    """
    _check_runs(runs, x.shape[1])
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y, gate = x.to(dtype), y.to(dtype), gate.to(dtype)
    if not needs_graph(x, y, gate):
        if fused.gated_residual(x, y, gate, runs) is not None:
            return y
        for start, stop, row in runs:
            part = y[:, start:stop]
            torch.addcmul(x[:, start:stop], _row(gate, row), part, out=part)
        return y
    lengths = _lengths(runs)
    parts = zip(x.split(lengths, dim=1), y.split(lengths, dim=1), runs, strict=True)
    return _join(
        [torch.addcmul(kept, _row(gate, row), added) for kept, added, (_, _, row) in parts]
    )


def _head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # Heads are usually a transposed view of a projection [B, N, H * D]: the LayerNorm of what lies
    # behind it neither copies nor changes the order in memory.
    behind = x.transpose(1, 2)
    if behind.is_contiguous():
        return _layer_norm(behind, weight, bias, eps).transpose(1, 2)
    return _layer_norm(x, weight, bias, eps)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _row(rows: Tensor, row: int) -> Tensor:
    return rows[:, row : row + 1]


def _lengths(runs: Runs) -> list[int]:
    return [stop - start for start, stop, _ in runs]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _check_runs(runs: Runs, length: int) -> None:
    position = 0
    for start, stop, _ in runs:
        if start != position:
            break
        position = stop
    if position != length or not runs:
        raise ValueError(f"the runs {tuple(runs)} do not cover {length} tokens one after another")
