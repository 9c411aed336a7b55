"""Pictures of what a network makes while it is trained: contact sheets for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import autocast

from ..conditioning.encoders import TextFeatures, VideoCodec
from ..conditioning.layers import clip_to_layers
from ..conditioning.prompts import indexed_prompts
from ..contact_sheet import contact_sheet
from ..frames import to_bytes
from ..sampling.guidance import guidance
from ..sampling.samplers import draw_noise, sample
from .layered import LayeredStage
from .settings import PreviewSettings

Pictures = dict[str, np.ndarray]


class Preview:
    """Draws the same prompts from the same noise each time it is called.

    Args:
        text: a frozen text encoder, read here once; None for stages that train their own.
        bf16: compute as in training.
    """

    def __init__(
        self,
        stage: LayeredStage,
        codec: VideoCodec,
        settings: PreviewSettings,
        text: TextFeatures | None = None,
        bf16: bool = False,
    ):
        self.stage, self.codec, self.settings, self.bf16 = stage, codec, settings, bf16
        self.texts = [indexed_prompts("generate", *pair) for pair in settings.prompts]
        self.features = None
        if text is not None:
            with torch.no_grad():
                self.features = [text.encode(texts).cpu() for texts in self.texts]

    @torch.no_grad()
    def __call__(self) -> Pictures:
        """Name -> sheet uint8 [H, W, 3]; an adapter's stage gets one without and one with it."""
        pictures: Pictures = {}
        for label, strengths in self.variants().items():
            for number, words in enumerate(self._words(), start=1):
                with strengths():
                    pictures[f"preview {number}{label}"] = self._sheet(words)
        return pictures

    def variants(self) -> Mapping[str, Callable]:
        """Label -> what holds the adapters' strengths while a sheet is drawn."""
        adapter = getattr(self.stage.network, "adapter", None)
        if adapter is None:
            return {"": nullcontext}
        self.stage.set_strengths(still=False)
        return {
            f", {adapter.name} {strength:g}": lambda value=strength: _Held(adapter, value)
            for strength in (0.0, 1.0)
        }

    def _words(self) -> list[torch.Tensor]:
        """Features [1, prompts, tokens, D] of each pair of prompts."""
        stage = self.stage
        if self.features is not None:
            return [features[None].to(stage.device).float() for features in self.features]
        ids = [torch.stack([stage.tokenizer(text) for text in texts]) for texts in self.texts]
        return [stage.network.text_encoder(each[None].to(stage.device)) for each in ids]

    def _sheet(self, words: torch.Tensor) -> np.ndarray:
        stage, settings = self.stage, self.settings
        segments = stage.sequence.segments("generate")
        size = stage.source.sizes[0]
        area = [side // self.codec.spatial_factor for side in size]
        frames = sum(segment.frames for segment in segments)
        both = torch.cat([torch.zeros_like(words), words])

        def predict(x: torch.Tensor, timestep: int, scale: float) -> torch.Tensor:
            times = torch.full((2,), timestep, device=stage.device)
            context = autocast(stage.device.type, torch.bfloat16) if self.bf16 else nullcontext()
            with context:
                out = stage.network.transformer(x.repeat(2, 1, 1, 1, 1), times, both, segments)
            without, with_text = out.float().chunk(2)
            return without + scale * (with_text - without)

        generator = torch.Generator().manual_seed(settings.seed)
        channels = stage.network.transformer.out_channels
        latents = sample(
            "ddim",
            predict,
            draw_noise((1, frames, channels, *area), generator, stage.device),
            steps=settings.steps,
            guidance=guidance("constant", settings.guidance, settings.steps),
            generator=generator,
            schedule=stage.schedule,
        )
        layers = clip_to_layers(self.codec.decode(latents).float().cpu(), stage.sequence)
        arrays = {name: to_bytes(clip, name)[0] for name, clip in layers.items()}
        alpha = arrays.pop("alpha", None)
        return np.asarray(contact_sheet(arrays, alpha))


class _Held:
    """An adapter's strength for a while."""

    def __init__(self, adapter: torch.nn.Module, strength: float):
        self.adapter, self.strength = adapter, strength

    def __enter__(self) -> None:
        self.before = self.adapter.strength
        self.adapter.strength = self.strength

    def __exit__(self, *error: object) -> None:
        self.adapter.strength = self.before
