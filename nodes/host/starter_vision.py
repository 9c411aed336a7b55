"""The animation starter's image encoder as a CLIP_VISION of the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from ...engine.models.starter_image import StarterImageEncoder


class StarterVision:
    """What the host's ``ClipVisionModel`` is to its nodes, over another network."""

    def __init__(self, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]):
        keywords = {key: value for key, value in settings.items() if key != "kind"}
        management = comfy.model_management
        self.load_device = management.text_encoder_device()
        offload = management.text_encoder_offload_device()
        self.model = StarterImageEncoder(**keywords, operations=comfy.ops.manual_cast)
        self.model.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
        self.model.eval().requires_grad_(False).to(offload)
        self.image_size = self.model.size
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.model, load_device=self.load_device, offload_device=offload
        )

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> comfy.clip_vision.Output:
        """Tokens of an IMAGE [B, H, W, 3]; ``crop`` takes the square in its middle."""
        comfy.model_management.load_model_gpu(self.patcher)
        pictures = image[..., :3].movedim(-1, 1).to(self.load_device).float() * 2 - 1
        if crop:
            side = min(pictures.shape[-2:])
            top, left = ((length - side) // 2 for length in pictures.shape[-2:])
            pictures = pictures[..., top : top + side, left : left + side]
        tokens = self.model(pictures).to(comfy.model_management.intermediate_device())
        output = comfy.clip_vision.Output()
        output["last_hidden_state"] = output["penultimate_hidden_states"] = tokens
        output["image_embeds"] = tokens.mean(1)
        output["image_sizes"] = [tuple(pictures.shape[1:])] * len(pictures)
        output["mm_projected"] = None
        return output

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()
