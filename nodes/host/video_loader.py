"""Makes the host's MODEL, CLIP, CLIP_VISION and VAE of a DynamiCrafter checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.clip_vision

from ...engine.animate_settings import AnimateSettings
from ...engine.checkpoints.dynamicrafter import (
    DynamiCrafterCheckpoint,
    open_dynamicrafter,
)
from ...engine.errors import LayerLoomError
from ...engine.models.dynamicrafter import VARIANTS
from .loader import find_checkpoint
from .patcher import blocker, clip_of, latent_format, make_patcher, network_dtypes, vae_of
from .starter_vision import StarterVision
from .video_model import VideoConfig, VideoModel

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
        _clip(checkpoint) or blocker(name, "text encoder", "SD 2.x's (OpenCLIP) with CLIPLoader"),
        _vision(checkpoint)
        or blocker(name, "image encoder", "CLIP-ViT-H-14 (laion2B) with CLIPVisionLoader"),
        _vae(checkpoint) or blocker(name, "VAE", "Stable Diffusion's with VAELoader"),
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
    config = VideoConfig(
        info.unet, info.image_projector, latent_format(checkpoint), network_dtypes(checkpoint)
    )
    return make_patcher(
        checkpoint,
        config,
        lambda config: VideoModel(config, settings),
        {"unet": "", "image_projector": "image_projector."},
        (load_model, (path, variant)),
        disable_dynamic,
    )


def _clip(checkpoint: DynamiCrafterCheckpoint):
    own = _own(checkpoint, "text_encoder") is not None
    return clip_of(checkpoint) if own or _holds(checkpoint, "text_encoder", *HOST_TEXT) else None


def _vision(checkpoint: DynamiCrafterCheckpoint):
    own = _own(checkpoint, "image_encoder")
    if own is not None:
        return StarterVision(own, checkpoint.part_state("image_encoder"))
    if not _holds(checkpoint, "image_encoder", *HOST_VISION):
        return None
    return comfy.clip_vision.load_clipvision_from_sd(checkpoint.part_state("image_encoder"))


def _vae(checkpoint: DynamiCrafterCheckpoint):
    own = _own(checkpoint, "vae") is not None
    return vae_of(checkpoint) if own or _holds(checkpoint, "vae", *HOST_VAE) else None


def _own(checkpoint: DynamiCrafterCheckpoint, part: str):
    """Settings of a part that is the starter's own, not a published one."""
    return checkpoint.metadata.get(part) if part in checkpoint.info.parts else None


def _holds(
    checkpoint: DynamiCrafterCheckpoint, part: str, weight: str, shape: tuple[int, ...]
) -> bool:
    """Whether the file has a part in the size that the host builds."""
    source = checkpoint.plan.get(part, {}).get(weight)
    return source is not None and source.spec(checkpoint.store).shape == shape
