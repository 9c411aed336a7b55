"""Cuts a sprite out of an opaque clip whose background is known, strictly."""

from __future__ import annotations

import torch

from .sprite_checks import SMALLEST_AREA, Clip, as_float

# How far a pixel is from its background (0..1, length of the colour difference) to be surely no
# background; sprites are 0.45 or more away, the autoencoder's noise 0.1 or less.
CLEAR = 0.3
# Sprites nearer than this to their background could not be told from its noise.
NEAREST = 0.2


def cut_out(clip: Clip, background: Clip) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Alpha [F, H, W] of what is not background, and the sprite's own colour [3] or None.

    ``clip`` is [F, H, W, 3], ``background`` [H, W, 3] or [F, H, W, 3]. With colour c over
    background b a pixel of opacity a differs from b by a |c - b|, so a = |pixel - b| / |c - b|,
    at most 1. The sprite's colour is the median of all clear differences, whatever colour was
    asked for. Strict: whatever else differs from the background, a ghost at the old place or a
    smeared pattern, counts as sprite as far as it differs, and spoils its outline.
    None, and an alpha of zeros, where hardly anything differs.
    """
    frames, behind = as_float(clip), as_float(background).expand(as_float(clip).shape)
    apart = (frames - behind).norm(dim=-1)
    clear = apart > CLEAR
    if float(clear.float().mean()) < SMALLEST_AREA / 2:
        return torch.zeros_like(apart), None
    # The farther half of what is clear: edges are mixtures.
    inner = clear & (apart >= apart[clear].median())
    colour = frames[inner].median(dim=0).values
    full = (colour - behind).norm(dim=-1).clamp(min=NEAREST)
    return (apart / full).clamp(max=1), colour
