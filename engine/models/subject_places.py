"""Where in a subject's picture the places of its box lie.

Not in arXiv 2410.13830, whose reference attention finds a subject's parts by their looks alone: a
large model that has seen many things can, a small one learns colours and no outlines. With places
its queries and keys know where they are, the query's through its box. A network's settings say
whether it was trained so; the paper's own is without.
"""

from __future__ import annotations

import math

import torch

from ..conditioning.subjects import SHARE

# Waves an axis: the longest is four sides of the picture, each next one half as long.
WAVES = 5
CHANNELS = 4 * WAVES
# Beyond half a side outside of the picture everywhere is alike; so no wave comes round again.
_REACH = 1.0


def box_edges(masks: torch.Tensor) -> torch.Tensor:
    """Edges (x0, y0, x1, y1) in pixels, half-open, [..., 4] of boxes as pixels [..., H, W]."""
    edges = []
    for axis in (-2, -1):
        inside = (masks.amax(axis) > 0.5).float()
        edges.append((inside.argmax(-1), inside.shape[-1] - inside.flip(-1).argmax(-1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], -1).float()


def picture_places(size: tuple[int, int]) -> torch.Tensor:
    """Middles (x, y) of a picture's h x w places from its middle, in longer sides: [h * w, 2]."""
    longer = max(size)
    rows, columns = ((torch.arange(side) + 0.5 - side / 2) / longer for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def box_places(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The same for a clip's places, seen from its boxes: [B, S, T * h * w, 2].

    The picture shows its subject in the middle, ``SHARE`` of a side large (``on_white``); each box
    is taken for a subject that fills it.

    Args:
        masks: boxes as pixels [B, S, T, H, W].
        size: (h, w) of a layer.
    """
    height, width = masks.shape[-2:]
    x0, y0, x1, y1 = box_edges(masks)[..., None].unbind(-2)
    zoom = SHARE * torch.minimum(height / (y1 - y0), width / (x1 - x0))
    longer = max(height, width)
    middle = torch.stack([x0 + x1 - width, y0 + y1 - height], -1) / (2 * longer)
    places = (picture_places(size).to(masks.device) - middle) * zoom[..., None]
    return places.clamp(-_REACH, _REACH).flatten(2, 3)


def waves(places: torch.Tensor) -> torch.Tensor:
    """Sines and cosines [..., CHANNELS] of places [..., 2]; near places have similar ones."""
    rates = math.pi / 2 * 2.0 ** torch.arange(WAVES, device=places.device)
    angles = (places[..., None] * rates).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)
