"""Sprite world as a source: endless scenes with exact layers, moving or standing still."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import autocast

from ...conditioning.encoders import StarterCodec, VideoCodec
from ...conditioning.layers import LayerSequence
from ...conditioning.prompts import indexed_prompts
from ...errors import LayerLoomError
from ..autoencoder import SpriteData, layer_clips
from ..settings import settings_from
from ..sprite_world import RenderedBatch, prompts, render, scene_at
from .fingerprints import network_of, weights_digest
from .source import DataParts, Drawing, LatentBatch, Pick, Progress

ENCODED_TOGETHER = 16
WORDINGS = 2**40


@dataclass(frozen=True)
class SpriteClips:
    """The ``[data]`` table of kind "sprites".

    frames: a clip's length. size: its side in pixels. seed: which endless set of scenes.
    scenes: how many of them are encoded before training. still: the share of batches, 0 to 1,
    whose clips are one frame of a scene repeated; the captions still speak of motion, so that an
    adapter learns to stand still whatever the text says.
    """

    frames: int = 8
    size: int = 96
    seed: int = 1
    scenes: int = 16000
    still: float = 0.0

    def __post_init__(self):
        SpriteData(self.frames, self.size, self.seed)
        if self.scenes < 1:
            raise LayerLoomError(f"The recipe's scenes is {self.scenes}; at least 1 is needed.")
        if not 0 <= self.still <= 1:
            raise LayerLoomError(f"The recipe's still is {self.still}; give a share from 0 to 1.")

    @property
    def counts(self) -> tuple[int, int]:
        """How many scenes move and how many stand still; of a share above 0 at least one."""
        still = 0 if self.still == 0 else max(1, round(self.scenes * self.still))
        moving = 0 if self.still == 1 else max(1, self.scenes - still)
        return moving, still


def open_sprites(table: Mapping[str, Any], parts: DataParts) -> SpriteSource:
    """The source of a table's entries; LayerLoomError names an entry that is wrong."""
    return SpriteSource(settings_from(dict(table), SpriteClips), parts)


