"""Networks that animate regions of a picture as models of the host; a LATENT is a batch of frames.

Several regions are several entries of one CONDITIONING, each with its place in the picture as the
host's own "mask": the host blends their predictions by these, as the engine does.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import torch

from ...engine.errors import LayerLoomError
from ...engine.models.follow_your_click import (
    STRENGTH,
    STRIDE,
    ClickSettings,
    affinity,
    join_conditions,
)
from ...engine.models.video_unet import VideoUNet
from ...engine.sampling.latent_schedules import latent_schedule
from .video_model import FRAMES, ClipCond, frames_of, host_attention
from .video_sampling import RescaledSampling

# Keys of a CONDITIONING's dictionary that only this pack writes and reads.
REGION, PICTURE = "layerloom_click_region", "layerloom_click_picture"
PHRASE, FORCE = "layerloom_click_phrase", "layerloom_click_strength"


class ClickNetwork(VideoUNet):
    """The engine's network behind the call that the host makes: frames in, frames out."""

    def __init__(
        self, *, settings: ClickSettings, device=None, dtype=None, operations: Any = None, **unet
    ):
        super().__init__(**unet, device=device, dtype=dtype, operations=operations)
        self.settings, self.dtype = settings, dtype

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        num_video_frames: int | None = None,
        region: torch.Tensor | None = None,
        picture: torch.Tensor | None = None,
        phrase: torch.Tensor | None = None,
        strength: torch.Tensor | None = None,
        **_of_other_models: Any,
    ) -> torch.Tensor:
        """Predictions [B * T, C, h, w] for frames of the same shape, clip after clip.

        ``timestep`` [B * T] and ``context`` [B * T, L, D] are a clip's in all its rows; ``region``
        [B, 1, h, w] (or [B, 1, T, h, w]), ``picture`` [B, C, h, w], ``phrase`` [B, L, D] and
        ``strength`` [B] have one row a clip.
        """
        options, frames = transformer_options or {}, num_video_frames or x.shape[0]
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2)

        given = {STRENGTH: strength, STRIDE: torch.full_like(strength, self.settings.stride)}
        made = super().forward(
            join_conditions(clip, region, picture, self.settings),
            timestep[::frames],
            context[::frames],
            scalars={name: given[name] for name in self.scalar_embeddings},
            attention=host_attention(options),
            phrase=phrase,
        )
        return made.transpose(1, 2).flatten(0, 1)


class ClickModel(comfy.model_base.BaseModel):
    """A region animator with its schedule; the conditions hold picture, regions and phrases."""

    def __init__(self, config: ClickConfig, device=None):
        settings: ClickSettings = config.unet_config["settings"]
        kinds = comfy.model_base.ModelType
        v = settings.prediction == "v"
        super().__init__(
            config,
            model_type=kinds.V_PREDICTION if v else kinds.EPS,
            device=device,
            unet_model=ClickNetwork,
        )
        self.settings = settings
        schedule = latent_schedule(
            settings.prediction, settings.zero_terminal_snr, betas=settings.betas
        )
        self.model_sampling = RescaledSampling(schedule, None)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """What one CONDITIONING entry says, checked against the latents being sampled."""
        out = super().extra_conds(**kwargs)
        if kwargs.get(PICTURE) is None:
            raise LayerLoomError(
                f"{self.settings.name} animates regions of a picture; put a Click to Animate node "
                "between the prompts and the sampler."
            )
        picture, frames, noise = kwargs[PICTURE], kwargs[FRAMES], kwargs["noise"]
        if noise.shape[0] % frames or picture.shape[1:] != noise.shape[1:]:
            raise LayerLoomError(
                f"The conditioning is for {frames} frames of latents {tuple(picture.shape[1:])} "
                f"and the latent being sampled is {noise.shape[0]} of {tuple(noise.shape[1:])}; "
                "take the latent from the same Click to Animate node."
            )
        device, dtype = kwargs["device"], self.get_dtype_inference()
        region = kwargs[REGION]
        if not self.settings.reads_regions:
            numbers = affinity(float(kwargs[FORCE]), frames)[None, None, :, None, None]
            region = numbers.expand(-1, -1, -1, *region.shape[-2:])
        rows = {
            "region": region,
            "picture": self.process_latent_in(picture),
            "phrase": kwargs[PHRASE],
            "strength": torch.full((1,), float(kwargs[FORCE])),
        }
        for name, row in rows.items():
            kind = torch.float32 if name == "strength" else dtype
            out[name] = ClipCond(row.to(device, kind), frames)
        out["num_video_frames"] = comfy.conds.CONDConstant(frames)
        return out

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, *_a, **_k):
        """Conditions for a piece of the clip, where the host's context windows are in use."""
        if "first" in (self.settings.picture, self.settings.mask):
            raise LayerLoomError(
                f"{self.settings.name} reads its picture in a clip's first frame alone, so every "
                "context window would begin with it anew; sample without context windows."
            )
        frames = frames_of(window, x_in)
        if cond_key == "num_video_frames":
            return comfy.conds.CONDConstant(len(frames))
        if not isinstance(cond_value, ClipCond):
            return None
        given = cond_value.cond
        if cond_key == "region" and given.ndim == 5:
            given = given[:, :, frames]  # a number a frame
        return ClipCond(given, len(frames))


class ClickConfig(comfy.supported_models_base.BASE):
    """The host's record of a region animator: constructor keywords, latents and memory use."""

    unet_extra_config = {}

    def __init__(
        self,
        unet: dict[str, Any],
        settings: ClickSettings,
        latent_format: comfy.latent_formats.LatentFormat,
        dtypes: list[torch.dtype],
    ):
        super().__init__({**unet, "settings": settings})
        self.latent_format = latent_format
        self.supported_inference_dtypes = dtypes


def click_settings(model) -> ClickSettings:
    """The settings of a MODEL.

    Raises:
        LayerLoomError: it animates no regions.
    """
    if not isinstance(model.model, ClickModel):
        raise LayerLoomError(
            f"The model is {type(model.model).__name__}, which animates no regions; connect the "
            "MODEL of Load Region Animator."
        )
    return model.model.settings
