"""Attention in eight-bit integers by packages made for it: opt-in, and checked before trusted.

SageAttention (arXiv:2410.02367) and ComfyUI's comfy-kitchen quantise q and k. That changes the
result by more than rounding, so a user has to name these backends, and each checks its first calls
against exact attention on some of the queries.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..plan import AttentionPlan
from . import Attention, Backend, Constraints, dispatch
from .reference import attend_explicit

log = logging.getLogger("layerloom.kernels")

CHECKED_CALLS = 64
"""Calls a plan that are compared with exact attention: the first step's blocks, twice."""
CHECKED_ROWS = 32
WORST_NRMSE = 0.1
"""Root mean square of the error over that of the exact output; int8 stays near 0.02 to 0.05."""


class SelfChecked:
    """An approximate attention that proves itself on its first calls.

    Call it with (q, k, v, scale), each [B, H, N, D]. A result that is not finite or strays by more
    than ``WORST_NRMSE`` on sampled query rows is logged once; that call and all later ones are
    computed by torch's own attention.
    """

    def __init__(self, name: str, attention: Attention):
        self.name, self.attention = name, attention
        self.calls, self.reason = 0, None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.reason is None:
            out = self.attention(q, k, v, scale)
            if self.calls >= CHECKED_CALLS:
                return out
            self.calls += 1
            self.reason = stray(out, q, k, v, scale)
            if self.reason is None:
                return out
            log.warning("%s %s; exact attention is used instead.", self.name, self.reason)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def stray(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """How an attention's output fails against the exact one on evenly spaced query rows."""
    rows = torch.linspace(0, q.shape[2] - 1, min(CHECKED_ROWS, q.shape[2])).long().to(q.device)
    exact = attend_explicit(q[:, :, rows], k, v, scale)[0].float()
    given = out[:, :, rows].float()
    if not bool(torch.isfinite(given).all()):
        return "gave numbers that are not finite"
    error = ((given - exact).square().mean() / exact.square().mean().clamp(min=1e-20)).sqrt().item()
    return f"strays from exact attention by {error:.0%}" if error > WORST_NRMSE else None


def _sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)


def _comfy_kitchen(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from comfy_kitchen import int8_attention

    return int8_attention(q, k, v, scale=scale)


@lru_cache(maxsize=16)
def _checked(name: str, plan: AttentionPlan) -> SelfChecked:
    """One a plan: a new model or size is checked anew."""
    return SelfChecked(name, {"sage": _sage, "int8": _comfy_kitchen}[name])


def _segment_attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    return_lse: bool,
    attention: Attention | None,
) -> tuple[Tensor, Tensor | None]:
    return dispatch.segment_attention(q, k, v, plan, scale, return_lse, _checked(name, plan))


def _missing(package: str, install: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install {install})"
    return None if torch.cuda.is_available() else "there is no CUDA device"


_CONSTRAINTS = {
    "devices": ("cuda",),
    "dtypes": (torch.float16, torch.bfloat16),
    "gradients": False,
}
SAGE = Backend(
    "sage",
    Constraints(head_dims=(64, 96, 128), min_capability=(8, 0), **_CONSTRAINTS),
    partial(_missing, "sageattention", "sageattention"),
    partial(_segment_attention, "sage"),
    approximate=True,
)
COMFY_KITCHEN = Backend(
    "int8",
    Constraints(min_capability=(7, 5), **_CONSTRAINTS),
    partial(_missing, "comfy_kitchen", "comfy-kitchen"),
    partial(_segment_attention, "int8"),
    approximate=True,
)
