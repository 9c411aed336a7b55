"""A picture, regions of it and their phrases as the CONDITIONING and LATENT of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...engine.click import fitted_mask
from ...engine.click_sampling import territories
from ...engine.clips import as_signed
from ...engine.conditioning.masks import check_mask
from ...engine.conditioning.pictures import clip_size, cover, fitting_note
from ...engine.errors import LayerLoomError
from ...engine.models.follow_your_click import ClickSettings, latent_mask
from .click_model import FORCE, PHRASE, PICTURE, REGION, click_settings
from .conditioning import Conditioning
from .pictures import as_pixels
from .video_model import FRAMES


@dataclass(frozen=True)
class ClickWish:
    """What a clip shall be; 0 leaves a number to the checkpoint.

    strength: mean optical flow inside the region, in pixels. batch: clips at once.
    """

    strength: float = 0.0
    frames: int = 0
    width: int = 0
    height: int = 0
    batch: int = 1


@dataclass(frozen=True)
class ClickAnimation:
    """Conditionings and LATENT of one clip."""

    positive: Conditioning
    negative: Conditioning
    latent: dict[str, Any]
    notes: list[str]


def animate_region(
    model,
    vae,
    image: torch.Tensor,
    mask: torch.Tensor,
    phrase: Conditioning,
    negative: Conditioning,
    wish: ClickWish,
    caption: Conditioning | None = None,
    others: Conditioning | None = None,
) -> ClickAnimation:
    """Everything a sampler needs to make one region of a picture move, beside ``others``.

    Args:
        model: a MODEL of Load Region Animator.
        image, mask: the first of each batch counts; the mask is of the picture's size.
        phrase: what the region does. caption: what the whole clip shows; None takes the phrase.
        others: the positive CONDITIONING of other regions of the same picture.

    Raises:
        LayerLoomError: something does not fit the model, or the regions do not fit each other.
    """
    settings, network = click_settings(model), model.model
    _check_text(network, settings, phrase, negative, *([caption] if caption else []))
    pixels = as_pixels(image)
    area = check_mask(mask.reshape(-1, *mask.shape[-2:])[0].float().cpu(), pixels.shape[:2])
    frames = wish.frames or settings.frames
    if frames > settings.positions:
        raise LayerLoomError(
            f"{frames} frames are more than the {settings.positions} that {settings.name} has "
            "positions for; ask for fewer."
        )
    levels = len(network.model_config.unet_config["block_channels"])
    multiple = settings.spatial_factor * 2 ** (levels - 1)
    native = (settings.height, settings.width)
    size, output = clip_size(
        pixels.shape[:2], native, multiple, wish.width or None, wish.height or None
    )
    fitted = fitted_mask(area.numpy(), size)
    if not (fitted >= 0.5).any():
        raise LayerLoomError(
            f"Nothing of the region is left after the picture is cut to {size[1]}x{size[0]}; "
            "choose another size, or a region nearer the middle."
        )
    sides = tuple(side // settings.spatial_factor for side in size)
    strength = wish.strength or settings.strength_default
    entry = {
        REGION: latent_mask(torch.from_numpy(fitted)[None, None], sides),
        PHRASE: phrase[0][0],
        FORCE: strength,
    }
    text, extra = (caption or phrase)[0]
    entries = [*_others(others, sides), (text, {**extra, **entry})]
    picture = _encode(network, settings, vae, as_signed(cover(pixels, size)[None]), sides)
    shared = {PICTURE: picture, FRAMES: frames}
    positive, unwanted = [], []
    shares = territories(torch.stack([values[REGION] for _, values in entries]))
    for (features, values), share in zip(entries, shares, strict=True):
        values = {**values, **shared}
        if len(entries) > 1:
            # The host blends what it predicts for each entry by these.
            values |= {"mask": share[0], "mask_strength": 1.0, "set_area_to_bounds": False}
        positive.append([features, values])
        # Guidance drops the text alone: region, picture and strength are in both branches.
        nothing, rest = negative[0]
        unwanted.append([nothing, {**values, **rest, PHRASE: nothing}])
    latent = torch.zeros(
        wish.batch * frames, *picture.shape[1:], device=comfy.model_management.intermediate_device()
    )
    notes = _notes(settings, pixels, size, output, frames, strength)
    return ClickAnimation(positive, unwanted, {"samples": latent}, notes)


def _others(others: Conditioning | None, sides: tuple[int, ...]) -> list[tuple[Any, dict]]:
    found = []
    for features, values in others or []:
        if REGION not in values:
            raise LayerLoomError(
                "What is connected as other regions holds none; connect the positive output of "
                "another Click to Animate node."
            )
        if tuple(values[REGION].shape[-2:]) != tuple(sides):
            raise LayerLoomError(
                "The other regions are for a clip of another size; give all Click to Animate "
                "nodes the same picture, width and height."
            )
        found.append((features, values))
    return found


def _check_text(network, settings: ClickSettings, *conditionings: Conditioning) -> None:
    wanted = network.model_config.unet_config["context_dim"]
    for features, _ in (entry for conditioning in conditionings for entry in conditioning):
        if features.shape[-1] != wanted:
            raise LayerLoomError(
                f"The prompts are {features.shape[-1]} numbers wide and {settings.name} reads "
                f"{wanted}; encode them with the checkpoint's own CLIP, or with Stable Diffusion "
                "1.5's."
            )


def _encode(network, settings: ClickSettings, vae, picture: torch.Tensor, sides) -> torch.Tensor:
    """Latents [1, C, h, w] of a picture [1, 3, H, W] in [-1, 1], as the host's VAE gives them."""
    latents = vae.encode(((picture + 1) / 2).clamp(0, 1).movedim(1, -1))
    wanted = (network.model_config.unet_config["out_channels"], *sides)
    if latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        raise LayerLoomError(
            f"The VAE made latents of shape {tuple(latents.shape[1:])} and {settings.name} takes "
            f"{wanted}; connect the checkpoint's own VAE, or Stable Diffusion 1.5's for published "
            "weights."
        )
    return latents


def _notes(
    settings: ClickSettings, pixels, size, output, frames: int, strength: float
) -> list[str]:
    """What a user should know: a picture that is resized, and what the weights do not know."""
    low, high = settings.strength_range
    notes = [fitting_note("image", pixels.shape[:2], size) or ""]
    if size != output:
        notes.append(f"The size is {size[1]}x{size[0]} instead of {output[1]}x{output[0]}.")
    if size != (settings.height, settings.width):
        notes.append(f"Trained on {settings.width}x{settings.height}; this may look worse.")
    if frames != settings.frames:
        notes.append(f"Trained on {settings.frames} frames; {frames} may look worse.")
    notes.append(f"Strength {strength:g}; {settings.name} was trained on {low:g} to {high:g}.")
    if not settings.reads_regions:
        notes.append("PIA reads no mask: the phrase moves the whole picture.")
    return [note for note in notes if note]
