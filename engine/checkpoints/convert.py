"""Turns published checkpoints and adapters into safetensors files of known names."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..errors import LayerLoomError
from .bases import open_base
from .click import from_store as open_click_store
from .click_detect import ClickInfo, is_click
from .detect import METADATA_KEY, CheckpointInfo, TableLayout
from .dreamvideo import from_store as open_trajectory_store
from .dreamvideo_detect import TrajectoryInfo, is_dreamvideo
from .dynamicrafter import from_store as open_dynamicrafter_store
from .dynamicrafter_detect import DynamiCrafterInfo, is_dynamicrafter
from .load import from_store
from .lora import NAMINGS, LoRA, read_lora, save_lora
from .names import TensorSource, adapter_key
from .parts import FP8, PartsCheckpoint
from .reader import TensorSpec, TensorStore, open_tensors
from .save import Pending, Progress, write_safetensors
from .segmenter import SegmenterInfo, identify_segmenter, is_segmenter

# What a user calls the types weights are stored in.
ELEMENT_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


def element_type(name: str | None) -> torch.dtype | None:
    """The type a name stands for; None for None.

    Raises:
        LayerLoomError: no such name.
    """
    if name is None:
        return None
    if name not in ELEMENT_TYPES:
        raise LayerLoomError(
            f"The element type is {name!r}; give one of {', '.join(ELEMENT_TYPES)}."
        )
    return ELEMENT_TYPES[name]


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    progress: Progress | None = None,
    *,
    dtype: torch.dtype | None = None,
    layout: TableLayout | None = None,
    variant: str | None = None,
    base: str | Path | None = None,
) -> CheckpointInfo | DynamiCrafterInfo | ClickInfo | TrajectoryInfo | SegmenterInfo:
    """Write ``src``, of any supported format, as one safetensors file with engine names.

    Segmenters keep segment-anything's names, which are what the engine's network has.

    Adapters stay adapters, so their strengths can still be chosen. Memory holds one tensor at a
    time; the file appears whole or not at all.

    Args:
        progress: called with (bytes written, bytes in all).
        dtype: element type for floating tensors; None keeps what is stored. With an 8-bit one,
            vectors and single numbers (norms, biases, gates) become float16.
        layout: see ``open_checkpoint``.
        variant: see ``open_dynamicrafter``.
        base: see ``open_click`` and ``open_trajectory``.

    Returns:
        What ``src`` is.

    Raises:
        LayerLoomError: unknown or incomplete source, or the target cannot be written.
    """
    store = open_tensors(src)
    if variant is not None and not is_dynamicrafter(store):
        raise LayerLoomError(
            f"{store.name} is no DynamiCrafter checkpoint, which alone has variants to choose from."
        )
    stands = is_click(store) or is_dreamvideo(store)
    if base is not None and not stands:
        raise LayerLoomError(
            f"{store.name} stands on no other file, as motion modules do; leave --base out."
        )
    if is_dynamicrafter(store):
        return _convert_parts(open_dynamicrafter_store(store, variant), dst, progress, dtype)
    if is_click(store):
        under = None if base is None else open_base(base)
        return _convert_parts(open_click_store(store, under), dst, progress, dtype)
    if is_dreamvideo(store):
        under = None if base is None else open_base(base)
        return _convert_parts(open_trajectory_store(store, under), dst, progress, dtype)
    if is_segmenter(store):
        info = identify_segmenter(store)
        pending = {name: _pending(store, TensorSource(name), dtype) for name in store.specs}
        write_safetensors(dst, pending, store.metadata, progress)
        return info
    checkpoint = from_store(store, layout)
    checkpoint.check()
    plan = checkpoint.plan
    sources = {f"transformer.{name}": source for name, source in plan.transformer.items()}
    for part, entries in plan.parts.items():
        sources |= {f"{part}.{name}": source for name, source in entries.items()}
    for adapter, modules in plan.adapters.items():
        for module, halves in modules.items():
            for half, source in halves.items():
                sources[adapter_key(adapter, module, half)] = source
    pending = {name: _pending(checkpoint.store, source, dtype) for name, source in sources.items()}
    write_safetensors(dst, pending, {METADATA_KEY: json.dumps(checkpoint.metadata)}, progress)
    return checkpoint.info


def _convert_parts(
    checkpoint: PartsCheckpoint,
    dst: str | Path,
    progress: Progress | None,
    dtype: torch.dtype | None,
) -> DynamiCrafterInfo | ClickInfo | TrajectoryInfo:
    checkpoint.check()
    pending = {
        f"{part}.{name}": _pending(checkpoint.store, source, dtype)
        for part, sources in checkpoint.plan.items()
        for name, source in sources.items()
    }
    write_safetensors(dst, pending, {METADATA_KEY: json.dumps(checkpoint.metadata)}, progress)
    return checkpoint.info


def convert_adapter(
    src: str | Path, dst: str | Path, name: str | None = None, naming: str = "host"
) -> LoRA:
    """Write an adapter file, or one adapter of a checkpoint, under the names another program reads.

    Args:
        name: which adapter of a checkpoint that carries several.
        naming: "host" (ComfyUI) or "diffusers"; see ``save_lora``.

    Raises:
        LayerLoomError: no such adapter, or the target cannot be written.
    """
    if naming not in NAMINGS:
        raise LayerLoomError(f"The naming is {naming!r}; give one of {', '.join(NAMINGS)}.")
    lora = read_lora(src, name)
    save_lora(dst, lora, naming)
    return lora


def _pending(store: TensorStore, source: TensorSource, dtype: torch.dtype | None) -> Pending:
    spec = source.spec(store)
    target = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
    if target in FP8 and len(spec.shape) < 2 and spec.dtype not in FP8:
        target = torch.float16
    return Pending(TensorSpec(spec.shape, target), lambda: source.read(store).to(target))
