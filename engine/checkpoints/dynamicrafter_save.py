"""Writes a trained DynamiCrafter in LayerLoom's own format: one file that holds all its parts.

Key prefixes are ``unet.``, ``image_projector.``, ``vae.``, ``text_encoder.`` and
``image_encoder.``, as ``layerloom convert`` writes published files; the metadata entry
``layerloom`` is ``dynamicrafter_detect.own_metadata``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.dynamicrafter import Variant
from .detect import METADATA_KEY
from .dynamicrafter_detect import PARTS, own_metadata
from .save import save_tensors


def save_dynamicrafter(
    path: str | Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    variant: Variant,
    unet: Mapping[str, Any],
    image_projector: Mapping[str, Any] | None,
    vae: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    image_encoder: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Args:
        path: the file; its folder must exist.
        states: part -> parameter name -> tensor.
        variant: what it is sampled with, its name included.
        unet, image_projector: constructor keywords of ``VideoUNet`` and ``QueryTransformer``.
        vae, text_encoder, image_encoder: settings of these parts, as their builders take them;
            None is the published one.
        metadata: further JSON entries (training notes, scores); may not replace the ones above.
        half: store floating tensors as float16.

    Raises:
        LayerLoomError: no such folder, no permission, or the disk is full.
    """
    strange = sorted(states.keys() - set(PARTS))
    if strange:
        raise ValueError(f"part {strange[0]!r} is not one of {PARTS}")
    tensors = {
        f"{part}.{name}": tensor.half() if half and tensor.is_floating_point() else tensor
        for part, state in states.items()
        for name, tensor in state.items()
    }
    parts = {"vae": vae, "text_encoder": text_encoder, "image_encoder": image_encoder}
    content = {**(metadata or {}), **own_metadata(variant, unet, image_projector, **parts)}
    save_tensors(path, tensors, {METADATA_KEY: json.dumps(content)})
