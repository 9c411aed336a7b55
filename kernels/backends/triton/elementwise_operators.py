"""The element-wise kernels as operators of torch: traceable, with gradients through plain torch.

Runs travel as one flat list of integers (start, stop, row, start, ...), as schemas know no tuples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .elementwise import launch_adaln_modulate, launch_gated_residual, launch_qk_layer_norm
from .namespace import NAMESPACE


@torch.library.custom_op(f"{NAMESPACE}::qk_layer_norm", mutates_args=())
def qk_layer_norm(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of q [B, H, N, D] and k [B, H, M, D] over D = 32, 64 or 128: contiguous copies."""
    return launch_qk_layer_norm(q, k, weight_q, bias_q, weight_k, bias_k, eps)


@qk_layer_norm.register_fake
def _(q, k, weight_q, bias_q, weight_k, bias_k, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op(f"{NAMESPACE}::adaln_modulate", mutates_args=())
def adaln_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    runs: Sequence[int],
    eps: float,
) -> Tensor:
    """LayerNorm(x) * (1 + scale_row) + shift_row: [B, N, C], rows [B, R, C]."""
    return launch_adaln_modulate(x, weight, bias, shift, scale, runs, eps)


@adaln_modulate.register_fake
def _(x, weight, bias, shift, scale, runs, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op(f"{NAMESPACE}::gated_residual", mutates_args=())
def gated_residual(x: Tensor, y: Tensor, gate: Tensor, runs: Sequence[int]) -> Tensor:
    """x + gate_row * y: [B, N, C], rows [B, R, C]."""
    out = y.new_empty(y.shape)
    launch_gated_residual(x, y, gate, runs, out)
    return out


@gated_residual.register_fake
def _(x, y, gate, runs):
    return y.new_empty(y.shape)


@torch.library.custom_op(f"{NAMESPACE}::gated_residual_", mutates_args=("y",))
def gated_residual_(x: Tensor, y: Tensor, gate: Tensor, runs: Sequence[int]) -> None:
    """y becomes x + gate_row * y; y is contiguous. Has no gradients."""
    launch_gated_residual(x, y, gate, runs, y)


@gated_residual_.register_fake
def _(x, y, gate, runs):
    return None


def _setup_qk(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_qk(ctx, grad_q, grad_k):
    q, k, weight_q, bias_q, weight_k, bias_k = ctx.saved_tensors
    q, grad_weight_q, grad_bias_q = _layer_norm_backward(grad_q, q, weight_q, bias_q, ctx.eps)
    k, grad_weight_k, grad_bias_k = _layer_norm_backward(grad_k, k, weight_k, bias_k, ctx.eps)
    return q, k, grad_weight_q, grad_bias_q, grad_weight_k, grad_bias_k, None


def _setup_adaln(ctx, inputs, output):
    *tensors, ctx.runs, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_adaln(ctx, grad):
    x, weight, bias, shift, scale = ctx.saved_tensors
    normed = torch.layer_norm(x, x.shape[-1:], _like(weight, x), _like(bias, x), ctx.eps)
    grad_normed = grad * (1 + _by_token(scale, ctx.runs, grad))
    grads = _layer_norm_backward(grad_normed, x, weight, bias, ctx.eps)
    grad_shift = _sum_by_row(grad, ctx.runs, shift)
    grad_scale = _sum_by_row(grad * normed, ctx.runs, scale)
    return *grads, grad_shift, grad_scale, None, None


def _setup_gate(ctx, inputs, output):
    x, y, gate, ctx.runs = inputs
    ctx.save_for_backward(y, gate)


def _backward_gate(ctx, grad):
    y, gate = ctx.saved_tensors
    grad_y = grad * _by_token(gate, ctx.runs, grad)
    return grad, grad_y, _sum_by_row(grad * y, ctx.runs, gate), None


qk_layer_norm.register_autograd(_backward_qk, setup_context=_setup_qk)
adaln_modulate.register_autograd(_backward_adaln, setup_context=_setup_adaln)
gated_residual.register_autograd(_backward_gate, setup_context=_setup_gate)


def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    shape = x.shape[-1:]
    parameters = _like(weight, x), _like(bias, x)
    _, mean, deviation = torch.native_layer_norm(x, shape, *parameters, eps)
    wanted = [True, weight is not None, bias is not None]
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x, shape, mean, deviation, *parameters, wanted
    )
    return grad, _like(grad_weight, weight), _like(grad_bias, bias)


def _by_token(rows: Tensor, runs: Sequence[int], like: Tensor) -> Tensor:
    """The row of every token: [B, N, C] of the type of ``like``."""
    parts = [
        rows[:, row : row + 1].expand(-1, stop - start, -1) for start, stop, row in _triples(runs)
    ]
    return torch.cat(parts, dim=1).to(like.dtype)


def _sum_by_row(x: Tensor, runs: Sequence[int], rows: Tensor) -> Tensor:
    """Sums of [B, N, C] over the tokens of each row, shaped as ``rows``."""
    sums: list[Tensor | None] = [None] * rows.shape[1]
    for start, stop, row in _triples(runs):
        part = x[:, start:stop].sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
        sums[row] = part if sums[row] is None else sums[row] + part
    empty = x.new_zeros(x.shape[0], x.shape[2])
    total = torch.stack([empty if part is None else part for part in sums], dim=1)
    # A row shared by the samples of a batch collects from all of them.
    return total.sum_to_size(rows.shape).to(rows.dtype)


def _triples(runs: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    return zip(runs[::3], runs[1::3], runs[2::3], strict=True)


def _like(x: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if x is None or other is None else x.to(other.dtype)
