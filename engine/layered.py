"""The layered generator from one call: checkpoint, prompts and given layers in, layers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels import SegmentKVCache, clean_sees_clean
from .checkpoints.load import Checkpoint, load_transformer, open_checkpoint
from .checkpoints.lora import LoRA
from .conditioning.encoders import TextFeatures, VideoCodec, load_codec, load_text
from .conditioning.layers import (
    GIVEN,
    LayerSequence,
    clip_to_layers,
    composite,
    layers_to_clip,
)
from .conditioning.pictures import resizing_note
from .conditioning.prompts import indexed_prompts
from .device import LARGE, pick_device
from .errors import LayerLoomError
from .frames import Size, resize, to_bytes, to_unit
from .layered_settings import LayeredSettings
from .models.layered_transformer import LayeredTransformer
from .reuse import GivenReuse
from .sampling.guidance import guidance
from .sampling.samplers import SAMPLER_NAMES, StepInfo, draw_noise, sample
from .sampling.schedules import check_steps

STARTER = Path(__file__).resolve().parent.parent / "starter" / "layered.safetensors"
Callback = Callable[[StepInfo], None]


@dataclass(frozen=True)
class LayeredRequest:
    """What one run shall make. None leaves a setting to the checkpoint.

    Attributes:
        task: "generate", "foreground" (given foreground and alpha), "background" (given) or
            "decompose" (given blended).
        foreground, background, blended: prompts; without ``blended`` it is put together.
        given: layer name -> uint8 frames [F, H, W, 3], "alpha" [F, H, W].
        fps: frames a second of the result.
        frames, width, height: frames a layer, size in pixels.
        steps, guidance, guidance_mode, sampler, seed: see ``engine.sampling``.
        reuse: keep what is computed of given layers over the steps; None is full attention at
            every step, as the weights were trained.
    """

    task: str
    foreground: str
    background: str
    blended: str | None = None
    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    fps: float = 8.0
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_mode: str | None = None
    sampler: str | None = None
    seed: int = 0
    reuse: GivenReuse | None = None

    def validate(self) -> None:
        """Raise LayerLoomError for what is wrong whatever the checkpoint."""
        if self.task not in GIVEN:
            raise LayerLoomError(f"Unknown task {self.task!r}: use one of {', '.join(GIVEN)}.")
        for name in ("foreground", "background"):
            if not getattr(self, name).strip():
                raise LayerLoomError(f"The {name} prompt is empty; say what the layer shows.")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and side < 1:
                raise LayerLoomError(f"The {name} is {side}; give a number of pixels above 0.")
        if self.reuse is not None:
            self.reuse.check(self.task)
        strange = sorted(set(self.given) - set(GIVEN[self.task]))
        if strange:
            raise LayerLoomError(f"The task {self.task!r} takes no given {strange[0]} layer.")
        lengths = {name: clip.shape[:3] for name, clip in self.given.items()}
        if len(set(lengths.values())) > 1:
            raise LayerLoomError(f"The given layers differ in length or size: {lengths}.")


@dataclass(frozen=True)
class LayeredResult:
    """Layers as uint8 arrays [F, H, W, 3], foreground straight; alpha [F, H, W] or None."""

    foreground: np.ndarray
    alpha: np.ndarray | None
    background: np.ndarray
    blended: np.ndarray
    recomposed: np.ndarray | None
    fps: float
    settings: dict[str, Any]
    seconds_per_step: float


@dataclass(frozen=True)
class _Plan:
    """A request with the checkpoint's settings filled in."""

    sequence: LayerSequence
    size: Size
    output_size: Size
    steps: int
    guidance: float
    guidance_mode: str
    sampler: str
    reuse: GivenReuse | None
    notes: list[str]


