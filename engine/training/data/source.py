"""The one interface a stage draws its batches through: latents of layered clips with their texts.

A stage does, with ``parts`` from its autoencoder and text encoder::

    source = open_data(recipe["data"], parts)       # checks what was given; encodes nothing
    source.encode(progress, rank, world)            # fills the cache; then wait for all processes
    latents, text, still = source.batch(generator, batch, rank, world)

``batch`` as the first thing a step asks of its generator lets a folder load the next one early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ...conditioning.encoders import TextFeatures, VideoCodec
from ...conditioning.layers import LayerSequence
from ...errors import LayerLoomError

KINDS = ("sprites", "folder")
Progress = Callable[[int, int], None]
Prompts = tuple[str, str, str]


@dataclass(frozen=True)
class DataParts:
    """What data needs of the model that will be trained on it.

    codec: the frozen video autoencoder, on the device it shall encode on.
    sequence: layers, frames a layer, duplicated first frame.
    size: (height, width) in pixels; buckets of other shapes keep its area.
    multiple: sides of a clip divide by this many pixels (autoencoder's factor times the patch).
    cache: the run's folder, where sprite world's latents are kept; a person's folder keeps its
        own in ``.layerloom`` or where the table's ``cache`` says, for all runs to share.
    text: the frozen text encoder; None where the stage trains its own and takes the prompts.
    """

    codec: VideoCodec
    sequence: LayerSequence
    size: tuple[int, int]
    multiple: int
    cache: Path
    text: TextFeatures | None = None


class Pick(NamedTuple):
    """One drawn sample: which, and the seed of its wording where captions have paraphrases."""

    index: int
    wording: int


class LatentBatch(NamedTuple):
    """A batch of joined layers, all of one size.

    latents: [B, T, C, h, w] bfloat16 on the CPU, layers joined as the ``LayerSequence`` says.
    text: features [B, 3, tokens, D] (bfloat16, on the CPU) of the foreground's, background's and
        blended prompt with their index prefixes; a task without a blended prompt takes the first
        two. Where ``DataParts.text`` is None: the prompts (foreground, background, blended)
        themselves, without prefixes. Leaving text out (zeros) is the stage's.
    still: bool [B], clips made of one repeated frame; the same for the whole batch, so that an
        adapter's strength can be set for a call.
    """

    latents: torch.Tensor
    text: torch.Tensor | list[Prompts]
    still: torch.Tensor


class LatentSource(Protocol):
    """Samples of layered clips; draws depend on the generator's state alone."""

    sequence: LayerSequence
    sizes: tuple[tuple[int, int], ...]
    """(height, width) in pixels of every bucket, the largest area first."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def describe(self) -> list[str]:
        """Lines for the log: samples of each kind, buckets, size of the cache."""
        ...

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        """Make what the cache lacks or what is stale; repeatable, may be stopped and goes on.

        Of ``world`` processes each does its own part: none may draw before all are done.

        Raises:
            LayerLoomError: a sample cannot be used, or the disk is full; finished parts stay.
        """
        ...

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        """A batch's samples, all in one bucket; cheap."""
        ...

    def load(self, picks: Sequence[Pick]) -> LatentBatch:
        """The latents and texts of some samples of one bucket."""
        ...

    def batch(
        self, generator: torch.Generator, batch: int, rank: int = 0, world: int = 1
    ) -> LatentBatch:
        """Process ``rank``'s ``batch`` samples of a draw of ``world * batch``.

        All processes pass the same generator state and leave it in the same state; together they
        get what one process with ``world`` times the batch gets.
        """
        ...


class Drawing:
    """``batch`` from ``draw`` and ``load``, for the sources to inherit."""

    def batch(
        self, generator: torch.Generator, batch: int, rank: int = 0, world: int = 1
    ) -> LatentBatch:
        picks = self.draw(generator, batch * world)
        return self.load(picks[rank * batch : (rank + 1) * batch])


def open_data(
    table: Mapping[str, Any], parts: DataParts, progress: Progress | None = None
) -> LatentSource:
    """The source that a recipe's ``[data]`` table names; ``kind`` is "sprites" where not given.

    "sprites" takes the entries of ``sprites.SpriteClips``, "folder" those of
    ``plan.FolderClips``. Nothing is encoded yet, but everything is checked: a folder's clips are
    read to their end (``progress``: files read, files), and again only where they changed. Of
    several processes let the first one finish this before the others start.

    Raises:
        LayerLoomError: an unknown entry, or a folder with samples that cannot be used.
    """
    entries = dict(table)
    kind = entries.pop("kind", "sprites")
    if kind == "sprites":
        from .sprites import open_sprites

        return open_sprites(entries, parts)
    if kind == "folder":
        from .folder_source import open_folder

        return open_folder(entries, parts, progress)
    raise LayerLoomError(
        f"The recipe's data.kind is {kind!r}; it must be one of {', '.join(KINDS)}."
    )
