"""What a layered checkpoint was made for: its layers, tasks, size and sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .checkpoints.load import Checkpoint
from .conditioning.layers import GIVEN, LayerSequence
from .errors import LayerLoomError
from .sampling.schedules import NoiseSchedule, layerflow_schedule

SPATIAL_FACTOR = 8


@dataclass(frozen=True)
class LayeredSettings:
    """A layered checkpoint's own settings.

    Attributes:
        name: the file's name, for messages.
        variant: what the weights are ("starter", "rgba-generate", ...).
        sequence: the layers and frames a layer it was trained on.
        tasks: what it can be asked for.
        height, width: pixels of a frame it was trained on.
        multiple: sides of a clip divide by this many pixels.
        channels: latent channels.
        sampling: default sampler, steps and guidance.
    """

    name: str
    variant: str
    sequence: LayerSequence
    tasks: tuple[str, ...]
    height: int
    width: int
    multiple: int
    channels: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LayeredSettings:
        """Read them from an open checkpoint.

        Raises:
            LayerLoomError: the checkpoint makes plain video, not layers.
        """
        metadata, info = checkpoint.metadata, checkpoint.info
        if not metadata.get("sequence"):
            raise LayerLoomError(
                f"{checkpoint.store.name} is {info.variant}, which makes plain video; it is a "
                "start for training, give a layered checkpoint."
            )
        sequence = {**metadata["sequence"], "layers": tuple(metadata["sequence"]["layers"])}
        return cls(
            name=checkpoint.store.name,
            variant=info.variant,
            sequence=LayerSequence(**sequence),
            tasks=tuple(metadata.get("tasks") or GIVEN),
            height=metadata["video"]["height"],
            width=metadata["video"]["width"],
            multiple=SPATIAL_FACTOR * info.transformer.get("patch_size", 2),
            channels=info.transformer.get("in_channels", 16),
            sampling=metadata["sampling"],
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule the weights were trained with."""
        return layerflow_schedule(**self.sampling.get("schedule", {}))

    def frames(self, count: int | None) -> LayerSequence:
        """The sequence with ``count`` frames a layer; None or 0 keeps the trained number."""
        return replace(self.sequence, frames=count) if count else self.sequence

    def check_task(self, task: str) -> None:
        """Raise LayerLoomError where the weights were not made for a task."""
        if task not in self.tasks:
            raise LayerLoomError(
                f"{self.name} ({self.variant}) was made for {', '.join(self.tasks)}, not for "
                f"{task!r}; give the checkpoint of that task."
            )

    def size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """(height, width) the network takes for a wanted size; None or 0 is the trained one."""
        step = self.multiple
        wanted = (height or self.height, width or self.width)
        return tuple(max(step, round(side / step) * step) for side in wanted)

    def notes(self, width: int | None, height: int | None, frames: int | None) -> list[str]:
        """What a user should know about a wanted size and length; 0 or None is the trained one."""
        notes, made = [], self.size(width, height)
        wanted = (height or self.height, width or self.width)
        if made != wanted:
            notes.append(
                f"{wanted[1]}x{wanted[0]} does not divide by {self.multiple}: made at "
                f"{made[1]}x{made[0]}."
            )
        if made != (self.height, self.width):
            notes.append(
                f"The checkpoint was trained on {self.width}x{self.height}; other sizes may look "
                "worse."
            )
        if frames and frames != self.sequence.frames:
            notes.append(
                f"The checkpoint was trained on {self.sequence.frames} frames a layer; {frames} "
                "may look worse."
            )
        return notes
