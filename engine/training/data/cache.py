"""Keeps encoded samples and prompts in files: each whole or not there, and none that is stale."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ...checkpoints.save import save_tensors
from ...errors import LayerLoomError
from .fingerprints import content_digest, settings_digest, stamp
from .plan import Entry

# A file half written for longer than this belongs to a process that was killed.
_FORGOTTEN = 3600


def cache_folder(path: Path) -> Path:
    """The folder, made where it is missing, without what killed processes left half written.

    Raises:
        LayerLoomError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        for partial in path.glob(".*.partial"):
            if time.time() - partial.stat().st_mtime > _FORGOTTEN:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise LayerLoomError(
            f"The cache {path} cannot be made ({error.strerror or error}); name another folder "
            "with data.cache=... ."
        ) from error
    return path


class LatentCache:
    """Joined latents of a folder's entries, one file each.

    settings: a digest of all that the latents depend on besides the entry and its files.
    """

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings

    def file(self, entry: Entry) -> Path:
        name = re.sub(r"[^A-Za-z0-9]+", "-", entry.name)[:40].strip("-")
        return self.folder / f"{name}-{settings_digest(entry.key)[:12]}.safetensors"

    def mark(self, entry: Entry) -> str:
        return settings_digest({**entry.key, "bucket": entry.bucket, "settings": self.settings})

    def is_fresh(self, entry: Entry, files: Sequence[Path]) -> bool:
        """Whether the entry's latents are there and made of what its files hold now."""
        from safetensors import SafetensorError, safe_open

        path = self.file(entry)
        try:
            with safe_open(path, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("mark") != self.mark(entry):
                    return False
                if metadata.get("files") == json.dumps([stamp(file) for file in files]):
                    return True
                if metadata.get("content") != content_digest(files):
                    return False
                latents = stored.get_tensor("latents").clone()
        except (OSError, SafetensorError):
            return False
        # Copied or touched, not changed: remember the new times.
        self.write(entry, files, latents)
        return True

    def write(self, entry: Entry, files: Sequence[Path], latents: torch.Tensor) -> None:
        """Keep latents [T, C, h, w]; LayerLoomError when the disk is full."""
        metadata = {
            "mark": self.mark(entry),
            "files": json.dumps([stamp(file) for file in files]),
            "content": content_digest(files),
        }
        save_tensors(self.file(entry), {"latents": latents}, metadata)

    def read(self, entry: Entry) -> torch.Tensor:
        """Latents [T, C, h, w]."""
        return _read(self.file(entry), "latents")


class TextCache:
    """Features [tokens, D] of single prompts, one file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:24]}.safetensors"

    def write(self, prompt: str, features: torch.Tensor) -> None:
        save_tensors(self.file(prompt), {"features": features}, {"prompt": prompt})

    def is_fresh(self, prompt: str) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file(prompt), framework="pt") as stored:
                return (stored.metadata() or {}).get("prompt") == prompt
        except (OSError, SafetensorError):
            return False

    def read(self, prompt: str) -> torch.Tensor:
        return _read(self.file(prompt), "features")


def _read(path: Path, name: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            return stored.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise LayerLoomError(
            f"The encoded sample {path} is missing or damaged; resume, and it is made again."
        ) from error
