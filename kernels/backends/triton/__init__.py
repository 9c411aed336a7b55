"""The Triton backend: one kernel for all segment masks. Triton itself is imported when needed."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ...plan import AttentionPlan
from ...tables import run_table
from .. import Attention, Backend, Constraints
from .compile import INTERPRETED, failure, ready, wait

# Looked up once, and where a compiler need not trace it.
_INSTALLED = importlib.util.find_spec("triton") is not None


def _probe() -> str | None:
    if not _INSTALLED:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "not measured on AMD devices"
    return None


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    return_lse: bool,
    attention: Attention | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the segment kernel; the host's ``attention`` is not used."""
    from .attention import config_for
    from .operators import segment_attention as operator

    config = config_for(plan.head_dim, INTERPRETED)
    table = run_table(plan, config.block_m, q.device)
    out, lse = operator(*(_last_contiguous(x) for x in (q, k, v)), *table, scale)
    return out, lse if return_lse else None


def prepare(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, must: bool) -> str | None:
    """Why the kernel cannot run this call yet, or None; with ``must`` it is compiled now."""
    if torch.compiler.is_compiling():
        return None
    from .operators import compile_variant, variant

    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    key = variant(q, k, v)

    def compile() -> None:
        compile_variant(q, k, v, plan)

    if must:
        wait(key, compile)
    elif not ready(key, compile):
        return failure(key) or "its kernel is still being compiled"
    return None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


BACKEND = Backend(
    "triton",
    Constraints(
        devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
        # The interpreter also takes float32, where a wrong kernel has no rounding to hide behind.
        dtypes=(torch.float16, torch.bfloat16) + ((torch.float32,) if INTERPRETED else ()),
        head_dims=(32, 64, 128),
        min_capability=(8, 0),
    ),
    _probe,
    segment_attention,
    prepare,
)
