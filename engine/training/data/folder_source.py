"""A person's folder as a source: every entry encoded once, every prompt's features kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...conditioning.encoders import TextFeatures
from ...conditioning.layers import layers_to_clip
from ...conditioning.prompts import indexed_prompts
from ...errors import LayerLoomError
from ..settings import settings_from
from .cache import LatentCache, TextCache, cache_folder
from .dataset import LayeredFolder
from .fingerprints import network_of, settings_digest, weights_digest
from .plan import FolderClips, latent_bytes
from .read_ahead import ReadAhead
from .reading import Layers
from .source import DataParts, Drawing, LatentBatch, Pick, Progress

WORDINGS = 2**40
# Counts up when the way samples are cut, scaled or pasted changes.
FORMAT = 1
_PROBES = "clips.json"


def open_folder(
    table: Mapping[str, Any], parts: DataParts, progress: Progress | None = None
) -> FolderSource:
    """Check a folder and plan what is drawn from it.

    Raises:
        LayerLoomError: an entry of the table is wrong, or the folder has problems.
    """
    settings = settings_from(dict(table), FolderClips)
    folder = Path(settings.path)
    if not folder.is_dir():
        raise LayerLoomError(f"The recipe's data.path {folder} is not a folder; check the path.")
    cache = cache_folder(Path(settings.cache) if settings.cache else folder / ".layerloom")
    dataset = LayeredFolder(
        settings,
        frames=parts.sequence.frames,
        size=parts.size,
        multiple=parts.multiple,
        store=cache / _PROBES,
        progress=progress,
    )
    return FolderSource(dataset, parts, cache)


class FolderSource(Drawing):
    """Latents of a ``LayeredFolder``'s entries, encoded as one clip of joined layers each.

    The next batch is read while a step runs where ``batch`` is called first thing with a fresh
    generator whose seed goes up by one from step to step, as the trainer does.
    """

    def __init__(self, dataset: LayeredFolder, parts: DataParts, cache: Path):
        self.dataset, self.parts = dataset, parts
        self.sequence = replace(parts.sequence, frames=dataset.settings.frames)
        entries = dataset.entries
        self.sizes = tuple(sorted({e.bucket for e in entries}, key=lambda s: (-s[0] * s[1], s)))
        groups: dict[tuple, list[int]] = {}
        for index, entry in enumerate(entries):
            groups.setdefault((entry.bucket, entry.stands_still), []).append(index)
        self._buckets = list(groups.values())
        weights = [torch.tensor([entries[i].weight for i in group]) for group in self._buckets]
        self._weights, self._shares = weights, torch.stack([w.sum() for w in weights])
        settings = {
            "format": FORMAT,
            "codec": weights_digest(network_of(parts.codec)),
            "sequence": repr(self.sequence),
            "size": [dataset.settings.height, dataset.settings.width],
            "multiple": parts.multiple,
            "buckets": dataset.settings.buckets,
            "fps": dataset.settings.fps,
        }
        mark = settings_digest(settings)
        self._latents = LatentCache(cache_folder(cache / f"latents-{mark[:12]}"), mark)
        self._texts = None
        if parts.text is not None:
            mark = weights_digest(network_of(parts.text), _described(parts.text))
            self._texts = TextCache(cache_folder(cache / f"text-{mark[:12]}"))
        self._ahead = ReadAhead(self._draw_and_load)

    def __len__(self) -> int:
        return len(self.dataset)

    def describe(self) -> list[str]:
        report = self.dataset.report
        counts = ", ".join(f"{number} {kind}" for kind, number in report.counts.items() if number)
        buckets = ", ".join(f"{w}x{h} {n}" for (h, w), n in report.buckets.items())
        return [
            f"{self.dataset.folder}: {counts}",
            f"{self.sequence.frames} frames a layer, buckets: {buckets}",
            f"encoded samples are kept in {self._latents.folder}",
            *report.notes,
        ]

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        groups = [self._stale(group) for group in self.dataset.groups()[rank::world]]
        groups = [group for group in groups if group]
        prompts = [p for p in self._prompts()[rank::world] if not self._texts.is_fresh(p)]
        self._require_room([index for group in groups for index in group])
        total, done = sum(map(len, groups)) + len(prompts), 0
        for group, layers in self._read_ahead(groups):
            for index, clip in zip(group, layers, strict=True):
                self._encode(index, clip)
                done += 1
                if progress:
                    progress(done, total)
        for prompt in prompts:
            with torch.no_grad():
                features = self.parts.text.encode([prompt])[0]
            self._texts.write(prompt, features.bfloat16().cpu())
            done += 1
            if progress:
                progress(done, total)

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        bucket = int(torch.multinomial(self._shares, 1, generator=generator))
        chosen = torch.multinomial(
            self._weights[bucket], batch, replacement=True, generator=generator
        )
        wordings = torch.randint(WORDINGS, (batch,), generator=generator)
        return [
            Pick(self._buckets[bucket][row], wording)
            for row, wording in zip(chosen.tolist(), wordings.tolist(), strict=True)
        ]

    def load(self, picks: Sequence[Pick]) -> LatentBatch:
        entries = [self.dataset.entries[pick.index] for pick in picks]
        texts = [self.dataset.prompts(pick.index, pick.wording) for pick in picks]
        features = texts
        if self._texts is not None:
            each = [[self._texts.read(p) for p in indexed_prompts("generate", *t)] for t in texts]
            features = torch.stack([torch.stack(row) for row in each])
        return LatentBatch(
            torch.stack([self._latents.read(entry) for entry in entries]),
            features,
            torch.tensor([entry.stands_still for entry in entries]),
        )

    def batch(
        self, generator: torch.Generator, batch: int, rank: int = 0, world: int = 1
    ) -> LatentBatch:
        return self._ahead(generator, batch, rank, world)

    def _draw_and_load(
        self, generator: torch.Generator, batch: int, rank: int, world: int
    ) -> LatentBatch:
        return super().batch(generator, batch, rank, world)

    def _stale(self, group: Sequence[int]) -> list[int]:
        entries, files = self.dataset.entries, self.dataset.files(group[0])
        return [index for index in group if not self._latents.is_fresh(entries[index], files)]

    def _prompts(self) -> list[str]:
        """Every prompt with its index prefix that a draw may ask for, in a fixed order."""
        if self._texts is None:
            return []
        texts = [self.dataset.wordings(index) for index in range(len(self.dataset))]
        return sorted(
            {
                indexed_prompts("generate", *(text,) * 3)[position]
                for wordings in texts
                for position, paraphrases in enumerate(wordings)
                for text in paraphrases
            }
        )

    def _require_room(self, indices: Sequence[int]) -> None:
        """Before hours of work: is there room for its results?"""
        entries = [self.dataset.entries[index] for index in indices]
        frames = sum(self.sequence.latent_frames(layer) for layer in self.sequence.layers)
        factor = self.parts.codec.spatial_factor
        needed = latent_bytes(entries, frames, factor, 16)
        folder = self._latents.folder
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise LayerLoomError(
                f"The encoded samples need about {needed / 1e9:.2f} GB and {folder} has "
                f"{free / 1e9:.2f} GB free; make room or name another folder with data.cache=... ."
            )

    def _read_ahead(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple]:
        """Groups with their layers; the next ones are decoded while one is encoded."""
        with ThreadPoolExecutor(1, "layerloom-read") as pool:
            waiting = [(group, pool.submit(self.dataset.read, group)) for group in groups[:2]]
            try:
                for number in range(len(groups)):
                    group, future = waiting.pop(0)
                    if number + 2 < len(groups):
                        later = groups[number + 2]
                        waiting.append((later, pool.submit(self.dataset.read, later)))
                    yield group, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    @torch.no_grad()
    def _encode(self, index: int, layers: Layers) -> None:
        entry, sequence = self.dataset.entries[index], self.sequence
        clips = {}
        for name, clip in layers.items():
            values = torch.from_numpy(np.array(clip)).float()[None] / 255
            clips[name] = values[:, :, None] if name == "alpha" else values.movedim(-1, 2)
        joined = layers_to_clip(clips, sequence, sequence.layers)
        device = next(network_of(self.parts.codec).parameters()).device
        # The VAE's noise is the sample's own, whatever is encoded before it.
        seed = int(settings_digest(entry.key)[:12], 16)
        latents = self.parts.codec.encode(joined.to(device), torch.Generator().manual_seed(seed))
        if not torch.isfinite(latents).all():
            raise LayerLoomError(
                f"The autoencoder gives no finite numbers for {entry.name}; check its layers or "
                "take the sample out."
            )
        self._latents.write(entry, self.dataset.files(index), latents[0].bfloat16().cpu())


def _described(text: TextFeatures) -> str:
    """What features depend on besides weights: the encoder's kind and how many tokens it gives."""
    text = getattr(text, "part", text)  # one that is loaded when it is first used
    tokens = getattr(text, "tokens", None) or getattr(text.tokenizer, "tokens", None)
    return f"{type(text).__name__} {tokens}"
