"""Self-attention over a packed sequence of segments."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .backends import Attention, Backend, Request, dispatch
from .backends.reference import merge_attention_states
from .kv_cache import SegmentKVCache
from .layout import needs_graph
from .plan import AttentionPlan
from .registry import give_up, named_backend, select_backend

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
    kv_cache: SegmentKVCache | None = None,
    cache_key: Hashable = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v over the keys that the plan lets each query see.

    Args:
        q, k, v: [B, H, N, D], N the layout's length. With a plan `without_static` q has its
            `query_length` rows alone, and so have k and v with a `kv_cache`.
        plan: from `plan_attention`, or what `kv_cache.begin` returned.
        scale: factor of the scores; D^-0.5 by default.
        return_lse: also return the log-sum-exp of the scaled, biased scores.
        attention: a host's own attention (q, k, v, scale) to use where plain attention over
            some of the tokens is needed; queries and keys may differ in number.
        kv_cache: keeps the static segments' keys and values, and fills them in where the plan
            leaves these segments out. Not under autograd or a compiler.
        cache_key: whose keys and values these are, the index of the block for instance.

    Returns:
        [B, H, rows of q, D], and [B, H, rows] in float32 (float64 for float64) with `return_lse`.
        A query that sees nothing gets 0 and -inf.

    Raises:
        ValueError: tensors that do not fit the plan or what is kept.
        BackendUnavailableError: no backend can take the call.
    """
    rows = plan.query_length
    keys = plan.layout.length if kv_cache is None else rows
    for name, x, tokens in (("q", q, rows), ("k", k, keys), ("v", v, keys)):
        expected = (plan.heads, tokens, plan.head_dim)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but the plan expects "
                f"(batch, heads, tokens, head size) = (B, {', '.join(map(str, expected))})"
            )
    if kv_cache is not None:
        if needs_graph(q, k, v):
            raise ValueError("kv_cache is for inference: call under torch.no_grad, not compiled")
        k, v = kv_cache.keys_values(k, v, plan, cache_key)
    watched = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    request = Request(q.device, q.dtype, plan.head_dim, gradients=watched)
    scale = plan.head_dim**-0.5 if scale is None else scale
    if attention is not None and named_backend() is None:
        # A host's choice of attention goes before ours.
        backend = dispatch.BACKEND
    else:
        backend = select_backend(request, plan, (q, k, v))
    out, lse = _run(backend, q, k, v, plan, scale, return_lse, attention)
    return (out, lse) if return_lse else out


def _run(backend: Backend, *call: object) -> tuple[Tensor, Tensor | None]:
    """Run a call; where a kernel of ours fails, log it once and let torch's attention do it."""
    if backend is dispatch.BACKEND or torch.compiler.is_compiling():
        return backend.segment_attention(*call)
    try:
        return backend.segment_attention(*call)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Compilers, drivers and optional packages raise what they like.
        if not give_up(backend, error):
            raise
    return dispatch.BACKEND.segment_attention(*call)
