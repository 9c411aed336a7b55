"""Self-attention over a packed sequence of segments."""

from __future__ import annotations

from torch import Tensor

from .backends import Attention, Request
from .backends.reference import merge_attention_states
from .layout import needs_graph
from .plan import AttentionPlan
from .registry import select_backend

__all__ = ["merge_attention_states", "segment_attention"]


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    attention: Attention | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v over the keys that the plan lets each query see.

    Args:
        q, k, v: [B, H, N, D], N the layout's length.
        plan: from `plan_attention`.
        scale: factor of the scores; D^-0.5 by default.
        return_lse: also return the log-sum-exp of the scaled, biased scores.
        attention: a host's own attention (q, k, v, scale) to use where plain attention over
            some of the tokens is needed; queries and keys may differ in number.

    Returns:
        [B, H, N, D], and [B, H, N] in float32 (float64 for float64) with `return_lse`. A query
        that sees nothing gets 0 and -inf.

    Raises:
        ValueError: tensors that do not fit the plan.
        BackendUnavailableError: no backend can take the call.
    """
    expected = (plan.heads, plan.layout.length, plan.head_dim)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but the plan expects "
                f"(batch, heads, tokens, head size) = (B, {', '.join(map(str, expected))})"
            )
    request = Request(q.device, q.dtype, plan.head_dim, gradients=needs_graph(q, k, v))
    backend = select_backend(request)
    if scale is None:
        scale = plan.head_dim**-0.5
    out, lse = backend.segment_attention(q, k, v, plan, scale, return_lse, attention)
    return (out, lse) if return_lse else out