class SpriteSource(Drawing):
    """Latents of sprite scenes, encoded once and kept in ``parts.cache``."""

    def __init__(self, clips: SpriteClips, parts: DataParts):
        self.clips, self.parts = clips, parts
        self.sequence = replace(parts.sequence, frames=clips.frames)
        self.sizes = ((clips.size, clips.size),)
        moving, still = clips.counts
        # Scenes that stand still are others than those that move.
        self.first = (0, moving)
        self.count = (moving, still)
        self._latents: tuple[torch.Tensor | None, ...] | None = None

    def __len__(self) -> int:
        return sum(self.count)

    def describe(self) -> list[str]:
        moving, still = self.count
        stills = f", {still} of one repeated frame" if still else ""
        size, frames = self.clips.size, self.clips.frames
        return [f"sprite world: {moving} moving scenes{stills}, {frames} frames of {size}x{size}"]

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        if rank:  # one file, one writer
            return
        done = 0
        for still in (False, True):
            count = self.count[still]
            if count and self._stored(still) is None:
                step = progress and (lambda n, _, done=done: progress(done + n, len(self)))
                self._encode(still, step)
            done += count

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        still = bool(torch.rand((), generator=generator) < self.clips.still)
        indices = torch.randint(self.count[still], (batch,), generator=generator)
        wordings = torch.randint(WORDINGS, (batch,), generator=generator)
        return [
            Pick(self.first[still] + index, wording)
            for index, wording in zip(indices.tolist(), wordings.tolist(), strict=True)
        ]

    def load(self, picks: Sequence[Pick]) -> LatentBatch:
        still = bool(picks) and picks[0].index >= self.first[True]
        rows = torch.tensor([pick.index - self.first[still] for pick in picks])
        texts = [
            prompts(scene_at(self.clips.seed, pick.index), random.Random(pick.wording))
            for pick in picks
        ]
        features = texts
        if self.parts.text is not None:
            with torch.no_grad():
                each = [self.parts.text.encode(indexed_prompts("generate", *t)) for t in texts]
            features = torch.stack(each).bfloat16().cpu()
        return LatentBatch(self._all()[still][rows], features, torch.full((len(picks),), still))

    def _all(self) -> tuple[torch.Tensor | None, ...]:
        if self._latents is None:
            found = tuple(
                self._stored(still) if self.count[still] else None for still in (False, True)
            )
            if any(n and t is None for n, t in zip(self.count, found, strict=True)):
                raise RuntimeError("encode() comes before the first batch")
            self._latents = found
        return self._latents

    def _file(self, still: bool) -> Path:
        return self.parts.cache / ("latents_still.safetensors" if still else "latents.safetensors")

    def _mark(self, still: bool) -> str:
        clips = self.clips
        settings = f"{SpriteData(clips.frames, clips.size, clips.seed)} {self.count[still]}"
        if still:
            settings += f" still from {self.first[still]}"
        if self.sequence != LayerSequence(frames=clips.frames):
            settings += f" {self.sequence}"
        return weights_digest(network_of(self.parts.codec), settings)

    def _stored(self, still: bool) -> torch.Tensor | None:
        """The latents of an earlier run, or None where they are missing, damaged or stale."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(still), framework="pt") as stored:
                if (stored.metadata() or {}).get("fingerprint") == self._mark(still):
                    return stored.get_tensor("latents")
        except (OSError, SafetensorError):
            pass
        return None

    def _encode(self, still: bool, progress: Progress | None) -> None:
        from ...checkpoints.save import save_tensors

        clips, first = self.clips, self.first[still]
        data = SpriteData(clips.frames, clips.size, clips.seed)
        indices = range(first, first + self.count[still])
        latents = encode_scenes(
            self.parts.codec, data, self.sequence, indices, still=still, progress=progress
        )
        save_tensors(self._file(still), {"latents": latents}, {"fingerprint": self._mark(still)})


@torch.no_grad()
def encode_scenes(
    codec: VideoCodec,
    data: SpriteData,
    sequence: LayerSequence,
    indices: Sequence[int],
    *,
    still: bool = False,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Joined latents [len(indices), T, C, h, w] (bfloat16, CPU) of training scenes.

    still: one frame of each scene, the same at every call, is repeated for the whole clip.
    """
    device = next(network_of(codec).parameters()).device
    # The starters' autoencoder loses nothing that training would notice.
    fast = isinstance(codec, StarterCodec)
    parts = []
    for start in range(0, len(indices), ENCODED_TOGETHER):
        now = indices[start : start + ENCODED_TOGETHER]
        scenes = [scene_at(data.seed, index) for index in now]
        batch = render(scenes, data.frames, (data.size, data.size))
        clips = layer_clips(still_frames(batch, data.seed, now) if still else batch)
        joined = sequence.join_pixels({name: clips[name] for name in sequence.layers})
        generator = torch.Generator().manual_seed(now[0])
        with autocast(device.type, torch.bfloat16) if fast else nullcontext():
            latents = codec.encode(joined.to(device), generator)
        parts.append(latents.bfloat16().cpu())
        if progress:
            progress(start + len(now), len(indices))
    return torch.cat(parts)


def still_frames(batch: RenderedBatch, seed: int, indices: Sequence[int]) -> RenderedBatch:
    """The same scenes with one frame of each, drawn by seed and index, repeated throughout."""
    frames = batch.alpha.shape[1]
    chosen = [random.Random(f"still frame {seed} {i}").randrange(frames) for i in indices]
    rows = torch.arange(len(chosen))

    def held(layer: torch.Tensor) -> torch.Tensor:
        return layer[rows, chosen][:, None].expand_as(layer)

    return replace(
        batch,
        foreground=held(batch.foreground),
        alpha=held(batch.alpha),
        background=held(batch.background),
        blended=held(batch.blended),
        boxes=held(batch.boxes),
    )
