"""Writes LayerLoom's own checkpoint: one safetensors file with its settings in the metadata.

Key prefixes are ``transformer.``, ``vae.``, ``text_encoder.`` and
``adapters.<name>.<module>.lora_A.weight`` [rank, in] / ``lora_B.weight`` [out, rank]. The metadata
entry ``layerloom`` is JSON: format, family, variant, constructor keywords of each network, the
layers' sequence, sampling defaults and each adapter's rank, alpha and default strength.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import LayerLoomError
from .detect import FORMAT, METADATA_KEY
from .names import PART_NAMES, adapter_key
from .reader import DTYPES, TensorSpec

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its shape and type now, its values when their turn comes."""

    spec: TensorSpec
    read: Callable[[], torch.Tensor]


def save_checkpoint(
    path: str | Path,
    transformer_state: Mapping[str, torch.Tensor],
    *,
    variant: str,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    sequence: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    parts: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    adapters: Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor]]] | None = None,
    adapter_scales: Mapping[str, float] | None = None,
    adapter_alphas: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Args:
        path: the file; its folder must exist.
        transformer_state: engine name -> tensor.
        variant: the name ``layerloom info`` prints.
        transformer: constructor keywords of ``LayeredTransformer``.
        vae, text_encoder: settings of the parts, as their builders take them.
        sequence, sampling: layer order and sampling defaults.
        parts: "vae" / "text_encoder" -> parameter name -> tensor.
        adapters: adapter name -> module path -> (A [rank, in], B [out, rank]).
        adapter_scales: default strength of each adapter, 1 where not given.
        adapter_alphas: alpha of each adapter, 1 where not given: strength 1 adds alpha / rank B A.
        metadata: further JSON entries (training notes, scores); may not replace the ones above.
        half: store floating tensors as float16.

    Raises:
        LayerLoomError: no such folder, no permission, or the disk is full.
    """
    tensors = {f"transformer.{name}": tensor for name, tensor in transformer_state.items()}
    for part, state in (parts or {}).items():
        if part not in PART_NAMES:
            raise ValueError(f"part {part!r} is not one of {PART_NAMES}")
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    listed = {}
    for adapter, modules in (adapters or {}).items():
        for module, (a, b) in modules.items():
            tensors |= {adapter_key(adapter, module, "A"): a, adapter_key(adapter, module, "B"): b}
        rank = max(a.shape[0] for a, _ in modules.values())
        listed[adapter] = {
            "rank": rank,
            "alpha": float((adapter_alphas or {}).get(adapter, 1.0)),
            "scale": float((adapter_scales or {}).get(adapter, 1.0)),
        }
    content = {
        **(metadata or {}),
        "format": FORMAT,
        "family": "layered",
        "variant": variant,
        "transformer": dict(transformer),
        "vae": vae,
        "text_encoder": text_encoder,
        "sequence": sequence,
        "sampling": sampling,
        "adapters": listed,
    }
    if half:
        tensors = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    save_tensors(path, tensors, {METADATA_KEY: json.dumps(content)})


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """``write_safetensors`` of tensors in memory; the file appears whole or not at all."""
    pending = {
        name: Pending(TensorSpec(tuple(tensor.shape), tensor.dtype), lambda t=tensor: t)
        for name, tensor in tensors.items()
    }
    write_safetensors(path, pending, metadata or {})


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Pending],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file tensor by tensor: the header first, then each tensor as it is read.

    Holds one tensor in memory at a time. ``progress`` gets (bytes written, bytes in all), from
    (0, total) on. An exception, a cancel included, leaves no file behind.
    """
    # Wide types first, so that every tensor starts at a multiple of its element size.
    order = sorted(tensors.items(), key=lambda item: -item[1].spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    total = 0
    for name, pending in order:
        spec = pending.spec
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [total, total + spec.bytes],
        }
        total += spec.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_file(path, 8 + len(encoded) + total) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        done = 0
        for name, pending in order:
            if progress:
                progress(done, total)
            _write_tensor(file, name, pending)
            done += pending.spec.bytes
    if progress:
        progress(total, total)


def _write_tensor(file: BinaryIO, name: str, pending: Pending) -> None:
    # A function of its own: the tensor is gone before the next one is read.
    tensor = pending.read().detach().cpu()
    if (tuple(tensor.shape), tensor.dtype) != (pending.spec.shape, pending.spec.dtype):
        raise ValueError(f"{name} is not the shape or type it was announced as")
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def atomic_file(path: str | Path, size: int = 0) -> Iterator[BinaryIO]:
    """A file that appears under its name only when everything was written.

    Args:
        size: bytes that will be needed; checked against the free space before work starts.

    Raises:
        LayerLoomError: the folder is missing or may not be written to, or the disk is full.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise LayerLoomError(f"The folder {folder} does not exist; create it or choose another.")
    if path.is_dir():
        raise LayerLoomError(f"{path} is a folder; give the name of a file to write.")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise LayerLoomError(
            f"{path.name} needs {size / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
            "make room or choose another folder."
        )
    temporary = folder / f".{path.name}.{os.getpid()}.partial"
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> LayerLoomError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LayerLoomError(
            f"The disk is full while writing {path}; make room or choose another folder "
            "(nothing was left behind)."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LayerLoomError(
            f"{path} may not be written ({error.strerror}); choose a folder you can write to."
        )
    return LayerLoomError(f"{path} cannot be written ({error.strerror or error}).")
