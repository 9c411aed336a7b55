"""Opens DynamiCrafter checkpoints: the official files, pruned ones, and LayerLoom's own.

Detected from keys and shapes: the UNet behind ``model.diffusion_model.`` (or bare, or as DeepSpeed
leaves it), with query transformer, autoencoder and CLIP encoders where they are inside. ToonCrafter
and CIL files share the UNet's and the query transformer's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.dynamicrafter import DynamiCrafter
from .dynamicrafter_detect import NETWORKS, identify
from .identified import Identified
from .parts import PartsCheckpoint
from .reader import TensorStore, open_tensors


@dataclass(frozen=True)
class DynamiCrafterCheckpoint(Identified, PartsCheckpoint):
    """An open checkpoint; tensors of ``store`` are read when asked for."""

    store: TensorStore
    networks = NETWORKS

    @property
    def label(self) -> str:
        return f"DynamiCrafter {self.info.variant}"

    def build(self, device: Any, dtype: torch.dtype | None, operations: Any) -> DynamiCrafter:
        return DynamiCrafter(
            unet=self.info.unet,
            image_projector=self.info.image_projector,
            device=device,
            dtype=dtype,
            operations=operations,
        )


def open_dynamicrafter(path: str | Path, variant: str | None = None) -> DynamiCrafterCheckpoint:
    """Open a checkpoint of any supported format.

    Args:
        path: the file.
        variant: which published variant it is, where its shapes leave that open.

    Raises:
        LayerLoomError: not a DynamiCrafter checkpoint, or not of that variant.
    """
    return from_store(open_tensors(path), variant)


def from_store(store: TensorStore, variant: str | None = None) -> DynamiCrafterCheckpoint:
    """The same over tensors that are already open."""
    return DynamiCrafterCheckpoint(**vars(identify(store, variant)), store=store)


def load_dynamicrafter(
    checkpoint: DynamiCrafterCheckpoint | str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
) -> DynamiCrafter:
    """The networks with a checkpoint's weights, in eval mode; memory peaks at about one copy.

    Args:
        checkpoint: an open checkpoint, or its path.
        device, dtype: where and as what the weights end up; dtype None keeps the stored types,
            except that 8-bit floats, which torch does not compute with, become bfloat16.
        operations: the namespace layers are built from (``torch.nn`` when None).

    Raises:
        LayerLoomError: unknown file, or names and shapes that do not fit the network.
    """
    if not isinstance(checkpoint, DynamiCrafterCheckpoint):
        checkpoint = open_dynamicrafter(checkpoint)
    return checkpoint.load(device, dtype, operations)
