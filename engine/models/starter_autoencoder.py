"""The starters' own small video autoencoder: a few frames and 8x8 pixels to one latent position.

Frames are folded into channels in groups of four, or coded one by one (the animator's), so a group
is coded on its own and nothing depends on where one layer ends and the next begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, channel LayerNorm, pointwise MLP, residual (arXiv 2201.03545)."""

    def __init__(self, dim: int, kernel: int, expansion: int, operations: Any):
        super().__init__()
        self.depthwise = operations.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = operations.LayerNorm(dim, eps=1e-6)
        self.up = operations.Linear(dim, expansion * dim)
        self.down = operations.Linear(expansion * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm before each, residual.

    On CPUs whose matrix units take bf16 its backward pass is several times faster than a depthwise
    convolution's.
    """

    def __init__(self, dim: int, operations: Any):
        super().__init__()
        self.norm1 = operations.GroupNorm(8, dim, eps=1e-6)
        self.conv1 = operations.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = operations.GroupNorm(8, dim, eps=1e-6)
        self.conv2 = operations.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(y)))


class StarterAutoencoder(nn.Module):
    """Between pixels [B, F, 3, H, W] in [-1, 1] and latents [B, F/4, C, H/8, W/8].

    ``temporal_factor`` is how many frames make a latent one: 4 here and below, or 1. ``blocks`` are
    "depthwise" (``ConvNeXtBlock``) or "dense" (``ConvBlock``); ``encoder_blocks`` and
    ``decoder_blocks`` are at 8x8 pixels a position, ``fine_blocks`` of the decoder at 4x4.
    Latents are standardised a channel by running statistics. In training, ``bottleneck`` uses the
    batch's own statistics and adds noise, so the code is spread evenly over the channels and
    the decoder learns to draw clean sprites from the slightly wrong latents a sampler makes.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 12,
        temporal_factor: int = TEMPORAL_FACTOR,
        width: int = 112,
        encoder_blocks: int = 2,
        decoder_blocks: int = 4,
        fine_blocks: int = 1,
        blocks: str = "depthwise",
        operations: Any = None,
    ):
        super().__init__()
        operations = operations or nn
        if blocks not in ("depthwise", "dense"):
            raise ValueError(f"blocks must be depthwise or dense, not {blocks!r}")

        def block(dim: int, expansion: int) -> nn.Module:
            if blocks == "dense":
                return ConvBlock(dim, operations)
            return ConvNeXtBlock(dim, 5, expansion, operations)

        self.latent_channels, self.temporal_factor = latent_channels, temporal_factor
        half, quarter = width // 2, width // 4
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            operations.Conv2d(3 * temporal_factor * 16, half, 1),
            block(half, 2),
            nn.PixelUnshuffle(2),
            operations.Conv2d(4 * half, width, 1),
            *(block(width, 2) for _ in range(encoder_blocks)),
            operations.Conv2d(width, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            operations.Conv2d(latent_channels, width, 3, padding=1),
            *(block(width, 4) for _ in range(decoder_blocks)),
            operations.Conv2d(width, 4 * half, 1),
            nn.PixelShuffle(2),
            *(block(half, 2) for _ in range(fine_blocks)),
            operations.Conv2d(half, 4 * quarter, 3, padding=1),
            nn.PixelShuffle(2),
            nn.GELU(),
            operations.Conv2d(quarter, 3 * temporal_factor * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode_groups(self, clip: torch.Tensor) -> torch.Tensor:
        """Raw codes [B * F/4, C, H/8, W/8] of a clip [B, F, 3, H, W]."""
        frames, height, width = clip.shape[1], *clip.shape[-2:]
        if frames % self.temporal_factor or height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
            raise ValueError(
                f"clip of {frames} frames of {width}x{height}: frames must divide by "
                f"{self.temporal_factor}, sides by {SPATIAL_FACTOR}"
            )
        groups = clip.reshape(-1, 3 * self.temporal_factor, height, width)
        return self.encoder(groups)

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """Standardised latents [B, F/4, C, H/8, W/8] of pixels [B, F, 3, H, W] in [-1, 1]."""
        codes = self.encode_groups(clip)
        mean, std = self.latent_mean[:, None, None], self.latent_std[:, None, None]
        return ((codes - mean) / std).unflatten(0, (clip.shape[0], -1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [B, F, 3, H, W] in [-1, 1] of standardised latents [B, F/4, C, H/8, W/8]."""
        pixels = self.decoder(latents.flatten(0, 1))
        frames = latents.shape[1] * self.temporal_factor
        return pixels.reshape(latents.shape[0], frames, 3, *pixels.shape[-2:])

    def bottleneck(
        self, codes: torch.Tensor, noise: torch.Tensor, momentum: float = 0.02
    ) -> torch.Tensor:
        """Training step's latents: standardised by the batch, running statistics kept, noise added.

        ``codes`` and ``noise`` (already scaled) are [N, C, h, w].
        """
        mean = codes.float().mean((0, 2, 3))
        std = codes.float().std((0, 2, 3)) + 1e-4
        with torch.no_grad():
            self.latent_mean.lerp_(mean.to(self.latent_mean), momentum)
            self.latent_std.lerp_(std.to(self.latent_std), momentum)
        return (codes - mean[:, None, None]) / std[:, None, None] + noise
