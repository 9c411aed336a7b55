"""DreamVideo-2 on the video UNet: a subject's picture by reference attention, its path by boxes.

No code or weights of arXiv 2410.13830 were published. Where it is silent the choice is ours, and is
written down beside the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...kernels import Attention
from .box_control import (
    ENCODER,
    BoxEncoder,
    FrameControl,
    block_keywords,
    frame_settings,
    network_keywords,
)
from .subject_places import CHANNELS, box_places, picture_places, waves
from .video_attention import attend
from .video_blocks import BlockSettings, Site, plain_attention
from .video_unet import VideoUNet


@dataclass(frozen=True)
class TrajectorySettings:
    """What a network that moves subjects along boxes was trained and is sampled with.

    Attributes:
        name: what ``layerloom info`` prints.
        prediction, zero_terminal_snr, betas: the noise schedule, see ``latent_schedule``.
        height, width: native size in pixels.
        frames: clip length it was trained on.
        placed_reference: reference attention also knows where in its picture a subject's part lies,
            see ``subject_places``; ours, the paper has it not.
        reference_weight: lambda_M, how much the subject counts outside of its box, 0..1.
        latent_scale: factor on the autoencoder's latents.
        spatial_factor: pixels a latent position stands for, a side.
        steps, guidance: the paper's sampler settings.
        guidance_drops: what guidance leaves out to compare with: "text" alone, or "all", subjects
            and boxes too, which is the base.
        frames_per_second: of the files that are written.
    """

    name: str = "dreamvideo-2"
    prediction: str = "eps"
    zero_terminal_snr: bool = False
    betas: str = "scaled"
    height: int = 256
    width: int = 448
    frames: int = 16
    placed_reference: bool = False
    reference_weight: float = 0.75
    latent_scale: float = 0.18215
    spatial_factor: int = 8
    steps: int = 50
    guidance: float = 9.0
    guidance_drops: str = "text"
    frames_per_second: float = 8.0


# ModelScope's text-to-video (arXiv 2308.06571), which the paper stands on.
UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_levels": (True, True, True, False),
    "context_dim": 1024,
    "head_dim": 64,
    "num_heads": None,
    "norm_groups": 32,
    "linear_projection": True,
    "temporal_convolution": True,
    "temporal_transformer": True,
    "initial_temporal_transformer": True,
}
# The time step at which the subject's picture goes through the base. It is clean, so is the step;
# with a fixed one, and no words, its features are computed once a run and not once a step.
SUBJECT_TIMESTEP = 0

Features = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""A subject's features a spatial transformer: of its self- and its cross-attention, each
[B, S, N, C] for S subjects."""


Places = tuple[torch.Tensor, torch.Tensor]
"""``waves`` of a clip's places, [B, S, T * N, C], and of the subjects' pictures', [N, C]."""


class BoxShares:
    """How much each subject's reference counts at each place of each frame.

    One subject: M^ = M + lambda (1 - M) (arXiv 2410.13830, section 3.2). Of several, a place in
    boxes belongs to the first of those whose box it is in, alone: earlier subjects stand in front.
    Outside of all boxes lambda is divided among them. The last is ours; the paper has one subject.

    Args:
        masks: boxes as pixels [B, S, T, H, W], 1 inside and 0 outside.
        weight: lambda.
    """

    def __init__(self, masks: torch.Tensor, weight: float):
        self.masks, self.weight = masks, weight
        outside = 1 - masks.amax(1, keepdim=True)
        self._shares = owned(masks) + outside * (weight / masks.shape[1])
        self._pooled: dict[tuple[int, int], torch.Tensor] = {}
        self._placed: dict[tuple[int, int], Places] = {}

    def at(self, size: tuple[int, int]) -> torch.Tensor:
        """[B, S, T * h * w] at a layer's resolution: the share of a place that is covered."""
        if size not in self._pooled:
            self._pooled[size] = pool_masks(self._shares, size).flatten(2)
        return self._pooled[size]

    def places(self, size: tuple[int, int]) -> Places:
        """Where in the subjects' pictures the places of a layer's resolution lie."""
        if size not in self._placed:
            theirs = waves(box_places(self.masks.float(), size))
            own = waves(picture_places(size).to(theirs.device))
            self._placed[size] = theirs.to(self.masks.dtype), own.to(self.masks.dtype)
        return self._placed[size]


