"""Opens checkpoints that move subjects along boxes, whole or on the base they stand on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.dreamvideo import DreamVideo
from .bases import joined, open_base
from .dreamvideo_detect import BASE, NETWORKS, identify
from .identified import Identified
from .parts import PartsCheckpoint
from .reader import TensorStore


@dataclass(frozen=True)
class TrajectoryCheckpoint(Identified, PartsCheckpoint):
    """An open checkpoint; tensors of ``store`` are read when asked for."""

    store: TensorStore
    networks = NETWORKS

    @property
    def label(self) -> str:
        return self.info.variant

    def build(self, device: Any, dtype: torch.dtype | None, operations: Any) -> DreamVideo:
        if self.info.needs_base:
            raise LayerLoomError(
                f"{self.store.name} holds what was added to a base and not the base; name it with "
                f"--base, it is {BASE}."
            )
        return DreamVideo(
            unet=self.info.unet,
            settings=self.variant,
            reference=self.info.reference,
            control=self.info.control,
            device=device,
            dtype=dtype,
            operations=operations,
        )


def open_trajectory(path: str | Path, base: str | Path | None = None) -> TrajectoryCheckpoint:
    """Open a checkpoint of any supported format.

    Args:
        path: the file, or a folder in diffusers' layout.
        base: ModelScope's weights, where ``path`` holds additions alone; not opened else.

    Raises:
        LayerLoomError: not a checkpoint of this kind, or a base that it does not fit.
    """
    store = open_base(path)
    alone = from_store(store)
    if base is None or not alone.info.needs_base:
        return alone
    return from_store(store, open_base(base))


def from_store(store: TensorStore, base: TensorStore | None = None) -> TrajectoryCheckpoint:
    """The same over tensors that are already open."""
    found = identify(store, base)
    whole = store if base is None else joined(store, base)
    return TrajectoryCheckpoint(**vars(found), store=whole)


def load_trajectory(
    checkpoint: TrajectoryCheckpoint | str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
) -> DreamVideo:
    """The network with a checkpoint's weights, in eval mode; memory peaks at about one copy.

    Args:
        checkpoint: an open checkpoint, or its path.
        device, dtype: where and as what the weights end up; dtype None keeps the stored types,
            except that 8-bit floats, which torch does not compute with, become bfloat16.
        operations: the namespace layers are built from (``torch.nn`` when None).

    Raises:
        LayerLoomError: unknown file, or names and shapes that do not fit the network.
    """
    if not isinstance(checkpoint, TrajectoryCheckpoint):
        checkpoint = open_trajectory(checkpoint)
    return checkpoint.load(device, dtype, operations)
