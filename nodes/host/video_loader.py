"""Makes the host's MODEL, CLIP, CLIP_VISION and VAE of a DynamiCrafter checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...engine.animate_settings import AnimateSettings
from ...engine.checkpoints.dynamicrafter import (
    DynamiCrafterCheckpoint,
    open_dynamicrafter,
)
from ...engine.checkpoints.parts import FP8
from ...engine.errors import LayerLoomError
from ...engine.models.dynamicrafter import VARIANTS
from .loader import find_checkpoint
from .starter_text import starter_clip
from .starter_vae import StarterFrameVAE
from .starter_vision import StarterVision
from .video_model import FramesLatentFormat, OwnLatentFormat, VideoConfig, VideoModel

AUTO = "auto"
CHOICES = (AUTO, *VARIANTS)
# A weight that the host's own encoders are recognised by, with its size.
HOST_TEXT = ("text_model.encoder.layers.23.layer_norm1.weight", (1024,))
HOST_VISION = ("vision_model.encoder.layers.31.layer_norm1.weight", (1280,))
HOST_VAE = ("encoder.conv_in.weight", (128, 3, 3, 3))


@dataclass(frozen=True)
class LoadedAnimator:
    """A MODEL, and CLIP, CLIP_VISION and VAE or what stands in for those the file lacks.

    note: which published weights the file may be, where several look alike; else "".
    """

    model: object
    clip: object
    clip_vision: object
    vae: object
    note: str


def open_animator(name: str, variant: str = AUTO) -> DynamiCrafterCheckpoint:
    """A listed checkpoint, opened; reads names alone.

    Raises:
        LayerLoomError: no such file, or not one that animates pictures, or not of that variant.
    """
    opened = open_dynamicrafter(find_checkpoint(name), None if variant == AUTO else variant)
    if opened.info.image_projector is None:
        raise LayerLoomError(
            f"{name} holds no image projector (image_proj_model), without which no picture reaches "
            "the network; give the official file, a pruned one or UNet with projector."
        )
    return opened


def load_animator(name: str, variant: str = AUTO) -> LoadedAnimator:
    """All parts of a listed checkpoint.

    In place of those that the file lacks come blockers that say which loader of the host to use.
    """
    checkpoint = open_animator(name, variant)
    checkpoint.check()
    return LoadedAnimator(
        load_model(str(find_checkpoint(name)), variant),
        _clip(checkpoint) or _missing(name, "text encoder", "SD 2.x's (OpenCLIP) with CLIPLoader"),
        _vision(checkpoint)
        or _missing(name, "image encoder", "CLIP-ViT-H-14 (laion2B) with CLIPVisionLoader"),
        _vae(checkpoint) or _missing(name, "VAE", "Stable Diffusion's with VAELoader"),
        _note(checkpoint),
    )


def _note(checkpoint: DynamiCrafterCheckpoint) -> str:
    info = checkpoint.info
    if len(info.variants) < 2:
        return ""
    return (
        f"{checkpoint.store.name} may be {' or '.join(info.variants)}, whose weights look alike; "
        f"it is taken for {info.variant}: set the variant to say which."
    )


def load_model(path: str, variant: str = AUTO, disable_dynamic: bool = False):
    """The MODEL alone; the host calls this again where it needs a second copy."""
    checkpoint = open_dynamicrafter(path, None if variant == AUTO else variant)
    info, settings = checkpoint.info, AnimateSettings.of(checkpoint)
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    # The starters were measured in float32 and are small enough for it anywhere.
    starter = checkpoint.metadata.get("vae") is not None
    dtypes = [torch.float32] if starter else [torch.float16, torch.bfloat16, torch.float32]
    config = VideoConfig(info.unet, info.image_projector, _latent_format(checkpoint), dtypes)
    stored = getattr(torch, info.dtype)
    dtype = management.unet_dtype(
        model_params=info.parameters, supported_dtypes=dtypes, weight_dtype=stored
    )
    cast = management.unet_manual_cast(dtype, device, dtypes)
    config.set_inference_dtype(dtype, cast, device=device)
    model = VideoModel(config, settings)
    plain, core = comfy.model_patcher.ModelPatcher, comfy.model_patcher.CoreModelPatcher
    patcher = (plain if disable_dynamic else core)(
        model, load_device=device, offload_device=offload
    )
    # What 8-bit files keep in more bits (norms, biases) is not squeezed into 8.
    keep = None if dtype in FP8 else dtype
    state = dict(checkpoint.iter_part("unet", keep))
    if info.image_projector is not None:
        for key, tensor in checkpoint.iter_part("image_projector", keep):
            state[f"image_projector.{key}"] = tensor
    # Assigned, not copied: what the host has laid out for the weights was never touched.
    model.load_model_weights(state, "", assign=True)
    note_types = getattr(management, "archive_model_dtypes", None)
    if keep is None and note_types:
        # Noted when the network was built, all of one type; norms would be loaded as such.
        note_types(model.diffusion_model)
    if not management.is_device_cpu(offload):
        model.to(offload)
    patcher.cached_patcher_init = (load_model, (path, variant))
    return patcher


def _latent_format(checkpoint: DynamiCrafterCheckpoint):
    if checkpoint.metadata.get("vae") is None:
        return FramesLatentFormat()
    preview = checkpoint.metadata.get("preview") or {}
    return OwnLatentFormat(
        checkpoint.info.unet["out_channels"], preview.get("factors"), preview.get("bias")
    )


def _clip(checkpoint: DynamiCrafterCheckpoint):
    own = _own(checkpoint, "text_encoder")
    if own is not None:
        return starter_clip(own, checkpoint.part_state("text_encoder"))
    if not _holds(checkpoint, "text_encoder", *HOST_TEXT):
        return None
    return comfy.sd.load_text_encoder_state_dicts([checkpoint.part_state("text_encoder")])


def _vision(checkpoint: DynamiCrafterCheckpoint):
    own = _own(checkpoint, "image_encoder")
    if own is not None:
        return StarterVision(own, checkpoint.part_state("image_encoder"))
    if not _holds(checkpoint, "image_encoder", *HOST_VISION):
        return None
    return comfy.clip_vision.load_clipvision_from_sd(checkpoint.part_state("image_encoder"))


def _vae(checkpoint: DynamiCrafterCheckpoint):
    own = _own(checkpoint, "vae")
    if own is not None:
        return StarterFrameVAE(own, checkpoint.part_state("vae"))
    if not _holds(checkpoint, "vae", *HOST_VAE):
        return None
    return comfy.sd.VAE(sd=checkpoint.part_state("vae"))


def _own(checkpoint: DynamiCrafterCheckpoint, part: str):
    """Settings of a part that is the starter's own, not a published one."""
    return checkpoint.metadata.get(part) if part in checkpoint.info.parts else None


def _holds(
    checkpoint: DynamiCrafterCheckpoint, part: str, weight: str, shape: tuple[int, ...]
) -> bool:
    """Whether the file has a part in the size that the host builds."""
    source = checkpoint.plan.get(part, {}).get(weight)
    return source is not None and source.spec(checkpoint.store).shape == shape


def _missing(name: str, part: str, instead: str) -> ExecutionBlocker:
    return ExecutionBlocker(f"{name} holds no {part}; load {instead}.")
