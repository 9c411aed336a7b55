"""What the pipelines of clips share: pictures to latents, noise, latents to frames, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .conditioning.encoders import TextFeatures
from .conditioning.frame_codec import FrameCodec
from .conditioning.pictures import Size
from .errors import LayerLoomError
from .frames import resize, to_bytes
from .sampling.samplers import Callback, StepInfo, draw_noise

Progress = Callable[[str, int, int], None]
"""(what is being done, how much is done, of how much); what it raises ends the work."""


class StepReport:
    """A sampler's callback: tells of each step and keeps the time they take."""

    def __init__(self, progress: Progress | None, callback: Callback | None):
        self.progress, self.callback = progress, callback
        self._started = self._last = time.perf_counter()
        self._steps = 1

    def __call__(self, info: StepInfo) -> None:
        self._last, self._steps = time.perf_counter(), info.total
        if self.progress:
            self.progress("Denoising", info.step, info.total)
        if self.callback:
            self.callback(info)

    @property
    def seconds_per_step(self) -> float:
        """From the report's making to its last step, over the steps of the run."""
        return (self._last - self._started) / self._steps


def as_signed(pictures: np.ndarray) -> Tensor:
    """Pictures uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    unit = torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255
    return unit.movedim(-1, 1) * 2 - 1


def text_features(encoder: TextFeatures, prompts: Sequence[str], like: Tensor) -> Tensor:
    """Features [B, L, D] on the device and in the type of ``like``."""
    return encoder.encode(prompts).to(like.device, like.dtype)


def draw_each(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device
) -> Tensor:
    """Noise [B, *shape], a clip from each generator, so that a batch equals its single runs."""
    return torch.stack([draw_noise(shape, generator, device) for generator in generators])


def encode_images(
    codec: FrameCodec, images: Sequence[Tensor], generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """Latents [B, C, h, w] of each image [B, 3, H, W]; each clip draws from its own generator."""
    return [
        torch.cat(
            [
                codec.encode(picture[None], generator)
                for picture, generator in zip(image, generators, strict=True)
            ]
        )
        for image in images
    ]


def shipped(starter: Path) -> Path:
    """The starter's path; LayerLoomError where it has not been made."""
    if not starter.exists():
        raise LayerLoomError(
            f"The starter {starter.name} is not there; make it with `layerloom train "
            f"starter/{starter.stem}.toml`, or name a checkpoint."
        )
    return starter


def untrained_notes(native: Size, size: Size, trained: int, frames: int) -> list[str]:
    """What a person should know about a size or a clip length that the weights do not."""
    notes = []
    if size != native:
        notes.append(
            f"The checkpoint was trained on {native[1]}x{native[0]}; {size[1]}x{size[0]} may look "
            "worse."
        )
    if frames != trained:
        notes.append(f"The checkpoint was trained on {trained} frames; {frames} may look worse.")
    return notes


@torch.no_grad()
def decode_frames(
    codec: FrameCodec,
    latents: Tensor,
    size: Size,
    at_once: int = 1,
    progress: Progress | None = None,
) -> np.ndarray:
    """Frames uint8 [B, T, H, W, 3], of ``size``, of latents [B, C, T, h, w].

    The autoencoder sees each frame alone, however many go ``at_once``: one keeps memory flat.
    """
    batch, total = latents.shape[0], latents.shape[2]
    frames = []
    for start in range(0, total, at_once):
        part = latents[:, :, start : start + at_once].transpose(1, 2).flatten(0, 1)
        made = (codec.decode(part).float().cpu().unflatten(0, (batch, -1)) + 1) / 2
        frames.append(to_bytes(resize(made.clamp(0, 1), size), "frames"))
        if progress:
            progress("Decoding", min(start + at_once, total), total)
    return np.concatenate(frames, axis=1)


@torch.no_grad()
def reconstruct(
    codec: FrameCodec, frames: np.ndarray, device: torch.device, seed: int = 0, at_once: int = 1
) -> np.ndarray:
    """Frames uint8 [N, H, W, 3] encoded and decoded: the best the autoencoder allows."""
    generator = torch.Generator().manual_seed(seed)
    pictures = as_signed(frames).to(device)
    latents = [codec.encode(picture[None], generator) for picture in pictures]
    return decode_frames(codec, torch.stack(latents, dim=2), frames.shape[1:3], at_once)[0]
