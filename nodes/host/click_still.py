"""Puts the picture back around what moves in a clip of the host."""

from __future__ import annotations

import torch

from ...engine.click import fitted_mask
from ...engine.click_composite import hold_still
from ...engine.conditioning.masks import check_mask
from ...engine.conditioning.pictures import cover
from ...engine.frames import to_bytes
from .pictures import as_pixels


def hold_background(
    frames: torch.Tensor, image: torch.Tensor, masks: torch.Tensor, vae
) -> torch.Tensor:
    """An IMAGE whose background is the picture's, to the pixel.

    Args:
        frames: IMAGE of the clip. image: IMAGE it was made from, scaled and cut as it was there.
        masks: MASK of the regions, of the picture's size; all of a batch count.
        vae: shows the picture as the clip's autoencoder does, so that its losses are no motion.

    Raises:
        LayerLoomError: a mask of another size, or empty.
    """
    pixels = as_pixels(image)
    size = tuple(frames.shape[1:3])
    whole = masks.reshape(-1, *masks.shape[-2:]).float().cpu().amax(0)
    area = fitted_mask(check_mask(whole, pixels.shape[:2]).numpy(), size) >= 0.5
    picture = cover(pixels, size)
    coded = vae.decode(vae.encode(torch.from_numpy(picture)[None].float() / 255))
    # Video autoencoders give a clip of one frame.
    still = cover(as_pixels(coded.reshape(-1, *coded.shape[-3:])), size)
    clip = frames[..., :3].movedim(-1, 1)[None].float().cpu()
    held = hold_still(to_bytes(clip, "frames")[0], picture, still, area)
    return torch.from_numpy(held).float() / 255
