"""What a DynamiCrafter checkpoint was made for: its modes, size, length and sampling defaults."""

from __future__ import annotations

from dataclasses import dataclass

from .animate_request import check_gate
from .checkpoints.dynamicrafter import DynamiCrafterCheckpoint
from .conditioning.pictures import Size, clip_size
from .models.dynamicrafter import Variant
from .sampling.latent_schedules import latent_schedule
from .sampling.schedules import NoiseSchedule
from .sampling.streams import StreamGuidance

# The paper trades shape against motion in these of the 16 spatial transformers, counted from 1.
MIDDLE_LAYERS = (7, 8, 9)
FRAMES_PER_SECOND = 8.0


@dataclass(frozen=True)
class AnimateSettings:
    """A checkpoint's own settings.

    Attributes:
        name: the file's name, for messages.
        variant: what the weights were trained and are sampled with.
        variants: all published variants they may be, where their shapes leave that open.
        modes: what they were trained for ("animate", "interpolate", "loop").
        multiple: sides of a clip divide by this many pixels.
        layers: spatial transformers, for the image stream's gate.
        text_scale, image_scale: default guidance.
        frames_per_second: of the files that are written.
    """

    name: str
    variant: Variant
    variants: tuple[str, ...]
    modes: tuple[str, ...]
    multiple: int
    layers: int
    text_scale: float
    image_scale: float
    frames_per_second: float = FRAMES_PER_SECOND

    @classmethod
    def of(cls, checkpoint: DynamiCrafterCheckpoint) -> AnimateSettings:
        """Read them from an open checkpoint."""
        metadata, variant, unet = checkpoint.metadata, checkpoint.variant, checkpoint.info.unet
        sampling = metadata.get("sampling") or {}
        text = float(sampling.get("text_scale", variant.guidance))
        modes = ("interpolate", "loop") if variant.interpolates else ("animate",)
        levels = len(unet["block_channels"])
        attends = [bool(level) for level in unet["attention_levels"]]
        # Down and up, one more layer a level on the way up, and the middle block.
        layers = sum(attends) * (2 * unet["layers_per_block"] + 1) + 1
        return cls(
            name=checkpoint.store.name,
            variant=variant,
            variants=checkpoint.info.variants,
            modes=tuple(metadata.get("modes") or modes),
            multiple=variant.spatial_factor * 2 ** (levels - 1),
            layers=layers,
            text_scale=text,
            image_scale=float(sampling.get("image_scale", text)),
            frames_per_second=float(sampling.get("frames_per_second", FRAMES_PER_SECOND)),
        )

    @property
    def native_size(self) -> Size:
        """(height, width) the weights were trained on."""
        return self.variant.height, self.variant.width

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule the weights were trained with."""
        return latent_schedule(self.variant.prediction, self.variant.zero_terminal_snr)

    def size(self, picture: Size, width: int | None, height: int | None) -> tuple[Size, Size]:
        """The network's and the result's (height, width), see ``clip_size``."""
        return clip_size(picture, self.native_size, self.multiple, width, height)

    def guidance(
        self, text: float | None, image: float | None, rescale: float | None
    ) -> StreamGuidance:
        """The guidance that is asked for, None being the checkpoint's own.

        A text scale without an image scale moves both, which is plain classifier-free guidance.
        """
        if image is None:
            image = self.image_scale if text is None else text
        if rescale is None:
            rescale = self.variant.guidance_rescale
        return StreamGuidance(self.text_scale if text is None else text, image, rescale)

    def gate(self, strength: float, layers: str) -> float | tuple[float, ...]:
        """The image stream's factor, for ``VideoUNet``: of all layers, or the middle ones alone."""
        check_gate(strength, layers)
        if layers == "all":
            return strength
        return tuple(
            strength if layer in MIDDLE_LAYERS else 1.0 for layer in range(1, self.layers + 1)
        )

    def notes(self, mode: str, motion: float | None, size: Size, length: int) -> list[str]:
        """What a user should know about what is asked for. length: frames the network sees."""
        variant, notes = self.variant, []
        if len(self.variants) > 1:
            notes.append(
                f"{self.name} may be {' or '.join(self.variants)}, whose weights look alike; it is "
                f"taken for {variant.name}: say which with --variant."
            )
        if mode not in self.modes:
            trained = " or ".join(self.modes)
            notes.append(
                f"The checkpoint was trained to {trained}; to {mode} may not come out well."
            )
        low, high = variant.speed_range
        if motion is not None and not low <= motion <= high:
            notes.append(
                f"The motion is {motion:g}; useful values of {variant.name}'s {variant.speed} are "
                f"{low} to {high}."
            )
        if size != self.native_size:
            notes.append(
                f"The checkpoint was trained on {variant.width}x{variant.height}; {size[1]}x"
                f"{size[0]} may look worse."
            )
        if length != variant.frames:
            notes.append(
                f"The checkpoint was trained on {variant.frames} frames at once; {length} may look "
                "worse."
            )
        return notes
