"""Prompts and given layers as the host's CONDITIONING and LATENT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch

from ...engine.conditioning.layers import LayerSequence, layers_to_clip
from ...engine.errors import LayerLoomError
from ...engine.layered_settings import SPATIAL_FACTOR, LayeredSettings
from .layered_model import GIVEN_LATENTS, PROMPTS, TASK

Conditioning = list[list[Any]]


def encode_prompts(clip, texts: Sequence[str]) -> tuple[Conditioning, Conditioning, str]:
    """Positive and negative CONDITIONING of one prompt a layer, and a note or "".

    Each prompt is encoded alone; the features follow one another [1, prompts * tokens, D]. The
    negative is zeros (LayerFlow, arXiv 2506.04228), not an encoded empty text.

    Raises:
        LayerLoomError: no text encoder is connected.
    """
    if clip is None:
        raise LayerLoomError(
            "No CLIP is connected to Layer Prompts; take the starter's or load T5-XXL with "
            "CLIPLoader, type cogvideox."
        )
    features = [clip.encode_from_tokens(clip.tokenize(text)) for text in texts]
    lengths = [feature.shape[1] for feature in features]
    shortest, note = min(lengths), ""
    if max(lengths) > shortest:
        # Encoders pad to a fixed length; only a prompt too long for it comes out longer.
        note = f"A prompt is longer than {shortest} tokens; what goes beyond is not read."
    joined = torch.cat([feature[:, :shortest] for feature in features], dim=1)
    extra = {"pooled_output": None, PROMPTS: len(texts)}
    return [[joined, dict(extra)]], [[torch.zeros_like(joined), dict(extra)]], note


def condition(conditioning: Conditioning, task: str, given: torch.Tensor) -> Conditioning:
    """The CONDITIONING with a given layer; decomposition drops the scene's prompt.

    Raises:
        LayerLoomError: the conditioning is not from Layer Prompts.
    """
    entries = []
    for features, extra in conditioning:
        prompts = extra.get(PROMPTS)
        if prompts is None:
            raise LayerLoomError(
                "The conditioning does not come from Layer Prompts; connect that node, which "
                "encodes one prompt a layer."
            )
        if task == "decompose" and prompts == 3:
            features, prompts = features[:, : features.shape[1] // 3 * 2], 2
        added = {PROMPTS: prompts, TASK: task, GIVEN_LATENTS: given}
        entries.append([features, {**extra, **added}])
    return entries


def empty_latent(
    settings: LayeredSettings, sequence: LayerSequence, size: tuple[int, int], batch: int
) -> dict[str, Any]:
    """A LATENT of zeros [B, C, T, h, w] for all layers of a sequence; size = (height, width)."""
    frames = sum(sequence.latent_frames(layer) for layer in sequence.layers)
    sides = [side // SPATIAL_FACTOR for side in size]
    samples = torch.zeros(
        [batch, settings.channels, frames, *sides],
        device=comfy.model_management.intermediate_device(),
    )
    return {"samples": samples, "layerloom_sequence": sequence}


def encode_clip(
    settings: LayeredSettings,
    vae,
    clip: torch.Tensor,
    sequence: LayerSequence,
    names: Sequence[str],
) -> torch.Tensor:
    """Latents [1, C, T, h, w] of the joined layers ``names``: [1, F, 3, H, W] in [-1, 1].

    Raises:
        LayerLoomError: the VAE makes other latents than the model takes.
    """
    latents = vae.encode(((clip[0] + 1) / 2).movedim(1, -1))
    expected = (settings.channels, sum(sequence.latent_frames(name) for name in names))
    if latents.ndim != 5 or tuple(latents.shape[1:3]) != expected:
        raise LayerLoomError(
            f"The VAE made latents of shape {tuple(latents.shape)}, but {settings.name} takes "
            f"{expected[0]} channels and {expected[1]} latent frames; connect the checkpoint's own "
            "VAE (CogVideoX for published weights)."
        )
    return latents


def given_latent(
    settings: LayeredSettings,
    vae,
    layers: Mapping[str, torch.Tensor],
    sequence: LayerSequence,
    task: str,
    size: tuple[int, int],
    batch: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents of the given layers [1, C, T_given, h, w], and a LATENT with them at their places.

    ``layers`` are [1, F, C, H, W] in [0, 1] at the network's size.

    Raises:
        LayerLoomError: the VAE makes other latents than the model takes.
    """
    names = sequence.given(task)
    given = encode_clip(settings, vae, layers_to_clip(layers, sequence, names), sequence, names)
    latent = empty_latent(settings, sequence, size, batch)
    places = sequence.split_latents(latent["samples"].transpose(1, 2))
    for name, latents in sequence.split_latents(given.transpose(1, 2), names).items():
        places[name].copy_(latents)
    return given, latent
