"""Maps the original names of Stable Diffusion's UNet and its video kin to the engine's.

DynamiCrafter, ToonCrafter and ModelScope store the UNet in this form (``input_blocks.1.0...``);
the engine's names are diffusers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import LayerLoomError
from ..models.video_unet import INITIAL_HEADS
from .names import TensorSource
from .reader import TensorSpec

FIRST = "input_blocks.0.0.weight"
# A residual block's modules, and a resampling's, inside their block.
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# The number beside the timestep: DynamiCrafter 256's file calls it otherwise than the others do.
SCALARS = {"fps_embedding": "fps_embedding", "framestride_embed": "fps_embedding"}
# The first temporal transformer's place in DynamiCrafter's files, and in ModelScope's.
INITIAL = ("init_attn.0", "input_blocks.0.1")
# What leads to the next resolution, inside its block: in ModelScope's files, and in the others.
DOWN = ("op", "0.op")
# Temporal transformers may project by pointwise convolutions; the engine's are linear layers.
POINTWISE = re.compile(r"(transformer_in|.*\.temp_attentions\.\d+)\.proj_(in|out)\.weight")


def unet_keywords(name: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """``VideoUNet`` keywords that keys and shapes tell; ``name`` is the file's, for messages.

    GroupNorm's groups are in no shape: 32, or what divides the narrowest width.

    Raises:
        LayerLoomError: incomplete, or blocks in no known order.
    """
    try:
        channels, attends, layers = _levels(specs)
        first = specs[FIRST].shape
        spatial = f"input_blocks.{1 + attends.index(True) * (layers + 1)}.1."
        block = f"{spatial}transformer_blocks.0.attn2."
        initial = next((f"{i}.proj_in.weight" for i in INITIAL if f"{i}.norm.weight" in specs), "")
        scalars = (SCALARS[key] for key in SCALARS if f"{key}.0.weight" in specs)
        return {
            "in_channels": first[1],
            "out_channels": specs["out.2.weight"].shape[0],
            "block_channels": channels,
            "layers_per_block": layers,
            "attention_levels": attends,
            "context_dim": specs[f"{block}to_k.weight"].shape[1],
            # 64 in everything published; the first temporal transformer shows it.
            "head_dim": specs[initial].shape[0] // INITIAL_HEADS if initial else 64,
            "num_heads": None,
            "norm_groups": math.gcd(32, *channels),
            "linear_projection": len(specs[f"{spatial}proj_in.weight"].shape) == 2,
            "temporal_convolution": "input_blocks.1.0.temopral_conv.conv1.0.weight" in specs,
            "temporal_transformer": f"{spatial[:-2]}2.norm.weight" in specs,
            "initial_temporal_transformer": bool(initial),
            "image_attention": f"{block}to_k_ip.weight" in specs,
            "image_gate": f"{block}alpha" in specs,
            "scalar_embeddings": tuple(dict.fromkeys(scalars)),
        }
    except KeyError as error:
        raise LayerLoomError(
            f"{name} is incomplete: {error.args[0]} is missing from its video UNet; download or "
            "copy the checkpoint again."
        ) from None
    except (ValueError, IndexError):
        raise LayerLoomError(
            f"{name} holds a video UNet whose blocks are in no order that LayerLoom knows."
        ) from None


def _levels(specs: Mapping[str, TensorSpec]) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    """Width and attention of each resolution, and residual blocks a resolution."""
    channels, attends, counts = [], [], [0]
    numbers = {int(m[1]) for key in specs if (m := re.match(r"input_blocks\.(\d+)\.", key))}
    for block in range(1, max(numbers) + 1):
        convolution = f"input_blocks.{block}.0.out_layers.3.weight"
        if convolution not in specs:
            # Anything else than a residual block must lead to the next resolution.
            if not any(f"input_blocks.{block}.{down}.weight" in specs for down in DOWN):
                raise ValueError
            counts.append(0)
            continue
        if counts[-1] == 0:
            channels.append(specs[convolution].shape[0])
            attends.append(f"input_blocks.{block}.1.norm.weight" in specs)
        counts[-1] += 1
    if len(set(counts)) != 1 or len(channels) != len(counts) or not counts[0]:
        raise ValueError
    return tuple(channels), tuple(attends), counts[0]


def unet_modules(unet: Mapping[str, Any]) -> dict[str, str]:
    """Original module -> engine module, for a network of these ``VideoUNet`` keywords.

    Transformers and temporal convolutions are named alike inside, so each is one entry. Where
    files differ, a module appears under all its original names.
    """
    found = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    if unet["initial_temporal_transformer"]:
        found |= dict.fromkeys(INITIAL, "transformer_in")
    for original, engine in SCALARS.items():
        if engine in unet["scalar_embeddings"]:
            found[f"{original}.0"] = f"{engine}.linear_1"
            found[f"{original}.2"] = f"{engine}.linear_2"
    levels, layers = len(unet["block_channels"]), unet["layers_per_block"]
    for level in range(levels):
        start = 1 + level * (layers + 1)
        for layer in range(layers):
            found |= _layer(f"input_blocks.{start + layer}", f"down_blocks.{level}", layer)
        if level < levels - 1:
            for down in DOWN:
                convolution = f"down_blocks.{level}.downsamplers.0.conv"
                found[f"input_blocks.{start + layers}.{down}"] = convolution
    found |= _layer("middle_block", "mid_block", 0)
    found |= _residual("middle_block.3", "mid_block", 1)
    for up in range(levels):
        level, start = levels - 1 - up, up * (layers + 1)
        for layer in range(layers + 1):
            found |= _layer(f"output_blocks.{start + layer}", f"up_blocks.{up}", layer)
        if level:
            attended = unet["attention_levels"][level]
            place = 1 + attended * (1 + unet["temporal_transformer"])
            upsample = f"output_blocks.{start + layers}.{place}.conv"
            found[upsample] = f"up_blocks.{up}.upsamplers.0.conv"
    return found


def _layer(original: str, engine: str, layer: int) -> dict[str, str]:
    """A residual block and the transformers behind it."""
    return {
        **_residual(f"{original}.0", engine, layer),
        f"{original}.1": f"{engine}.attentions.{layer}",
        f"{original}.2": f"{engine}.temp_attentions.{layer}",
    }


def _residual(original: str, engine: str, layer: int) -> dict[str, str]:
    inside = {
        f"{original}.{old}": f"{engine}.resnets.{layer}.{new}" for old, new in RESIDUAL.items()
    }
    return {**inside, f"{original}.temopral_conv": f"{engine}.temp_convs.{layer}"}


def rename(key: str, modules: Mapping[str, str]) -> str | None:
    """A key with its longest known module renamed, or None."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:length]))
        if module is not None:
            return ".".join([module, *parts[length:]])
    return None


def plan_unet(
    specs: Mapping[str, TensorSpec], prefix: str, unet: Mapping[str, Any]
) -> tuple[dict[str, TensorSource], list[str]]:
    """Engine name -> source for every UNet tensor behind ``prefix``, and the keys left over."""
    modules, sources, left_over = unet_modules(unet), {}, []
    for key in specs:
        if not key.startswith(prefix):
            continue
        name = rename(key.removeprefix(prefix), modules)
        if name is None or name in sources:
            left_over.append(key)
        else:
            form = "matrix" if POINTWISE.fullmatch(name) else ""
            sources[name] = TensorSource(key, form=form)
    return sources, left_over
