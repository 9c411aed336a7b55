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
    from .operators import config_on
    from .operators import segment_attention as operator

    table = run_table(plan, config_on(q.device, plan.head_dim).block_m, q.device)
    out, lse = operator(q, k, v, *table, scale)
    return out, lse if return_lse else None


def prepare(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, must: bool) -> str | None:
    """Why the kernel cannot run this call yet, or None; with ``must`` it is compiled now."""
    if torch.compiler.is_compiling():
        return None
    device, dtype, head_dim = q.device, q.dtype, plan.head_dim
    key = ("attention", device, dtype, head_dim)

    def compile() -> None:
        from .operators import launch_example

        launch_example(device, dtype, head_dim)

    if must:
        wait(key, compile)
    elif not ready(key, compile):
        return failure(key) or "its kernel is still being compiled"
    return None


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
