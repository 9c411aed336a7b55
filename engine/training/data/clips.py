"""The interface that an animation stage draws its batches through: whole clips with one text.

As with layered data: open the source, ``encode`` on every process, then draw and load::

    source = open_clips(recipe["data"], parts)
    source.encode(progress, rank, world)
    picks = source.draw(generator, batch)
    clips = source.load(picks, frames)          # frames: which one is the picture of each clip
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ...conditioning.encoders import TextFeatures
from ...conditioning.frame_codec import FrameCodec
from ...conditioning.video_encoders import ImageFeatures
from ...errors import LayerLoomError
from .source import KINDS, Pick, Progress


@dataclass(frozen=True)
class ClipParts:
    """What data needs of the model that will be trained on it.

    codec: the frozen autoencoder, frame by frame, on the device it shall encode on.
    frames: length of a clip. size: (height, width) in pixels; other shapes keep its area.
    multiple: sides of a clip divide by this many pixels.
    cache: the run's folder.
    text, image: the frozen encoders; None where the stage trains its own and takes the prompts
        and pictures themselves.
    speed: what a clip's number is, "frame stride" or "fps".
    """

    codec: FrameCodec
    frames: int
    size: tuple[int, int]
    multiple: int
    cache: Path
    text: TextFeatures | None = None
    image: ImageFeatures | None = None
    speed: str = "frame stride"


class ClipBatch(NamedTuple):
    """Clips of one size, on the CPU.

    latents: [B, T, C, h, w] bfloat16, posterior samples where the autoencoder has a posterior.
    text: features [B, tokens, D], or the prompts themselves.
    image: what the image stream reads of one frame of each clip: tokens [B, N, D], or the pictures
        [B, 3, H, W] in [-1, 1].
    motion: [B] float32, the number that the network reads as the clip's speed.
    """

    latents: torch.Tensor
    text: torch.Tensor | list[str]
    image: torch.Tensor
    motion: torch.Tensor


class ClipSource(Protocol):
    """Clips with a caption each; draws depend on the generator's state alone."""

    frames: int
    sizes: tuple[tuple[int, int], ...]
    """(height, width) in pixels of every bucket, the largest area first."""
    pictures: tuple[int, ...]
    """Frames that may be asked for as a clip's picture, the first and the last among them."""

    def __len__(self) -> int:
        """Number of clips."""
        ...

    def describe(self) -> list[str]:
        """Lines for the log."""
        ...

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        """Make what the cache lacks or what is stale; repeatable, may be stopped and goes on.

        Raises:
            LayerLoomError: a clip cannot be used, or the disk is full; finished parts stay.
        """
        ...

    def release(self) -> None:
        """Let go of frozen networks that batches do not need once all is encoded."""
        ...

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        """A batch's clips, all of one size; cheap."""
        ...

    def load(self, picks: Sequence[Pick], frames: Sequence[int]) -> ClipBatch:
        """The clips; ``frames`` says which of ``pictures`` the image stream reads of each."""
        ...


def open_clips(
    table: Mapping[str, Any], parts: ClipParts, progress: Progress | None = None
) -> ClipSource:
    """The source that an animation recipe's ``[data]`` table names; "sprites" where it does not.

    "sprites" takes the entries of ``moving_sprites.MovingClips``, "folder" those of
    ``clip_folder.CaptionedClips``. Nothing is encoded yet, but everything is checked.

    Raises:
        LayerLoomError: an unknown entry, or a folder with clips that cannot be used.
    """
    entries = dict(table)
    kind = entries.pop("kind", "sprites")
    if kind == "sprites":
        from .moving_sprites import open_moving_sprites

        return open_moving_sprites(entries, parts)
    if kind == "folder":
        from .clip_folder import open_clip_folder

        return open_clip_folder(entries, parts, progress)
    raise LayerLoomError(
        f"The recipe's data.kind is {kind!r}; it must be one of {', '.join(KINDS)}."
    )
