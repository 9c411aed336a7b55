"""Which exact backend to try first for a plan: rules with their reasons, no measuring at run time.

The numbers behind the rules are in docs/performance.md and docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backends import Request
from .plan import AttentionPlan

# Calls of a fused attention that one plan may take before their launches and gathers cost more
# than a kernel that walks the runs itself.
MOST_CALLS = 8
# Keys a call must see to keep a GPU busy on its own.
FEWEST_KEYS = 512


@dataclass(frozen=True)
class Preference:
    """The backends in the order to try them, and why the first is first."""

    order: tuple[str, ...]
    reason: str


def preference(plan: AttentionPlan, request: Request) -> Preference:
    """Order the exact backends for one call.

    Torch's own kernels are as fast as hand-written ones on dense attention, so the segment kernel
    goes first only where they would need several calls, gathered keys or merged states.
    """
    slow, fast = ("dispatch", "triton", "reference"), ("triton", "dispatch", "reference")
    if request.device.type != "cuda":
        return Preference(slow, "no CUDA device: torch's attention on the visible keys")
    if request.gradients:
        return Preference(slow, "gradients: torch's attention has a fused backward")
    if request.dtype == torch.float32:
        return Preference(slow, "float32: the segment kernel takes two-byte types")
    if plan.is_full:
        return Preference(slow, "everything sees everything: torch's fastest dense kernel")
    if any(len(group.by_bias) > 1 for group in plan.groups):
        return Preference(fast, "biases differ between a query's keys: one pass, nothing to merge")
    calls = sum(len(group.queries) for group in plan.groups if group.runs)
    if calls > MOST_CALLS:
        return Preference(fast, f"{calls} stretches of queries: one launch instead of {calls}")
    fewest = min((group.key_length for group in plan.groups if group.runs), default=0)
    if fewest < FEWEST_KEYS:
        return Preference(fast, f"as few as {fewest} keys a query: one launch for all segments")
    return Preference(slow, "few large pieces: torch's fastest dense kernel on each")
