"""What checkpoints of several parts have in common: reading a part, checking names and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import LayerLoomError
from .names import TensorSource
from .reader import TensorStore

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class PartsCheckpoint:
    """An open checkpoint whose tensors are read when asked for.

    A subclass has ``info``, ``plan`` (part -> engine name -> source), ``left_over`` and ``store``;
    it says which parts are ``networks`` of ours, its ``label`` for messages, and builds them.
    """

    info: Any
    plan: dict[str, dict[str, TensorSource]]
    left_over: tuple[str, ...]
    store: TensorStore
    networks: tuple[str, ...]

    @property
    def label(self) -> str:
        """What the file looks like, for messages."""
        raise NotImplementedError

    def build(self, device: Any, dtype: torch.dtype | None, operations: Any) -> nn.Module:
        """The networks, their parts named as in ``networks``, without weights on "meta"."""
        raise NotImplementedError

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
        self.compare(self._built("meta", None, None))

    def compare(self, network: nn.Module) -> None:
        """``check`` with networks that are already built."""
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        found = {
            f"{part}.{name}": source.spec(self.store).shape
            for part in self.networks
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
                    f"{self.store.name} looks like {self.label} ({self.info.source}) but {keys[0]} "
                    f"{problem}{more}; the file is incomplete or of another version."
                )

    def load(self, device: Any, dtype: torch.dtype | None, operations: Any) -> Any:
        """The networks with their weights, in eval mode; memory peaks at about one copy.

        ``dtype`` None keeps the stored types, except that 8-bit floats, which torch does not
        compute with, become bfloat16.

        Raises:
            LayerLoomError: names and shapes that do not fit the networks.
        """
        if dtype is None and getattr(torch, self.info.dtype) in FP8:
            dtype = torch.bfloat16
        network = self._built("meta", dtype, operations)
        self.compare(network)
        state = {
            f"{part}.{name}": tensor.to(device)
            for part in self.networks
            if part in self.plan
            for name, tensor in self.iter_part(part, dtype)
        }
        network.load_state_dict(state, assign=True)
        return network.eval()

    def _built(self, device: Any, dtype: torch.dtype | None, operations: Any) -> nn.Module:
        try:
            return self.build(device, dtype, operations)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LayerLoomError(
                f"{self.store.name} describes a network this version cannot build ({error})."
            ) from error
