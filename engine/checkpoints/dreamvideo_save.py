"""Writes a network that moves subjects along boxes in LayerLoom's own format: one file.

Key prefixes are ``unet.``, ``reference.``, ``box_encoder.``, ``control.``, ``vae.`` and
``text_encoder.``; the metadata entry ``layerloom`` is ``dreamvideo_detect.own_metadata``. Without
``unet`` the file holds what was added to a base and is opened together with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.dreamvideo import TrajectorySettings
from .detect import METADATA_KEY
from .dreamvideo_detect import PARTS, own_metadata
from .save import save_tensors


def save_trajectory(
    path: str | Path,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    settings: TrajectorySettings,
    unet: Mapping[str, Any],
    reference: bool,
    control: Mapping[str, Any] | None,
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
        unet, reference, control: constructor keywords of ``DreamVideo``.
        vae, text_encoder: settings of these parts, as their builders take them; None is
            ModelScope's.
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
    own = own_metadata(settings, unet, reference, control, vae=vae, text_encoder=text_encoder)
    save_tensors(path, tensors, {METADATA_KEY: json.dumps({**(metadata or {}), **own})})


def network_states(network: Any, base: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> state of a ``DreamVideo``; ``base`` False leaves its UNet out."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in network.state_dict().items():
        part, _, rest = name.partition(".")
        if base or part != "unet":
            states.setdefault(part, {})[rest] = tensor
    return states
