"""Pictures that a user connects, as the CONDITIONING and LATENT of a clip that starts from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import numpy as np
import torch

from ...engine.animate_sampling import detail_latents, known_frames
from ...engine.animate_settings import AnimateSettings
from ...engine.clips import as_signed
from ...engine.conditioning.clip import squash
from ...engine.conditioning.key_images import ClipPlan, clip_plan
from ...engine.conditioning.pictures import cover, fitting_note
from ...engine.errors import LayerLoomError
from ...engine.sampling.windows import SlidingWindows
from .conditioning import Conditioning
from .starter_vision import StarterVision
from .video_model import FRAMES, MOTION, TOKENS, WINDOWS, VideoModel, animate_settings

ENCODER = "CLIP-ViT-H-14 (laion2B) from CLIPVisionLoader, or the checkpoint's own"
# Two encodings of one picture differ by rounding; of another crop, by far more.
SAME = 0.02


@dataclass(frozen=True)
class Wish:
    """What a clip shall be; 0 leaves a number to the checkpoint.

    frames: of the result. motion: frame stride or fps, as the checkpoint reads it. overlap: frames
    that windows of a long clip share. exact: given pictures' frames stay as their latents. batch:
    clips at once.
    """

    loop: bool = False
    frames: int = 0
    motion: float = 0.0
    width: int = 0
    height: int = 0
    overlap: int = 0
    exact: bool = False
    batch: int = 1


@dataclass(frozen=True)
class Animation:
    """Conditionings and LATENT of one clip; ``kept`` of its frames are the result."""

    positive: Conditioning
    negative: Conditioning
    image_only: Conditioning
    latent: dict[str, Any]
    kept: int
    notes: list[str]


def animate(
    model,
    positive: Conditioning,
    negative: Conditioning,
    vae,
    clip_vision,
    pictures: Sequence[torch.Tensor],
    seen,
    wish: Wish,
) -> Animation:
    """Everything a sampler needs to animate one picture, or to go from one to the next.

    Args:
        model: a MODEL of Load Animator. positive, negative: encoded prompts.
        pictures: IMAGE of the start and, maybe, the end; the first of each batch counts.
        seen: CLIP_VISION_OUTPUT that takes the place of the start's, or None.

    Raises:
        LayerLoomError: something does not fit the model.
    """
    settings, network = animate_settings(model), model.model
    _check_text(network, positive, negative)
    _check_wish(settings, pictures, wish)
    trained = settings.variant.frames
    plan = clip_plan(len(pictures), wish.loop, wish.frames or None, trained)
    shown = [_bytes(picture) for picture in pictures]
    size, output = settings.size(shown[0].shape[:2], wish.width or None, wish.height or None)
    fitted = [as_signed(cover(picture, size)[None]) for picture in shown]
    windows = SlidingWindows(trained, wish.overlap or max(1, trained // 2))
    windows.check()
    notes = _notes(settings, wish, plan, [len(p) for p in pictures], shown, size, output)
    tokens = _tokens(network, clip_vision, fitted[0])
    if seen is not None:
        tokens = _given_tokens(network, clip_vision, seen, pictures[0][:1])
    # The unconditional picture of the training: mid-grey.
    grey = _tokens(network, clip_vision, torch.zeros_like(fitted[0]))
    latents = [_encode(network, vae, picture) for picture in fitted]
    extra = {
        "concat_latent_image": detail_latents(plan, latents)[0].transpose(0, 1).contiguous(),
        FRAMES: plan.frames,
        MOTION: wish.motion or float(settings.variant.speed_default),
        WINDOWS: windows if plan.mode == "animate" and plan.frames > trained else None,
    }
    return Animation(
        _with(positive, {**extra, TOKENS: tokens}),
        _with(negative, {**extra, TOKENS: grey}),
        _with(negative, {**extra, TOKENS: tokens}),
        _latent(plan, latents, wish),
        plan.kept,
        notes,
    )


def _check_text(network: VideoModel, *conditionings: Conditioning) -> None:
    wanted = network.model_config.unet_config["context_dim"]
    for features, _ in (entry for conditioning in conditionings for entry in conditioning):
        if features.shape[-1] != wanted:
            raise LayerLoomError(
                f"The prompts are {features.shape[-1]} numbers wide and {network.settings.name} "
                f"reads {wanted}; encode them with the checkpoint's own CLIP, or with SD 2.x's "
                "(OpenCLIP ViT-H) from CLIPLoader."
            )


def _check_wish(settings: AnimateSettings, pictures: Sequence[torch.Tensor], wish: Wish) -> None:
    if wish.loop and len(pictures) > 1:
        raise LayerLoomError(
            "A loop ends on its first image, so it takes no end image; disconnect it or switch the "
            "loop off."
        )
    if wish.motion < 0:
        low, high = settings.variant.speed_range
        raise LayerLoomError(
            f"The motion is {wish.motion:g}; {settings.variant.name} takes {low} to {high}, 0 is "
            "its own."
        )


def _bytes(picture: torch.Tensor) -> np.ndarray:
    """The first picture of an IMAGE [B, H, W, C] as uint8 [H, W, 3]."""
    return (picture[0, ..., :3].float().cpu().clamp(0, 1) * 255).round().byte().numpy()


def _image(picture: torch.Tensor) -> torch.Tensor:
    """An IMAGE [1, H, W, 3] of a picture [1, 3, H, W] in [-1, 1]."""
    return ((picture + 1) / 2).clamp(0, 1).movedim(1, -1)


def _notes(
    settings: AnimateSettings,
    wish: Wish,
    plan: ClipPlan,
    counts: Sequence[int],
    shown: Sequence[np.ndarray],
    size: tuple[int, int],
    output: tuple[int, int],
) -> list[str]:
    """What a user should know: pictures that are resized, and what the weights do not know."""
    names = ("start image", "end image")
    notes = [
        f"Only the first of {count} pictures is the {name}."
        for name, count in zip(names, counts, strict=False)
        if count > 1
    ]
    for name, picture in zip(names, shown, strict=False):
        notes.append(fitting_note(name, picture.shape[:2], size) or "")
    if size != output:
        notes.append(
            f"The size is {size[1]}x{size[0]} instead of {output[1]}x{output[0]}: sides divide by "
            f"{settings.multiple}."
        )
    variant = settings.variant
    low, high = variant.speed_range
    more = "larger" if variant.more_is_faster else "smaller"
    notes.append(
        f"Motion {wish.motion or variant.speed_default:g} is the {variant.speed}: {low} to {high}, "
        f"{more} moves more."
    )
    at_once = min(plan.length, variant.frames) if plan.mode == "animate" else plan.length
    # Which of the look-alike weights it is has been said by the loader.
    known = replace(settings, variants=(variant.name,))
    notes += known.notes(plan.mode, wish.motion or None, size, at_once)
    if plan.kept < plan.frames:
        notes.append(
            f"The loop has {plan.frames} frames, the last of which shows the first again: keep "
            f"{plan.kept} (output frames)."
        )
    return [note for note in notes if note]


def _encode(network: VideoModel, vae, picture: torch.Tensor) -> torch.Tensor:
    """Latents [1, C, h, w] of a picture, as the host's VAE gives them."""
    latents = vae.encode(_image(picture))
    factor = network.settings.variant.spatial_factor
    sides = (side // factor for side in picture.shape[-2:])
    wanted = (network.model_config.unet_config["out_channels"], *sides)
    if latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        raise LayerLoomError(
            f"The VAE made latents of shape {tuple(latents.shape[1:])} and {network.settings.name} "
            f"takes {wanted}; connect the checkpoint's own VAE, or Stable Diffusion's (1.5 or 2.1) "
            "for published weights."
        )
    return latents


def _tokens(network: VideoModel, clip_vision, picture: torch.Tensor) -> torch.Tensor:
    """What the image encoder makes of a whole picture, [1, N, D]: squashed, nothing cut off."""
    if not isinstance(clip_vision, StarterVision):
        # In the encoder's own size, so that the host neither crops nor resizes it again.
        picture = squash(picture, clip_vision.image_size)
    return _checked(network, clip_vision.encode_image(_image(picture), crop=False))


def _checked(network: VideoModel, seen) -> torch.Tensor:
    tokens = seen["last_hidden_state"]
    wanted = network.model_config.unet_config["image_projector"]["in_dim"]
    if tokens.shape[-1] != wanted:
        raise LayerLoomError(
            f"The image encoder makes tokens {tokens.shape[-1]} wide and {network.settings.name} "
            f"reads {wanted}; connect {ENCODER}."
        )
    return tokens[:1]


def _given_tokens(network: VideoModel, clip_vision, seen, start: torch.Tensor) -> torch.Tensor:
    """Tokens of a CLIP_VISION_OUTPUT, which may show another picture but no cropped start."""
    tokens = _checked(network, seen)
    cropped, whole = (
        clip_vision.encode_image(start, crop=crop)["last_hidden_state"] for crop in (True, False)
    )
    near, apart = (float((cropped - other).square().mean()) for other in (tokens, whole))
    if near < SAME * apart:
        raise LayerLoomError(
            "The CLIP vision output shows the start image's middle alone; set crop to none in CLIP "
            "Vision Encode, or leave the output unconnected."
        )
    return tokens


def _with(conditioning: Conditioning, values: dict[str, Any]) -> Conditioning:
    return [[features, {**extra, **values}] for features, extra in conditioning]


def _latent(plan: ClipPlan, latents: Sequence[torch.Tensor], wish: Wish) -> dict[str, Any]:
    """A LATENT [batch * T, C, h, w] of zeros, or with the given frames and a mask that keeps them.

    The mask is the host's own: 1 where the sampler decides.
    """
    device = comfy.model_management.intermediate_device()
    known = known_frames(plan, latents)
    frames = known.latents[0].transpose(0, 1).to(device)
    if not wish.exact:
        return {"samples": torch.zeros_like(frames).repeat(wish.batch, 1, 1, 1)}
    mask = 1 - known.mask[0].transpose(0, 1).expand(-1, 1, *frames.shape[-2:]).to(device)
    return {
        "samples": frames.repeat(wish.batch, 1, 1, 1),
        "noise_mask": mask[:, 0].repeat(wish.batch, 1, 1),
    }
