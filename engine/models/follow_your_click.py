"""Follow-Your-Click on the video UNet: what a region, its phrase and its strength add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...kernels import Attention
from .video_unet import VideoUNet

# The numbers added to the time embedding: the frame stride, and how far the region moves.
STRIDE, STRENGTH = "fps_embedding", "motion_embedding"
SCALARS = (STRIDE, STRENGTH)
# (picture, mask) of ``ClickSettings`` in the released code and in the paper (arXiv 2403.08268).
READINGS = {"code": ("first", "all"), "paper": ("all", "first")}
PLACES = ("first", "all")


@dataclass(frozen=True)
class ClickSettings:
    """What a network that animates regions was trained and is sampled with.

    Attributes:
        name: what ``layerloom info`` prints.
        picture: which frames the picture's latent is joined to, "first" or "all"; "none" for
            AnimateDiff's networks, which read neither picture nor mask.
        mask: which frames the mask is joined to, "first" or "all"; "affinity" where the channel
            holds a number a frame instead, how like the picture it is (PIA).
        prediction, zero_terminal_snr, betas: the noise schedule, see ``latent_schedule``.
        height, width: native size in pixels.
        frames: clip length it was trained on.
        positions: most frames that its motion modules have positions for.
        strength_default, strength_range: mean optical flow inside the region, in pixels a frame
            pair of the training's clips; where the network reads it.
        stride: the frame stride it is told, where it reads one.
        latent_scale: factor on the autoencoder's latents.
        spatial_factor: pixels a latent position stands for, a side.
        steps, guidance: the released sampler's settings.
        frames_per_second: of the files that are written.
    """

    name: str = "follow-your-click"
    picture: str = "first"
    mask: str = "all"
    prediction: str = "v"
    zero_terminal_snr: bool = True
    betas: str = "linear"
    height: int = 512
    width: int = 512
    frames: int = 16
    positions: int = 24
    strength_default: float = 4.0
    strength_range: tuple[float, float] = (4.0, 16.0)
    stride: float = 4.0
    latent_scale: float = 0.18215
    spatial_factor: int = 8
    steps: int = 50
    guidance: float = 7.5
    frames_per_second: float = 8.0

    def __post_init__(self):
        if self.picture not in (*PLACES, "none") or self.mask not in (*PLACES, "affinity", "none"):
            raise ValueError(f"no network reads picture {self.picture!r} and mask {self.mask!r}")

    @property
    def reading(self) -> str:
        """ "code" or "paper" where picture and mask are placed as there, else "own"."""
        places = (self.picture, self.mask)
        return next((name for name, found in READINGS.items() if found == places), "own")

    @property
    def reads_picture(self) -> bool:
        """Whether a picture can be animated with it at all."""
        return self.picture != "none"

    @property
    def reads_regions(self) -> bool:
        """Whether the mask tells the network where to move."""
        return self.mask in PLACES


# Stable Diffusion 1.5 with motion modules; what differs between files is told by their shapes.
UNET: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "block_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_levels": (True, True, True, False),
    "context_dim": 768,
    "head_dim": None,
    "num_heads": 8,
    "norm_groups": 32,
    "linear_projection": False,
    "temporal_convolution": False,
    "temporal_transformer": False,
    "initial_temporal_transformer": False,
    "motion_modules": {"heads": 8, "middle": False, "norm_over_frames": False, "phrase": False},
    "scalar_embeddings": SCALARS,
    "norm_over_frames": True,
}
# AnimateDiff's motion modules: (in the middle block too, positions they hold).
VERSIONS = {"v1": (False, 24), "v2": (True, 32), "v3": (False, 32)}


def click_unet(version: str = "v1", phrase: bool = False, **changes: Any) -> dict[str, Any]:
    """``VideoUNet`` keywords for a version of motion modules.

    The released code has them as in "v1", the paper as in "v2"; ``phrase`` adds the paper's
    attention to the short phrase, the motion-augmented module. ``changes`` replace keywords.
    """
    middle, _ = VERSIONS[version]
    motion = {**UNET["motion_modules"], "middle": middle, "phrase": phrase}
    return {**UNET, "motion_modules": motion, **changes}


def latent_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A mask [..., H, W] of 0 .. 1 as the network reads it: 0 or 1, [..., h, w].

    Cut at one half and then nearest-resized. The released code counts any grey above 0 as full and
    so takes a soft edge for the inside. A region that falls between the places that nearest
    picks keeps the places it touches.
    """
    hard = (mask >= 0.5).to(mask)
    flat = hard.reshape(-1, 1, *hard.shape[-2:])
    small = functional.interpolate(flat, size=size, mode="nearest")
    touched = functional.adaptive_max_pool2d(flat, size)
    lost = small.flatten(1).amax(1) == 0
    small = torch.where(lost[:, None, None, None], touched, small)
    return small.reshape(*hard.shape[:-2], *size)


