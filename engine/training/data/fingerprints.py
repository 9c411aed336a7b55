"""Digests that tell whether something encoded earlier still belongs to its weights and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ...conditioning.encoders import TextFeatures, VideoCodec

_BLOCK = 1 << 20
# Of a tensor with more values than this only so many are read: no other weights agree in all of
# them, and T5-XXL as a whole would take a minute.
_SAMPLED = 1 << 20


def weights_digest(network: nn.Module, settings: str = "") -> str:
    """A digest of some settings and a network's weights and buffers, whatever their type."""
    # Here, so that checking a folder need not load torch.
    import torch

    digest = hashlib.sha256(settings.encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        values = tensor.detach().contiguous().reshape(-1)
        values = values[:: -(-values.numel() // _SAMPLED) or 1].cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_of(part: VideoCodec | TextFeatures) -> nn.Module:
    """The network inside an autoencoder's or text encoder's interface."""
    return part.vae if hasattr(part, "vae") else part.model


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A digest of plain values that does not depend on their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder of pictures in a fixed order."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))


def stamp(path: Path) -> list[list]:
    """Name, size and time of change of a clip's files: equal means unchanged, almost surely."""
    entries = []
    for file in files_of(path):
        status = file.stat()
        entries.append([file.name, status.st_size, status.st_mtime_ns])
    return entries


def content_digest(paths: Sequence[Path]) -> str:
    """A digest of the bytes of all files of some clips."""
    digest = hashlib.sha256()
    for path in paths:
        for file in files_of(path):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()
