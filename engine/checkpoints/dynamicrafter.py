"""Opens DynamiCrafter checkpoints: the official files, pruned ones, and LayerLoom's own.

Detected from keys and shapes: the UNet behind ``model.diffusion_model.`` (or bare, or as DeepSpeed
leaves it), with query transformer, autoencoder and CLIP encoders where they are inside. ToonCrafter
and CIL files share the UNet's and the query transformer's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.dynamicrafter import DynamiCrafter
from .dynamicrafter_detect import NETWORKS, Identified, identify
from .reader import TensorStore, open_tensors

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class DynamiCrafterCheckpoint(Identified):
    """An open checkpoint; tensors of ``store`` are read when asked for."""

    store: TensorStore

    def iter_part(
        self, part: str, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Engine name and tensor of a part, one at a time, with memory of their own.

        ``dtype`` None keeps the stored types.

        Raises:
            LayerLoomError: the file holds no such part.
        """
        if part not in self.plan:
            raise LayerLoomError(
                f"{self.store.name} holds no {part.replace('_', ' ')}; name its file or folder."
            )
        store = self.store.owned()
        for name, source in self.plan[part].items():
            tensor = source.read(store).to(dtype)
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensor = tensor.clone()  # a piece would keep the whole of it
            yield name, tensor

    def part_state(self, part: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """``iter_part`` at once."""
        return dict(self.iter_part(part, dtype))

    def check(self) -> None:
        """Compare every name and shape with the networks' own, on the meta device.

        Raises:
            LayerLoomError: something is missing, left over or of another shape.
        """
        self._compare(self._build("meta", None, None))

    def _build(self, device: Any, dtype: torch.dtype | None, operations: Any) -> DynamiCrafter:
        try:
            return DynamiCrafter(
                unet=self.info.unet,
                image_projector=self.info.image_projector,
                device=device,
                dtype=dtype,
                operations=operations,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise LayerLoomError(
                f"{self.store.name} describes a network this version cannot build ({error})."
            ) from error

    def _compare(self, network: DynamiCrafter) -> None:
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        found = {
            f"{part}.{name}": source.spec(self.store).shape
            for part in NETWORKS
            for name, source in self.plan.get(part, {}).items()
        }
        for problem, keys in (
            ("is missing", sorted(expected.keys() - found.keys())),
            (
                "is not part of the network",
                [*self.left_over, *sorted(found.keys() - expected.keys())],
            ),
            (
                "has an unexpected shape",
                [name for name in found if found[name] != expected.get(name, found[name])],
            ),
        ):
            if keys:
                more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
                raise LayerLoomError(
                    f"{self.store.name} looks like DynamiCrafter {self.info.variant} "
                    f"({self.info.source}) but {keys[0]} {problem}{more}; the file is incomplete "
                    "or of another version."
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
    if dtype is None and getattr(torch, checkpoint.info.dtype) in FP8:
        dtype = torch.bfloat16
    network = checkpoint._build("meta", dtype, operations)
    checkpoint._compare(network)
    state = {
        f"{part}.{name}": tensor.to(device)
        for part in NETWORKS
        if part in checkpoint.plan
        for name, tensor in checkpoint.iter_part(part, dtype)
    }
    network.load_state_dict(state, assign=True)
    return network.eval()
