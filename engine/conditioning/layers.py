"""The one place that knows a layered clip's layers: order, frames, premultiplication, joining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import avg_pool2d

from ..errors import LayerLoomError
from ..models.layered_transformer import LayerSegment
from ..models.layerflow import RGB_LAYERS as RGB
from ..models.layerflow import RGBA_LAYERS as RGBA

# Layers that each task is given; the others are made.
GIVEN = {
    "generate": (),
    "foreground": ("foreground", "alpha"),
    "background": ("background",),
    "decompose": ("blended",),
}
# Coverage from which a pixel's own premultiplied value gives its colour, and below which there is
# nothing to tell a colour from. The neighbourhood is this share of the frame's longer side.
TRUSTED = 0.25
MIN_COVERAGE = 1 / 64
NEIGHBOURHOOD = 24


def premultiply(foreground: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """``rgb * alpha`` in [-1, 1], so transparent is mid-grey (LayerFlow).

    ``foreground`` [..., 3, H, W] in [-1, 1], ``alpha`` [..., 1, H, W] in [0, 1].
    """
    return foreground * alpha


def unpremultiply(foreground: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Straight colour in [-1, 1] of a premultiplied mid-grey one [..., 3, H, W].

    From ``TRUSTED`` coverage on it is the exact quotient. Below, where the quotient only blows up
    errors of the network, it goes over into the coverage-weighted mean of the neighbourhood, so
    edges keep the colour of the thing they belong to; mid-grey where nothing is near.
    """
    height, width = foreground.shape[-2:]
    reach = max(1, max(height, width) // NEIGHBOURHOOD)

    def mean(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-3], height, width)
        # Down, then across: the same mean as of the square, for a thirtieth of the work at 480p.
        down = avg_pool2d(flat, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
        return avg_pool2d(down, (1, 2 * reach + 1), stride=1, padding=(0, reach)).reshape(x.shape)

    cover = mean(alpha)
    around = mean(foreground) / cover.clamp(min=MIN_COVERAGE) * (cover > MIN_COVERAGE)
    direct = foreground / alpha.clamp(min=MIN_COVERAGE)
    trust = (alpha / TRUSTED).clamp(0, 1)
    return trust * direct.clamp(-1, 1) + (1 - trust) * around.clamp(-1, 1)


def composite(
    foreground: torch.Tensor, alpha: torch.Tensor, background: torch.Tensor
) -> torch.Tensor:
    """Straight foreground over background: ``a * f + (1 - a) * b``, any one value range."""
    return alpha * foreground + (1 - alpha) * background


def layers_to_clip(
    layers: Mapping[str, torch.Tensor], sequence: LayerSequence, names: Sequence[str]
) -> torch.Tensor:
    """The clip [B, frames, 3, H, W] in [-1, 1] that an autoencoder encodes for some layers.

    ``layers`` maps names to [B, F, 3, H, W] in [0, 1], alpha to [B, F, 1, H, W]; the foreground
    is straight and is premultiplied here where there is an alpha.
    """
    signed = {name: layers[name] * 2 - 1 for name in names}
    if "foreground" in names and "alpha" in layers:
        signed["foreground"] = premultiply(signed["foreground"], layers["alpha"])
    if "alpha" in names:
        signed["alpha"] = signed["alpha"].expand(-1, -1, 3, -1, -1)
    return sequence.join_pixels(signed)


def clip_to_layers(clip: torch.Tensor, sequence: LayerSequence) -> dict[str, torch.Tensor]:
    """Layers [B, F, 3, H, W] in [0, 1] of a decoded clip [B, frames, 3, H, W] in [-1, 1].

    Alpha has one channel; with it the foreground comes back straight.
    """
    layers = sequence.split_pixels(clip.clamp(-1, 1))
    if sequence.has_alpha:
        alpha = (layers["alpha"].mean(2, keepdim=True) + 1) / 2
        layers["foreground"] = unpremultiply(layers["foreground"], alpha)
    layers = {name: (layer + 1) / 2 for name, layer in layers.items()}
    if sequence.has_alpha:
        layers["alpha"] = alpha
    return layers


@dataclass(frozen=True)
class LayerSequence:
    """Layers laid end to end on the time axis of one clip.

    ``frames`` pixel frames a layer; ``temporal_factor`` of them make one latent frame.
    ``duplicate_first_frame`` puts frame 0 once more in front of the clip (LayerFlow's RGBA
    conditioned checkpoints), which gives the first layer one latent frame more.
    ``decompose_latents`` is how many of the blended layer's last latent frames are given when
    decomposing; None gives all, and the released RGB code gave 2 of 4.
    """

    layers: tuple[str, ...] = RGBA
    frames: int = 16
    temporal_factor: int = 4
    duplicate_first_frame: bool = False
    decompose_latents: int | None = None

    def __post_init__(self):
        if self.layers not in (RGB, RGBA):
            raise LayerLoomError(f"Layers {self.layers} are not in the order of {RGB} or {RGBA}.")
        if self.frames < 1 or self.frames % self.temporal_factor:
            raise LayerLoomError(
                f"{self.frames} frames a layer do not divide by {self.temporal_factor}; "
                f"use {max(1, round(self.frames / self.temporal_factor)) * self.temporal_factor}."
            )

    @property
    def has_alpha(self) -> bool:
        return "alpha" in self.layers

    def given(self, task: str) -> tuple[str, ...]:
        """Names of the clean layers of a task, in this sequence's order."""
        if task not in GIVEN:
            raise LayerLoomError(f"Unknown task {task!r}: use one of {', '.join(GIVEN)}.")
        return tuple(layer for layer in self.layers if layer in GIVEN[task])

    def pixel_frames(self, layer: str) -> int:
        """Pixel frames of a layer in the joined clip."""
        extra = self.duplicate_first_frame and layer == self.layers[0]
        return self.frames + int(extra)

    def latent_frames(self, layer: str) -> int:
        """Latent frames of a layer in the joined clip."""
        extra = self.duplicate_first_frame and layer == self.layers[0]
        return self.frames // self.temporal_factor + int(extra)

    def segments(self, task: str) -> tuple[LayerSegment, ...]:
        """The network's segments for a task, given layers marked clean."""
        given, segments = self.given(task), []
        for layer in self.layers:
            total = self.latent_frames(layer)
            clean = total if layer in given else 0
            if task == "decompose" and clean and self.decompose_latents is not None:
                clean = min(total, self.decompose_latents)
            if total > clean:
                segments.append(LayerSegment(layer, total - clean))
            if clean:
                name = layer if clean == total else f"{layer}.given"
                segments.append(LayerSegment(name, clean, clean=True))
        return tuple(segments)

    def join_pixels(self, layers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One clip [B, sum of frames, 3, H, W] of the layers present, in order.

        ``layers`` maps names to [B, frames, 3, H, W] in [-1, 1], foreground premultiplied.
        """
        parts = []
        for layer in self.layers:
            if layer not in layers:
                continue
            clip = layers[layer]
            if clip.shape[1] != self.frames:
                raise LayerLoomError(
                    f"The {layer} layer has {clip.shape[1]} frames, {self.frames} were expected."
                )
            if self.pixel_frames(layer) > self.frames:
                parts.append(clip[:, :1])
            parts.append(clip)
        return torch.cat(parts, dim=1)

    def split_pixels(self, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        """Layers [B, frames, 3, H, W] of a joined clip; the duplicated frame is dropped."""
        layers, start = {}, 0
        for layer in self.layers:
            stop = start + self.pixel_frames(layer)
            layers[layer] = clip[:, stop - self.frames : stop]
            start = stop
        if start != clip.shape[1]:
            raise LayerLoomError(f"A clip of {clip.shape[1]} frames is not {start} frames long.")
        return layers

    def split_latents(
        self, latents: torch.Tensor, names: tuple[str, ...] | None = None
    ) -> dict[str, torch.Tensor]:
        """Views [B, T_layer, C, H, W] of joined latents holding ``names`` (all layers)."""
        kept = [layer for layer in self.layers if names is None or layer in names]
        lengths = [self.latent_frames(layer) for layer in kept]
        if sum(lengths) != latents.shape[1]:
            raise LayerLoomError(
                f"Latents of {latents.shape[1]} frames are not the {sum(lengths)} of {kept}."
            )
        return dict(zip(kept, latents.split(lengths, dim=1), strict=True))

    def join_latents(self, layers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Latents [B, T, C, H, W] of the layers present, in order."""
        return torch.cat([layers[layer] for layer in self.layers if layer in layers], dim=1)

    def clean_latents(self, latents: torch.Tensor, task: str) -> torch.Tensor:
        """The part of the given layers' joined latents that the network reads."""
        kept = sum(s.frames for s in self.segments(task) if s.clean)
        return latents[:, latents.shape[1] - kept :]


def sequence_for(shape: tuple[int, ...], layers: str = "auto") -> LayerSequence:
    """The sequence that latents [B, C, T, h, w] most likely hold, from their length alone.

    ``layers`` is "rgba", "rgb" or "auto". One latent frame over is the duplicated first frame.
    "auto" takes RGBA, but RGB for LayerFlow's published 12 latent frames.

    Raises:
        LayerLoomError: not a clip, or its length does not divide into layers.
    """
    if len(shape) != 5:
        raise LayerLoomError(
            f"A latent of shape {tuple(shape)} is no layered clip [batch, channels, time, height, "
            "width]; connect the latent that a layered model was sampled with."
        )
    kinds = {"rgba": RGBA, "rgb": RGB}
    if layers == "auto":
        order = ("rgb", "rgba") if shape[2] == 12 else ("rgba", "rgb")
    else:
        order = (layers,)
    for extra in (0, 1):
        for kind in order:
            frames, rest = divmod(shape[2] - extra, len(kinds[kind]))
            if not rest and frames:
                sequence = LayerSequence(kinds[kind], duplicate_first_frame=bool(extra))
                return replace(sequence, frames=frames * sequence.temporal_factor)
    raise LayerLoomError(
        f"A latent of {shape[2]} frames does not divide into the {' or '.join(order)} layers."
    )
