"""Video UNets as models of the host: a LATENT is a batch of frames, as Stable Video's is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention

from ...engine.animate_settings import AnimateSettings
from ...engine.errors import LayerLoomError
from ...engine.models.dynamicrafter import SPEED, QueryTransformer
from ...engine.models.video_unet import VideoUNet
from ...engine.sampling.windows import SlidingWindows, Window, fuse
from ...kernels import Attention
from .video_sampling import RescaledSampling

# Keys of a CONDITIONING's dictionary that only this pack writes and reads, beside the host's own
# "concat_latent_image".
FRAMES, TOKENS, MOTION = "layerloom_frames", "layerloom_image_tokens", "layerloom_motion"
WINDOWS = "layerloom_windows"
# Entry of a model's transformer_options: the image stream's factor in each spatial transformer.
GATE = "layerloom_image_gate"


class FramesLatentFormat(comfy.latent_formats.SD15):
    """Stable Diffusion's latents [T, 4, h, w]; previews show the frame in the middle."""

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors_reshape = middle_frame


class OwnLatentFormat(comfy.latent_formats.LatentFormat):
    """Latents [T, C, h, w] of a starter's autoencoder, as the network takes them."""

    def __init__(
        self,
        channels: int,
        rgb_factors: list[list[float]] | None,
        rgb_bias: list[float] | None,
    ):
        self.latent_channels = channels
        self.latent_rgb_factors, self.latent_rgb_factors_bias = rgb_factors, rgb_bias
        self.latent_rgb_factors_reshape = middle_frame


def middle_frame(latents: torch.Tensor) -> torch.Tensor:
    """Frames [T, C, h, w] from the one in the middle on: the first of them is shown."""
    return latents[(len(latents) - 1) // 2 :]


class ClipCond(comfy.conds.CONDRegular):
    """A condition with one row a clip, where the host's own have one a frame."""

    def __init__(self, cond: torch.Tensor, frames: int):
        super().__init__(cond)
        self.frames = frames

    def _copy_with(self, cond: torch.Tensor) -> ClipCond:
        return type(self)(cond, self.frames)

    def process_cond(self, batch_size: int, **kwargs: Any) -> ClipCond:
        clips = batch_size // self.frames
        return self._copy_with(comfy.utils.repeat_to_batch_size(self.cond, clips))


class WindowsCond(comfy.conds.CONDConstant):
    """The temporal windows of a long clip; its size says how many of its frames are seen at once.

    ``cond`` is (windows, frames of the clip).
    """

    def size(self) -> list[int]:
        windows, frames = self.cond
        return [min(windows.length, frames), frames]


def frames_of(window: Any, x_in: torch.Tensor) -> list[int]:
    """The frames that one of the host's context windows holds, of latents ``x_in`` [T, C, h, w]."""
    # Counted by cutting: the host may put a frame in front of the window's own.
    return window.get_tensor(torch.arange(len(x_in)), dim=0).tolist()


def host_attention(options: Mapping[str, Any]) -> Attention:
    """The host's attention, as networks of the engine call one."""

    def attention(q, k, v, scale):
        return optimized_attention(
            q,
            k,
            v,
            q.shape[1],
            skip_reshape=True,
            skip_output_reshape=True,
            transformer_options=options,
        )

    return attention


class VideoNetwork(VideoUNet):
    """The engine's network behind the call that the host makes: frames in, frames out.

    The query transformer lives in it, so that the host moves, casts and patches it as well.
    """

    def __init__(
        self,
        *,
        image_projector: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        operations: Any = None,
        **unet: Any,
    ):
        rest = {"device": device, "dtype": dtype, "operations": operations}
        super().__init__(**unet, **rest)
        self.dtype, self.image_projector = dtype, None
        if image_projector is not None:
            self.image_projector = QueryTransformer(**image_projector, **rest)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        num_video_frames: int | None = None,
        image_context: torch.Tensor | None = None,
        scalars: Mapping[str, float] | None = None,
        windows: tuple[SlidingWindows, int] | None = None,
        **_of_other_models: Any,
    ) -> torch.Tensor:
        """Predictions [B * T, C, h, w] for frames of the same shape, clip after clip.

        ``timestep`` [B * T] and text ``context`` [B * T, L, D] are a clip's in all its rows;
        ``image_context`` [B, N, D] has one row a clip. Clips longer than ``windows`` are seen in
        overlapping windows, whose predictions are fused.
        """
        options = transformer_options or {}
        frames = num_video_frames or x.shape[0]
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
        numbers = {
            name: torch.full((clip.shape[0],), float(value), device=x.device)
            for name, value in (scalars or {}).items()
        }

        attention = host_attention(options)
        # Not in ``predict``: super() needs this method's own arguments.
        network = super().forward

        def predict(window: Window) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return network(
                window.take(clip, 2),
                timestep[::frames],
                context[::frames],
                image_context=image_context,
                scalars=numbers,
                image_scale=options.get(GATE, 1.0),
                attention=attention,
            )

        whole = [Window(0, frames, (1.0,) * frames)]
        spans = whole if windows is None else windows[0].at(frames, step_of(options))
        return fuse(spans, predict, frames, dim=2).transpose(1, 2).flatten(0, 1)


