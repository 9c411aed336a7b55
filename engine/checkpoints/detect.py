"""Says what a checkpoint is from its keys and shapes, never from its file name."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LayerLoomError
from ..models.layerflow import (
    ADAPTER_SCALES,
    FRAMES_PER_SECOND,
    PIXEL_SIZE,
    TEMPORAL_FACTOR,
    LayerFlowVariant,
    find_variant,
)
from .lora_names import split_key
from .names import (
    POSITIONS,
    Plan,
    is_diffusers,
    plan_diffusers,
    plan_own,
    plan_sat,
    sat_prefix,
)
from .reader import TensorSpec, TensorStore, open_tensors

METADATA_KEY = "layerloom"
FORMAT = 1
SUPPORTED = (
    "LayerFlow's .pt files, CogVideoX-2B in diffusers names, DynamiCrafter's, Follow-Your-Click's, "
    "AnimateDiff's and ModelScope's files and LayerLoom's own .safetensors"
)
# LayerFlow's released settings, which keep CogVideoX-2B's noise schedule (arXiv 2506.04228).
SAMPLING = {
    "schedule": {
        "snr_shift": 3.0,
        "zero_terminal_snr": True,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps": 1000,
    },
    "sampler": "released",
    "steps": 50,
    "guidance": 6.0,
    "guidance_formula": "dynamic-released",
}


@dataclass(frozen=True)
class TableLayout:
    """How a stored position table is laid out; its length alone does not say.

    Published files are 60x90 latents and 226 tokens a prompt. ``text_length`` None means: found
    from the table's length.
    """

    text_length: int | None = None
    tokens_per_prompt: int = 226
    latent_height: int = 60
    latent_width: int = 90


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    Attributes:
        family: the network ("layered").
        variant: "rgb", "rgba-generate", ...; "cogvideox-2b"; or the name in our own metadata.
        source: format it is stored in: "layerflow-sat", "cogvideox-sat", "cogvideox-diffusers",
            "layerloom".
        transformer: constructor keywords of ``LayeredTransformer``.
        parts: networks in the file: "transformer", and "vae", "text_encoder" where they are inside.
        adapters: adapter name -> rank (the largest, where modules differ).
        parameters: transformer weights without adapters and without the position table.
        bytes: size on disk.
        dtype: element type of most transformer weights, such as "float16".
    """

    family: str
    variant: str
    source: str
    transformer: dict[str, Any]
    parts: tuple[str, ...]
    adapters: dict[str, int]
    parameters: int
    bytes: int
    dtype: str


def inspect_checkpoint(path: str | Path, layout: TableLayout | None = None) -> CheckpointInfo:
    """Say what a file or folder is, reading names and shapes only.

    Raises:
        LayerLoomError: not a checkpoint, or none that LayerLoom knows.
    """
    return identify(open_tensors(path), layout)[0]


