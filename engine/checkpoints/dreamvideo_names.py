"""Finds ModelScope's text-to-video UNet in a file, under diffusers' names or the original ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LayerLoomError
from ..models.video_unet import INITIAL_HEADS
from .names import TensorSource
from .reader import TensorSpec, TensorStore
from .video_names import FIRST, plan_unet
from .video_names import unet_keywords as original_keywords

# What may stand before the UNet's names: nothing, Stable Diffusion's prefix, or diffusers' folder.
ORIGINAL_PREFIXES = ("", "model.diffusion_model.")
DIFFUSERS_PREFIXES = ("", "unet.")
# Tell it from Stable Diffusion's image UNet, in both namings.
ORIGINAL_MARK = "input_blocks.1.0.temopral_conv.conv1.0.weight"
DIFFUSERS_MARK = "down_blocks.0.temp_convs.0.conv1.0.weight"
# Of networks that read more than noise and text.
OTHERS = (".to_k_ip.", "fps_embedding.", "framestride_embed.", ".motion_modules.", "controlnet_")


@dataclass(frozen=True)
class Found:
    """source: "modelscope" (original names) or "diffusers". unet: ``VideoUNet`` keywords.

    plan: engine name -> source. left_over: names behind the prefix that the engine does not know.
    """

    source: str
    unet: dict[str, Any]
    plan: dict[str, TensorSource]
    left_over: tuple[str, ...]


def find(store: TensorStore) -> Found | None:
    """What a store holds; None where it is none of these.

    Raises:
        LayerLoomError: the UNet is incomplete.
    """
    if any(mark in key for key in store.specs for mark in OTHERS):
        return None
    for prefix in ORIGINAL_PREFIXES:
        if prefix + FIRST in store.specs and prefix + ORIGINAL_MARK in store.specs:
            return _original(store, prefix)
    for prefix in DIFFUSERS_PREFIXES:
        if prefix + DIFFUSERS_MARK in store.specs:
            inside = _behind(store, prefix)
            plan = {name: TensorSource(prefix + name) for name in inside}
            return Found("diffusers", unet_keywords(store.name, inside), plan, ())
    return None


def _original(store: TensorStore, prefix: str) -> Found | None:
    unet = original_keywords(store.name, _behind(store, prefix))
    if unet["in_channels"] != unet["out_channels"] or not unet["initial_temporal_transformer"]:
        return None
    # What this base never has stays out of the record.
    for name in ("image_attention", "image_gate", "scalar_embeddings"):
        del unet[name]
    plan, left_over = plan_unet(store.specs, prefix, unet | {"scalar_embeddings": ()})
    if not prefix:
        # Bare names may have other networks beside them.
        blocks = ("input_blocks.", "middle_block.", "output_blocks.")
        left_over = [key for key in left_over if key.startswith(blocks)]
    return Found("modelscope", unet, plan, tuple(left_over))


def _behind(store: TensorStore, prefix: str) -> dict[str, TensorSpec]:
    return {k.removeprefix(prefix): s for k, s in store.specs.items() if k.startswith(prefix)}


def unet_keywords(name: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """``VideoUNet`` keywords that diffusers' names and shapes tell; ``name`` is the file's.

    GroupNorm's groups are in no shape: 32, or what divides the narrowest width.

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
            "head_dim": specs["transformer_in.proj_in.weight"].shape[0] // INITIAL_HEADS,
            "num_heads": None,
            "norm_groups": math.gcd(32, *channels),
            "linear_projection": len(specs[f"{spatial}proj_in.weight"].shape) == 2,
            "temporal_convolution": True,
            "temporal_transformer": True,
            "initial_temporal_transformer": True,
        }
    except (KeyError, ValueError) as error:
        raise LayerLoomError(
            f"{name} is incomplete: {error.args[0]} is missing from its video UNet; download or "
            "copy the checkpoint again."
        ) from None
