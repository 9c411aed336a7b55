"""Writes a network that animates regions in LayerLoom's own format: one file, all its parts.

Key prefixes are ``unet.``, ``vae.`` and ``text_encoder.``, as ``layerloom convert`` writes them;
the metadata entry ``layerloom`` is ``click_detect.own_metadata``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.follow_your_click import ClickSettings
from .click_detect import PARTS, own_metadata
from .detect import METADATA_KEY
from .save import save_tensors


def save_click(
    path: str | Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    settings: ClickSettings,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Args:
        path: the file; its folder must exist.
        states: part -> parameter name -> tensor.
        settings: what it was trained and is sampled with.
        unet: constructor keywords of ``VideoUNet``.
        vae, text_encoder: settings of these parts, as their builders take them; None is Stable
            Diffusion 1.5's.
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
    own = own_metadata(settings, unet, vae=vae, text_encoder=text_encoder)
    save_tensors(path, tensors, {METADATA_KEY: json.dumps({**(metadata or {}), **own})})
