"""The layered network as a model of the host: its samplers, schedulers and memory manager work."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention

from ...engine.conditioning.layers import LayerSequence
from ...engine.errors import LayerLoomError
from ...engine.layered_settings import LayeredSettings
from ...engine.models.layered_transformer import LayeredTransformer
from ...engine.sampling.schedules import NoiseSchedule
from ...kernels import use_backend
from .attention import CACHES, OPTION, LayerAttention

# Keys of a CONDITIONING's dictionary that only this pack writes and reads.
PROMPTS, TASK, GIVEN_LATENTS = "layerloom_prompts", "layerloom_task", "layerloom_given"
# The host's stand-in for an infinite sigma: alphas_cumprod at zero terminal SNR.
SMALLEST_ALPHA = 4.8973451890853435e-08
# Linear latents-to-RGB fit for CogVideoX's autoencoder, as kijai's ComfyUI-CogVideoXWrapper found.
COGVIDEOX_RGB = [
    [0.1195, 0.0992, -0.0048],
    [-0.0012, 0.0550, 0.0213],
    [-0.0141, -0.0087, -0.0210],
    [0.0306, 0.1219, 0.0140],
    [0.0927, 0.0303, 0.0508],
    [0.0379, 0.0494, 0.0586],
    [0.0177, 0.0088, 0.0360],
    [0.1061, 0.0234, 0.0572],
    [0.1274, -0.0110, 0.0433],
    [-0.0187, 0.0822, 0.1061],
    [0.0084, 0.0762, 0.0930],
    [0.1294, 0.1236, 0.0448],
    [0.0457, 0.0411, -0.0177],
    [0.0002, -0.0140, 0.0533],
    [0.0808, 0.1155, -0.0215],
    [-0.0152, -0.0058, 0.0722],
]


class LayeredLatentFormat(comfy.latent_formats.LatentFormat):
    """Latents [B, C, T, h, w] of all layers end to end; previews show the blended layer."""

    latent_dimensions = 3
    temporal_downscale_ratio = 4

    def __init__(
        self,
        sequence: LayerSequence,
        channels: int,
        scale: float,
        rgb_factors: list[list[float]] | None,
        rgb_bias: list[float] | None = None,
    ):
        self.sequence = sequence
        self.latent_channels, self.scale_factor = channels, scale
        self.latent_rgb_factors, self.latent_rgb_factors_bias = rgb_factors, rgb_bias
        self.latent_rgb_factors_reshape = self.blended_frame

    def blended_frame(self, latents: torch.Tensor) -> torch.Tensor:
        """The middle latent frame [B, C, h, w] of the blended layer."""
        frames = latents.shape[2] // len(self.sequence.layers)
        last = latents.shape[2] - 1
        return latents[:, :, last - (frames - 1) // 2]


class LayeredNetwork(LayeredTransformer):
    """The engine's network behind the call that the host makes: whole clips in, whole clips out."""

    def __init__(self, *, sequence: LayerSequence, dtype=None, **transformer: Any):
        super().__init__(dtype=dtype, **transformer)
        self.sequence, self.dtype = sequence, dtype

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        task: str = "generate",
        prompts: int = 3,
        given: torch.Tensor | None = None,
        **_of_other_models: Any,
    ) -> torch.Tensor:
        """v [B, C, T, h, w] of the layers being made; zeros where a layer is given.

        ``given`` holds the given layers' latents [B, C, T_given, h, w], ``context`` the prompts'
        features one after another [B, prompts * tokens, D].
        """
        options = transformer_options or {}
        wanted = options.get(OPTION, LayerAttention())
        sequence = sequence_of(self.sequence, x.shape[2])
        segments = sequence.segments(task)
        names = sequence.given(task)
        video = sequence.split_latents(x.transpose(1, 2))
        clean = None
        if names:
            clean = sequence.clean_latents(given.transpose(1, 2), task)
        noisy, kept = [], {}
        for layer, latents in video.items():
            frames = sum(
                s.frames for s in segments if s.name.partition(".")[0] == layer and not s.clean
            )
            kept[layer] = frames
            noisy.append(latents[:, :frames])

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

        # What is kept for this run, if anything is given.
        caches = options.get(CACHES) if names else None
        with use_backend(wanted.backend):
            made = super().forward(
                torch.cat(noisy, dim=1),
                timestep,
                context.unflatten(1, (prompts, -1)),
                segments,
                clean=clean,
                attention_mask=wanted.mask,
                attention=attention if wanted.uses_host else None,
                kv_cache=caches and caches.on(x.device),
            )
        out, start = torch.zeros_like(x), 0
        places = sequence.split_latents(out.transpose(1, 2))
        for layer, frames in kept.items():
            places[layer][:, :frames] = made[:, start : start + frames]
            start += frames
        return out


