"""Low-rank adapters (LoRA) as data: reading and writing their files, folding them into weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import LayerLoomError
from .adapters import lora_delta
from .click_detect import ClickInfo, is_click
from .click_detect import identify as identify_click
from .detect import CheckpointInfo, identify
from .dreamvideo_detect import TrajectoryInfo, is_dreamvideo
from .dreamvideo_detect import identify as identify_dreamvideo
from .dynamicrafter_detect import DynamiCrafterInfo, is_dynamicrafter
from .dynamicrafter_detect import identify as identify_dynamicrafter
from .lora_names import split_key, targets_for
from .reader import TensorStore, open_tensors
from .save import save_tensors
from .segmenter import SegmenterInfo, identify_segmenter, is_segmenter

Pair = tuple[torch.Tensor, torch.Tensor]
# Our entry in the header of the files we write; diffusers' entry, where a trainer left one.
METADATA_KEY = "layerloom_lora"
DIFFUSERS_KEY = "lora_adapter_metadata"
FORMAT = 1
NAMINGS = ("diffusers", "host")
# Strengths a user may set: of a checkpoint's motion and content adapters, and of further ones.
OWN_RANGE = (-1.0, 2.0)
EXTRA_RANGE = (-10.0, 10.0)


@dataclass(frozen=True)
class LoRA:
    """One adapter: ``y = W x + strength * scale * B A x`` (LoRA, arXiv 2106.09685).

    Attributes:
        name: "motion", "content", or what the file calls it.
        rank: rows of A (the largest, where modules differ).
        alpha: ``scale`` is alpha / rank; LayerFlow's convention is alpha 1.
        weights: engine module path -> (A [rank, in], B [out, rank]).
    """

    name: str
    rank: int
    alpha: float
    weights: Mapping[str, Pair]

    @classmethod
    def of(cls, name: str, weights: Mapping[str, Pair], scales: Mapping[str, float]) -> LoRA:
        """An adapter whose modules may differ in scale (alpha / rank): B carries the difference."""
        rank = max(a.shape[0] for a, _ in weights.values())
        common = Counter(scales.values()).most_common(1)[0][0] or 1.0
        even = {
            module: (a, b if scales[module] == common else b.float() * (scales[module] / common))
            for module, (a, b) in weights.items()
        }
        return cls(name, rank, common * rank, even)

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the modules it changes."""
        return tuple(self.weights)

    @property
    def scale(self) -> float:
        """What strength 1 multiplies ``B A`` with."""
        return self.alpha / self.rank

    def delta(self, module: str) -> torch.Tensor:
        """``scale * B A`` [out, in] in float32 or wider: what strength 1 adds to a weight."""
        a, b = self.weights[module]
        return lora_delta(a, b, self.scale)

    def check(self, shapes: Mapping[str, Sequence[int]], owner: str) -> None:
        """Compare with a network's parameters (name -> shape).

        Raises:
            LayerLoomError: a module the network does not have, or one of another size.
        """
        for module, (a, b) in self.weights.items():
            wanted, has = shapes.get(f"{module}.weight"), (b.shape[0], a.shape[1])
            if wanted is None:
                raise LayerLoomError(
                    f"The adapter {self.name} does not fit {owner}, which has no {module}; give "
                    "an adapter made for this checkpoint."
                )
            if tuple(wanted) != has:
                raise LayerLoomError(
                    f"The adapter {self.name} does not fit {owner}: {module} is "
                    f"{wanted[0]}x{wanted[1]} there and {has[0]}x{has[1]} in the adapter; give an "
                    "adapter made for this checkpoint."
                )


def read_lora(path: str | Path, name: str | None = None) -> LoRA:
    """Read an adapter file, or one adapter of a checkpoint that carries several.

    Takes safetensors (or torch files of plain weights) with ``lora_A`` / ``lora_B`` or
    ``lora_down`` / ``lora_up`` names and ``alpha``; module names of the engine, diffusers, the
    host, kohya's scripts or SAT. Files without alpha have scale 1, as in diffusers and the host.

    Args:
        name: which adapter of a checkpoint; not needed where there is only one.

    Raises:
        LayerLoomError: missing or damaged file, names that are no adapter's, or halves of a pair
            that are missing or do not fit.
    """
    adapters = read_loras(path)
    if name is None and len(adapters) == 1:
        return next(iter(adapters.values()))
    known = ", ".join(adapters)
    if name is None:
        raise LayerLoomError(
            f"{Path(path).name} holds several adapters ({known}); say which one is meant."
        )
    if name not in adapters:
        raise LayerLoomError(f"{Path(path).name} has no adapter {name!r}; it holds {known}.")
    return adapters[name]


