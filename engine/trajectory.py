"""Subjects along paths of boxes to a clip, from one call: checkpoint, pictures, boxes, prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.dreamvideo import TrajectoryCheckpoint, load_trajectory, open_trajectory
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
from .conditioning.box_paths import pixel_boxes, track_masks
from .conditioning.encoders import TextFeatures
from .conditioning.frame_codec import FrameCodec
from .conditioning.pictures import Size, clip_size, resizing_note
from .conditioning.subjects import on_white
from .conditioning.video_encoders import load_frame_codec, load_text_features
from .device import LARGE, pick_device
from .errors import LayerLoomError
from .models.dreamvideo import DreamVideo, Placement
from .sampling.ddim import DDIMTable, Predictor, ddim_table, sample_ddim
from .sampling.latent_schedules import latent_schedule
from .sampling.samplers import Callback
from .trajectory_request import TrajectoryRequest, TrajectoryResult

STARTER = Path(__file__).resolve().parent.parent / "starter" / "trajectory.safetensors"


@dataclass(frozen=True)
class _Plan:
    """A request with the checkpoint's settings filled in."""

    frames: int
    size: Size
    output_size: Size
    table: DDIMTable
    guidance: float
    drops: str
    weight: float
    notes: list[str]


class TrajectoryPipeline:
    """A loaded checkpoint with its text encoder and autoencoder; ``open`` makes one."""

    def __init__(
        self,
        checkpoint: TrajectoryCheckpoint,
        network: DreamVideo,
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
    ) -> TrajectoryPipeline:
        """Load a checkpoint (the starter when None) and its parts.

        Nothing is downloaded. ``base`` is ModelScope's text-to-video, a file or a folder: the
        weights that a file of additions stands on, and the autoencoder and text encoder where
        ``vae`` and ``text_encoder`` do not name others. ``dtype`` is the network's, by default
        bfloat16 for large ones and float32 for starters.

        Raises:
            LayerLoomError: a file is missing or not what it should be; no such device.
        """
        opened = open_trajectory(shipped(STARTER) if checkpoint is None else checkpoint, base)
        if not opened.info.reference:
            raise LayerLoomError(
                f"{opened.store.name} is {opened.info.variant}, a base that reads neither subjects "
                "nor boxes and is a start for training alone; give weights that LayerLoom trained."
            )
        opened.check()
        target = pick_device(device)
        codec = load_frame_codec(opened, vae or _part(opened, base, "vae"), target)
        text = load_text_features(
            opened, text_encoder or _part(opened, base, "text_encoder"), target
        )
        if dtype is None:
            dtype = torch.bfloat16 if opened.info.parameters > LARGE else torch.float32
        return cls(opened, load_trajectory(opened, device=target, dtype=dtype), codec, text)

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        levels = len(self.checkpoint.info.unet["block_channels"])
        return self.settings.spatial_factor * 2 ** (levels - 1)

    @property
    def native_size(self) -> Size:
        """(height, width) the checkpoint was trained on."""
        return self.settings.height, self.settings.width

    def output_size(self, width: int | None, height: int | None) -> Size:
        """(height, width) of a result for what is asked for; one side gives the other."""
        return clip_size(self.native_size, self.native_size, self.multiple, width, height)[1]

    def prepare(self, request: TrajectoryRequest) -> list[str]:
        """Check a request against the checkpoint; notes say what is resized, retimed or untrained.

        Raises:
            LayerLoomError: the checkpoint cannot do what is asked.
        """
        return self._plan(request).notes

    def _plan(self, request: TrajectoryRequest) -> _Plan:
        request.validate()
        settings = self.settings
        size, output = clip_size(
            self.native_size, self.native_size, self.multiple, request.width, request.height
        )
        frames = settings.frames if request.frames is None else request.frames
        steps = settings.steps if request.steps is None else request.steps
        weight = request.reference_weight
        return _Plan(
            frames=frames,
            size=size,
            output_size=output,
            # ModelScope's from 981 down in 50 steps and to the first timestep. A schedule that ends
            # in pure noise has to begin there.
            table=ddim_table(
                self.schedule,
                steps,
                "trailing" if settings.zero_terminal_snr else "uniform",
                eta=0.0,
            ),
            guidance=settings.guidance if request.guidance is None else request.guidance,
            drops=request.guidance_drops or settings.guidance_drops,
            weight=settings.reference_weight if weight is None else weight,
            notes=self._notes(request, frames, size, output),
        )

    def _notes(
        self, request: TrajectoryRequest, frames: int, size: Size, output: Size
    ) -> list[str]:
        settings = self.settings
        resized = resizing_note(output, size, self.multiple)
        notes = [resized] if resized else []
        notes += untrained_notes(self.native_size, size, settings.frames, frames)
        if request.paths.frames != frames:
            notes.append(
                f"The boxes are for {request.paths.frames} frames and are retimed to {frames}."
            )
        for number, subject in enumerate(request.subjects, 1):
            if subject.mask is None:
                notes.append(
                    f"Subject {number} has no mask: all of its picture is taken for the subject."
                )
        return notes + self.text.notes([request.prompt, request.negative])

    def run(
        self,
        request: TrajectoryRequest,
        progress: Progress | None = None,
        callback: Callback | None = None,
    ) -> TrajectoryResult:
        """Make the clip of one request.

        progress: told of "Denoising" and "Decoding". callback: gets each step's ``StepInfo``, whose
        ``denoised`` [1, C, T, h, w] is a preview. What either raises stops the work within a step.
        """
        plan = self._plan(request)
        report = StepReport(progress, callback)
        latents = self._sample(plan, [request], report)
        paths = request.paths.retimed(plan.frames)
        tracks = [pixel_boxes(track, plan.frames, plan.output_size) for track in paths.tracks]
        return TrajectoryResult(
            frames=decode_frames(self.codec, latents, plan.output_size, progress=progress)[0],
            boxes=np.stack(tracks),
            subjects=_cut_outs(request, plan.size),
            fps=self.settings.frames_per_second if request.fps is None else request.fps,
            settings=self._record(request, plan),
            seconds_per_step=report.seconds_per_step,
        )

    def _record(self, request: TrajectoryRequest, plan: _Plan) -> dict[str, Any]:
        return {
            "variant": self.checkpoint.info.variant,
            "subjects": len(request.subjects),
            "reference_weight": plan.weight,
            "guidance": plan.guidance,
            "guidance_drops": plan.drops,
            "steps": len(plan.table.timesteps),
            "seed": request.seed,
            "network_size": list(plan.size),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def generate_batch(self, requests: Sequence[TrajectoryRequest]) -> np.ndarray:
        """Several clips at once, for evaluation: uint8 [B, T, H, W, 3], at the network's size.

        The requests may differ in subjects, boxes, prompts and seeds; the first one's settings hold
        for all, and all have as many subjects.
        """
        plan = self._plan(requests[0])
        for request in requests[1:]:
            self._plan(request)
        return decode_frames(self.codec, self._sample(plan, requests, None), plan.size)

    def reconstruct(self, frames: np.ndarray, seed: int = 0) -> np.ndarray:
        """Frames uint8 [N, H, W, 3] encoded and decoded: the best the autoencoder allows."""
        return reconstruct(self.codec, frames, self.device, seed)

    @torch.no_grad()
    def _sample(
        self, plan: _Plan, requests: Sequence[TrajectoryRequest], callback: Callback | None
    ) -> Tensor:
        """Latents [B, C, T, h, w] of the clips."""
        sides = tuple(side // self.codec.spatial_factor for side in plan.size)
        shape = (self.codec.channels, plan.frames, *sides)
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        # The noise first: it is the same whatever the autoencoder draws.
        noise = draw_each(shape, generators, self.device)
        weight = next(self.network.parameters())
        return sample_ddim(
            subject_predictor(
                self.network,
                self._place(plan, requests, generators),
                text_features(self.text, [r.prompt for r in requests], weight),
                text_features(self.text, [r.negative for r in requests], weight),
                plan.guidance,
                plan.drops,
                self.passes_at_once,
            ),
            noise,
            plan.table,
            prediction=self.schedule.prediction,
            generator=generators[0],
            callback=callback,
        )

    def _place(
        self,
        plan: _Plan,
        requests: Sequence[TrajectoryRequest],
        generators: Sequence[torch.Generator],
    ) -> Placement:
        """Subjects and boxes of the clips, computed once a run."""
        weight = next(self.network.parameters())
        cut = np.stack([_cut_outs(request, plan.size) for request in requests], axis=1)
        images = [as_signed(pictures).to(self.device) for pictures in cut]
        latents = torch.stack(encode_images(self.codec, images, generators), dim=1)
        nothing = text_features(self.text, [""] * len(requests), weight)
        masks = [track_masks(r.paths.retimed(plan.frames), plan.size) for r in requests]
        return self.network.place(
            torch.from_numpy(np.stack(masks)).to(weight),
            self.network.subject_features(latents.to(weight), nothing),
            plan.weight,
        )


def subject_predictor(
    network: DreamVideo,
    placement: Placement,
    text: Tensor,
    no_text: Tensor,
    guidance: float,
    drops: str,
    together: bool,
) -> Predictor:
    """The guided prediction for clips [B, C, T, h, w].

    The paper gives guidance's scale and not what it drops. With "text" subjects and boxes are in
    both branches and hold at any scale. With "all" the other branch is the base without additions,
    which has never seen them: guidance sharpens what they say.

    Args:
        text, no_text: features [B, L, D] of the prompt and of the negative one.
        drops: one of ``DROPS``.
        together: branches that both have subjects go in one batch.
    """
    other = placement if drops == "text" else None

    def run(x: Tensor, timestep: int, context: Tensor, placed: Placement | None) -> Tensor:
        rows = torch.full((len(context),), timestep, device=x.device)
        return network(x.to(context), rows, context, placement=placed).float()

    if guidance == 1:
        return lambda x, timestep, index: run(x, timestep, text, placement)
    if together and other is not None:
        both, contexts = placement.repeated(2), torch.cat([no_text, text])

        def branches(x: Tensor, timestep: int) -> Sequence[Tensor]:
            return run(x.repeat(2, 1, 1, 1, 1), timestep, contexts, both).chunk(2)
    else:

        def branches(x: Tensor, timestep: int) -> Sequence[Tensor]:
            return run(x, timestep, no_text, other), run(x, timestep, text, placement)

    return lambda x, timestep, index: torch.lerp(*branches(x, timestep), guidance)


def _cut_outs(request: TrajectoryRequest, size: Size) -> np.ndarray:
    """Subjects on white, uint8 [S, H, W, 3]."""
    return np.stack([on_white(s.image, s.mask, size) for s in request.subjects])


def _part(checkpoint: TrajectoryCheckpoint, base: Path | None, part: str) -> Path | None:
    """Where a part comes from that is not named: the base, where the checkpoint holds none."""
    if base is None or not base.is_dir() or part in checkpoint.info.parts:
        return None
    return base
