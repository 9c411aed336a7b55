"""One clip's conditions, and the predictions that sampling asks of the video network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditioning.key_images import ClipPlan
from .conditioning.video_encoders import ImageFeatures
from .models.dynamicrafter import SPEED, DynamiCrafter, QueryTransformer
from .sampling.ddim import KnownFrames, Predictor
from .sampling.streams import StreamGuidance
from .sampling.windows import SlidingWindows, Window, fuse


@dataclass(frozen=True, eq=False)
class ClipConditions:
    """What the network is told beside the noise, for B clips of one plan.

    Attributes:
        detail: latents joined to every frame's noise [B, C, T, h, w]: the image's on all frames
            where a clip starts from one, zeros between the frames that images are given for else.
        tokens: image tokens of each piece, [B, N, D] each.
        no_tokens: those of a mid-grey picture, the unconditional image.
        text, no_text: features [B, L, D].
        motion: the number ``fps_embedding`` reads.
        gate: factor on the image stream, one or one a layer.
    """

    detail: Tensor
    tokens: tuple[Tensor, ...]
    no_tokens: Tensor
    text: Tensor
    no_text: Tensor
    motion: float
    gate: float | tuple[float, ...]


def image_tokens(
    encoder: ImageFeatures, projector: QueryTransformer, pictures: Tensor, like: Tensor
) -> Tensor:
    """Context tokens [B, N, D] of pictures [B, 3, H, W] in [-1, 1]."""
    return projector(encoder.encode(pictures).to(like.device, like.dtype))


def detail_latents(clip: ClipPlan, images: Sequence[Tensor]) -> Tensor:
    """``ClipConditions.detail`` of the images' latents [B, C, h, w] each."""
    if clip.mode == "animate":
        return images[0][:, :, None].repeat(1, 1, clip.frames, 1, 1)
    first = images[0]
    detail = first.new_zeros(*first.shape[:2], clip.frames, *first.shape[2:])
    for frame, image in clip.keys:
        detail[:, :, frame] = images[image]
    return detail


def known_frames(clip: ClipPlan, images: Sequence[Tensor]) -> KnownFrames:
    """The given images' latents as frames that come out as they are."""
    first = images[0]
    latents = first.new_zeros(*first.shape[:2], clip.frames, *first.shape[2:])
    mask = first.new_zeros(1, 1, clip.frames, 1, 1)
    for frame, image in clip.keys:
        latents[:, :, frame] = images[image]
        mask[:, :, frame] = 1
    return KnownFrames(latents, mask)


def predictor(
    network: DynamiCrafter,
    conditions: ClipConditions,
    clip: ClipPlan,
    sliding: SlidingWindows,
    guidance: StreamGuidance,
    together: bool,
) -> Predictor:
    """The guided prediction for a whole clip [B, C, T, h, w], windows and branches taken care of.

    Each branch is fused over the windows before guidance combines them, so that its rescale sees
    the whole clip. together: all branches in one batch.
    """
    branches = guidance.branches

    def branch(x: Tensor, timestep: int, window: Window, names: Sequence[str]) -> Tensor:
        """Predictions [names, B, C, t, h, w] of some branches for one window."""
        batch, dtype = x.shape[0], conditions.text.dtype
        part = torch.cat([window.take(x, 2), window.take(conditions.detail, 2)], dim=1).to(dtype)
        tokens = {"none": conditions.no_tokens.expand_as(conditions.tokens[window.piece])}
        text = {"both": conditions.text}
        rows = len(names) * batch
        out = network.unet(
            part.repeat(len(names), 1, 1, 1, 1),
            torch.full((rows,), timestep, device=x.device),
            torch.cat([text.get(name, conditions.no_text) for name in names]),
            image_context=torch.cat(
                [tokens.get(name, conditions.tokens[window.piece]) for name in names]
            ),
            scalars={SPEED: torch.full((rows,), conditions.motion, device=x.device)},
            image_scale=conditions.gate,
        )
        return out.float().unflatten(0, (len(names), batch))

    def predict(x: Tensor, timestep: int, index: int) -> Tensor:
        def window_prediction(window: Window) -> Tensor:
            if together:
                return branch(x, timestep, window, branches)
            return torch.cat([branch(x, timestep, window, [name]) for name in branches])

        windows = clip.windows(sliding, index)
        made = fuse(windows, window_prediction, clip.frames, dim=3)
        parts = dict(zip(branches, made, strict=True))
        return guidance.combine(parts["both"], parts.get("image"), parts.get("none"))

    return predict
