"""Clicked regions of a picture to a moving clip, from one call: checkpoint, masks, phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.click import ClickCheckpoint, load_click, open_click
from .click_composite import hold_still
from .click_request import ClickRequest, ClickResult
from .click_sampling import RegionConditions, region_predictor
from .clips import (
    Progress,
    StepReport,
    as_signed,
    decode_frames,
    draw_each,
    encode_images,
    reconstruct,
    shipped,
    text_features,
    untrained_notes,
)
from .conditioning.click_encoders import load_click_text
from .conditioning.encoders import TextFeatures
from .conditioning.frame_codec import FrameCodec
from .conditioning.pictures import Size, clip_size, cover, fitting_note, resizing_note
from .conditioning.video_encoders import load_frame_codec
from .device import LARGE, pick_device
from .errors import LayerLoomError
from .frames import resize, to_bytes
from .models.follow_your_click import FollowYourClick, latent_mask
from .sampling.ddim import DDIMTable, KnownFrames, leading_table, sample_ddim
from .sampling.latent_schedules import latent_schedule
from .sampling.samplers import Callback

STARTER = Path(__file__).resolve().parent.parent / "starter" / "click.safetensors"


@dataclass(frozen=True)
class _Plan:
    """A request with the checkpoint's settings filled in."""

    frames: int
    size: Size
    output_size: Size
    table: DDIMTable
    guidance: float
    strengths: tuple[float, ...]
    notes: list[str]


