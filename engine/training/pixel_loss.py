"""The error of layers as they will be seen: decoded by the frozen autoencoder, outlines first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..models.layered_transformer import LayerSegment
from ..models.starter_autoencoder import StarterAutoencoder
from .autoencoder import edges


class PixelLoss:
    """Weighted squared error of decoded layers; gradients go through the decoder, not into it.

    Latents say little about which of their errors are seen: a matte's outline is a small part of
    them. LayerFlow has no such loss (its autoencoder is too large to train through); it is for
    small autoencoders.

    Args:
        autoencoder: the frozen one.
        weights: layer name to its weight; others are left out, and not decoded.
        edge_weight: extra weight of pixels whose neighbours differ.
    """

    def __init__(
        self, autoencoder: StarterAutoencoder, weights: Mapping[str, float], edge_weight: float
    ):
        self.autoencoder, self.edge_weight = autoencoder, edge_weight
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}

    def __call__(
        self,
        predicted: torch.Tensor,
        latents: torch.Tensor,
        amount: torch.Tensor,
        segments: Sequence[LayerSegment],
    ) -> torch.Tensor:
        """Mean over the layers' pixels of weight times error, 0 where no such layer is made.

        predicted, latents: [B, T, C, h, w], the made layers alone. amount: [B], each sample's
        weight. segments: of all layers in order, given ones too.
        """
        made = [segment for segment in segments if not segment.clean]
        frames = [segment.frames for segment in made]
        pairs = zip(made, predicted.split(frames, 1), latents.split(frames, 1), strict=True)
        total = predicted.new_zeros(())
        for segment, found, true in pairs:
            weight = self.weights.get(segment.name, 0.0)
            if not weight:
                continue
            with torch.no_grad():
                expected = self.autoencoder.decode(true).float()
                importance = 1 + self.edge_weight * edges(expected)
            error = (self.autoencoder.decode(found).float() - expected).square()
            each = (error * importance).mean((1, 2, 3, 4))
            total = total + weight * (each * amount).mean()
        return total