def read_loras(path: str | Path) -> dict[str, LoRA]:
    """All adapters of a file by name: a checkpoint's, or the one of an adapter file."""
    store = open_tensors(path)
    if is_lora(store):
        lora = lora_of(store, Path(path))
        return {lora.name: lora}
    from .load import from_store

    checkpoint = from_store(store)
    if not checkpoint.info.adapters:
        raise LayerLoomError(
            f"{store.name} is a checkpoint without adapters; give a LoRA file or a checkpoint "
            "that carries some."
        )
    checkpoint.check()
    return {name: checkpoint.lora(name) for name in checkpoint.info.adapters}


def is_lora(store: TensorStore) -> bool:
    """Whether a file holds an adapter alone: pairs in names that we know, and no other weights."""
    if METADATA_KEY in store.metadata:
        return True
    return any(
        (found := split_key(key)) and found[1] != "alpha" and not key.startswith("adapters.")
        for key in store.specs
    )


def is_adapter_file(path: str | Path) -> bool:
    """``is_lora`` of a file; LayerLoomError where it cannot be opened."""
    return is_lora(open_tensors(path))


@dataclass(frozen=True)
class LoRAInfo:
    """What an adapter file is.

    Attributes:
        family: "adapter".
        name: what it calls itself, or the file's name.
        rank, alpha, scale: strength 1 adds scale = alpha / rank times ``B A``.
        modules: how many layers it changes. kinds: which layers of a block. blocks: their numbers.
        parameters: numbers in the pairs.
        bytes: size on disk.
        dtype: element type of the pairs.
        notes: what else its header says (training).
    """

    family: str
    name: str
    rank: int
    alpha: float
    scale: float
    modules: int
    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    parameters: int
    bytes: int
    dtype: str
    notes: dict[str, object]


FileInfo = (
    CheckpointInfo | DynamiCrafterInfo | ClickInfo | TrajectoryInfo | SegmenterInfo | LoRAInfo
)


def inspect_file(path: str | Path) -> FileInfo:
    """Say what a file is: adapter, checkpoint or segmenter.

    Raises:
        LayerLoomError: neither, or damaged.
    """
    store = open_tensors(path)
    for is_one, identify_one in (
        (is_dynamicrafter, identify_dynamicrafter),
        (is_click, identify_click),
        (is_dreamvideo, identify_dreamvideo),
    ):
        if is_one(store):
            return identify_one(store).info
    if is_segmenter(store):
        return identify_segmenter(store)
    if not is_lora(store):
        return identify(store)[0]
    lora = lora_of(store, Path(path))
    found = [re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module) for module in lora.targets]
    inside = [match for match in found if match]
    halves = [half for pair in lora.weights.values() for half in pair]
    notes = json.loads(store.metadata.get(METADATA_KEY, "{}"))
    return LoRAInfo(
        family="adapter",
        name=lora.name,
        rank=lora.rank,
        alpha=lora.alpha,
        scale=lora.scale,
        modules=len(lora.targets),
        kinds=tuple(dict.fromkeys(match[2] for match in inside)),
        blocks=tuple(sorted({int(match[1]) for match in inside})),
        parameters=sum(half.numel() for half in halves),
        bytes=store.size,
        dtype=str(halves[0].dtype).removeprefix("torch."),
        notes={key: notes[key] for key in notes.keys() - {"format", "name", "rank", "alpha"}},
    )


def lora_of(store: TensorStore, path: Path | None = None) -> LoRA:
    """The adapter of an open file; ``path`` is where PEFT's settings may lie beside it."""
    halves: dict[str, dict[str, str]] = {}
    for key in store.specs:
        found = split_key(key)
        if found is None or not targets_for(found[0]):
            raise LayerLoomError(
                f"{store.name} holds {key}, which is no LoRA pair of a layered model; give a "
                "plain LoRA (lora_A/lora_B or lora_down/lora_up) made for CogVideoX-2B, LayerFlow "
                "or a starter."
            )
        halves.setdefault(found[0], {})[found[1]] = key
    stated = _stated(store, path)
    weights, scales = {}, {}
    for name, keys in halves.items():
        a, b = _pair(store, name, keys)
        scale = stated.scale(name, a.shape[0])
        if "alpha" in keys:
            scale = float(store.read(keys["alpha"]).float().reshape(-1)[0]) / a.shape[0]
        for target in targets_for(name):
            rows = b
            if target.of > 1:
                parts = b.chunk(target.of)
                rows = torch.cat([parts[i] for i in target.pieces])
            if target.module in weights:
                raise LayerLoomError(
                    f"{store.name} has two pairs for {target.module}; give a file with one."
                )
            weights[target.module], scales[target.module] = (a, rows), scale
    if not weights:
        raise LayerLoomError(f"{store.name} holds no LoRA pairs; give a LoRA file.")
    return LoRA.of(stated.name or Path(store.name).stem, weights, scales)


@dataclass(frozen=True)
class _Stated:
    """What the header or PEFT's settings file says: the name, and alpha where it is not 1 / 1."""

    name: str | None = None
    alpha: float | None = None
    patterns: Mapping[str, float] | None = None
    root: bool = False

    def scale(self, module: str, rank: int) -> float:
        if self.alpha is None:
            return 1.0
        alpha = self.alpha
        for pattern, value in (self.patterns or {}).items():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = float(value)
        return alpha / (rank**0.5 if self.root else rank)