def join_conditions(
    noisy: torch.Tensor, mask: torch.Tensor, picture: torch.Tensor, settings: ClickSettings
) -> torch.Tensor:
    """The network's input [B, 2 C + 1, T, h, w]: noisy latents, mask, picture.

    Args:
        noisy: [B, C, T, h, w].
        mask: [B, 1, h, w] of 0 and 1, or [B, 1, T, h, w] as it is to be joined.
        picture: the picture's latent [B, C, h, w].
        settings: says which frames mask and picture are joined to; the others get zeros.
    """
    if mask.ndim == 4:
        mask = _placed(mask, noisy.shape[2], settings.mask)
    picture = _placed(picture, noisy.shape[2], settings.picture)
    return torch.cat([noisy, mask.to(noisy), picture.to(noisy)], dim=1)


def _placed(still: torch.Tensor, frames: int, where: str) -> torch.Tensor:
    """[B, C, h, w] to [B, C, T, h, w]."""
    if where == "all":
        return still[:, :, None].expand(-1, -1, frames, -1, -1)
    clip = still.new_zeros(*still.shape[:2], frames, *still.shape[2:])
    clip[:, :, 0] = still
    return clip


def affinity(strength: float, frames: int) -> torch.Tensor:
    """PIA's channel, [T]: how like the picture each frame is, for a strength of 4 .. 16.

    Its published weights know values from 1 (the picture) down to about 0.5; here the first frame
    is 1 and the others fall from 0.9 to 0.6 as the strength rises.
    """
    later = min(max(1 - 0.025 * strength, 0.5), 1.0)
    return torch.tensor([1.0] + [later] * (frames - 1))


class FollowYourClick(nn.Module):
    """The network that animates regions of a picture, each by a phrase and a strength.

    Args:
        unet: ``VideoUNet`` keywords (``click_unet``).
        settings: what it was trained with.
    """

    def __init__(
        self,
        *,
        unet: Mapping[str, Any],
        settings: ClickSettings | None = None,
        device=None,
        dtype=None,
        operations: Any = None,
    ):
        super().__init__()
        self.settings = settings or ClickSettings()
        self.unet = VideoUNet(**unet, device=device, dtype=dtype, operations=operations)

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        *,
        mask: torch.Tensor,
        picture: torch.Tensor,
        strength: torch.Tensor,
        stride: torch.Tensor,
        phrase: torch.Tensor | None = None,
        attention: Attention | None = None,
    ) -> torch.Tensor:
        """One prediction for clips [B, C, T, h, w].

        Args:
            noisy, mask, picture: see ``join_conditions``; mask as ``latent_mask`` makes it.
            timestep: [B], 0 .. 999.
            context: text features [B, L, D] of the caption.
            strength, stride: [B]; read where the network has embeddings for them.
            phrase: text features [B, L, D] of the motion phrase; None takes the caption's.
            attention: a host's own, see ``VideoUNet``.
        """
        joined = noisy
        if self.settings.reads_picture:
            joined = join_conditions(noisy, mask, picture, self.settings)
        given = {STRIDE: stride, STRENGTH: strength}
        return self.unet(
            joined,
            timestep,
            context,
            scalars={name: given[name] for name in self.unet.scalar_embeddings},
            attention=attention,
            phrase=phrase,
        )
