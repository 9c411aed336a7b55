"""Makes the host's MODEL, CLIP and VAE of a layered checkpoint, and lists the files to choose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...engine.checkpoints.click_detect import is_click
from ...engine.checkpoints.detect import METADATA_KEY, inspect_checkpoint
from ...engine.checkpoints.dreamvideo_detect import is_dreamvideo
from ...engine.checkpoints.dynamicrafter_detect import is_dynamicrafter
from ...engine.checkpoints.load import Checkpoint, open_checkpoint
from ...engine.checkpoints.reader import open_tensors
from ...engine.conditioning.encoders import COGVIDEOX_SCALE
from ...engine.errors import LayerLoomError
from ...engine.layered_settings import LayeredSettings
from .layered_model import COGVIDEOX_RGB, LayeredConfig, LayeredLatentFormat, LayeredModel
from .lora import add_own_adapters, base_state
from .starter_text import starter_clip
from .starter_vae import StarterVAE

STARTERS = Path(__file__).resolve().parents[2] / "starter"
PREFIX = "starter/"
FOLDERS = ("checkpoints", "diffusion_models")
FAMILY = "layered"
# What files of the other families do, and which node loads them.
_OTHERS = (
    (is_dynamicrafter, "is a DynamiCrafter checkpoint, which animates pictures", "Load Animator"),
    (is_click, "animates regions of pictures", "Load Region Animator"),
    (is_dreamvideo, "moves subjects along boxes", "Load Subject Model"),
)
# What a menu of files offers where none is needed.
NONE = "[None]"


@dataclass(frozen=True)
class Loaded:
    """A MODEL, and a CLIP and a VAE or what stands in for one that the file does not hold."""

    model: object
    clip: object
    vae: object


def list_checkpoints(family: str = FAMILY, folders: Sequence[str] = FOLDERS) -> list[str]:
    """Names to choose from: the family's starters first, then all of the host's folders."""
    starters = sorted(STARTERS.glob("*.safetensors"))
    names = [f"{PREFIX}{path.name}" for path in starters if _family(path) == family]
    for folder in folders:
        names += [name for name in folder_paths.get_filename_list(folder) if name not in names]
    return names


def _family(starter: Path) -> str:
    """What a starter says it is; its header alone is read."""
    try:
        content = json.loads(open_tensors(starter).metadata.get(METADATA_KEY, "{}"))
    except (LayerLoomError, ValueError):
        return ""
    return content.get("family", "")


def find_checkpoint(name: str, folders: Sequence[str] = FOLDERS) -> Path:
    """The file of a listed name.

    Raises:
        LayerLoomError: there is none.
    """
    if name.startswith(PREFIX):
        path = STARTERS / Path(name).name
        if path.is_file():
            return path
    for folder in folders:
        found = folder_paths.get_full_path(folder, name)
        if found:
            return Path(found)
    places = " or ".join(f"models/{folder}" for folder in folders)
    raise LayerLoomError(
        f"There is no checkpoint {name!r}; put it into {places} and refresh the list."
    )


def check_checkpoint(name: str) -> None:
    """Raise LayerLoomError where a file is not a layered checkpoint; reads names alone."""
    path = find_checkpoint(name)
    store = open_tensors(path)
    for belongs, what, node in _OTHERS:
        if belongs(store):
            raise LayerLoomError(f"{name} {what} and makes no layers; load it with {node}.")
    inspect_checkpoint(path)
    LayeredSettings.of(open_checkpoint(path))


def load_checkpoint(name: str) -> Loaded:
    """MODEL, CLIP and VAE of a listed checkpoint.

    Published files hold the network alone: in place of CLIP and VAE come blockers that say which
    loader of the host to use.
    """
    path = find_checkpoint(name)
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    clip = vae = None
    if "text_encoder" in checkpoint.info.parts:
        clip = starter_clip(
            checkpoint.metadata["text_encoder"], checkpoint.part_state("text_encoder")
        )
    if "vae" in checkpoint.info.parts:
        vae = StarterVAE(checkpoint.metadata["vae"], checkpoint.part_state("vae"))
    return Loaded(
        load_model(str(path)),
        clip or _missing(name, "text encoder", "T5-XXL with CLIPLoader, type cogvideox"),
        vae or _missing(name, "VAE", "the CogVideoX VAE with VAELoader"),
    )


def load_model(path: str, disable_dynamic: bool = False):
    """The MODEL alone; the host calls this again where it needs a second copy."""
    checkpoint = open_checkpoint(path)
    settings = LayeredSettings.of(checkpoint)
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config = LayeredConfig(
        checkpoint.info.transformer,
        settings.sequence,
        _latent_format(checkpoint, settings),
        _dtypes(checkpoint),
    )
    dtype = management.unet_dtype(
        model_params=checkpoint.info.parameters,
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=getattr(torch, checkpoint.info.dtype),
    )
    cast = management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast, device=device)
    model = LayeredModel(config, settings)
    plain, core = comfy.model_patcher.ModelPatcher, comfy.model_patcher.CoreModelPatcher
    patcher = (plain if disable_dynamic else core)(
        model, load_device=device, offload_device=offload
    )
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(base_state(checkpoint), "", assign=patcher.is_dynamic())
    add_own_adapters(patcher, checkpoint)
    patcher.cached_patcher_init = (load_model, (path,))
    return patcher


def layered_settings(model) -> LayeredSettings:
    """The settings of a MODEL.

    Raises:
        LayerLoomError: it is no layered model.
    """
    if not isinstance(model.model, LayeredModel):
        raise LayerLoomError(
            f"The model is {type(model.model).__name__}, which makes no layers; connect the MODEL "
            "of Load LayerLoom Checkpoint."
        )
    return model.model.settings


def _dtypes(checkpoint: Checkpoint) -> list[torch.dtype]:
    # The starters were measured in float32 and are small enough for it anywhere.
    if checkpoint.info.source == "layerloom" and "vae" in checkpoint.info.parts:
        return [torch.float32]
    return [torch.bfloat16, torch.float16, torch.float32]


def _latent_format(checkpoint: Checkpoint, settings: LayeredSettings) -> LayeredLatentFormat:
    if "vae" not in checkpoint.info.parts:
        return LayeredLatentFormat(
            settings.sequence, settings.channels, COGVIDEOX_SCALE, COGVIDEOX_RGB
        )
    preview = checkpoint.metadata.get("preview") or {}
    return LayeredLatentFormat(
        settings.sequence, settings.channels, 1.0, preview.get("factors"), preview.get("bias")
    )


def _missing(name: str, part: str, instead: str) -> ExecutionBlocker:
    return ExecutionBlocker(f"{name} holds no {part}; load {instead}.")