class LayeredPipeline:
    """A loaded checkpoint with its text encoder and autoencoder; ``open`` makes one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        transformer: LayeredTransformer,
        codec: VideoCodec,
        text: TextFeatures,
        adapters: Mapping[str, float] | None = None,
        loras: Sequence[tuple[LoRA, float]] = (),
    ):
        self.checkpoint, self.transformer = checkpoint, transformer
        self.codec, self.text = codec, text
        # What is folded into the transformer, for the record.
        self.strengths, self.loras = checkpoint.strengths(adapters), loras
        self.metadata = checkpoint.metadata
        self.device = next(transformer.parameters()).device
        self.dtype = next(transformer.parameters()).dtype
        self.settings = LayeredSettings.of(checkpoint)
        self.schedule = self.settings.schedule

    @classmethod
    def open(
        cls,
        checkpoint: Path | None = None,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        device: str | None = None,
        adapters: Mapping[str, float] | None = None,
        loras: Sequence[tuple[LoRA, float]] = (),
        dtype: torch.dtype | None = None,
    ) -> LayeredPipeline:
        """Load a checkpoint (the starter when None) and its parts.

        Nothing is downloaded. Parts that the checkpoint does not hold are named by ``vae`` and
        ``text_encoder``; they are looked up before the large file is read. ``adapters`` gives
        strengths of the checkpoint's own adapters (those left out keep their default), ``loras``
        further ones with theirs; all are folded into the weights. ``dtype`` is the network's, by
        default bfloat16 for large ones and float32 for starters.

        Raises:
            LayerLoomError: a file is missing or not what it should be; no such device or adapter.
        """
        opened = open_checkpoint(checkpoint or STARTER)
        LayeredSettings.of(opened)
        opened.check()
        opened.strengths(adapters)
        opened.check_loras(loras)
        target = pick_device(device)
        codec = load_codec(opened, vae, target)
        text = load_text(opened, text_encoder, target)
        large = opened.info.parameters > LARGE
        transformer = load_transformer(
            opened,
            adapters=adapters,
            loras=loras,
            device=target,
            dtype=dtype or (torch.bfloat16 if large else torch.float32),
        )
        return cls(opened, transformer, codec, text, adapters, loras)

    @property
    def native_size(self) -> Size:
        """(height, width) the checkpoint was trained on."""
        return self.settings.height, self.settings.width

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        return self.codec.spatial_factor * self.transformer.patch_size

    def sequence(self, frames: int | None = None) -> LayerSequence:
        """The checkpoint's layer sequence, with another number of frames a layer if given."""
        return (
            self.settings.sequence
            if frames is None
            else replace(self.settings.sequence, frames=frames)
        )

    def prepare(self, request: LayeredRequest) -> list[str]:
        """Check a request against the checkpoint; notes say what will be resized or left out.

        Raises:
            LayerLoomError: the checkpoint cannot do what is asked.
        """
        return self._plan(request).notes

    def _plan(self, request: LayeredRequest) -> _Plan:
        request.validate()
        sequence = self.sequence(request.frames)
        self._check_task(request, sequence)
        self._check_frames(sequence)
        notes, sampling = [], self.metadata["sampling"]
        trained = self.metadata["sequence"]["frames"]
        if sequence.frames != trained:
            notes.append(
                f"The checkpoint was trained on {trained} frames a layer; {sequence.frames} may "
                "look worse."
            )
        source = None
        for name, clip in request.given.items():
            source = clip.shape[1:3]
            if len(clip) < sequence.frames:
                raise LayerLoomError(
                    f"The given {name} has {len(clip)} frames, but {sequence.frames} a layer are "
                    f"needed; give a longer clip or --frames (a multiple of "
                    f"{sequence.temporal_factor})."
                )
            if len(clip) > sequence.frames:
                notes.append(
                    f"Only the first {sequence.frames} of the given {name}'s {len(clip)} frames "
                    "are used."
                )
        size, output = self._sizes(request, source, notes)
        texts = indexed_prompts(
            request.task, request.foreground, request.background, request.blended
        )
        notes += self.text.notes(texts)
        by_task = sampling.get("guidance_by_task", {})
        scale = by_task.get(request.task, sampling["guidance"])
        plan = _Plan(
            sequence=sequence,
            size=size,
            output_size=output,
            steps=sampling["steps"] if request.steps is None else request.steps,
            guidance=scale if request.guidance is None else request.guidance,
            guidance_mode=request.guidance_mode or sampling["guidance_formula"],
            sampler=request.sampler or sampling["sampler"],
            reuse=request.reuse,
            notes=notes,
        )
        # What cannot be sampled with fails here, before anything is encoded.
        if plan.sampler not in SAMPLER_NAMES:
            raise LayerLoomError(
                f"There is no sampler named {plan.sampler!r}; choose one of "
                f"{', '.join(SAMPLER_NAMES)}."
            )
        check_steps(plan.steps, len(self.schedule))
        guidance(plan.guidance_mode, plan.guidance, plan.steps)
        return plan

    def _check_task(self, request: LayeredRequest, sequence: LayerSequence) -> None:
        self.settings.check_task(request.task)
        missing = [name for name in sequence.given(request.task) if name not in request.given]
        if missing:
            raise LayerLoomError(
                f"The given foreground has no {missing[0]}; give a clip with transparency or its "
                "matte (--given-alpha)."
                if missing[0] == "alpha"
                else f"The task {request.task!r} needs the {missing[0]} layer."
            )

    def _check_frames(self, sequence: LayerSequence) -> None:
        latents = sum(sequence.latent_frames(layer) for layer in sequence.layers)
        pixels = sum(sequence.pixel_frames(layer) for layer in sequence.layers)
        if self.codec.pixel_frames(latents) != pixels:
            raise LayerLoomError(
                f"{sequence.frames} frames a layer make {latents} latent frames, which this "
                f"autoencoder does not decode to {pixels} frames; use --frames "
                f"{sequence.frames + sequence.temporal_factor}."
            )

    def _sizes(
        self, request: LayeredRequest, source: Size | None, notes: list[str]
    ) -> tuple[Size, Size]:
        """The network's clip size and the size of the result, both (height, width)."""
        native, step = self.native_size, self.multiple
        if request.width is None and request.height is None:
            size, output = native, source or native
        else:
            output = (request.height or native[0], request.width or native[1])
            size = tuple(max(step, round(side / step) * step) for side in output)
        if source and size != tuple(source):
            notes.append(
                f"The given clip of {source[1]}x{source[0]} is resized to {size[1]}x{size[0]} for "
                f"the network; the layers are resized to {output[1]}x{output[0]}."
            )
        elif not source and (note := resizing_note(output, size, step)):
            notes.append(note)
        if size != native:
            notes.append(
                f"The checkpoint was trained on {native[1]}x{native[0]}; other sizes may look "
                "worse."
            )
        return size, output

    def run(self, request: LayeredRequest, callback: Callback | None = None) -> LayeredResult:
        """Make the layers of one request; an exception from ``callback`` stops within a step."""
        plan = self._plan(request)
        count = plan.sequence.frames
        given = {name: clip[None, :count] for name, clip in request.given.items()}
        texts = [(request.foreground, request.background, request.blended)]
        started: list[float] = []

        def step(info: StepInfo) -> None:
            started.append(time.perf_counter())
            if callback:
                callback(info)

        cache = plan.reuse.cache() if plan.reuse else None
        started.append(time.perf_counter())
        made = self._sample(request.task, texts, given, plan, request.seed, step, cache)
        seconds = (started[-1] - started[0]) / plan.steps
        layers = {name: resize(clip, plan.output_size) for name, clip in made.items()}
        # Given layers come back as they were given, at their own size when that is the result's.
        for name, clip in given.items():
            layers[name] = resize(to_unit(clip, name), plan.output_size)
        arrays = {name: to_bytes(clip, name)[0] for name, clip in layers.items()}
        alpha, recomposed = arrays.get("alpha"), None
        if alpha is not None:
            scene = composite(layers["foreground"], layers["alpha"], layers["background"])
            recomposed = to_bytes(scene, "blended")[0]
        return LayeredResult(
            foreground=arrays["foreground"],
            alpha=alpha,
            background=arrays["background"],
            blended=arrays["blended"],
            recomposed=recomposed,
            fps=request.fps,
            settings={
                "variant": self.checkpoint.info.variant,
                "steps": plan.steps,
                "sampler": plan.sampler,
                "guidance": plan.guidance,
                "guidance_mode": plan.guidance_mode,
                "seed": request.seed,
                "network_size": list(plan.size),
                "reuse_given": plan.reuse.record(cache) if plan.reuse else None,
                "adapters": self.strengths,
                "loras": [{"name": lora.name, "strength": s} for lora, s in self.loras],
                "device": str(self.device),
                "dtype": str(self.dtype).removeprefix("torch."),
            },
            seconds_per_step=seconds,
        )

    def generate_batch(
        self,
        task: str,
        prompts: Sequence[tuple[str, str, str | None]],
        given: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        reuse: GivenReuse | None = None,
    ) -> dict[str, np.ndarray]:
        """Many samples at once, at the checkpoint's own size (for evaluation).

        ``given`` holds uint8 [B, F, H, W, 3], alpha [B, F, H, W]; so does the result, with all
        layers as the network made them and the given ones as given.
        """
        given = dict(given or {})
        first = {name: clip[0] for name, clip in given.items()}
        request = LayeredRequest(
            task, *prompts[0], first, steps=steps, guidance=guidance, reuse=reuse
        )
        cache = reuse.cache() if reuse else None
        layers = self._sample(task, prompts, given, self._plan(request), seed, None, cache)
        return {**{name: to_bytes(clip, name) for name, clip in layers.items()}, **given}

    @torch.no_grad()
    def reconstruct(self, layers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode and decode all layers: the best the autoencoder allows. Arrays as above."""
        sequence = self.sequence()
        latents = self._encode(layers, sequence, sequence.layers, self.native_size, 0)
        clips = self._decode(latents, sequence)
        return {name: to_bytes(clip, name) for name, clip in clips.items()}

    @torch.no_grad()
    def _sample(
        self,
        task: str,
        prompts: Sequence[tuple[str, str, str | None]],
        given: Mapping[str, np.ndarray],
        plan: _Plan,
        seed: int,
        callback: Callback | None,
        cache: SegmentKVCache | None,
    ) -> dict[str, torch.Tensor]:
        """The layers [B, F, C, H, W] in [0, 1] at the network's size, foreground straight."""
        sequence, segments = plan.sequence, plan.sequence.segments(task)
        text = torch.stack([self.text.encode(indexed_prompts(task, *texts)) for texts in prompts])
        text = text.to(self.dtype)
        clean, known = None, {}
        if given:
            names = sequence.given(task)
            joined = self._encode(given, sequence, names, plan.size, seed)
            known = sequence.split_latents(joined, names)
            clean = sequence.clean_latents(joined, task).to(self.dtype)
        frames = sum(segment.frames for segment in segments if not segment.clean)
        sides = [side // self.codec.spatial_factor for side in plan.size]
        channels = self.transformer.out_channels

        def predict(x: torch.Tensor, timestep: int, scale: float) -> torch.Tensor:
            """Both guidance branches in one batch; the unconditional text is zeros."""
            guided = scale != 1
            words = torch.cat([torch.zeros_like(text), text]) if guided else text
            copies = 2 if guided else 1
            out = self.transformer(
                x.to(self.dtype).repeat(copies, 1, 1, 1, 1),
                torch.full((len(words),), timestep, device=self.device),
                words,
                segments,
                clean=None if clean is None else clean.repeat(copies, 1, 1, 1, 1),
                attention_mask=clean_sees_clean if plan.reuse else None,
                kv_cache=cache,
            ).float()
            if not guided:
                return out
            uncond, cond = out.chunk(2)
            return uncond + scale * (cond - uncond)

        generator = torch.Generator().manual_seed(seed)
        latents = sample(
            plan.sampler,
            predict,
            draw_noise((len(prompts), frames, channels, *sides), generator, self.device),
            steps=plan.steps,
            guidance=guidance(plan.guidance_mode, plan.guidance, plan.steps),
            generator=generator,
            schedule=self.schedule,
            callback=callback,
        )
        made = [name for name in sequence.layers if name not in known]
        # A partly given layer is made whole by the latents given for its end.
        missing = sum(sequence.latent_frames(name) for name in made) - latents.shape[1]
        if missing < 0:
            latents = latents[:, :missing]
        layers = {**sequence.split_latents(latents, tuple(made)), **known}
        return self._decode(sequence.join_latents(layers), sequence)

    def _encode(
        self,
        layers: Mapping[str, np.ndarray],
        sequence: LayerSequence,
        names: Sequence[str],
        size: Size,
        seed: int,
    ) -> torch.Tensor:
        """Joined latents of some layers, encoded as one clip as the network was trained on."""
        clips = {name: resize(to_unit(layers[name], name), size) for name in layers}
        joined = layers_to_clip(clips, sequence, names).to(self.device)
        return self.codec.encode(joined, torch.Generator().manual_seed(seed))

    def _decode(self, latents: torch.Tensor, sequence: LayerSequence) -> dict[str, torch.Tensor]:
        """Layers [B, F, C, H, W] in [0, 1]; alpha has one channel, the foreground is straight."""
        return clip_to_layers(self.codec.decode(latents).float().cpu(), sequence)
