"""What every detector of checkpoints of several parts finds, and how it reads our own files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import LayerLoomError
from .detect import FORMAT, METADATA_KEY
from .names import TensorSource
from .reader import TensorStore

Plan = dict[str, dict[str, TensorSource]]
"""Part -> engine name -> where it comes from."""
# Constructor keywords of ``VideoUNet`` that JSON turns into lists.
_TUPLES = ("block_channels", "attention_levels", "scalar_embeddings")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Identified:
    """What a store is, and where everything comes from.

    Attributes:
        info: what it is, as the family's detector describes it.
        variant: what it was trained and is sampled with.
        metadata: settings in our own format's shape, made up for published files.
        plan: part -> engine name -> where it comes from.
        left_over: stored names of our networks that the engine does not know.
    """

    info: Any
    variant: Any
    metadata: dict[str, Any]
    plan: Plan
    left_over: tuple[str, ...]


def stated(store: TensorStore) -> dict[str, Any]:
    """What a file that LayerLoom wrote says of itself; empty where that cannot be read."""
    try:
        metadata = json.loads(store.metadata[METADATA_KEY])
    except (KeyError, ValueError, TypeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def read_stated(store: TensorStore, read: Callable[[dict[str, Any]], _T]) -> _T:
    """``read`` of what the file says of itself.

    Raises:
        LayerLoomError: another format, or nothing that ``read`` can make something of.
    """
    metadata = stated(store)
    if metadata.get("format") != FORMAT:
        raise LayerLoomError(
            f"{store.name} is LayerLoom format {metadata.get('format')}; this version reads "
            f"format {FORMAT}: update LayerLoom."
        )
    try:
        return read(metadata)
    except (KeyError, TypeError, ValueError):
        raise LayerLoomError(
            f"{store.name} carries LayerLoom metadata that cannot be read; "
            "save or convert it again."
        ) from None


def unet_from_json(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor keywords of ``VideoUNet`` as they were before JSON."""
    return {key: tuple(value) if key in _TUPLES else value for key, value in dict(stored).items()}


def plan_parts(store: TensorStore, parts: Sequence[str]) -> tuple[Plan, tuple[str, ...]]:
    """Where the parts of a file of ours come from, and the stored names of none of them."""
    plan: Plan = {}
    left_over = []
    for key in store.specs:
        part, _, name = key.partition(".")
        if part in parts:
            plan.setdefault(part, {})[name] = TensorSource(key)
        else:
            left_over.append(key)
    return plan, tuple(left_over)


def unet_figures(store: TensorStore, plan: Plan) -> dict[str, Any]:
    """``parameters`` of the UNet, ``bytes`` on disk and ``dtype`` of most UNet weights.

    Raises:
        LayerLoomError: there is no UNet.
    """
    specs = [entry.spec(store) for entry in plan.get("unet", {}).values()]
    kinds: Counter[str] = Counter()
    for spec in specs:
        kinds[str(spec.dtype).removeprefix("torch.")] += spec.bytes
    if not kinds:
        raise LayerLoomError(f"{store.name} holds no video UNet; download or convert it again.")
    return {
        "parameters": sum(spec.elements for spec in specs),
        "bytes": store.size or sum(spec.bytes for spec in store.specs.values()),
        "dtype": kinds.most_common(1)[0][0],
    }


def unread(store: TensorStore, plan: Plan) -> set[str]:
    """Stored names that no part is made of."""
    return store.specs.keys() - {
        source.key for sources in plan.values() for source in sources.values()
    }
