"""Opens weight files without running code in them and reads their tensors one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import LayerLoomError

# safetensors' names for element types (https://github.com/huggingface/safetensors, "Format").
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The largest header the safetensors library itself accepts.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class TensorStore:
    """Named tensors that are read when asked for.

    Attributes:
        name: the file's or folder's name for messages.
        specs: shape and type of every tensor.
        read: returns one tensor by name, on the CPU; it may still be backed by the file.
        metadata: the safetensors header's ``__metadata__``.
        config: the ``config.json`` beside the weights, where there is one.
        size: bytes on disk.
        read_past_map: the same as ``read`` into memory of its own and past the memory map, whose
            pages would count twice beside the copy; None where there is no such way.
    """

    name: str
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    size: int = 0
    read_past_map: Callable[[str], torch.Tensor] | None = None

    def owned(self) -> TensorStore:
        """The same store whose ``read`` gives tensors with memory of their own."""
        copy = self.read_past_map or (lambda key: self.read(key).clone())
        return dataclasses.replace(self, read=copy)


def open_tensors(path: str | Path) -> TensorStore:
    """Open a weight file or folder whatever its name.

    Takes a safetensors file, a diffusers folder (or pipeline folder with ``transformer/``) of one
    or more safetensors files, or a torch pickle, which is read as plain weights only.

    Raises:
        LayerLoomError: missing, empty, truncated, not a weight file, or a pickle with code.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in_folder(path)
    if not path.exists():
        raise LayerLoomError(f"There is no file {path}; give the path of a checkpoint.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise LayerLoomError(f"{path} cannot be read ({error.strerror}).") from None
    if not start:
        raise LayerLoomError(f"{path.name} is empty; download or copy the checkpoint again.")
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return _open_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return memory_store(_load_pickle(path), path.name, path.stat().st_size)
    raise LayerLoomError(
        f"{path.name} is not a checkpoint: it is neither a safetensors file nor a torch file; "
        "give the file of a network's weights."
    )


def memory_store(tensors: Mapping[str, torch.Tensor], name: str, size: int = 0) -> TensorStore:
    """A store over tensors that are already open."""
    specs = {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    return TensorStore(name, specs, tensors.__getitem__, size=size)


def _weights_in_folder(folder: Path) -> Path:
    """The one weight file (or shard index) a folder stands for."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    for pattern in (
        "*.safetensors.index.json",
        "*.safetensors",
        "mp_rank_00_model_states.pt",
        "*/mp_rank_00_model_states.pt",
    ):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise LayerLoomError(
                f"The folder {folder} holds several checkpoints ({found[0].name}, "
                f"{found[1].name}, ...); name one of the files."
            )
    raise LayerLoomError(
        f"The folder {folder} holds no checkpoint; expected a diffusers transformer folder with "
        ".safetensors files, or a LayerFlow folder with mp_rank_00_model_states.pt."
    )


def _config_beside(path: Path) -> Mapping[str, Any] | None:
    config = path.parent / "config.json"
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _truncated(path: Path) -> LayerLoomError:
    return LayerLoomError(
        f"{path.name} is cut short or damaged; download or copy the checkpoint again."
    )


def _open_safetensors(path: Path) -> TensorStore:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            specs = {
                name: TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                for name, entry in header.items()
            }
            starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise _truncated(path) from None
    if 8 + length + end != size:
        raise _truncated(path)
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError:
        raise _truncated(path) from None

    def past_map(name: str) -> torch.Tensor:
        spec = specs[name]
        if not spec.bytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        raw = np.fromfile(path, np.uint8, spec.bytes, offset=starts[name])
        return torch.from_numpy(raw).view(spec.dtype).reshape(spec.shape)

    return TensorStore(
        path.name, specs, file.get_tensor, metadata, _config_beside(path), size, past_map
    )


def _open_sharded(index: Path) -> TensorStore:
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LayerLoomError(f"{index.name} is not a shard index of a diffusers folder.") from None
    for file in files:
        if not (index.parent / file).is_file():
            raise LayerLoomError(
                f"{file}, named by {index.name}, is missing; download the whole folder again."
            )
    shards = {file: _open_safetensors(index.parent / file) for file in files}
    for key, file in names.items():
        if key not in shards[file].specs:
            raise _truncated(index.parent / file)
    return TensorStore(
        index.parent.name,
        {key: shards[file].specs[key] for key, file in names.items()},
        lambda key: shards[names[key]].read(key),
        config=_config_beside(index),
        size=sum(shard.size for shard in shards.values()),
        read_past_map=lambda key: shards[names[key]].owned().read(key),
    )


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch file, memory-mapped, under ``module``, ``state_dict`` or bare."""
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not is_zip:
            raise _truncated(path)
    try:
        with _plain_data_allowed():
            # An open file, where the name would make newer torch take it for safetensors.
            named = path.suffix != ".safetensors"
            with contextlib.nullcontext(path) if named else path.open("rb") as source:
                content = torch.load(
                    source, map_location="cpu", weights_only=True, mmap=is_zip and named
                )
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, OSError):
        raise _truncated(path) from None
    for key in ("module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise LayerLoomError(
            f"{path.name} holds no named tensors; expected a checkpoint's weights under "
            "'module' or 'state_dict'."
        )
    return tensors


def _refused(path: Path, message: str) -> LayerLoomError:
    """Tell a pickle that names code from one that is merely broken."""
    named = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"(?:class|type) ([\w.]+)", message)
    if named is None:
        return _truncated(path)
    return LayerLoomError(
        f"{path.name} wants to run code when opened ({named[1]}), which is refused; "
        "get a safetensors version or a file with plain weights."
    )


@contextlib.contextmanager
def _plain_data_allowed() -> Iterator[None]:
    """Let torch's restricted reader rebuild numpy arrays: training runs leave random states."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):  # no scoped list of (object, stored name) there; such files are refused
        yield
        return
    import numpy

    rebuild = numpy.random.get_state()[1].__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    dtypes = [type(numpy.dtype(name)) for name in ("uint32", "int64", "float32", "float64")]
    allowed = [*((rebuild, name) for name in names), numpy.ndarray, numpy.dtype, *dtypes]
    with torch.serialization.safe_globals(allowed):
        yield
