"""Pictures as the host's IMAGE."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def as_image(picture: Image.Image) -> torch.Tensor:
    """An IMAGE [1, H, W, 3] in [0, 1] of a picture."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]