def identify(
    store: TensorStore, layout: TableLayout | None = None
) -> tuple[CheckpointInfo, Plan, dict[str, Any]]:
    """What a store is, where each engine tensor comes from, and our metadata for it."""
    from .click_detect import is_click
    from .dreamvideo_detect import is_dreamvideo
    from .dynamicrafter_detect import is_dynamicrafter

    if is_dynamicrafter(store):
        raise LayerLoomError(
            f"{store.name} is a DynamiCrafter checkpoint, which animates pictures and makes no "
            "layers; give it to `layerloom animate`, and a layered checkpoint here."
        )
    if is_click(store):
        raise LayerLoomError(
            f"{store.name} animates regions of pictures and makes no layers; give it to `layerloom "
            "click`, and a layered checkpoint here."
        )
    if is_dreamvideo(store):
        raise LayerLoomError(
            f"{store.name} moves subjects along boxes and makes no layers; give it to `layerloom "
            "trajectory`, and a layered checkpoint here."
        )
    if METADATA_KEY in store.metadata:
        return _own(store)
    prefix = sat_prefix(store.specs)
    if prefix is not None:
        return _sat(store, prefix, layout or TableLayout())
    if is_diffusers(store.specs):
        return _diffusers(store)
    if any(split_key(key) for key in store.specs):
        raise LayerLoomError(
            f"{store.name} is an adapter (LoRA) and no checkpoint; give it beside one, with --lora "
            "or Load Adapter."
        )
    names = sorted(store.specs)
    shown = ", ".join(names[:: max(1, len(names) // 3)][:3]) or "no tensors"
    raise LayerLoomError(
        f"{store.name} is not a checkpoint LayerLoom knows: it holds {len(names)} tensors such as "
        f"{shown}; supported are {SUPPORTED}."
    )


def _own(store: TensorStore) -> tuple[CheckpointInfo, Plan, dict[str, Any]]:
    try:
        metadata = json.loads(store.metadata[METADATA_KEY])
        found, family = metadata["format"], metadata["family"]
        transformer, variant = dict(metadata["transformer"]), str(metadata["variant"])
    except (ValueError, KeyError, TypeError):
        raise LayerLoomError(
            f"{store.name} carries LayerLoom metadata that cannot be read; "
            "save or convert it again."
        ) from None
    if found != FORMAT or family != "layered":
        raise LayerLoomError(
            f"{store.name} is LayerLoom format {found}, family {family!r}; this version reads "
            f"format {FORMAT}, family 'layered': update LayerLoom."
        )
    if transformer.get("position_table"):
        transformer["position_table"] = tuple(transformer["position_table"])
    plan = plan_own(store.specs)
    return _info(store, plan, variant, "layerloom", transformer), plan, metadata


def _sat(
    store: TensorStore, prefix: str, layout: TableLayout
) -> tuple[CheckpointInfo, Plan, dict[str, Any]]:
    plan = plan_sat(store.specs, prefix)
    specs = {name: source.spec(store) for name, source in plan.transformer.items()}
    transformer = _keywords(store.name, specs)
    if POSITIONS not in specs:
        raise LayerLoomError(
            f"{store.name} has no position table (mixins.pos_embed.pos_embedding), so it is "
            f"neither LayerFlow nor CogVideoX-2B; supported are {SUPPORTED}."
        )
    area = _area(layout, transformer["patch_size"])
    rows = specs[POSITIONS].shape[-2]
    text, frames = _split_table(store.name, rows, layout, math.prod(area))
    transformer["position_table"] = (text, frames, *area)
    prompts = text // layout.tokens_per_prompt
    variant = find_variant(prompts, frames, transformer["layer_embedding"])
    if variant is None and not (prompts == 1 and not plan.adapters):
        raise LayerLoomError(
            f"{store.name} has LayerFlow's names but no published shape: {prompts} prompts, "
            f"{frames} latent frames, layer embedding "
            f"{'on' if transformer['layer_embedding'] else 'off'}; expected one of the eight "
            "released files."
        )
    name = variant.name if variant else _cogvideox_name(transformer)
    source = "layerflow-sat" if variant else "cogvideox-sat"
    info = _info(store, plan, name, source, transformer)
    return info, plan, _metadata(info, _published(variant, layout) if variant else {})


def _diffusers(store: TensorStore) -> tuple[CheckpointInfo, Plan, dict[str, Any]]:
    # Only the rotary models store a position table in this format; the others compute it.
    plan, config = plan_diffusers(store.specs), store.config or {}
    transformer = _keywords(store.name, store.specs)
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if config.get("use_rotary_positional_embeddings", dim == 3072):
        raise LayerLoomError(
            f"{store.name} is a CogVideoX with rotary positions (the 5B size), which the layered "
            "network does not use; give CogVideoX-2B."
        )
    transformer["output_norm_eps"] = 1e-5  # diffusers' own; the SAT code has 1e-6
    for key in ("spatial_interpolation_scale", "temporal_interpolation_scale"):
        if key in config:
            transformer[key] = float(config[key])
    name = _cogvideox_name(transformer)
    info = _info(store, plan, name, "cogvideox-diffusers", transformer)
    return info, plan, _metadata(info, {})


def _keywords(name: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """``LayeredTransformer`` keywords that shapes tell (all but the position table)."""
    blocks = {int(m[1]) for key in specs if (m := re.match(r"transformer_blocks\.(\d+)\.", key))}
    try:
        dim, channels, patch, across = specs["patch_embed.proj.weight"].shape
        head_dim = specs["transformer_blocks.0.attn1.norm_q.weight"].shape[0]
        out_rows = specs["proj_out.weight"].shape[0]
        keywords = {
            "num_layers": max(blocks) + 1,
            "num_attention_heads": dim // head_dim,
            "attention_head_dim": head_dim,
            "in_channels": channels,
            "out_channels": out_rows // patch**2,
            "time_embed_dim": specs["time_embedding.linear_1.weight"].shape[0],
            "text_embed_dim": specs["patch_embed.text_proj.weight"].shape[1],
            "patch_size": patch,
            "spatial_interpolation_scale": 1.875,
            "temporal_interpolation_scale": 1.0,
            "layer_embedding": "layer_embedding.proj.weight" in specs,
            "clean_embedding": False,
            "position_table": None,
        }
    except KeyError as error:
        raise LayerLoomError(
            f"{name} is incomplete: {error.args[0]} is missing; supported are {SUPPORTED}."
        ) from None
    except (ValueError, IndexError):
        raise LayerLoomError(
            f"{name} is another CogVideoX than the 2B one (its patches are cut differently); "
            f"supported are {SUPPORTED}."
        ) from None
    if patch != across or dim % head_dim or out_rows % patch**2:
        raise LayerLoomError(
            f"{name} has shapes that do not fit together (width {dim}, head width {head_dim}, "
            f"patch {patch}x{across}); supported are {SUPPORTED}."
        )
    return keywords


def _area(layout: TableLayout, patch: int) -> tuple[int, int]:
    return layout.latent_height // patch, layout.latent_width // patch


def _split_table(name: str, rows: int, layout: TableLayout, area: int) -> tuple[int, int]:
    """Text tokens and latent frames of a position table with ``rows`` rows."""
    texts = (
        [layout.text_length]
        if layout.text_length is not None
        else [prompts * layout.tokens_per_prompt for prompts in (3, 2, 1)]
    )
    for text in texts:
        if rows > text and (rows - text) % area == 0:
            return text, (rows - text) // area
    raise LayerLoomError(
        f"{name} has a position table of {rows} rows, which is not {' or '.join(map(str, texts))} "
        f"text tokens plus whole frames of {area} patches."
    )


def _cogvideox_name(transformer: Mapping[str, Any]) -> str:
    size = (transformer["num_layers"], transformer["num_attention_heads"])
    return "cogvideox-2b" if size == (30, 30) else "cogvideox"


def _info(
    store: TensorStore, plan: Plan, variant: str, source: str, transformer: dict[str, Any]
) -> CheckpointInfo:
    specs = {name: entry.spec(store) for name, entry in plan.transformer.items()}
    if not specs:
        raise LayerLoomError(f"{store.name} holds no transformer; supported are {SUPPORTED}.")
    kinds: Counter[str] = Counter()
    for spec in specs.values():
        kinds[str(spec.dtype).removeprefix("torch.")] += spec.bytes
    return CheckpointInfo(
        family="layered",
        variant=variant,
        source=source,
        transformer=transformer,
        parts=("transformer", *plan.parts),
        adapters={name: _rank(store, plan, name) for name in sorted(plan.adapters, reverse=True)},
        parameters=sum(spec.elements for name, spec in specs.items() if name != POSITIONS),
        bytes=store.size or sum(spec.bytes for spec in store.specs.values()),
        dtype=kinds.most_common(1)[0][0],
    )


def _rank(store: TensorStore, plan: Plan, adapter: str) -> int:
    for module, halves in plan.adapters[adapter].items():
        if set(halves) != {"A", "B"}:
            raise LayerLoomError(
                f"{store.name} is incomplete: the adapter {adapter!r} lacks one of its two "
                f"matrices for {module}."
            )
    return max(halves["A"].spec(store).shape[0] for halves in plan.adapters[adapter].values())


def _published(variant: LayerFlowVariant, layout: TableLayout) -> dict[str, Any]:
    """Metadata entries that only LayerFlow's files have; "sequence" is ``LayerSequence``'s."""
    return {
        "sequence": {
            "layers": list(variant.layers),
            "frames": variant.frames_per_layer,
            "temporal_factor": TEMPORAL_FACTOR,
            "duplicate_first_frame": variant.duplicate_first_frame,
            "decompose_latents": None,
        },
        "tasks": list(variant.tasks),
        "text": {"prompts": variant.prompts, "tokens_per_prompt": layout.tokens_per_prompt},
        "video": {
            "frames_per_second": FRAMES_PER_SECOND,
            "height": PIXEL_SIZE[0],
            "width": PIXEL_SIZE[1],
        },
    }


def _metadata(info: CheckpointInfo, published: Mapping[str, Any]) -> dict[str, Any]:
    """What ``convert`` writes for a published file (the entries are described in ``save``)."""
    table = info.transformer["position_table"]
    return {
        "format": FORMAT,
        "family": info.family,
        "variant": info.variant,
        "transformer": {**info.transformer, "position_table": list(table) if table else None},
        "vae": None,
        "text_encoder": None,
        "sequence": None,
        "sampling": SAMPLING,
        "adapters": {
            # LayerFlow's own convention: strength 1 adds B A / rank.
            name: {"rank": rank, "alpha": 1.0, "scale": ADAPTER_SCALES.get(name, 1.0)}
            for name, rank in info.adapters.items()
        },
        **published,
    }
