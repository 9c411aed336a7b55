"""Segment attention over torch's or the host's own attention: correct everywhere, fast if it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import needs_graph
from ..plan import AttentionPlan, KeyRun, QueryGroup
from . import Attention, Backend, Constraints
from .reference import QUERY_CHUNK, accumulator, attend_explicit, merge_attention_states


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    return_lse: bool,
    attention: Attention | None,
) -> tuple[Tensor, Tensor | None]:
    """Run every query group over its visible keys alone; no N x N mask is ever made.

    `attention` stands in for torch's wherever neither a bias inside a group nor the log-sum-exp
    is asked for.
    """
    if plan.is_full and not return_lse:
        return _attend(q, k, v, scale, attention), None
    stretches: list[tuple[int, Tensor, Tensor | None]] = []
    buffer = None
    if not needs_graph(q, k, v):
        # Heads last in memory, as SDPA returns them: joining the heads afterwards is a view.
        batch, heads, length, _ = q.shape
        out = v.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, length, dtype=accumulator(q.dtype))
        buffer = (out, lse)
    for group in plan.groups:
        for start, out, lse in _attend_group(q, k, v, group, scale, return_lse, attention):
            if buffer is None:
                stretches.append((start, out, lse))
                continue
            stop = start + out.shape[2]
            buffer[0][:, :, start:stop] = out
            if return_lse:
                buffer[1][:, :, start:stop] = lse
    if buffer is not None:
        return buffer[0], buffer[1] if return_lse else None
    if not stretches:
        return torch.zeros_like(q), _no_keys(q) if return_lse else None
    stretches.sort(key=lambda stretch: stretch[0])
    out = torch.cat([stretch[1] for stretch in stretches], dim=2)
    return out, torch.cat([stretch[2] for stretch in stretches], dim=2) if return_lse else None


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: QueryGroup,
    scale: float,
    return_lse: bool,
    attention: Attention | None,
) -> list[tuple[int, Tensor, Tensor | None]]:
    """(start, out, lse) of every stretch of a group's queries."""
    queries = [(start, q[:, :, start:stop]) for start, stop in group.queries]
    if not group.runs:
        return [(start, torch.zeros_like(x), _no_keys(x)) for start, x in queries]
    biases = group.by_bias
    if len(biases) == 1:
        bias, runs = biases[0]
        keys, values = _gather(k, runs), _gather(v, runs)
        if not return_lse:
            # A bias shared by all of a query's keys cancels in the softmax.
            return [(s, _attend(x, keys, values, scale, attention), None) for s, x in queries]
        states = [(start, *_attend_lse(x, keys, values, scale)) for start, x in queries]
        return [(start, out, lse + bias) for start, out, lse in states]
    # A CPU's kernel reads one row of biases for all queries, in its own type: one pass.
    one_pass = q.device.type == "cpu" and q.dtype == accumulator(q.dtype) and not return_lse
    if _has_fused_lse(q, k, v) and not one_pass:
        parts = [(bias, _gather(k, runs), _gather(v, runs)) for bias, runs in biases]
        merged = []
        for start, x in queries:
            states = [_attend_lse(x, keys, values, scale) for _, keys, values in parts]
            lses = [lse + part[0] for (_, lse), part in zip(states, parts, strict=True)]
            merged.append((start, *merge_attention_states([out for out, _ in states], lses)))
        return merged
    keys, values = _gather(k, group.runs), _gather(v, group.runs)
    row = _bias_row(group.runs, q)
    if return_lse:
        return [(start, *_attend_lse(x, keys, values, scale, row)) for start, x in queries]
    row = row.to(q.dtype)
    return [
        (
            start,
            F.scaled_dot_product_attention(
                x, keys, values, attn_mask=row.expand(*x.shape[:3], -1), scale=scale
            ),
            None,
        )
        for start, x in queries
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, attention: Attention | None) -> Tensor:
    if attention is not None:
        return attention(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _attend_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float, row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp: a fused kernel's where there is one, else written out."""
    if row is None and _has_fused_lse(q, k, v):
        if q.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, scale=scale
            )
            return out, lse
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return result[0], result[1]
    states = [attend_explicit(chunk, k, v, scale, row) for chunk in q.split(QUERY_CHUNK, dim=2)]
    if len(states) == 1:
        return states[0]
    return torch.cat([out for out, _ in states], 2), torch.cat([lse for _, lse in states], 2)


def _has_fused_lse(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has a kernel that gives the log-sum-exp here.

    Its log-sum-exp carries no gradient, so never when autograd watches.
    """
    if needs_graph(q, k, v) or q.dtype != k.dtype or q.dtype != v.dtype:
        return False
    if any(x.stride(-1) != 1 for x in (q, k, v)) or q.shape[-1] != v.shape[-1]:
        return False
    if q.device.type == "cpu":
        return True
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def _gather(x: Tensor, runs: Sequence[KeyRun]) -> Tensor:
    """The tokens of `runs`: a view if they are one stretch, whatever their biases."""
    stretches: list[tuple[int, int]] = []
    for run in runs:
        if stretches and stretches[-1][1] == run.start:
            stretches[-1] = (stretches[-1][0], run.stop)
        else:
            stretches.append((run.start, run.stop))
    parts = [x[:, :, start:stop] for start, stop in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _bias_row(runs: Sequence[KeyRun], like: Tensor) -> Tensor:
    """[1, 1, 1, keys]: the bias of every visible key, the same for all queries of a group."""
    row = torch.empty(sum(run.stop - run.start for run in runs), dtype=accumulator(like.dtype))
    start = 0
    for run in runs:
        row[start : start + run.stop - run.start] = run.bias
        start += run.stop - run.start
    return row.to(like.device).view(1, 1, 1, -1)


def _no_keys(q: Tensor) -> Tensor:
    return torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)


def _probe() -> str | None:
    return None


BACKEND = Backend("dispatch", Constraints(), _probe, segment_attention)