def _stated(store: TensorStore, path: Path | None) -> _Stated:
    try:
        if METADATA_KEY in store.metadata:
            own = json.loads(store.metadata[METADATA_KEY])
            return _Stated(name=str(own["name"]))
        if DIFFUSERS_KEY in store.metadata:
            entries = json.loads(store.metadata[DIFFUSERS_KEY])
            found = {key.removeprefix("transformer."): entry for key, entry in entries.items()}
        elif beside := _peft_settings(path):
            found = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return _Stated()
        alpha = found.get("lora_alpha")
        return _Stated(
            alpha=None if alpha is None else float(alpha),
            patterns=dict(found.get("alpha_pattern") or {}),
            root=bool(found.get("use_rslora")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LayerLoomError(
            f"{store.name} carries adapter settings that cannot be read; save it again."
        ) from None


def _peft_settings(path: Path | None) -> Path | None:
    """PEFT's adapter_config.json that belongs to a file or folder, or None."""
    if path is None or not (path.is_dir() or path.stem == "adapter_model"):
        return None
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    return beside if beside.is_file() else None


def _pair(store: TensorStore, name: str, keys: Mapping[str, str]) -> Pair:
    for half in ("A", "B"):
        if half not in keys:
            raise LayerLoomError(
                f"{store.name} is incomplete: the pair of {name} lacks its {half} matrix "
                f"({'lora_A or lora_down' if half == 'A' else 'lora_B or lora_up'})."
            )
    shapes = [store.specs[keys[half]].shape for half in ("A", "B")]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0][0] == shapes[1][1] > 0
    if not fits:
        written = " and ".join("x".join(map(str, shape)) or "a number" for shape in shapes)
        raise LayerLoomError(
            f"{store.name} has a pair that does not fit together: {name} is {written}; expected "
            "A as rank x in and B as out x rank."
        )
    return store.read(keys["A"]), store.read(keys["B"])


def lora_tensors(lora: LoRA, naming: str = "host") -> dict[str, torch.Tensor]:
    """The pairs under the names of a file; see ``save_lora`` for ``naming``."""
    if naming not in NAMINGS:
        raise ValueError(f"naming {naming!r} is not one of {NAMINGS}")
    tensors: dict[str, torch.Tensor] = {}
    for module, (a, b) in lora.weights.items():
        if naming == "host":
            key = f"diffusion_model.{module}"
            # Readers divide by the rows of A, which modules may have fewer of than `rank`.
            tensors[f"{key}.alpha"] = torch.tensor(lora.scale * a.shape[0])
        else:
            key = f"transformer.{module}"
            b = b if lora.scale == 1 else (b.float() * lora.scale).to(b.dtype)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    return tensors


def save_lora(
    path: str | Path,
    lora: LoRA,
    naming: str = "diffusers",
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write an adapter as safetensors; the file appears whole or not at all.

    "host" keeps A and B as they are and writes alpha beside each pair: ComfyUI's own LoRA loaders
    read it. "diffusers" has no place for alpha, so B carries the scale (exact where alpha / rank
    is a power of two).

    Args:
        metadata: further JSON entries for the header (training notes).

    Raises:
        LayerLoomError: the file cannot be written.
    """
    tensors = lora_tensors(lora, naming)
    own = {"format": FORMAT, "name": lora.name, "rank": lora.rank, "alpha": lora.alpha}
    header = {METADATA_KEY: json.dumps({**(metadata or {}), **own})}
    save_tensors(path, tensors, header)


def folded_state(
    state: Mapping[str, torch.Tensor], loras: Sequence[tuple[LoRA, float]], owner: str = "it"
) -> dict[str, torch.Tensor]:
    """``W + sum(strength * delta)`` for every weight that an adapter changes.

    Summed in float32 or wider and rounded once to the weight's type. ``state`` is not changed and
    what no adapter touches is the same tensor, so unfolding is exact: fold ``state`` anew with
    other strengths, or use it as it is.

    Args:
        state: parameter name -> tensor of the network without adapters.
        loras: (adapter, strength) pairs; strength 0 leaves the weights alone.
        owner: what ``state`` belongs to, for messages.

    Raises:
        LayerLoomError: an adapter does not fit.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    deltas: dict[str, torch.Tensor] = {}
    for lora, strength in loras:
        lora.check(shapes, owner)
        if not strength:
            continue
        for module in lora.targets:
            name = f"{module}.weight"
            delta = strength * lora.delta(module).to(state[name].device)
            deltas[name] = deltas[name] + delta if name in deltas else delta
    return {
        name: (tensor.to(deltas[name].dtype) + deltas[name]).to(tensor.dtype)
        if name in deltas
        else tensor
        for name, tensor in state.items()
    }