class VideoModel(comfy.model_base.BaseModel):
    """A video UNet with its schedule; a clip starts from a picture, which the conditions hold."""

    def __init__(self, config: VideoConfig, settings: AnimateSettings, device=None):
        kinds = comfy.model_base.ModelType
        v = settings.variant.prediction == "v"
        super().__init__(
            config,
            model_type=kinds.V_PREDICTION if v else kinds.EPS,
            device=device,
            unet_model=VideoNetwork,
        )
        self.settings = settings
        self.model_sampling = RescaledSampling(settings.schedule, settings.variant.rescale_base)

    def concat_cond(self, **kwargs: Any) -> torch.Tensor:
        """The picture's latents [B * T, C, h, w] that go with every frame's noise."""
        noise, detail = kwargs["noise"], kwargs.get("concat_latent_image")
        if detail is None or kwargs.get(FRAMES) is None:
            raise LayerLoomError(
                f"{self.settings.name} animates a picture; put an Animate Image node between the "
                "prompts and the sampler."
            )
        frames = detail.shape[0]
        if noise.shape[0] % frames or detail.shape[1:] != noise.shape[1:]:
            raise LayerLoomError(
                f"The conditioning is for {frames} frames of latents {tuple(detail.shape[1:])} and "
                f"the latent being sampled is {noise.shape[0]} of {tuple(noise.shape[1:])}; take "
                "the latent from the same Animate Image node."
            )
        detail = self.process_latent_in(detail).to(kwargs["device"])
        return detail.repeat(noise.shape[0] // frames, 1, 1, 1)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """What one CONDITIONING entry says, checked against the latents being sampled."""
        out = super().extra_conds(**kwargs)
        network, frames = self.diffusion_model, kwargs[FRAMES]
        tokens = kwargs[TOKENS].to(kwargs["device"], self.get_dtype_inference())
        # Once a run, not once a step: nothing in it depends on the noise.
        context = network.image_projector(tokens)
        out["image_context"] = ClipCond(context, frames)
        out["num_video_frames"] = comfy.conds.CONDConstant(frames)
        out["scalars"] = comfy.conds.CONDConstant({SPEED: kwargs[MOTION]})
        if kwargs.get(WINDOWS) is not None:
            out["windows"] = WindowsCond((kwargs[WINDOWS], frames))
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """What the host asks before loading the weights, to guess the memory a run needs."""
        windows = kwargs.get(WINDOWS)
        return {} if windows is None else {"windows": WindowsCond((windows, kwargs[FRAMES])).size()}

    def memory_required(self, input_shape, cond_shapes=None) -> float:
        """Bytes that a call needs beside the weights; windows are seen one after another."""
        shapes, (rows, *rest) = cond_shapes or {}, input_shape
        for at_once, frames in shapes.get("windows", [])[:1]:
            rows = -(-rows * at_once // frames)
        return super().memory_required([rows, *rest], shapes)

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, *_a, **_k):
        """Conditions for a piece of the clip, where the host's own context windows are in use."""
        frames = len(frames_of(window, x_in))
        if cond_key == "num_video_frames":
            return comfy.conds.CONDConstant(frames)
        if cond_key == "image_context":
            return ClipCond(cond_value.cond, frames)
        return None


class VideoConfig(comfy.supported_models_base.BASE):
    """The host's record of a video UNet: constructor keywords, latents and memory use."""

    unet_extra_config = {}

    def __init__(
        self,
        unet: Mapping[str, Any],
        image_projector: Mapping[str, Any] | None,
        latent_format: comfy.latent_formats.LatentFormat,
        dtypes: list[torch.dtype],
    ):
        super().__init__({**unet, "image_projector": image_projector})
        self.latent_format = latent_format
        self.supported_inference_dtypes = dtypes


def step_of(options: Mapping[str, Any]) -> int:
    """Which sampling step a call belongs to, from 0; 0 where the host does not say."""
    sigmas, sigma = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or sigma is None or len(sigmas) < 2:
        return 0
    return int((sigmas[:-1] - sigma.flatten()[:1].to(sigmas.device)).abs().argmin())


def animate_settings(model) -> AnimateSettings:
    """The settings of a MODEL.

    Raises:
        LayerLoomError: it animates no pictures.
    """
    if not isinstance(model.model, VideoModel):
        raise LayerLoomError(
            f"The model is {type(model.model).__name__}, which animates no pictures; connect the "
            "MODEL of Load Animator."
        )
    return model.model.settings
