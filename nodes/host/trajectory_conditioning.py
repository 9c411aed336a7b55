"""Subjects of pictures and their boxes as the CONDITIONING and LATENT of a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ...engine.clips import as_signed, untrained_notes
from ...engine.conditioning.box_paths import track_masks
from ...engine.conditioning.box_sources import read_path
from ...engine.conditioning.boxes import BoxPaths, parse_boxes
from ...engine.conditioning.masks import check_mask
from ...engine.conditioning.pictures import Size, clip_size
from ...engine.conditioning.subjects import on_white
from ...engine.errors import LayerLoomError
from ...engine.models.dreamvideo import TrajectorySettings
from .conditioning import Conditioning
from .pictures import as_pixels
from .trajectory_model import SUBJECTS, Subjects, trajectory_settings


@dataclass(frozen=True)
class TrajectoryWish:
    """What a clip shall be; 0 leaves a number to the checkpoint.

    subject: which of the paths of boxes is this subject's, counted from 1. weight: lambda_M, how
    much subjects count outside of their boxes. batch: clips at once. drops: what guidance leaves
    out, one of ``DROPS``; None is the checkpoint's.
    """

    subject: int = 1
    weight: float = 0.75
    frames: int = 0
    width: int = 0
    height: int = 0
    batch: int = 1
    drops: str | None = None


@dataclass(frozen=True)
class Trajectory:
    """Conditionings and LATENT of one clip."""

    positive: Conditioning
    negative: Conditioning
    latent: dict[str, Any]
    notes: list[str]


def move_subject(
    model,
    clip,
    vae,
    image: torch.Tensor,
    mask: torch.Tensor | None,
    boxes: Any,
    positive: Conditioning,
    negative: Conditioning,
    wish: TrajectoryWish,
    others: Conditioning | None = None,
) -> Trajectory:
    """Everything a sampler needs to let a subject go along its boxes, behind ``others``.

    Args:
        model, clip, vae: of Load Subject Model.
        image, mask: the subject's picture and what of it is the subject; the first of each batch
            counts. Without a mask the picture's own transparency, or all of it.
        boxes: as ``read_path`` takes them; pixels are the clip's.
        others: the positive CONDITIONING of other subjects of the same clip.

    Raises:
        LayerLoomError: something does not fit the model, or the subjects do not fit each other.
    """
    settings, network = trajectory_settings(model), model.model
    no_text = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    _check_texts(network, settings, positive, negative, no_text)
    pixels, area = as_pixels(image), _area(image, mask)
    frames = wish.frames or settings.frames
    levels = len(network.model_config.unet_config["unet"]["block_channels"])
    multiple = settings.spatial_factor * 2 ** (levels - 1)
    native = (settings.height, settings.width)
    size, output = clip_size(native, native, multiple, wish.width or None, wish.height or None)
    path = _path(read_path(boxes, output, frames), wish.subject)
    subjects = Subjects(
        _encode(network, settings, vae, on_white(pixels, area, size)),
        torch.from_numpy(track_masks(path, size)),
        wish.weight,
        no_text[0][0],
    )
    if others is not None:
        subjects = _behind(_subjects_of(others), subjects)
    latent = torch.zeros(
        wish.batch * frames,
        *subjects.latents.shape[1:],
        device=comfy.model_management.intermediate_device(),
    )
    notes = [] if size == output else [_resized(size, output)]
    notes += untrained_notes(native, size, settings.frames, frames)
    drawn = _drawn_frames(boxes)
    if drawn not in (None, frames):
        notes.append(f"The boxes are for {drawn} frames and are retimed to {frames}.")
    if area is None:
        notes.append("There is no mask: all of the picture is taken for the subject.")
    drops = wish.drops or settings.guidance_drops
    other = replace(subjects, dropped=True) if drops == "all" else subjects
    return Trajectory(_with(positive, subjects), _with(negative, other), {"samples": latent}, notes)


def _path(paths: BoxPaths, subject: int) -> BoxPaths:
    count = len(paths.require().tracks)
    if subject > count:
        raise LayerLoomError(
            f"There are boxes for {count} {'subject' if count == 1 else 'subjects'} and this is "
            f"subject {subject}; draw its boxes too, or set subject to the number of its path."
        )
    return paths.only(subject)


def _drawn_frames(boxes: Any) -> int | None:
    """How many frames drawn boxes are for; lists of boxes and of points do not say."""
    drawn = isinstance(boxes, str) and not boxes.lstrip().startswith("[")
    return parse_boxes(boxes).frames if drawn else None


def _area(image: torch.Tensor, mask: torch.Tensor | None):
    """What of the first picture is the subject [H, W], None for all of it."""
    if mask is None and image.shape[-1] == 4:
        mask = image[..., 3]
    if mask is None:
        return None
    first = mask.reshape(-1, *mask.shape[-2:])[0].float().cpu()
    return check_mask(first, tuple(image.shape[1:3])).numpy()


def _with(conditioning: Conditioning, subjects: Subjects) -> Conditioning:
    for _, values in conditioning:
        if SUBJECTS in values:
            raise LayerLoomError(
                "A prompt comes from another Subject Trajectory node; connect that node's positive "
                "to other_subjects, and the texts to positive and negative."
            )
    return [[features, {**values, SUBJECTS: subjects}] for features, values in conditioning]


def _subjects_of(others: Conditioning) -> Subjects:
    for _, values in others:
        if SUBJECTS in values:
            return values[SUBJECTS]
    raise LayerLoomError(
        "What is connected as other subjects holds none; connect the positive output of another "
        "Subject Trajectory node."
    )


def _behind(front: Subjects, subject: Subjects) -> Subjects:
    if front.boxes.shape[1:] != subject.boxes.shape[1:]:
        frames, height, width = front.boxes.shape[1:]
        raise LayerLoomError(
            f"The other subjects are for {frames} frames of {width}x{height}; give all Subject "
            "Trajectory nodes the same frames, width and height."
        )
    if front.latents.shape[1:] != subject.latents.shape[1:]:
        raise LayerLoomError(
            "The other subjects are for another model; give all Subject Trajectory nodes the same."
        )
    return Subjects(
        torch.cat([front.latents, subject.latents.to(front.latents)]),
        torch.cat([front.boxes, subject.boxes]),
        subject.weight,
        subject.no_text,
    )


def _check_texts(network, settings: TrajectorySettings, *conditionings: Conditioning) -> None:
    wanted = network.model_config.unet_config["unet"]["context_dim"]
    for features, _ in (entry for conditioning in conditionings for entry in conditioning):
        if features.shape[-1] != wanted:
            raise LayerLoomError(
                f"A text is {features.shape[-1]} numbers wide and {settings.name} reads {wanted}; "
                "take the checkpoint's own CLIP for the prompts and this node, or OpenCLIP "
                "ViT-H/14's (that of SD 2.x)."
            )


def _encode(network, settings: TrajectorySettings, vae, picture) -> torch.Tensor:
    """Latents [1, C, h, w] of a picture uint8 [H, W, 3], as the host's VAE gives them."""
    signed = as_signed(picture[None])
    latents = vae.encode(((signed + 1) / 2).clamp(0, 1).movedim(1, -1))
    channels = network.model_config.unet_config["unet"]["in_channels"]
    wanted = (channels, *(side // settings.spatial_factor for side in picture.shape[:2]))
    if latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        raise LayerLoomError(
            f"The VAE made latents of shape {tuple(latents.shape[1:])} and {settings.name} takes "
            f"{wanted}; connect the checkpoint's own VAE, or Stable Diffusion's."
        )
    return latents


def _resized(size: Size, output: Size) -> str:
    return f"The size is {size[1]}x{size[0]} instead of {output[1]}x{output[0]}."
