"""Where a network runs, and from what size on memory counts more than one call."""

from __future__ import annotations

import torch

from .errors import LayerLoomError

# Networks above this run in bfloat16 unless told otherwise; starters stay in float32.
LARGE = 100_000_000


def pick_device(name: str | None) -> torch.device:
    """The named device, or the first GPU, or the CPU; LayerLoomError when it cannot be had."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LayerLoomError(f"The device {name!r} cannot be used here; try cpu.") from error
    return torch.device(name)