class LayeredModel(comfy.model_base.BaseModel):
    """v-prediction over all layers; given layers come out of every step as they were given."""

    # What a run is about to keep beside its activations (``reuse``).
    kept_bytes = 0

    def __init__(self, config: LayeredConfig, settings: LayeredSettings, device=None):
        super().__init__(
            config,
            model_type=comfy.model_base.ModelType.V_PREDICTION,
            device=device,
            unet_model=LayeredNetwork,
        )
        self.settings = settings
        # Filled by the loader: adapter name -> ``nodes.host.lora.HostAdapter``.
        self.adapters: dict[str, Any] = {}
        self.model_sampling.set_sigmas(sigmas(settings.schedule))

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """What one CONDITIONING entry says, checked against the latents being sampled."""
        out = super().extra_conds(**kwargs)
        noise = kwargs["noise"]
        sequence = sequence_of(self.settings.sequence, noise.shape[2])
        task = kwargs.get(TASK, "generate")
        self.settings.check_task(task)
        text, prompts = kwargs.get("cross_attn"), kwargs.get(PROMPTS)
        if text is None or prompts is None:
            raise LayerLoomError(
                "A layered model needs one prompt a layer; connect the Layer Prompts node instead "
                "of a single text encode."
            )
        self.check_text(text.shape[1], prompts)
        out["task"] = comfy.conds.CONDConstant(task)
        out["prompts"] = comfy.conds.CONDConstant(prompts)
        if sequence.given(task):
            given = self.process_latent_in(kwargs[GIVEN_LATENTS])
            expected = sum(sequence.latent_frames(name) for name in sequence.given(task))
            if tuple(given.shape[2:]) != (expected, *noise.shape[3:]):
                raise LayerLoomError(
                    f"The given layers have latents of {tuple(given.shape[2:])}, but the latent "
                    f"being sampled needs {(expected, *noise.shape[3:])}; take the latent from "
                    "the Condition on Layers node that made the conditioning."
                )
            out["given"] = comfy.conds.CONDRegular(given)
        return out

    def memory_required(self, input_shape, cond_shapes=None) -> float:
        """Bytes that a call needs beside the weights, as the host asks before loading them."""
        return super().memory_required(input_shape, cond_shapes or {}) + self.kept_bytes

    def check_text(self, tokens: int, prompts: int) -> None:
        """Raise LayerLoomError where so many text tokens of all prompts do not fit the network."""
        table = self.diffusion_model.patch_embed.position_table
        if tokens % prompts or (table and table[0] != tokens):
            expected = f"{table[0]}" if table else f"a multiple of {prompts}"
            raise LayerLoomError(
                f"The prompts make {tokens} text tokens, but {self.settings.name} takes "
                f"{expected}; use the text encoder of this checkpoint (CLIPLoader, type cogvideox, "
                "for published weights)."
            )

    def apply_model(self, x, t, *args, task="generate", given=None, **kwargs):
        """The denoised clip; given layers are put back exactly, whatever the sampler did."""
        if self.current_patcher is not None and self.current_patcher.current_hooks is not None:
            # Hooks give branches weights of their own, that may change from step to step.
            options = kwargs.get("transformer_options") or {}
            kept = {name: value for name, value in options.items() if name != CACHES}
            kwargs["transformer_options"] = kept
        denoised = super().apply_model(x, t, *args, task=task, given=given, **kwargs)
        if given is not None:
            sequence = sequence_of(self.settings.sequence, x.shape[2])
            names = sequence.given(task)
            places = sequence.split_latents(denoised.transpose(1, 2))
            for name, latents in sequence.split_latents(given.transpose(1, 2), names).items():
                places[name].copy_(latents)
        return denoised


class LayeredConfig(comfy.supported_models_base.BASE):
    """The host's record of a layered checkpoint: constructor keywords, latents and memory use."""

    unet_extra_config = {}
    # Measured on 22,278 tokens in bf16: about 1 GB of activations a sample.
    memory_usage_factor = 0.8

    def __init__(
        self,
        transformer: dict[str, Any],
        sequence: LayerSequence,
        latent_format: LayeredLatentFormat,
        dtypes: list[torch.dtype],
    ):
        super().__init__({**transformer, "sequence": sequence})
        self.latent_format = latent_format
        self.supported_inference_dtypes = dtypes


def sequence_of(trained: LayerSequence, latent_frames: int) -> LayerSequence:
    """The sequence whose layers fill ``latent_frames`` latent frames.

    Raises:
        LayerLoomError: they do not divide into equally long layers.
    """
    count, extra = len(trained.layers), int(trained.duplicate_first_frame)
    frames, rest = divmod(latent_frames - extra, count)
    if rest or frames < 1:
        raise LayerLoomError(
            f"A latent of {latent_frames} frames does not hold {count} layers of equal length; "
            "take it from Empty Layered Latent or Condition on Layers."
        )
    return LayerSequence(
        layers=trained.layers,
        frames=frames * trained.temporal_factor,
        temporal_factor=trained.temporal_factor,
        duplicate_first_frame=trained.duplicate_first_frame,
        decompose_latents=trained.decompose_latents,
    )


def sigmas(schedule: NoiseSchedule) -> torch.Tensor:
    """sqrt((1 - a) / a) for every timestep [1000], float64; finite at zero terminal SNR."""
    alphas = schedule.alphas_cumprod.clamp(min=SMALLEST_ALPHA)
    return ((1 - alphas) / alphas).sqrt()