class ClickPipeline:
    """A loaded checkpoint with its text encoder and autoencoder; ``open`` makes one."""

    def __init__(
        self,
        checkpoint: ClickCheckpoint,
        network: FollowYourClick,
        codec: FrameCodec,
        text: TextFeatures,
    ):
        self.checkpoint, self.network = checkpoint, network
        self.codec, self.text = codec, text
        self.settings = checkpoint.variant
        weight = next(network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.schedule = latent_schedule(
            self.settings.prediction, self.settings.zero_terminal_snr, betas=self.settings.betas
        )
        # A large network's passes one after the other: as fast, and a part of the memory.
        self.passes_at_once = checkpoint.info.parameters <= LARGE

    @classmethod
    def open(
        cls,
        checkpoint: Path | None = None,
        base: Path | None = None,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ClickPipeline:
        """Load a checkpoint (the starter when None) and its parts.

        Nothing is downloaded. ``base`` is Stable Diffusion 1.5, a file or a folder: the weights
        that PIA's file stands on, and the autoencoder and text encoder where ``vae`` and
        ``text_encoder`` do not name others. ``dtype`` is the network's, by default bfloat16 for
        large ones and float32 for starters.

        Raises:
            LayerLoomError: a file is missing or not what it should be; no such device.
        """
        opened = open_click(shipped(STARTER) if checkpoint is None else checkpoint, base)
        if not opened.variant.reads_picture:
            raise LayerLoomError(
                f"{opened.store.name} is {opened.info.variant}, which reads neither a picture nor "
                "a mask and is a start for training alone; give Follow-Your-Click's or PIA's "
                "weights, or ones that LayerLoom trained."
            )
        opened.check()
        target = pick_device(device)
        codec = load_frame_codec(opened, vae or _part(opened, base, "vae"), target)
        text = load_click_text(opened, text_encoder or _part(opened, base, "text_encoder"), target)
        if dtype is None:
            dtype = torch.bfloat16 if opened.info.parameters > LARGE else torch.float32
        return cls(opened, load_click(opened, device=target, dtype=dtype), codec, text)

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        levels = len(self.checkpoint.info.unet["block_channels"])
        return self.settings.spatial_factor * 2 ** (levels - 1)

    @property
    def native_size(self) -> Size:
        """(height, width) the checkpoint was trained on."""
        return self.settings.height, self.settings.width

    def prepare(self, request: ClickRequest) -> list[str]:
        """Check a request against the checkpoint; notes say what is resized, cut or untrained.

        Raises:
            LayerLoomError: the checkpoint cannot do what is asked.
        """
        return self._plan(request).notes

    def _plan(self, request: ClickRequest) -> _Plan:
        request.validate()
        settings = self.settings
        size, output = clip_size(
            request.image.shape[:2],
            self.native_size,
            self.multiple,
            request.width,
            request.height,
        )
        frames = settings.frames if request.frames is None else request.frames
        if frames > settings.positions:
            raise LayerLoomError(
                f"{frames} frames are more than the {settings.positions} that "
                f"{self.checkpoint.store.name} has positions for; ask for fewer."
            )
        for number, region in enumerate(request.regions, 1):
            if not (fitted_mask(region.mask, size) >= 0.5).any():
                raise LayerLoomError(
                    f"Nothing of region {number} is left after the picture is cut to "
                    f"{size[1]}x{size[0]}; choose another size, or a region nearer the middle."
                )
        strengths = tuple(
            settings.strength_default if region.strength is None else region.strength
            for region in request.regions
        )
        return _Plan(
            frames=frames,
            size=size,
            output_size=output,
            table=leading_table(
                self.schedule, settings.steps if request.steps is None else request.steps
            ),
            guidance=settings.guidance if request.guidance is None else request.guidance,
            strengths=strengths,
            notes=self._notes(request, frames, size, output, strengths),
        )

    def _notes(
        self,
        request: ClickRequest,
        frames: int,
        size: Size,
        output: Size,
        strengths: Sequence[float],
    ) -> list[str]:
        settings = self.settings
        fitting = (
            fitting_note("image", request.image.shape[:2], size),
            resizing_note(output, size, self.multiple),
        )
        notes = [note for note in fitting if note]
        notes += untrained_notes(self.native_size, size, settings.frames, frames)
        low, high = settings.strength_range
        notes += [
            f"The strength {strength:g} is outside of {low:g} to {high:g}, which {settings.name} "
            "was trained on."
            for strength in sorted(set(strengths))
            if not low <= strength <= high
        ]
        if not settings.reads_regions:
            notes.append(
                "PIA reads no mask: the phrase moves the whole picture, and the regions matter "
                "where the background is held."
            )
        if request.hold_background:
            notes.append(
                "The background is the picture itself, put back around what moves: a composite."
            )
        phrases = [region.phrase for region in request.regions]
        return notes + self.text.notes([request.prompt, request.negative, *phrases])

    def run(
        self,
        request: ClickRequest,
        progress: Progress | None = None,
        callback: Callback | None = None,
    ) -> ClickResult:
        """Make the clip of one request.

        progress: told of "Denoising" and "Decoding". callback: gets each step's ``StepInfo``, whose
        ``denoised`` [1, C, T, h, w] is a preview. What either raises stops the work within a step.
        """
        plan = self._plan(request)
        report = StepReport(progress, callback)
        latents = self._sample(plan, [request], report)
        frames = decode_frames(self.codec, latents, plan.output_size, progress=progress)[0]
        masks = np.stack([fitted_mask(r.mask, plan.output_size) >= 0.5 for r in request.regions])
        if request.hold_background:
            frames = self._hold(frames, request, masks.any(0), plan, plan.output_size)
        return ClickResult(
            frames=frames,
            masks=masks,
            fps=self.settings.frames_per_second if request.fps is None else request.fps,
            settings=self._record(request, plan),
            seconds_per_step=report.seconds_per_step,
        )

    def _hold(
        self,
        frames: np.ndarray,
        request: ClickRequest,
        mask: np.ndarray,
        plan: _Plan,
        size: Size,
    ) -> np.ndarray:
        still = self.reconstruct(cover(request.image, plan.size)[None], request.seed)
        unit = torch.from_numpy(still).movedim(-1, 1)[None].float() / 255
        still = to_bytes(resize(unit, size), "frames")[0, 0]
        return hold_still(frames, cover(request.image, size), still, mask)

    def _record(self, request: ClickRequest, plan: _Plan) -> dict[str, Any]:
        return {
            "variant": self.checkpoint.info.variant,
            "reading": self.checkpoint.info.reading,
            "regions": [
                {"phrase": region.phrase, "strength": strength}
                for region, strength in zip(request.regions, plan.strengths, strict=True)
            ],
            "guidance": plan.guidance,
            "steps": len(plan.table.timesteps),
            "hold_background": request.hold_background,
            "exact_first_frame": request.exact_first_frame,
            "seed": request.seed,
            "network_size": list(plan.size),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def generate_batch(self, requests: Sequence[ClickRequest]) -> np.ndarray:
        """Several clips at once, for evaluation: uint8 [B, T, H, W, 3], at the network's size.

        The requests may differ in images, masks, phrases, strengths and seeds; the first one's
        settings hold for all, their images are of one shape and their regions as many.
        """
        plan = self._plan(requests[0])
        for request in requests[1:]:
            self._plan(request)
        clips = decode_frames(self.codec, self._sample(plan, requests, None), plan.size)
        if not requests[0].hold_background:
            return clips
        held = []
        for frames, request in zip(clips, requests, strict=True):
            masks = [fitted_mask(region.mask, plan.size) >= 0.5 for region in request.regions]
            held.append(self._hold(frames, request, np.any(masks, axis=0), plan, plan.size))
        return np.stack(held)

    def reconstruct(self, frames: np.ndarray, seed: int = 0) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] encoded and decoded: the best the autoencoder allows."""
        return reconstruct(self.codec, frames, self.device, seed)

    @torch.no_grad()
    def _sample(
        self, plan: _Plan, requests: Sequence[ClickRequest], callback: Callback | None
    ) -> Tensor:
        """Latents [B, C, T, h, w] of the clips."""
        sides = tuple(side // self.codec.spatial_factor for side in plan.size)
        shape = (self.codec.channels, plan.frames, *sides)
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        # The noise first: it is the same whatever the autoencoder draws.
        noise = draw_each(shape, generators, self.device)
        images = as_signed(np.stack([cover(r.image, plan.size) for r in requests]))
        picture = encode_images(self.codec, [images.to(self.device)], generators)[0]
        weight = next(self.network.parameters())
        known = None
        if requests[0].exact_first_frame:
            clip = torch.zeros_like(noise)
            clip[:, :, 0] = picture
            first = torch.zeros(1, 1, plan.frames, 1, 1, device=self.device)
            first[:, :, 0] = 1
            known = KnownFrames(clip, first)
        return sample_ddim(
            region_predictor(
                self.network,
                [self._conditions(requests, n, plan, sides) for n in range(len(plan.strengths))],
                picture.to(weight),
                text_features(self.text, [r.negative for r in requests], weight),
                plan.guidance,
                self.settings.stride,
                self.passes_at_once,
            ),
            noise,
            plan.table,
            prediction=self.schedule.prediction,
            generator=generators[0],
            known=known,
            callback=callback,
        )

    def _conditions(
        self, requests: Sequence[ClickRequest], number: int, plan: _Plan, sides: Size
    ) -> RegionConditions:
        weight = next(self.network.parameters())
        regions = [request.regions[number] for request in requests]
        masks = torch.from_numpy(np.stack([fitted_mask(r.mask, plan.size) for r in regions]))
        default = self.settings.strength_default
        phrases = [region.phrase for region in regions]
        captions = [r.prompt or phrase for r, phrase in zip(requests, phrases, strict=True)]
        strengths = [default if r.strength is None else r.strength for r in regions]
        return RegionConditions(
            mask=latent_mask(masks[:, None], sides).to(weight),
            caption=text_features(self.text, captions, weight),
            phrase=text_features(self.text, phrases, weight),
            strength=torch.tensor(strengths, dtype=torch.float32, device=self.device),
        )


def fitted_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """A mask [H, W] scaled and cut as ``cover`` does with its picture, float32 0..1."""
    grey = np.rint(np.clip(np.asarray(mask, dtype=np.float32), 0, 1) * 255).astype(np.uint8)
    return cover(np.repeat(grey[..., None], 3, axis=2), size)[..., 0].astype(np.float32) / 255


def _part(checkpoint: ClickCheckpoint, base: Path | None, part: str) -> Path | None:
    """Where a part comes from that is not named: the base, where the checkpoint holds none."""
    return base if base is not None and part not in checkpoint.info.parts else None
