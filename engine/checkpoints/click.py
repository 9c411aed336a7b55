"""Opens checkpoints that animate regions, alone or on the Stable Diffusion 1.5 they stand on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.follow_your_click import FollowYourClick
from .bases import joined, open_base
from .click_detect import BASE, identify
from .identified import Identified
from .parts import PartsCheckpoint
from .reader import TensorStore, open_tensors


@dataclass(frozen=True)
class ClickCheckpoint(Identified, PartsCheckpoint):
    """An open checkpoint; tensors of ``store`` are read when asked for."""

    store: TensorStore
    networks = ("unet",)

    @property
    def label(self) -> str:
        return self.info.variant

    def build(self, device: Any, dtype: torch.dtype | None, operations: Any) -> FollowYourClick:
        if self.info.needs_base:
            raise LayerLoomError(
                f"{self.store.name} holds motion modules alone; name what they stand on with "
                f"--base, it is {BASE}."
            )
        return FollowYourClick(
            unet=self.info.unet,
            settings=self.variant,
            device=device,
            dtype=dtype,
            operations=operations,
        )


def open_click(path: str | Path, base: str | Path | None = None) -> ClickCheckpoint:
    """Open a checkpoint of any supported format.

    Args:
        path: the file, or a folder in diffusers' layout.
        base: Stable Diffusion 1.5, where ``path`` holds motion modules alone; not opened else.

    Raises:
        LayerLoomError: not a checkpoint of this kind, or a base that it does not fit.
    """
    store = open_tensors(path)
    alone = from_store(store)
    if base is None or not alone.info.needs_base:
        return alone
    return from_store(store, open_base(base))


def from_store(store: TensorStore, base: TensorStore | None = None) -> ClickCheckpoint:
    """The same over tensors that are already open."""
    found = identify(store, base)
    whole = store if base is None else joined(store, base)
    return ClickCheckpoint(**vars(found), store=whole)


def load_click(
    checkpoint: ClickCheckpoint | str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
) -> FollowYourClick:
    """The network with a checkpoint's weights, in eval mode; memory peaks at about one copy.

    Args:
        checkpoint: an open checkpoint, or its path.
        device, dtype: where and as what the weights end up; dtype None keeps the stored types,
            except that 8-bit floats, which torch does not compute with, become bfloat16.
        operations: the namespace layers are built from (``torch.nn`` when None).

    Raises:
        LayerLoomError: unknown file, or names and shapes that do not fit the network.
    """
    if not isinstance(checkpoint, ClickCheckpoint):
        checkpoint = open_click(checkpoint)
    return checkpoint.load(device, dtype, operations)


def grown_state(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """A UNet's tensors for a network that reads more, which has no effect at first.

    Args:
        state: engine name -> tensor of the start.
        shapes: those of the network that is wanted.

    Returns:
        The tensors of ``state``, the first convolution's further inputs zeros. Names of ``shapes``
        that it lacks are left to the network, whose new layers end in zeros themselves.

    Raises:
        LayerLoomError: a tensor of another shape than wanted.
    """
    made = {}
    for name, tensor in state.items():
        wanted = shapes.get(name)
        if wanted is None:
            raise LayerLoomError(f"The start's {name} is not part of the network that is wanted.")
        if name == "conv_in.weight" and tensor.shape[1] < wanted[1]:
            wider = tensor.new_zeros(wanted)
            wider[:, : tensor.shape[1]] = tensor
            tensor = wider
        if tuple(tensor.shape) != tuple(wanted):
            raise LayerLoomError(
                f"The start's {name} has the shape {list(tensor.shape)}, not {list(wanted)}."
            )
        made[name] = tensor
    return made
