"""Makes the host's MODEL, CLIP and VAE of a checkpoint that animates regions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...engine.checkpoints.click import ClickCheckpoint, open_click
from ...engine.checkpoints.parts import FP8
from ...engine.errors import LayerLoomError
from .click_model import ClickConfig, ClickModel
from .loader import find_checkpoint
from .starter_text import starter_clip
from .starter_vae import StarterFrameVAE
from .video_model import FramesLatentFormat, OwnLatentFormat

NONE = "[None]"


@dataclass(frozen=True)
class LoadedClicker:
    """A MODEL, and CLIP and VAE or what stands in for those the file lacks."""

    model: object
    clip: object
    vae: object


def open_clicker(name: str, base: str = NONE) -> ClickCheckpoint:
    """A listed checkpoint on its base, opened; reads names alone.

    Raises:
        LayerLoomError: no such file, or not one that animates regions.
    """
    return _open(find_checkpoint(name), None if base == NONE else find_checkpoint(base))


def _open(path: Path, base: Path | None) -> ClickCheckpoint:
    opened = open_click(path, base)
    if opened.info.needs_base:
        raise LayerLoomError(
            f"{path.name} holds motion modules alone; choose the Stable Diffusion 1.5 checkpoint "
            "they stand on as base."
        )
    if not opened.variant.reads_picture:
        raise LayerLoomError(
            f"{path.name} is {opened.info.variant}, which reads neither a picture nor a mask and "
            "is a start for training alone; choose Follow-Your-Click's or PIA's weights, or ones "
            "that LayerLoom trained."
        )
    return opened


def load_clicker(name: str, base: str = NONE) -> LoadedClicker:
    """All parts of a listed checkpoint.

    In place of those that the file lacks come blockers that say which loader of the host to use.
    """
    checkpoint = open_clicker(name, base)
    checkpoint.check()
    base_path = None if base == NONE else str(find_checkpoint(base))
    return LoadedClicker(
        load_model(str(find_checkpoint(name)), base_path),
        _clip(checkpoint) or _missing(name, "text encoder", "CLIP or Checkpoint"),
        _vae(checkpoint) or _missing(name, "VAE", "VAE or Checkpoint"),
    )


def load_model(path: str, base: str | None = None, disable_dynamic: bool = False):
    """The MODEL alone; the host calls this again where it needs a second copy."""
    checkpoint = _open(Path(path), None if base is None else Path(base))
    info, management = checkpoint.info, comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    # The starters were measured in float32 and are small enough for it anywhere.
    starter = checkpoint.metadata.get("vae") is not None
    dtypes = [torch.float32] if starter else [torch.float16, torch.bfloat16, torch.float32]
    config = ClickConfig(info.unet, checkpoint.variant, _latent_format(checkpoint), dtypes)
    dtype = management.unet_dtype(
        model_params=info.parameters,
        supported_dtypes=dtypes,
        weight_dtype=getattr(torch, info.dtype),
    )
    cast = management.unet_manual_cast(dtype, device, dtypes)
    config.set_inference_dtype(dtype, cast, device=device)
    model = ClickModel(config)
    plain, core = comfy.model_patcher.ModelPatcher, comfy.model_patcher.CoreModelPatcher
    patcher = (plain if disable_dynamic else core)(
        model, load_device=device, offload_device=offload
    )
    # What 8-bit files keep in more bits (norms, biases) is not squeezed into 8.
    keep = None if dtype in FP8 else dtype
    # Assigned, not copied: what the host has laid out for the weights was never touched.
    model.load_model_weights(dict(checkpoint.iter_part("unet", keep)), "", assign=True)
    note_types = getattr(management, "archive_model_dtypes", None)
    if keep is None and note_types:
        # Noted when the network was built, all of one type; norms would be loaded as such.
        note_types(model.diffusion_model)
    if not management.is_device_cpu(offload):
        model.to(offload)
    patcher.cached_patcher_init = (load_model, (path, base))
    return patcher


def _latent_format(checkpoint: ClickCheckpoint):
    if checkpoint.metadata.get("vae") is None:
        return FramesLatentFormat()
    preview = checkpoint.metadata.get("preview") or {}
    return OwnLatentFormat(
        checkpoint.info.unet["out_channels"], preview.get("factors"), preview.get("bias")
    )


def _clip(checkpoint: ClickCheckpoint):
    if "text_encoder" not in checkpoint.info.parts:
        return None
    state = checkpoint.part_state("text_encoder")
    own = checkpoint.metadata.get("text_encoder")
    return starter_clip(own, state) if own else comfy.sd.load_text_encoder_state_dicts([state])


def _vae(checkpoint: ClickCheckpoint):
    if "vae" not in checkpoint.info.parts:
        return None
    state, own = checkpoint.part_state("vae"), checkpoint.metadata.get("vae")
    return StarterFrameVAE(own, state) if own else comfy.sd.VAE(sd=state)


def _missing(name: str, part: str, loader: str) -> ExecutionBlocker:
    return ExecutionBlocker(
        f"{name} holds no {part}; load Stable Diffusion 1.5's with Load {loader}."
    )