def owned(masks: torch.Tensor) -> torch.Tensor:
    """Masks [B, S, ...] without what an earlier subject's mask covers."""
    before = torch.cat([torch.zeros_like(masks[:, :1]), masks.cummax(1).values[:, :-1]], dim=1)
    return masks * (1 - before)


def pool_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks [..., H, W] to the share of each of [..., h, w] places that they cover."""
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    return functional.adaptive_avg_pool2d(flat, size).reshape(*masks.shape[:-2], *size)


@dataclass(frozen=True, eq=False)
class Placement:
    """What a run's subjects and boxes are to the network, computed once; ``DreamVideo.place``.

    Attributes:
        features: the subjects', or None without reference attention.
        shares: where each counts.
        hint: the box encoder's features [B, T, C, h, w], or None without one.
    """

    features: Features | None
    shares: BoxShares
    hint: torch.Tensor | None

    def repeated(self, times: int) -> Placement:
        """The same for so many batches after each other."""
        if times == 1:
            return self

        def more(x: torch.Tensor) -> torch.Tensor:
            return x.repeat(times, *[1] * (x.ndim - 1))

        return Placement(
            self.features and tuple((more(a), more(b)) for a, b in self.features),
            BoxShares(more(self.shares.masks), self.shares.weight),
            None if self.hint is None else more(self.hint),
        )


class ReferenceAttention(nn.Module):
    """Attention of the clip's tokens to a subject's, added where the subject's share says.

    Z'' = Z' + M^ . Attn(Z' W_Q, Z'_s W_K, Z'_s W_V) (arXiv 2410.13830, section 3.2); the output
    starts at zero. It has no bias: places where nothing counts get nothing.

    placed: both sides know their places in the picture, by one projection that draws near ones to
    each other from the start.
    """

    def __init__(self, dim: int, heads: int, settings: BlockSettings, placed: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = settings.linear(dim, dim, bias=False)
        self.to_k = settings.linear(dim, dim, bias=False)
        self.to_v = settings.linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([settings.linear(dim, dim, bias=False)])
        for parameter in self.to_out[0].parameters():
            nn.init.zeros_(parameter)
        self.to_place = None
        if placed:
            self.to_place = settings.linear(CHANNELS, dim, bias=False)
            # The same place adds 12 to a score (half of CHANNELS times 1.2), others far less.
            nn.init.normal_(self.to_place.weight, std=(1.44 * heads / dim) ** 0.25)

    def forward(
        self,
        x: torch.Tensor,
        subjects: torch.Tensor,
        shares: torch.Tensor,
        attention: Attention = plain_attention,
        places: Places | None = None,
    ) -> torch.Tensor:
        """``x`` [B * T, N, C], ``subjects`` [B, S, M, C], ``shares`` [B, S, T * N]."""
        batch, count = subjects.shape[:2]
        q = self.to_q(x).reshape(batch, -1, x.shape[-1]).repeat_interleave(count, 0)
        subjects = subjects.flatten(0, 1)
        k = self.to_k(subjects)
        if self.to_place is not None:
            theirs, own = places
            q, k = q + self.to_place(theirs.flatten(0, 1).to(q)), k + self.to_place(own.to(k))
        out = attend(q, k, self.to_v(subjects), self.heads, attention)
        # The projection is linear: the subjects are weighed and added before it, once for all.
        seen = (out.unflatten(0, (batch, count)) * shares[..., None].to(out)).sum(1)
        return x + self.to_out[0](seen).reshape(x.shape)


class ReferencePair(nn.Module):
    """One spatial transformer's two reference attentions."""

    def __init__(self, dim: int, heads: int, settings: BlockSettings, placed: bool = False):
        super().__init__()
        self.attn1 = ReferenceAttention(dim, heads, settings, placed)
        self.attn2 = ReferenceAttention(dim, heads, settings, placed)


