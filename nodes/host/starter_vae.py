"""The starters' autoencoders as VAEs of the host: clip by clip, and frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

from ...engine.models.starter_autoencoder import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    StarterAutoencoder,
)

# Bytes of activations a pixel of one frame, measured on the widest stage in float32.
BYTES_A_PIXEL = 1200


class HostAutoencoder(StarterAutoencoder):
    """The same network on the host's axes: pixels [B, 3, F, H, W], latents [B, C, T, h, w]."""

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """Latents of a clip; a number of frames that does not divide is filled with the last."""
        clip = clip.transpose(1, 2)
        missing = -clip.shape[1] % TEMPORAL_FACTOR
        if missing:
            clip = torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return super().encode(clip).transpose(1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents.transpose(1, 2)).transpose(1, 2)


class HostFrameAutoencoder(StarterAutoencoder):
    """The same on frames: pixels [N, 3, H, W], latents [N, C, h, w]."""

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().encode(pictures[:, None])[:, 0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents[:, None])[:, 0]


class StarterVAE(comfy.sd.VAE):
    """What the host's VAE is, built from a network and its weights instead of detected keys."""

    network = HostAutoencoder

    def __init__(self, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]):
        keywords = {key: value for key, value in settings.items() if key != "kind"}
        self.first_stage_model = self.network(**keywords, operations=comfy.ops.manual_cast)
        self.first_stage_model.eval().requires_grad_(False)
        self.latent_channels, self.output_channels = keywords["latent_channels"], 3
        self._set_axes()
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes = [torch.float32]
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = self.size = None
        self.disable_offload = self.not_video = self.handles_tiling = False
        self.crop_input, self.audio_sample_rate = True, 44100
        management = comfy.model_management
        self.device = management.vae_device()
        self.output_device = management.intermediate_device()
        self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=management.vae_offload_device(),
        )
        self.first_stage_model.load_state_dict(dict(weights), strict=True)
        self.model_size()

    def _set_axes(self) -> None:
        """How latents lie to pixels, and what a call costs."""
        self.latent_dim = 3
        factors = (SPATIAL_FACTOR, SPATIAL_FACTOR)
        self.downscale_ratio = (lambda frames: -(-frames // TEMPORAL_FACTOR), *factors)
        self.upscale_ratio = (lambda frames: frames * TEMPORAL_FACTOR, *factors)
        self.downscale_index_formula = self.upscale_index_formula = (TEMPORAL_FACTOR, *factors)
        self.memory_used_encode = lambda shape, dtype: BYTES_A_PIXEL * math.prod(shape[-3:])
        self.memory_used_decode = lambda shape, dtype: (
            BYTES_A_PIXEL * math.prod(shape[-3:]) * TEMPORAL_FACTOR * SPATIAL_FACTOR**2
        )


class StarterFrameVAE(StarterVAE):
    """The animation starter's, which codes each frame alone, as Stable Diffusion's does."""

    network = HostFrameAutoencoder

    def _set_axes(self) -> None:
        self.latent_dim = 2
        self.downscale_ratio = self.upscale_ratio = SPATIAL_FACTOR
        self.downscale_index_formula = self.upscale_index_formula = None
        self.memory_used_encode = lambda shape, dtype: BYTES_A_PIXEL * math.prod(shape[-2:])
        self.memory_used_decode = lambda shape, dtype: (
            BYTES_A_PIXEL * math.prod(shape[-2:]) * SPATIAL_FACTOR**2
        )
