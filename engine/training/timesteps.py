"""Draws the noise levels that a step trains on."""

from __future__ import annotations

import torch


def draw_times(
    batch: int,
    generator: torch.Generator,
    uniform: float = 1.0,
    mean: float = 0.0,
    spread: float = 1.0,
) -> torch.Tensor:
    """Times [batch] in [0, 1), one in each of ``batch`` equally likely slices.

    A share ``uniform`` of them is uniform, the rest logit-normal with mean and spread (Esser et
    al., arXiv 2403.03206, section 3.1). The expectation is that of independent draws, the variance
    smaller.
    """
    slices = torch.arange(batch) + torch.rand(batch, generator=generator)
    level = (slices / batch).clamp(1e-4, 1 - 1e-4)
    focused = torch.sigmoid(mean + spread * torch.special.ndtri(level))
    plain = torch.rand(batch, generator=generator) < uniform
    return torch.where(plain, level, focused)
