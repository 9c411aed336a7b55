"""The contract of an attention backend: what it can do, said as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""A host's own attention: (q, k, v, scale), each [B, H, N, D], to [B, H, N, D]."""


@dataclass(frozen=True)
class Request:
    """What one call asks of a backend."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    gradients: bool = False


@dataclass(frozen=True)
class Constraints:
    """What a backend can take; None is no limit.

    Args:
        devices: device types.
        dtypes: element types of q, k and v.
        head_dims: sizes of a head.
        min_capability: lowest CUDA compute capability.
        gradients: whether it can be trained through.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    min_capability: tuple[int, int] | None = None
    gradients: bool = True

    def refusal(self, request: Request) -> str | None:
        """Why a request does not fit, or None if it does."""
        if self.devices is not None and request.device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {request.device.type}"
        if self.dtypes is not None and request.dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {request.dtype}"
        if self.head_dims is not None and request.head_dim not in self.head_dims:
            return f"takes heads of {self.head_dims}, not of {request.head_dim}"
        if request.gradients and not self.gradients:
            return "has no gradients"
        if self.min_capability is not None and request.device.type == "cuda":
            capability = torch.cuda.get_device_capability(request.device)
            if capability < self.min_capability:
                return f"needs compute capability {self.min_capability}, this is {capability}"
        return None


@dataclass(frozen=True)
class Backend:
    """One implementation of segment attention.

    Args:
        name: how a user calls it.
        constraints: what it can take.
        probe: why it cannot run on this machine at all, or None if it can.
        segment_attention: (q, k, v, plan, scale, return_lse, attention) to (out, lse or None).
        prepare: (q, k, v, plan, must) to why this call cannot run now, or None; with `must` it
            takes the time it needs to be ready and raises where it never will be. None where
            there is nothing to prepare.
        approximate: whether results differ by more than rounding; such a backend runs only when a
            user names it.
    """

    name: str
    constraints: Constraints
    probe: Callable[[], str | None]
    segment_attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    prepare: Callable[..., str | None] | None = None
    approximate: bool = False
