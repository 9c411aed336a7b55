"""Pictures as the host's IMAGE, and the other way round."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image

from ...engine.checkpoints.save import atomic_file
from .folders import temp_folder


def as_image(picture: Image.Image) -> torch.Tensor:
    """An IMAGE [1, H, W, 3] in [0, 1] of a picture."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """The first picture of an IMAGE [B, H, W, C] as uint8 [H, W, 3]."""
    return (image[0, ..., :3].cpu().float().clamp(0, 1) * 255).round().byte().numpy()


def keep_for_editor(pixels: np.ndarray, lossless: bool = True) -> dict[str, str]:
    """A picture uint8 [H, W, 3] in the temporary folder, as the host's messages name files.

    The same picture keeps its name, so that an editor need not look at it again. Without
    ``lossless`` it is a JPEG, a tenth as large.
    """
    content = f"{pixels.shape}".encode() + pixels.tobytes()
    kind = "png" if lossless else "jpg"
    name = f"layerloom_{hashlib.sha256(content).hexdigest()[:24]}.{kind}"
    path = temp_folder() / name
    if not path.is_file():
        how = {"format": "PNG", "compress_level": 1} if lossless else {"format": "JPEG"}
        with atomic_file(path, pixels.size) as file:
            Image.fromarray(pixels).save(file, **how)
    return {"filename": name, "subfolder": "", "type": "temp"}