class DreamVideo(nn.Module):
    """The base and what the paper adds to it; at first all of it equals the base exactly.

    Args:
        unet: ``VideoUNet`` keywords of the base.
        settings: what it was trained with.
        reference: attention to subjects' features; False where the base stands alone.
        control: ``BoxEncoder`` keywords beside its width (``ENCODER``), or None without one.
    """

    def __init__(
        self,
        *,
        unet: Mapping[str, Any],
        settings: TrajectorySettings | None = None,
        reference: bool = False,
        control: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        operations: Any = None,
    ):
        super().__init__()
        self.settings = settings or TrajectorySettings()
        rest = {"device": device, "dtype": dtype, "operations": operations}
        self.unet = VideoUNet(**unet, **rest)
        blocks = frame_settings(**block_keywords(unet), **rest)
        self.reference = None
        if reference:
            self.reference = nn.ModuleList(
                ReferencePair(width, blocks.heads(width), blocks, self.settings.placed_reference)
                for width in (layer.width for layer in self.unet.spatial_transformers())
            )
        self.box_encoder = self.control = None
        if control is not None:
            self.box_encoder = BoxEncoder(self.unet.channels, blocks, **control)
            self.control = FrameControl(**network_keywords(unet), settings=blocks)

    def start_from_base(self) -> None:
        """Give the ControlNet the base's own way down and middle, which is where it begins."""
        if self.control is not None:
            own, base = self.control.state_dict(), self.unet.state_dict()
            self.control.load_state_dict({**own, **{k: base[k] for k in own.keys() & base.keys()}})

    @torch.no_grad()
    def subject_features(
        self, latents: torch.Tensor, context: torch.Tensor, attention: Attention | None = None
    ) -> Features:
        """What the base's attentions give for subjects' pictures, each a clip of one frame.

        The base is frozen and knows neither reference nor boxes here, so this holds for a whole
        run, and no gradient goes through it.

        Args:
            latents: of the pictures on white, clean, [B, S, C, h, w].
            context: features [B, L, D] of the empty text.
        """
        count = latents.shape[1]
        found: dict[tuple[int, bool], torch.Tensor] = {}

        def keep(site: Site, out: torch.Tensor) -> torch.Tensor:
            found[site.layer, site.cross] = out.unflatten(0, (-1, count))
            return out

        clips = latents.flatten(0, 1)[:, :, None]
        self.unet(
            clips,
            torch.full((len(clips),), SUBJECT_TIMESTEP, device=clips.device),
            context.repeat_interleave(count, 0),
            attention=attention,
            after_attention=keep,
        )
        layers = range(self.unet.spatial_count)
        return tuple((found[layer, False], found[layer, True]) for layer in layers)

    def place(
        self,
        masks: torch.Tensor,
        features: Features | None = None,
        weight: float | None = None,
        attention: Attention | None = None,
    ) -> Placement:
        """A run's boxes and subjects as ``forward`` takes them.

        Args:
            masks: boxes as pixels [B, S, T, H, W], 1 inside; sides are the latents' times 2 ** the
                encoder's halvings.
            features: of ``subject_features``; None leaves the subjects out.
            weight: lambda_M; None is the settings'.
        """
        hint = None
        if self.box_encoder is not None:
            # White outside of boxes, as behind the subject (section 3.3).
            hint = self.box_encoder(1 - masks.amax(1), attention)
            hint = hint.unflatten(0, (-1, masks.shape[2]))
        weight = self.settings.reference_weight if weight is None else weight
        used = features if self.reference is not None else None
        return Placement(used, BoxShares(masks, weight), hint)

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        *,
        placement: Placement | None = None,
        attention: Attention | None = None,
    ) -> torch.Tensor:
        """One prediction for clips [B, C, T, h, w].

        Args:
            noisy: latents.
            timestep: [B], 0..999.
            context: text features [B, L, D].
            placement: subjects and boxes; None is the base alone.
            attention: a host's own, see ``VideoUNet``.
        """
        if placement is None:
            return self.unet(noisy, timestep, context, attention=attention)
        down = middle = after = None
        if placement.hint is not None:
            hint = placement.hint.flatten(0, 1)
            down, middle = self.control(noisy, timestep, context, hint, attention)
        if placement.features is not None:

            def after(site: Site, out: torch.Tensor) -> torch.Tensor:
                pair = self.reference[site.layer]
                layer = pair.attn2 if site.cross else pair.attn1
                return layer(
                    out,
                    placement.features[site.layer][site.cross],
                    placement.shares.at(site.size),
                    attention or plain_attention,
                    placement.shares.places(site.size) if layer.to_place is not None else None,
                )

        return self.unet(
            noisy,
            timestep,
            context,
            down_residuals=down,
            mid_residual=middle,
            attention=attention,
            after_attention=after,
        )


def whole_network(unet: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``DreamVideo`` keywords of the paper's network on a base, ModelScope's when None."""
    return {"unet": dict(unet or UNET), "reference": True, "control": dict(ENCODER)}
