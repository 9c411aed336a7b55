"""CLIP and DINO as measures of subjects and prompts: pictures and texts to features of length one.

Both are folders of transformers that a person names; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..conditioning.clip import MEAN, STD, Tokenizer, load_tokenizer
from ..conditioning.encoders import first_line
from ..conditioning.video_encoders import quiet_loading
from ..device import pick_device
from ..errors import LayerLoomError

WHERE_CLIP = "a folder of CLIP ViT-B/32 (openai/clip-vit-base-patch32 on Hugging Face)"
WHERE_DINO = "a folder of DINO ViT-S/16 (facebook/dino-vits16 on Hugging Face)"
# ImageNet's statistics, and what a picture is scaled to before its middle is cut out: DINO's own.
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_SHARE = 256 / 224
_DINO_KINDS = ("vit", "dinov2", "dinov2_with_registers")
# Longer pieces are cut to their middle: of what is scaled, a square is looked at.
_LONGEST = 8
_BATCH = 16


class ClipLikeness:
    """CLIP with both towers and their projections."""

    def __init__(self, model: Any, tokenize: Tokenizer):
        self.model, self.tokenize = model, tokenize

    @classmethod
    def open(cls, folder: Path, device: str | None = None) -> ClipLikeness:
        """CLIP from a folder of transformers.

        Raises:
            LayerLoomError: there is none, a part is missing, or no such device.
        """
        from transformers import CLIPModel

        target = pick_device(device)
        model = _load(CLIPModel, folder, WHERE_CLIP)
        try:
            tokenize = load_tokenizer(folder)
        except Exception as error:  # the library fails in its own ways on a wrong folder
            raise LayerLoomError(
                f"{folder} holds no tokenizer of CLIP ({first_line(error)}); give {WHERE_CLIP}."
            ) from error
        return cls(model.to(target), tokenize)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features [N, D] of pictures uint8 [H, W, 3] of any sizes."""
        side = self.model.config.vision_config.image_size
        device = next(self.model.parameters()).device
        found = []
        for pixels in _batches(pictures, side, side, (MEAN, STD)):
            seen = self.model.vision_model(pixel_values=pixels.to(device)).pooler_output
            found.append(self.model.visual_projection(seen))
        return functional.normalize(torch.cat(found).float().cpu(), dim=-1)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """Features [D] of a prompt, cut where it is too long."""
        ids, most = self.tokenize(prompt), self.model.config.text_config.max_position_embeddings
        if len(ids) > most:
            ids = [*ids[: most - 1], ids[-1]]
        given = torch.tensor([ids], device=next(self.model.parameters()).device)
        read = self.model.text_model(input_ids=given).pooler_output
        found = self.model.text_projection(read)[0]
        return functional.normalize(found.float().cpu(), dim=-1)


class DinoLikeness:
    """A vision transformer trained by DINO; what it says of a picture is its class token."""

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def open(cls, folder: Path, device: str | None = None) -> DinoLikeness:
        """DINO from a folder of transformers.

        Raises:
            LayerLoomError: there is none, a part is missing, or no such device.
        """
        from transformers import AutoModel

        target = pick_device(device)
        model = _load(AutoModel, folder, WHERE_DINO)
        if model.config.model_type not in _DINO_KINDS:
            raise LayerLoomError(
                f"{folder} holds a model of kind {model.config.model_type!r}; give {WHERE_DINO}."
            )
        return cls(model.to(target))

    @torch.no_grad()
    def pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features [N, D] of pictures uint8 [H, W, 3] of any sizes."""
        side = self.model.config.image_size
        device = next(self.model.parameters()).device
        found = [
            self.model(pixel_values=pixels.to(device)).last_hidden_state[:, 0]
            for pixels in _batches(pictures, round(side * _DINO_SHARE), side, _IMAGENET)
        ]
        return functional.normalize(torch.cat(found).float().cpu(), dim=-1)


def prepared(
    picture: np.ndarray, short: int, side: int, statistics: Sequence[Sequence[float]]
) -> Tensor:
    """The middle of a picture uint8 [H, W, 3] as a network reads it, [3, side, side].

    short: what the shorter side is scaled to, bicubic. statistics: mean and deviation of colours.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    most = _LONGEST * min(height, width)
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    picture = picture[top : top + most, left : left + most]
    height, width = picture.shape[:2]
    scale = short / min(height, width)
    size = [short if n == min(height, width) else int(n * scale) for n in (width, height)]
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = ((n - side) // 2 for n in size)
    middle = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    mean, deviation = (np.array(numbers, dtype=np.float32) for numbers in statistics)
    return torch.from_numpy((middle / 255 - mean) / deviation).movedim(-1, 0)


def _batches(
    pictures: Sequence[np.ndarray], short: int, side: int, statistics: Sequence[Sequence[float]]
):
    for start in range(0, len(pictures), _BATCH):
        part = pictures[start : start + _BATCH]
        yield torch.stack([prepared(picture, short, side, statistics) for picture in part])


def _load(kind: Any, folder: Path, where: str) -> Any:
    if not folder.is_dir():
        raise LayerLoomError(f"There is no folder {folder}; give {where}.")
    try:
        with quiet_loading():
            model, report = kind.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # the library fails in its own ways on a wrong folder
        raise LayerLoomError(
            f"{folder} holds nothing to compare with ({first_line(error)}); give {where}."
        ) from error
    missing = _needed(report)
    if missing:
        raise LayerLoomError(f"{folder} lacks {missing[0]} among others; give {where}.")
    return model.float().eval()


def _needed(report: Mapping[str, Any]) -> list[str]:
    """Weights that were not there and would be drawn; a pooler's are not looked at."""
    return sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
