"""Networks that move subjects along boxes as models of the host; a LATENT is a batch of frames.

Subjects and boxes are one object in each CONDITIONING entry. What the network makes of them is
computed once a run, where the host asks for conditions, and is the same for all entries that hold
that object, so that the host still runs both halves of guidance in one batch where both have it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch

from ...engine.checkpoints.dreamvideo import TrajectoryCheckpoint
from ...engine.errors import LayerLoomError
from ...engine.models.dreamvideo import DreamVideo, Placement, TrajectorySettings
from ...engine.sampling.latent_schedules import latent_schedule
from .video_model import frames_of, host_attention
from .video_sampling import RescaledSampling

# Key of a CONDITIONING's dictionary that only this pack writes and reads.
SUBJECTS = "layerloom_subjects"


@dataclass(frozen=True, eq=False)
class Subjects:
    """Who goes where, as a CONDITIONING carries it; earlier subjects stand in front.

    Attributes:
        latents: of the pictures on white [S, C, h, w], as the host's VAE gives them.
        boxes: masks bool [S, T, H, W] in pixels.
        weight: lambda_M.
        no_text: features [1, L, D] of the empty text, with which the base sees the pictures.
        dropped: the base predicts, as if there were none; for the other branch of guidance.
    """

    latents: torch.Tensor
    boxes: torch.Tensor
    weight: float
    no_text: torch.Tensor
    dropped: bool = False

    @property
    def frames(self) -> int:
        return self.boxes.shape[1]


class TrajectoryNetwork(DreamVideo):
    """The engine's network behind the call that the host makes: frames in, frames out."""

    def __init__(self, *, dtype=None, **network: Any):
        super().__init__(**network, dtype=dtype)
        self.dtype = dtype

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        num_video_frames: int | None = None,
        placement: Placement | None = None,
        **_of_other_models: Any,
    ) -> torch.Tensor:
        """Predictions [B * T, C, h, w] for frames of the same shape, clip after clip.

        ``timestep`` [B * T] and ``context`` [B * T, L, D] are a clip's in all its rows; the
        ``placement`` is one clip's and holds for all.
        """
        frames = num_video_frames or x.shape[0]
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
        made = super().forward(
            clip,
            timestep[::frames],
            context[::frames],
            placement=None if placement is None else placement.repeated(len(clip)),
            attention=host_attention(transformer_options or {}),
        )
        return made.transpose(1, 2).flatten(0, 1)


class TrajectoryModel(comfy.model_base.BaseModel):
    """A network with its schedule; the conditions hold the subjects and where they are."""

    def __init__(self, config: TrajectoryConfig, device=None):
        settings: TrajectorySettings = config.unet_config["settings"]
        kinds = comfy.model_base.ModelType
        v = settings.prediction == "v"
        super().__init__(
            config,
            model_type=kinds.V_PREDICTION if v else kinds.EPS,
            device=device,
            unet_model=TrajectoryNetwork,
        )
        self.settings = settings
        schedule = latent_schedule(
            settings.prediction, settings.zero_terminal_snr, betas=settings.betas
        )
        self.model_sampling = RescaledSampling(schedule, None)
        # Both live as long as a run's conditions hold the placements, and no longer.
        self._placed = weakref.WeakValueDictionary()
        self._windows = weakref.WeakKeyDictionary()

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """What one CONDITIONING entry says, checked against the latents being sampled."""
        out = super().extra_conds(**kwargs)
        subjects: Subjects | None = kwargs.get(SUBJECTS)
        if subjects is None:
            raise LayerLoomError(
                f"{self.settings.name} moves subjects along boxes; put a Subject Trajectory node "
                "between the prompts and the sampler."
            )
        noise, frames = kwargs["noise"], subjects.frames
        if noise.shape[0] % frames or subjects.latents.shape[1:] != noise.shape[1:]:
            raise LayerLoomError(
                f"The conditioning is for {frames} frames of latents "
                f"{tuple(subjects.latents.shape[1:])} and the latent being sampled is "
                f"{noise.shape[0]} of {tuple(noise.shape[1:])}; take the latent from the same "
                "Subject Trajectory node."
            )
        if kwargs.get("area") is not None:
            raise LayerLoomError(
                f"{self.settings.name} needs whole frames and a prompt is set to an area of them; "
                "use Conditioning (Set Mask) with set_cond_area at default."
            )
        if not subjects.dropped:
            placed = self._placement(subjects, kwargs["device"])
            out["placement"] = comfy.conds.CONDConstant(placed)
        out["num_video_frames"] = comfy.conds.CONDConstant(frames)
        return out

    def _placement(self, subjects: Subjects, device: torch.device) -> Placement:
        """Once a run, not once a step: nothing in it depends on the noise."""
        # An adapter changes the weights, and with them what they make of a picture.
        key = (subjects, getattr(self.current_patcher, "patches_uuid", None), device)
        placed = self._placed.get(key)
        if placed is None:
            kind = {"device": device, "dtype": self.get_dtype_inference()}
            attention = host_attention({})
            features = self.diffusion_model.subject_features(
                self.process_latent_in(subjects.latents)[None].to(**kind),
                subjects.no_text.to(**kind),
                attention,
            )
            placed = self.diffusion_model.place(
                subjects.boxes[None].to(**kind), features, subjects.weight, attention
            )
            self._placed[key] = placed
        return placed

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, *_a, **_k):
        """Conditions for a piece of the clip, where the host's context windows are in use."""
        if cond_key == "num_video_frames":
            return comfy.conds.CONDConstant(len(frames_of(window, x_in)))
        if cond_key == "placement":
            return comfy.conds.CONDConstant(self._window(cond_value.cond, frames_of(window, x_in)))
        return None

    def _window(self, whole: Placement, frames: list[int]) -> Placement:
        """The placement of some of a clip's frames: a window's boxes are a clip's of their own."""
        masks = whole.shares.masks
        if max(frames) >= masks.shape[2]:
            raise LayerLoomError(
                "Context windows go over one clip; set batch_size to 1 in Subject Trajectory."
            )
        windows = self._windows.setdefault(whole, {})
        if tuple(frames) not in windows:
            windows[tuple(frames)] = self.diffusion_model.place(
                masks[:, :, frames], whole.features, whole.shares.weight, host_attention({})
            )
        return windows[tuple(frames)]


class TrajectoryConfig(comfy.supported_models_base.BASE):
    """The host's record of such a network: constructor keywords, latents and memory use."""

    unet_extra_config = {}

    def __init__(
        self,
        checkpoint: TrajectoryCheckpoint,
        latent_format: comfy.latent_formats.LatentFormat,
        dtypes: list[torch.dtype],
    ):
        info = checkpoint.info
        super().__init__(
            {
                "unet": info.unet,
                "settings": checkpoint.variant,
                "reference": info.reference,
                "control": info.control,
            }
        )
        self.latent_format = latent_format
        self.supported_inference_dtypes = dtypes


def trajectory_settings(model) -> TrajectorySettings:
    """The settings of a MODEL.

    Raises:
        LayerLoomError: it moves no subjects.
    """
    if not isinstance(model.model, TrajectoryModel):
        raise LayerLoomError(
            f"The model is {type(model.model).__name__}, which moves no subjects along boxes; "
            "connect the MODEL of Load Subject Model."
        )
    return model.model.settings
