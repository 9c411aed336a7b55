"""Maps the names of Stable Diffusion 1.5 with motion modules to the engine's, which are diffusers'.

Motion modules come under AnimateDiff's names (``.temporal_transformer.``) or diffusers'; the rest
under diffusers' names or the original ones (``input_blocks...``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LayerLoomError
from ..models.follow_your_click import SCALARS, STRENGTH
from .dynamicrafter_names import plan_vae
from .motion_names import POSITIONS, engine_name
from .names import TensorSource
from .reader import TensorSpec, TensorStore
from .video_names import FIRST, plan_unet
from .video_names import unet_keywords as original_keywords

ORIGINAL = "model.diffusion_model."
# Stable Diffusion 1.5's text encoder inside an original file; the rest are transformers' names.
TEXT = "cond_stage_model.transformer."
MOTION = ".motion_modules."
# What a file that is only modules lacks.
SPATIAL = "down_blocks.0.resnets.0.conv1.weight"
# Of networks that are not this one.
OTHERS = ("temp_convs.", "temp_attentions.", "transformer_in.", "to_k_ip", "temopral_conv", "lora")
NUM_HEADS = 8


@dataclass(frozen=True)
class Found:
    """What a file holds.

    kind: "follow-your-click", "pia", "animatediff" or "stable-diffusion". source: whose names.
    unet: engine name -> source. parts: "vae" and "text_encoder" where they are inside. complete:
    a whole UNet. positions: of the motion modules, where they are stored.
    """

    kind: str
    source: str
    unet: dict[str, TensorSource]
    parts: dict[str, dict[str, TensorSource]]
    complete: bool
    positions: int | None


def find(store: TensorStore) -> Found | None:
    """What a store holds; None where it is none of these."""
    prefix = next((p for p in (ORIGINAL, "") if p + FIRST in store.specs), None)
    if prefix is not None:
        return _original(store, prefix)
    sources: dict[str, TensorSource] = {}
    positions = None
    for key, spec in store.specs.items():
        name = engine_name(key)
        if name is None:
            positions = spec.shape[1] if len(spec.shape) == 3 else positions
            continue
        if key.endswith(POSITIONS):
            continue
        sources[name.removeprefix("unet.")] = TensorSource(key)
    motion = any(MOTION in name for name in sources)
    first = sources.get("conv_in.weight")
    if not motion and not (SPATIAL in sources and first is not None):
        return None
    if any(mark in name for name in sources for mark in OTHERS):
        return None
    if not motion and not _is_first_generation(sources, store):
        return None
    channels = first.spec(store).shape[1] if first is not None else 0
    kind = "animatediff" if motion else "stable-diffusion"
    if f"{STRENGTH}.linear_1.weight" in sources:
        kind = "follow-your-click"
    elif motion and channels == 9:
        kind = "pia"
    original = any(".temporal_transformer." in key for key in store.specs)
    source = "diffusers"
    if original:
        source = "animatediff" if kind == "animatediff" else kind
    return Found(kind, source, sources, {}, SPATIAL in sources, positions)


def _is_first_generation(sources: Mapping[str, TensorSource], store: TensorStore) -> bool:
    """Stable Diffusion 1.x: its spatial transformers project by pointwise convolutions."""
    projection = next(
        (s for n, s in sources.items() if n.endswith("attentions.0.proj_in.weight")), None
    )
    return projection is not None and len(projection.spec(store).shape) == 4


def _original(store: TensorStore, prefix: str) -> Found | None:
    """Stable Diffusion 1.x as it was published, its other parts in the same file."""
    inside = {k.removeprefix(prefix): s for k, s in store.specs.items() if k.startswith(prefix)}
    if any(mark in key for key in inside for mark in OTHERS):
        return None
    try:
        unet = original_keywords(store.name, inside)
    except LayerLoomError:
        return None
    if unet["linear_projection"] or unet["temporal_transformer"]:
        return None
    sources, left_over = plan_unet(store.specs, prefix, unet)
    if left_over:
        return None
    parts = {}
    vae, unknown = plan_vae(store.specs, "")
    if vae and not unknown:
        parts["vae"] = vae
    text = {
        key.removeprefix(TEXT): TensorSource(key)
        for key in store.specs
        if key.startswith(TEXT) and not key.endswith(".position_ids")
    }
    if text:
        parts["text_encoder"] = text
    return Found("stable-diffusion", "stable-diffusion", sources, parts, True, None)


def unet_keywords(name: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """``VideoUNet`` keywords that names and shapes tell; ``name`` is the file's, for messages.

    Attention has eight heads in everything published, and GroupNorm 32 groups.

    Raises:
        LayerLoomError: incomplete.
    """
    try:
        levels = 1 + max(int(m[1]) for k in specs if (m := re.match(r"down_blocks\.(\d+)\.", k)))
        channels = tuple(
            specs[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)
        )
        layers = {
            m[1] for k in specs if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.conv1\.", k))
        }
        attends = tuple(
            f"down_blocks.{level}.attentions.0.norm.weight" in specs for level in range(levels)
        )
        spatial = f"down_blocks.{attends.index(True)}.attentions.0."
        return {
            "in_channels": specs["conv_in.weight"].shape[1],
            "out_channels": specs["conv_out.weight"].shape[0],
            "block_channels": channels,
            "layers_per_block": len(layers),
            "attention_levels": attends,
            "context_dim": specs[f"{spatial}transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "head_dim": None,
            "num_heads": NUM_HEADS,
            "norm_groups": math.gcd(32, *channels),
            "linear_projection": len(specs[f"{spatial}proj_in.weight"].shape) == 2,
            "temporal_convolution": False,
            "temporal_transformer": False,
            "initial_temporal_transformer": False,
            "motion_modules": _motion(specs),
            "scalar_embeddings": tuple(
                scalar for scalar in SCALARS if f"{scalar}.linear_1.weight" in specs
            ),
            "norm_over_frames": False,
        }
    except (KeyError, ValueError) as error:
        raise LayerLoomError(
            f"{name} is incomplete: {error.args[0]} is missing from its UNet; download or copy the "
            "checkpoint again."
        ) from None


def _motion(specs: Mapping[str, TensorSpec]) -> dict[str, Any] | None:
    if not any(MOTION in name for name in specs):
        return None
    return {
        "heads": NUM_HEADS,
        "middle": any(name.startswith("mid_block.motion_modules.") for name in specs),
        "norm_over_frames": False,
        "phrase": any(".phrase_attn." in name for name in specs),
    }
