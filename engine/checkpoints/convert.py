"""Turns published checkpoints and adapters into safetensors files of known names."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..errors import LayerLoomError
from .detect import METADATA_KEY, CheckpointInfo, TableLayout
from .load import open_checkpoint
from .lora import NAMINGS, LoRA, read_lora, save_lora
from .names import TensorSource, adapter_key
from .reader import TensorSpec, TensorStore
from .save import Pending, Progress, write_safetensors


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    progress: Progress | None = None,
    *,
    dtype: torch.dtype | None = None,
    layout: TableLayout | None = None,
) -> CheckpointInfo:
    """Write ``src``, of any supported format, as one safetensors file with engine names.

    Adapters stay adapters, so their strengths can still be chosen. Memory holds one tensor at a
    time; the file appears whole or not at all.

    Args:
        progress: called with (bytes written, bytes in all).
        dtype: element type for floating tensors; None keeps what is stored.
        layout: see ``open_checkpoint``.

    Returns:
        What ``src`` is.

    Raises:
        LayerLoomError: unknown or incomplete source, or the target cannot be written.
    """
    checkpoint = open_checkpoint(src, layout)
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
    return Pending(TensorSpec(spec.shape, target), lambda: source.read(store).to(target))
