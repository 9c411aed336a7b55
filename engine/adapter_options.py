"""The adapter options of `layerloom layered`: strengths and files, checked before loading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LayerLoomError

if TYPE_CHECKING:
    from .checkpoints.lora import LoRA

# The ranges of engine/checkpoints/lora.py, which loads torch.
_OWN, _EXTRA = (-1.0, 2.0), (-10.0, 10.0)


@dataclass(frozen=True)
class AdapterOptions:
    """What was asked of adapters.

    motion, content: strength of the checkpoint's own, -1 to 2; None keeps its default.
    files: further ones as "FILE:STRENGTH", -10 to 10; without a strength it is 1.
    """

    motion: float | None = None
    content: float | None = None
    files: Sequence[str] = ()

    @property
    def strengths(self) -> dict[str, float]:
        """The checkpoint's own adapters that were named."""
        given = {"motion": self.motion, "content": self.content}
        return {name: strength for name, strength in given.items() if strength is not None}

    def check(self) -> None:
        """Raise LayerLoomError for what shows before a file is read."""
        for name, strength in self.strengths.items():
            _check_range(f"--{name}-lora", strength, _OWN)
        for text in self.files:
            path, strength = _split(text)
            _check_range(f"The strength in --lora {text}", strength, _EXTRA)
            if not path.exists():
                raise LayerLoomError(f"--lora {path} does not exist; check the path.")

    def read(self) -> list[tuple[LoRA, float]]:
        """The files' adapters with their strengths; LayerLoomError where one cannot be used."""
        from .checkpoints.lora import read_lora

        return [(read_lora(path), strength) for path, strength in map(_split, self.files)]

    def record(self) -> list[dict[str, object]]:
        """The files for run.json; the checkpoint's own are in its settings."""
        chosen = map(_split, self.files)
        return [{"file": str(path), "strength": strength} for path, strength in chosen]


def _split(text: str) -> tuple[Path, float]:
    file, colon, last = text.rpartition(":")
    try:
        if colon and file:
            return Path(file), float(last)
    except ValueError:
        # The colon may belong to the name, or to a drive of Windows.
        if not Path(text).exists() and not set(last) & {"/", "\\", "."}:
            raise LayerLoomError(
                f"--lora {text} ends in {last!r}, which is no number; write FILE:STRENGTH, such as "
                "style.safetensors:0.8."
            ) from None
    return Path(text), 1.0


def _check_range(what: str, strength: float, limits: tuple[float, float]) -> None:
    low, high = limits
    if not (math.isfinite(strength) and low <= strength <= high):
        raise LayerLoomError(f"{what} is {strength:g}; give a number from {low:g} to {high:g}.")
