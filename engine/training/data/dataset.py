"""A person's folder as a dataset: every entry's layers as tensors at its bucket's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .check import Progress, check_folder, refuse, with_defaults
from .plan import Entry, FolderClips, longest, stretches, texts_of
from .probes import ProbeStore
from .reading import Layers, paste, read_layers

Sample = dict[str, Any]


class LayeredFolder(Dataset):
    """Samples of a checked folder; sizes differ between buckets, never within one.

    A sample is {"foreground": [F, 3, H, W] straight, "alpha": [F, 1, H, W], "background",
    "blended": [F, 3, H, W], all float in [0, 1]; "prompts": (foreground, background, blended);
    "still": bool}.

    settings: what is drawn from the folder. frames, size (height, width): where the settings
    leave them open. multiple: what sides divide by. store: a file that keeps what was seen in the
    clips. progress: gets (files checked, files).

    Raises:
        LayerLoomError: the folder has a problem or nothing to draw.
    """

    def __init__(
        self,
        settings: FolderClips,
        *,
        frames: int = 16,
        size: tuple[int, int] = (480, 720),
        multiple: int = 16,
        store: Path | None = None,
        progress: Progress | None = None,
    ):
        self.folder = Path(settings.path)
        self.settings = with_defaults(settings, frames, size)
        probes = ProbeStore(self.folder, store)
        self.report = check_folder(self.folder, self.settings, multiple, probes, progress)
        refuse(self.report)
        self.entries = self.report.entries
        self._samples = {sample.name: sample for sample in self.report.good}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        (layers,) = self.read([index])
        tensors: Sample = {}
        for name, clip in layers.items():
            values = torch.from_numpy(np.ascontiguousarray(clip)).float() / 255
            tensors[name] = values[:, None] if name == "alpha" else values.movedim(-1, 1)
        entry = self.entries[index]
        return {**tensors, "prompts": self.prompts(index), "still": entry.stands_still}

    def prompts(self, index: int, wording: int | None = None) -> tuple[str, str, str]:
        """An entry's (foreground, background, blended); of paraphrases the first, or by seed."""
        from .captions import worded

        return worded(texts_of(self.entries[index], self.report.layout.captions), wording)

    def wordings(self, index: int) -> list[set[str]]:
        """All (foreground, background, blended) texts that ``prompts`` may give."""
        from ...conditioning.prompts import blended_prompt

        texts = texts_of(self.entries[index], self.report.layout.captions)
        foreground, background = texts["foreground"], texts["background"]
        blended = texts.get("blended") or [
            blended_prompt(one, other) for one in foreground for other in background
        ]
        return [set(foreground), set(background), set(blended)]

    def files(self, index: int) -> list[Path]:
        """The files an entry is made of, in a fixed order."""
        entry = self.entries[index]
        files = list(self._samples[entry.name].layers.values())
        if entry.placement is not None:
            files += self._samples[entry.placement.background].layers.values()
        return files

    def groups(self) -> list[list[int]]:
        """Entries that are read together because they share their files and their size."""
        groups: dict[tuple, list[int]] = {}
        for index, entry in enumerate(self.entries):
            groups.setdefault((entry.name, entry.placement), []).append(index)
        return list(groups.values())

    def read(self, indices: Sequence[int]) -> list[Layers]:
        """The layers uint8 of some entries of one group, each file read once."""
        entries = [self.entries[index] for index in indices]
        pieces = sorted({entry.piece for entry in entries})
        layers = dict(zip(pieces, self._pieces(entries[0], pieces), strict=True))
        return [_held(layers[entry.piece], entry) for entry in entries]

    def _pieces(self, entry: Entry, pieces: Sequence[int]) -> list[Layers]:
        sample, probes = self._samples[entry.name], self.report.probes
        own = self._stretches(entry.name)
        chosen = [own[piece] for piece in pieces]
        if entry.placement is None:
            return read_layers(sample.layers, probes[entry.name], chosen, entry.bucket)
        place = entry.placement
        below = self._samples[place.background].layers["background"]
        numbers = self._stretches(place.background)[place.background_piece]
        return [
            paste(
                (sample.layers, probes[entry.name], stretch), (below, numbers), place, entry.bucket
            )
            for stretch in chosen
        ]

    def _stretches(self, name: str) -> list[list[int]]:
        settings = self.settings
        found = longest(self.report.probes[name])
        return stretches(found, settings.frames, settings.fps, settings.pieces)


def _held(layers: Layers, entry: Entry) -> Layers:
    if entry.still is None:
        return layers
    return {name: np.broadcast_to(clip[entry.still], clip.shape) for name, clip in layers.items()}
