"""Stills to moving clips from one call: checkpoint, images and a prompt in, frames out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .animate_request import AnimateRequest, AnimateResult
from .animate_sampling import (
    ClipConditions,
    detail_latents,
    image_tokens,
    known_frames,
    predictor,
)
from .animate_settings import AnimateSettings
from .checkpoints.dynamicrafter import (
    DynamiCrafterCheckpoint,
    load_dynamicrafter,
    open_dynamicrafter,
)
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
)
from .conditioning.encoders import TextFeatures
from .conditioning.frame_codec import FrameCodec
from .conditioning.key_images import ClipPlan, clip_plan
from .conditioning.pictures import Size, cover, fitting_note, resizing_note
from .conditioning.video_encoders import (
    ImageFeatures,
    load_frame_codec,
    load_image_features,
    load_text_features,
)
from .device import LARGE, pick_device
from .errors import LayerLoomError
from .models.dynamicrafter import DynamiCrafter
from .sampling.ddim import DDIMTable, ddim_table, sample_ddim
from .sampling.samplers import Callback
from .sampling.streams import StreamGuidance
from .sampling.windows import SlidingWindows

STARTER = Path(__file__).resolve().parent.parent / "starter" / "animate.safetensors"


@dataclass(frozen=True)
class _Plan:
    """A request with the checkpoint's settings filled in."""

    clip: ClipPlan
    size: Size
    output_size: Size
    table: DDIMTable
    eta: float
    guidance: StreamGuidance
    gate: float | tuple[float, ...]
    motion: float
    windows: SlidingWindows
    notes: list[str]


