"""Makes the host's MODEL of a checkpoint of video parts, and what the families' loaders share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...engine.checkpoints.parts import FP8, PartsCheckpoint
from .starter_text import starter_clip
from .starter_vae import StarterFrameVAE
from .video_model import FramesLatentFormat, OwnLatentFormat


def network_dtypes(checkpoint: PartsCheckpoint) -> list[torch.dtype]:
    """What a network computes in, best first."""
    # The starters were measured in float32 and are small enough for it anywhere.
    starter = checkpoint.metadata.get("vae") is not None
    return [torch.float32] if starter else [torch.float16, torch.bfloat16, torch.float32]


def latent_format(checkpoint: PartsCheckpoint) -> comfy.latent_formats.LatentFormat:
    """Stable Diffusion's latents, or those of a starter's own autoencoder."""
    if checkpoint.metadata.get("vae") is None:
        return FramesLatentFormat()
    preview = checkpoint.metadata.get("preview") or {}
    return OwnLatentFormat(
        checkpoint.info.unet["out_channels"], preview.get("factors"), preview.get("bias")
    )


def make_patcher(
    checkpoint: PartsCheckpoint,
    config: comfy.supported_models_base.BASE,
    build: Callable[[Any], comfy.model_base.BaseModel],
    prefixes: Mapping[str, str],
    again: tuple[Callable[..., Any], tuple[Any, ...]],
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with a checkpoint's weights, under the host's memory management.

    Args:
        config: the host's record, with the types that the network computes in.
        build: the model of a config.
        prefixes: what stands before the names of each part in the network; parts that the file
            lacks are left out.
        again: what the host calls, and with what, where it needs a second copy.
        disable_dynamic: the host's own wish for such a copy.
    """
    info, management = checkpoint.info, comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    dtypes = config.supported_inference_dtypes
    dtype = management.unet_dtype(
        model_params=info.parameters,
        supported_dtypes=dtypes,
        weight_dtype=getattr(torch, info.dtype),
    )
    cast = management.unet_manual_cast(dtype, device, dtypes)
    config.set_inference_dtype(dtype, cast, device=device)
    model = build(config)
    plain, core = comfy.model_patcher.ModelPatcher, comfy.model_patcher.CoreModelPatcher
    patcher = (plain if disable_dynamic else core)(
        model, load_device=device, offload_device=offload
    )
    # What 8-bit files keep in more bits (norms, biases) is not squeezed into 8.
    keep = None if dtype in FP8 else dtype
    state = {
        f"{prefix}{key}": tensor
        for part, prefix in prefixes.items()
        if part in checkpoint.plan
        for key, tensor in checkpoint.iter_part(part, keep)
    }
    # Assigned, not copied: what the host has laid out for the weights was never touched.
    model.load_model_weights(state, "", assign=True)
    note_types = getattr(management, "archive_model_dtypes", None)
    if keep is None and note_types:
        # Noted when the network was built, all of one type; norms would be loaded as such.
        note_types(model.diffusion_model)
    if not management.is_device_cpu(offload):
        model.to(offload)
    patcher.cached_patcher_init = again
    return patcher


def clip_of(checkpoint: PartsCheckpoint) -> comfy.sd.CLIP | None:
    """The CLIP of the text encoder that a file holds: a starter's own, or one the host knows."""
    if "text_encoder" not in checkpoint.info.parts:
        return None
    own, state = checkpoint.metadata.get("text_encoder"), checkpoint.part_state("text_encoder")
    return starter_clip(own, state) if own else comfy.sd.load_text_encoder_state_dicts([state])


def vae_of(checkpoint: PartsCheckpoint) -> comfy.sd.VAE | None:
    """The VAE that a file holds: a starter's own, or one the host knows."""
    if "vae" not in checkpoint.info.parts:
        return None
    own, state = checkpoint.metadata.get("vae"), checkpoint.part_state("vae")
    return StarterFrameVAE(own, state) if own else comfy.sd.VAE(sd=state)


def blocker(name: str, part: str, instead: str) -> ExecutionBlocker:
    """What stands in for a part that a file lacks, and says where to take it from."""
    return ExecutionBlocker(f"{name} holds no {part}; load {instead}.")
