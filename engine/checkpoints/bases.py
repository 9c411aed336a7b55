"""Files that stand on a base: both opened as one store, the base's names marked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .names import TensorSource
from .reader import TensorStore, open_tensors

BASE_MARK = "base|"


def open_base(path: str | Path) -> TensorStore:
    """A base's weights: a file, or a folder that may hold other parts beside ``unet``."""
    folder = Path(path) / "unet"
    return open_tensors(folder if folder.is_dir() else path)


def of_base(source: TensorSource) -> TensorSource:
    """A base's source as ``joined`` stores it."""
    return replace(source, key=BASE_MARK + source.key)


def joined(store: TensorStore, base: TensorStore) -> TensorStore:
    """Both stores in one; the base's names are marked, see ``of_base``."""

    def place(key: str) -> tuple[TensorStore, str]:
        if key.startswith(BASE_MARK):
            return base, key.removeprefix(BASE_MARK)
        return store, key

    def read(key: str, owned: bool = False) -> torch.Tensor:
        where, name = place(key)
        return (where.owned() if owned else where).read(name)

    return TensorStore(
        f"{store.name} on {base.name}",
        {**store.specs, **{BASE_MARK + key: spec for key, spec in base.specs.items()}},
        read,
        size=store.size + base.size,
        read_past_map=lambda key: read(key, True),
    )