class AnimatePipeline:
    """A loaded checkpoint with its encoders and autoencoder; ``open`` makes one."""

    def __init__(
        self,
        checkpoint: DynamiCrafterCheckpoint,
        network: DynamiCrafter,
        codec: FrameCodec,
        text: TextFeatures,
        image: ImageFeatures,
    ):
        self.checkpoint, self.network = checkpoint, network
        self.codec, self.text, self.image = codec, text, image
        weight = next(network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.settings = AnimateSettings.of(checkpoint)
        self.schedule = self.settings.schedule
        # A large network's branches one after the other: as fast, and a third of the memory.
        self.branches_at_once = checkpoint.info.parameters <= LARGE

    @classmethod
    def open(
        cls,
        checkpoint: Path | None = None,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        image_encoder: Path | None = None,
        device: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AnimatePipeline:
        """Load a checkpoint (the starter when None) and its parts.

        Nothing is downloaded. Parts that the checkpoint does not hold are named by ``vae``,
        ``text_encoder`` and ``image_encoder``; they are looked up before the network is read.
        ``variant`` says which published weights these are, where their shapes leave that open;
        ``dtype`` is the network's, by default bfloat16 for large ones and float32 for starters.

        Raises:
            LayerLoomError: a file is missing or not what it should be; no such device or variant.
        """
        opened = open_dynamicrafter(checkpoint or shipped(STARTER), variant)
        opened.check()
        if opened.info.image_projector is None:
            raise LayerLoomError(
                f"{opened.store.name} holds no image projector (image_proj_model), without which "
                "no picture reaches the network; give the official file or a pruned one."
            )
        target = pick_device(device)
        codec = load_frame_codec(opened, vae, target)
        text = load_text_features(opened, text_encoder, target)
        image = load_image_features(opened, image_encoder, target)
        if dtype is None:
            dtype = torch.bfloat16 if opened.info.parameters > LARGE else torch.float32
        network = load_dynamicrafter(opened, device=target, dtype=dtype)
        return cls(opened, network, codec, text, image)

    def prepare(self, request: AnimateRequest) -> list[str]:
        """Check a request against the checkpoint; notes say what is resized, cut or untrained.

        Raises:
            LayerLoomError: the checkpoint cannot do what is asked.
        """
        return self._plan(request).notes

    def _plan(self, request: AnimateRequest) -> _Plan:
        request.validate()
        settings, variant = self.settings, self.settings.variant
        clip = clip_plan(len(request.images), request.loop, request.frames, variant.frames)
        size, output = settings.size(request.image.shape[:2], request.width, request.height)
        guidance = settings.guidance(request.text_scale, request.image_scale, request.rescale)
        guidance.check()
        eta = variant.eta if request.eta is None else request.eta
        overlap = variant.frames // 2 if request.overlap is None else request.overlap
        windows = SlidingWindows(variant.frames, overlap)
        windows.check()
        table = ddim_table(
            self.schedule,
            variant.steps if request.steps is None else request.steps,
            request.spacing or variant.spacing,
            eta,
            variant.rescale_base,
        )
        seen = min(clip.length, variant.frames) if clip.mode == "animate" else clip.length
        notes = self._picture_notes(request, size, output)
        notes += settings.notes(clip.mode, request.motion, size, seen)
        if clip.mode == "animate" and clip.frames > windows.length:
            notes.append(
                f"{clip.frames} frames are made in windows of {windows.length} that share at least "
                f"{overlap}; the network sees one window at a time."
            )
        notes += self.text.notes([request.prompt, request.negative])
        if request.exact_first_frame:
            notes.append(
                "Given images are blended in as latents: their frames are what the autoencoder "
                "makes of them, not their pixels."
            )
        return _Plan(
            clip=clip,
            size=size,
            output_size=output,
            table=table,
            eta=eta,
            guidance=guidance,
            gate=settings.gate(request.gate, request.gate_layers),
            motion=float(variant.speed_default if request.motion is None else request.motion),
            windows=windows,
            notes=notes,
        )

    def _picture_notes(self, request: AnimateRequest, size: Size, output: Size) -> list[str]:
        names = ["image", *(f"key image {i + 1}" for i in range(len(request.key_images)))]
        names += [] if request.end is None else ["end image"]
        notes = [
            fitting_note(name, picture.shape[:2], size)
            for name, picture in zip(names, request.images, strict=True)
        ]
        notes.append(resizing_note(output, size, self.settings.multiple))
        return [note for note in notes if note]

    def run(
        self,
        request: AnimateRequest,
        progress: Progress | None = None,
        callback: Callback | None = None,
    ) -> AnimateResult:
        """Make the clip of one request.

        progress: told of "Denoising" and "Decoding". callback: gets each step's ``StepInfo``, whose
        ``denoised`` [1, C, T, h, w] is a preview. What either raises stops the work within a step.
        """
        plan = self._plan(request)
        report = StepReport(progress, callback)
        latents = self._sample(plan, [request], report)
        frames = self._decode(latents[:, :, : plan.clip.kept], plan.output_size, progress)
        return AnimateResult(
            frames=frames[0],
            keys=tuple(key for key in plan.clip.keys if key[0] < plan.clip.kept),
            fps=self.settings.frames_per_second if request.fps is None else request.fps,
            settings=self._record(request, plan),
            seconds_per_step=report.seconds_per_step,
        )

    def _record(self, request: AnimateRequest, plan: _Plan) -> dict[str, Any]:
        return {
            "variant": self.checkpoint.info.variant,
            "mode": plan.clip.mode,
            "motion": plan.motion,
            "gate": request.gate,
            "gate_layers": request.gate_layers,
            "text_scale": plan.guidance.text,
            "image_scale": plan.guidance.image,
            "rescale": plan.guidance.rescale,
            "steps": len(plan.table.timesteps),
            "spacing": request.spacing or self.settings.variant.spacing,
            "eta": plan.eta,
            "exact_first_frame": request.exact_first_frame,
            "seed": request.seed,
            "window": plan.windows.length,
            "overlap": plan.windows.overlap,
            "network_size": list(plan.size),
            "network_frames": plan.clip.frames,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def generate_batch(self, requests: Sequence[AnimateRequest]) -> np.ndarray:
        """Several clips at once, for evaluation: uint8 [B, T, H, W, 3], at the network's size.

        The requests may differ in images, prompts and seeds; the first one's settings hold for
        all, and their images must be of one shape. Each clip is what `run` makes of it, to
        rounding.
        """
        plan = self._plan(requests[0])
        latents = self._sample(plan, requests, None)
        return self._decode(latents[:, :, : plan.clip.kept], plan.size, None)

    def reconstruct(self, frames: np.ndarray, seed: int = 0) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] encoded and decoded: the best the autoencoder allows."""
        return reconstruct(self.codec, frames, self.device, seed, self._at_once(len(frames)))

    @torch.no_grad()
    def _sample(
        self, plan: _Plan, requests: Sequence[AnimateRequest], callback: Callback | None
    ) -> Tensor:
        """Latents [B, C, T, h, w] of the clips."""
        weight, clip = next(self.network.parameters()), plan.clip
        images = [
            as_signed(np.stack([cover(picture, plan.size) for picture in pictures])).to(self.device)
            for pictures in zip(*(request.images for request in requests), strict=True)
        ]
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        sides = [side // self.codec.spatial_factor for side in plan.size]
        shape = (self.codec.channels, clip.frames, *sides)
        # The noise first: it is the same whatever the autoencoder draws.
        noise = draw_each(shape, generators, self.device)
        latents = encode_images(self.codec, images, generators)
        grey = torch.zeros_like(images[0][:1])
        seen = {clip.first_image(piece) for piece in range(clip.pieces)}
        projector = self.network.image_projector
        tokens = {i: image_tokens(self.image, projector, images[i], weight) for i in sorted(seen)}
        conditions = ClipConditions(
            detail=detail_latents(clip, latents),
            tokens=tuple(tokens[clip.first_image(piece)] for piece in range(clip.pieces)),
            no_tokens=image_tokens(self.image, projector, grey, weight),
            text=text_features(self.text, [r.prompt for r in requests], weight),
            no_text=text_features(self.text, [r.negative for r in requests], weight),
            motion=plan.motion,
            gate=plan.gate,
        )
        return sample_ddim(
            predictor(
                self.network, conditions, clip, plan.windows, plan.guidance, self.branches_at_once
            ),
            noise,
            plan.table,
            prediction=self.schedule.prediction,
            generator=generators[0],
            known=known_frames(clip, latents) if requests[0].exact_first_frame else None,
            callback=callback,
            noise_source=lambda: draw_each(shape, generators, self.device),
        )

    def _decode(self, latents: Tensor, size: Size, progress: Progress | None) -> np.ndarray:
        """``decode_frames``: one frame at a time where the weights were trained so."""
        return decode_frames(self.codec, latents, size, self._at_once(latents.shape[2]), progress)

    def _at_once(self, frames: int) -> int:
        return 1 if self.settings.variant.frame_by_frame else frames
