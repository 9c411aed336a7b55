"""Sprite world's moving scenes as a source of clips: encoded once, captions and pictures drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import autocast

from ...conditioning.frame_codec import StarterFrameCodec
from ...errors import LayerLoomError
from ..autoencoder import SpriteData
from ..moving_world import MovingScene, caption, frozen, moving_scene_at
from ..settings import settings_from
from ..sprite_world import render
from .clips import ClipBatch, ClipParts
from .fingerprints import network_of, weights_digest
from .source import Pick, Progress
from .sprites import WORDINGS

ENCODED_TOGETHER = 16
# Counts up when the same settings give other clips.
FORMAT = 1


@dataclass(frozen=True)
class MovingClips:
    """The ``[data]`` table of kind "sprites" for animation.

    frames: a clip's length. size: its side in pixels. seed: which endless set of clips.
    scenes: how many of them are encoded before training. returning: the share whose sprite comes
    back to where it began, from which loops are learnt. cache: folder of the encoded clips, which
    several stages may share; the run's own where empty.
    """

    frames: int = 16
    size: int = 96
    seed: int = 1
    scenes: int = 8000
    returning: float = 0.15
    cache: str = ""

    def __post_init__(self):
        # Four frames in a group do not matter here: sizes alone are checked.
        SpriteData(size=self.size)
        for name in ("frames", "scenes"):
            if getattr(self, name) < 1:
                raise LayerLoomError(
                    f"The recipe's data.{name} is {getattr(self, name)}; at least 1 is needed."
                )
        if not 0 <= self.returning <= 1:
            raise LayerLoomError(
                f"The recipe's data.returning is {self.returning}; give a share from 0 to 1."
            )


def open_moving_sprites(table: Mapping[str, Any], parts: ClipParts) -> MovingSprites:
    """The source of a table's entries; LayerLoomError names an entry that is wrong."""
    return MovingSprites(settings_from(dict(table), MovingClips), parts)


class MovingSprites:
    """Latents of moving scenes, encoded once; captions and pictures are made when drawn."""

    # Tells the clips of another world from these.
    world = ""

    def __init__(self, clips: MovingClips, parts: ClipParts):
        self.clips, self.parts = clips, parts
        self.frames, self.sizes = clips.frames, ((clips.size, clips.size),)
        self.pictures = tuple(range(clips.frames))
        self.folder = Path(clips.cache) if clips.cache else parts.cache
        self._latents: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.clips.scenes

    def describe(self) -> list[str]:
        clips = self.clips
        return [
            f"sprite world: {clips.scenes} clips of {clips.frames} frames, "
            f"{clips.size}x{clips.size}, kept in {self._file}"
        ]

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        if rank == 0 and self._stored() is None:  # one file, one writer
            self._encode(progress)

    def release(self) -> None:
        """Frozen encoders are needed for every batch."""

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        indices = torch.randint(len(self), (batch,), generator=generator)
        wordings = torch.randint(WORDINGS, (batch,), generator=generator)
        return [Pick(*pair) for pair in zip(indices.tolist(), wordings.tolist(), strict=True)]

    def load(self, picks: Sequence[Pick], frames: Sequence[int]) -> ClipBatch:
        scenes = [self._scene(pick.index) for pick in picks]
        texts: Any = [
            caption(moving.scene, random.Random(pick.wording))
            for moving, pick in zip(scenes, picks, strict=True)
        ]
        still = [
            frozen(moving.scene, frame, self.frames)
            for moving, frame in zip(scenes, frames, strict=True)
        ]
        image = render(still, 1, self.sizes[0]).blended[:, 0] * 2 - 1
        with torch.no_grad():
            if self.parts.text is not None:
                texts = self.parts.text.encode(texts).bfloat16().cpu()
            if self.parts.image is not None:
                image = self.parts.image.encode(image).bfloat16().cpu()
        motion = torch.tensor([moving.motion for moving in scenes])
        return ClipBatch(self.latents(picks), texts, image, motion)

    def latents(self, picks: Sequence[Pick]) -> torch.Tensor:
        """Encoded clips [B, T, C, h, w], bfloat16."""
        if self._latents is None:
            self._latents = self._stored()
            if self._latents is None:
                raise RuntimeError("encode() comes before the first batch")
        return self._latents[torch.tensor([pick.index for pick in picks])]

    def _scene(self, index: int) -> MovingScene:
        return moving_scene_at(self.clips.seed, index, returning=self.clips.returning)

    def _render(self, indices: Sequence[int]) -> torch.Tensor:
        """Clips [B, F, 3, H, W] in 0..1."""
        scenes = [self._scene(index).scene for index in indices]
        return render(scenes, self.frames, self.sizes[0]).blended

    @property
    def _file(self) -> Path:
        return self.folder / "clips.safetensors"

    @property
    def _mark(self) -> str:
        clips = self.clips
        settings = (FORMAT, clips.frames, clips.size, clips.seed, clips.scenes, clips.returning)
        return weights_digest(network_of(self.parts.codec), f"{self.world}{settings}")

    def _stored(self) -> torch.Tensor | None:
        """The latents of an earlier run, or None where they are missing, damaged or stale."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file, framework="pt") as stored:
                if (stored.metadata() or {}).get("fingerprint") == self._mark:
                    return stored.get_tensor("latents")
        except (OSError, SafetensorError):
            pass
        return None

    @torch.no_grad()
    def _encode(self, progress: Progress | None) -> None:
        from ...checkpoints.save import save_tensors

        codec = self.parts.codec
        device = next(network_of(codec).parameters()).device
        # The starter's autoencoder loses nothing that training would notice.
        fast = isinstance(codec, StarterFrameCodec)
        latents: torch.Tensor | None = None
        for start in range(0, len(self), ENCODED_TOGETHER):
            indices = range(start, min(start + ENCODED_TOGETHER, len(self)))
            clips = self._render(indices) * 2 - 1
            with autocast(device.type, torch.bfloat16) if fast else nullcontext():
                made = codec.encode(
                    clips.flatten(0, 1).to(device), torch.Generator().manual_seed(start)
                )
            made = made.bfloat16().cpu().unflatten(0, clips.shape[:2])
            if latents is None:
                latents = made.new_empty(len(self), *made.shape[1:])
            latents[indices.start : indices.stop] = made
            if progress:
                progress(indices.stop, len(self))
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._file, {"latents": latents}, {"fingerprint": self._mark})
