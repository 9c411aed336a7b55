"""Layers from memory as a source: clips that a graph hands over, cut into what is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...conditioning.encoders import VideoCodec
from ...conditioning.layers import LayerSequence, composite, layers_to_clip
from ...errors import LayerLoomError
from ...frames import resize
from .source import Drawing, LatentBatch, Pick, Progress

# What an adapter is trained on: moving clips as they are; every frame as a still clip; both.
KINDS = ("plain", "motion", "content")


@dataclass(frozen=True)
class GivenClip:
    """One clip's layers, and the features of its prompts [3, tokens, D].

    layers: name -> [N, C, H, W] in [0, 1], foreground straight; a layer of one frame serves all.
    """

    layers: Mapping[str, torch.Tensor]
    text: torch.Tensor

    @property
    def count(self) -> int:
        """Frames of its longest layer."""
        return max(len(layer) for layer in self.layers.values())


@dataclass(frozen=True)
class Piece:
    """What is encoded as one sample: the frames from ``start`` on, or that one frame repeated."""

    clip: int
    start: int
    still: bool


def given_clip(
    name: str,
    foreground: torch.Tensor,
    alpha: torch.Tensor | None,
    background: torch.Tensor,
    blended: torch.Tensor | None,
    text: torch.Tensor,
    sequence: LayerSequence,
) -> GivenClip:
    """Check one clip's layers against each other and put the scene together where it is missing.

    Args:
        name: for messages, "clip 2" say.
        foreground: [N, H, W, 3 or 4] in [0, 1], straight colour; a fourth channel is its alpha.
        alpha: [N or 1, H, W], 1 is opaque; goes before the fourth channel.
        background, blended: [N or 1, H, W, 3]; sizes may differ from layer to layer.

    Raises:
        LayerLoomError: no alpha where one is needed, or lengths that do not fit together.
    """
    if alpha is None and foreground.shape[-1] == 4:
        alpha = foreground[..., 3]
    layers = {"foreground": _frames(foreground), "background": _frames(background)}
    if alpha is not None:
        layers["alpha"] = alpha.float()[:, None].clamp(0, 1)
    elif sequence.has_alpha:
        raise LayerLoomError(
            f"The foreground of {name} has no alpha; connect a MASK (1 is opaque) or pictures with "
            "transparency."
        )
    elif blended is None:
        raise LayerLoomError(
            f"Without alpha the scene of {name} cannot be put together; connect alpha or blended."
        )
    if blended is not None:
        layers["blended"] = _frames(blended)
    count = max(len(layer) for layer in layers.values())
    odd = [layer for layer, frames in layers.items() if len(frames) not in (1, count)]
    if odd:
        lengths = ", ".join(f"{layer} {len(frames)}" for layer, frames in layers.items())
        raise LayerLoomError(
            f"The layers of {name} differ in length (frames: {lengths}); give equally long ones, "
            "or a single frame for a layer that stands still."
        )
    return GivenClip(layers, text)


def _frames(images: torch.Tensor) -> torch.Tensor:
    return images[..., :3].float().movedim(-1, 1).clamp(0, 1)


def cut(clips: Sequence[GivenClip], kind: str, frames: int, video_share: float) -> list[Piece]:
    """The samples that clips give.

    "plain": each clip's first ``frames`` frames, the next and so on; an incomplete rest is left
    out. "motion": every frame by itself. "content": every frame by itself, and what "plain" gives
    where ``video_share`` is above 0.

    Raises:
        LayerLoomError: moving clips are wanted, and none is long enough.
    """
    moving = [
        Piece(number, start, False)
        for number, clip in enumerate(clips)
        for start in range(0, clip.count - frames + 1, frames)
    ]
    if kind == "plain":
        short = [number for number, clip in enumerate(clips) if clip.count < frames]
        if short:
            raise LayerLoomError(
                f"Clip {short[0] + 1} has {clips[short[0]].count} frames, but {frames} a layer are "
                "needed; give a longer clip, set frames to a multiple of 4 that it has, or train "
                "on single frames with kind content."
            )
        return moving
    stills = [
        Piece(number, start, True)
        for number, clip in enumerate(clips)
        for start in range(clip.count)
    ]
    return stills + (moving if kind == "content" and video_share > 0 else [])


class MemorySource(Drawing):
    """Latents of pieces of clips, held in memory; a batch stands still as a whole, or moves.

    Args:
        size: (height, width) in pixels that every layer is resized to.
        video_share: how often moving pieces are drawn where there are both.
    """

    def __init__(
        self,
        clips: Sequence[GivenClip],
        kind: str,
        sequence: LayerSequence,
        size: tuple[int, int],
        codec: VideoCodec,
        video_share: float = 0.1,
    ):
        self.clips, self.sequence, self.sizes, self.codec = clips, sequence, (size,), codec
        self.pieces = cut(clips, kind, sequence.frames, video_share)
        moving = [i for i, piece in enumerate(self.pieces) if not piece.still]
        still = [i for i, piece in enumerate(self.pieces) if piece.still]
        self.groups = (moving, still)
        self.share = video_share if moving and still else float(bool(moving))
        self._latents: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.pieces)

    def describe(self) -> list[str]:
        moving, still = map(len, self.groups)
        parts = [f"{moving} moving" if moving else "", f"{still} still" if still else ""]
        height, width = self.sizes[0]
        what = " and ".join(part for part in parts if part)
        lines = [f"{what} samples of {self.sequence.frames} frames, {width}x{height}."]
        shapes = {f.shape[-2:] for clip in self.clips for f in clip.layers.values()}
        if shapes != {self.sizes[0]}:
            odd = ", ".join(f"{w}x{h}" for h, w in sorted(shapes - {self.sizes[0]}))
            lines.append(f"Layers of {odd} are resized to that.")
        rests = [clip.count % self.sequence.frames for clip in self.clips]
        if not still and any(rests):
            lines.append(f"{sum(rests)} frames at the ends of clips are left out.")
        return lines

    @torch.no_grad()
    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        self._latents = []
        for number, piece in enumerate(self.pieces):
            clip = layers_to_clip(self._layers(piece), self.sequence, self.sequence.layers)
            generator = torch.Generator().manual_seed(number)
            self._latents.append(self.codec.encode(clip, generator)[0].cpu())
            if progress:
                progress(number + 1, len(self.pieces))

    def _layers(self, piece: Piece) -> dict[str, torch.Tensor]:
        """A piece's layers [1, frames, C, H, W], all of one size."""
        clip, count = self.clips[piece.clip], self.sequence.frames
        layers = {}
        for name, frames in clip.layers.items():
            if len(frames) > 1:
                stop = piece.start + (1 if piece.still else count)
                frames = frames[piece.start : stop]
            made = resize(frames[None], self.sizes[0])
            layers[name] = made.expand(-1, count, -1, -1, -1)
        if "blended" not in layers:
            names = ("foreground", "alpha", "background")
            layers["blended"] = composite(*(layers[name] for name in names))
        return layers

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        moves = float(torch.rand((), generator=generator)) < self.share
        group = self.groups[0 if moves else 1]
        rows = torch.randint(len(group), (batch,), generator=generator).tolist()
        return [Pick(group[row], 0) for row in rows]

    def load(self, picks: Sequence[Pick]) -> LatentBatch:
        pieces = [self.pieces[pick.index] for pick in picks]
        return LatentBatch(
            torch.stack([self._latents[pick.index] for pick in picks]),
            torch.stack([self.clips[piece.clip].text for piece in pieces]),
            torch.tensor([piece.still for piece in pieces]),
        )
