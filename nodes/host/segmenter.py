"""Segmenters in the host: their folder, a MODEL that its memory manager moves, masks of clicks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch

from ...engine.checkpoints.reader import open_tensors
from ...engine.checkpoints.segmenter import FAMILY, identify_segmenter
from ...engine.conditioning.clicks import Clicks
from ...engine.conditioning.masks import refine
from ...engine.conditioning.segmenter import Embedding, Segmenter
from ...engine.errors import LayerLoomError
from .loader import find_checkpoint, list_checkpoints

# Where packs around segment-anything keep its files.
FOLDER = "sams"
EXTENSIONS = {".pth", ".pt", ".ckpt", ".safetensors"}
BEST = "best"
CANDIDATES = (BEST, "0", "1", "2")


class SegmenterModel(torch.nn.Module):
    """A segmenter as the MODEL of the host; no sampler can use it."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.network, self.segmenter = segmenter.network, segmenter

    @property
    def latent_format(self):
        # What samplers ask for first.
        raise LayerLoomError(
            "This MODEL turns clicks into masks and makes no pictures; connect it to Click Mask."
        )


@dataclass(frozen=True)
class ClickedMask:
    """A mask float32 [H, W] in 0..1 with the scores of all candidates, and which of them it is."""

    mask: torch.Tensor
    scores: list[float]
    candidate: int

    @property
    def share(self) -> float:
        """How much of the picture it covers, 0..1."""
        return float((self.mask >= 0.5).float().mean())


def list_segmenters() -> list[str]:
    """Names to choose from: the starter, then what lies in models/sams."""
    _register_folder()
    return list_checkpoints(FAMILY, (FOLDER,))


def find_segmenter(name: str) -> Path:
    """The file of a listed name.

    Raises:
        LayerLoomError: there is none.
    """
    _register_folder()
    return find_checkpoint(name, (FOLDER,))


def check_segmenter(name: str) -> None:
    """Raise LayerLoomError where a file is no segmenter; reads names alone."""
    identify_segmenter(open_tensors(find_segmenter(name)))


def load_segmenter_model(name: str):
    """The MODEL of a listed segmenter.

    Raises:
        LayerLoomError: missing, damaged or no segmenter.
    """
    model = SegmenterModel(Segmenter.open(find_segmenter(name), "cpu"))
    management = comfy.model_management
    # The host puts another class behind this name where it streams weights.
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )


def segmenter_of(model) -> Segmenter:
    """The segmenter behind a MODEL, on the device it works on.

    Raises:
        LayerLoomError: it is another kind of model.
    """
    inner = model.model
    if not isinstance(inner, SegmenterModel):
        raise LayerLoomError(
            f"The model is {type(inner).__name__}, which makes no masks of clicks; connect the "
            "MODEL of Load Segmenter."
        )
    comfy.model_management.load_models_gpu(
        [model], memory_required=_work(inner.segmenter.info.settings), force_full_load=True
    )
    device = inner.segmenter.device
    for buffer in inner.network.buffers():
        # Streaming moves weights alone.
        buffer.data = buffer.data.to(device)
    return inner.segmenter


def clicked_mask(
    segmenter: Segmenter,
    embedding: Embedding,
    clicks: Clicks,
    candidate: str = BEST,
    dilate: int = 0,
    feather: float = 0.0,
) -> ClickedMask:
    """The mask that clicks make, grown by ``dilate`` and softened over ``feather`` pixels.

    Raises:
        LayerLoomError: the clicks select nothing, or nothing is left of the mask.
    """
    found = segmenter.masks(embedding, clicks)
    chosen = found.best if candidate == BEST else int(candidate)
    mask = refine(found.mask(chosen), dilate, feather).cpu()
    made = ClickedMask(mask, found.scores.tolist(), chosen)
    if not made.share:
        raise LayerLoomError(
            f"Nothing is left of the mask with dilate {dilate} and feather {feather:g}; shrink or "
            "feather it less."
        )
    return made


def _work(settings: Mapping[str, Any]) -> int:
    """Bytes that looking at a picture takes beside the weights, in float32.

    Segment-anything writes attention out: scores, position biases and their softmax over all
    tokens of a block without windows.
    """
    tokens = (settings["image_size"] // settings["patch_size"]) ** 2
    return 4 * (3 * settings["heads"] * tokens**2 + 2 * settings["mlp"] * tokens)


def _register_folder() -> None:
    known = folder_paths.folder_names_and_paths
    new = FOLDER not in known
    # Does nothing where it is there already.
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    if new:
        # A new key lists every file.
        known[FOLDER] = (known[FOLDER][0], set(EXTENSIONS))
