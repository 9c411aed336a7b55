"""Opens segmenters by their keys: segment-anything's published files and our own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LayerLoomError
from ..models.segmenter import CANDIDATES, PUBLISHED, SegmenterSettings, build_segmenter
from .detect import FORMAT, METADATA_KEY
from .reader import TensorStore, open_tensors
from .save import save_tensors

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

FAMILY = "segmenter"
# What every segment-anything has, whatever its image encoder.
MARKS = ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "mask_decoder.iou_token")
PATCHES = "image_encoder.patch_embed.proj.weight"
SUPPORTED = (
    "segment-anything's ViT-B, ViT-L and ViT-H files (sam_vit_b_01ec64.pth, say) and LayerLoom's "
    "own segmenter"
)


@dataclass(frozen=True)
class SegmenterInfo:
    """What a file is.

    Attributes:
        family: "segmenter".
        variant: "vit_b", "vit_l", "vit_h", "custom" (the same classes of another size), or the
            name in our own metadata.
        source: "segment-anything" or "layerloom".
        settings: fields of ``SegmenterSettings``.
        parameters: weights.
        bytes: size on disk.
        dtype: element type of most weights.
    """

    family: str
    variant: str
    source: str
    settings: dict[str, Any]
    parameters: int
    bytes: int
    dtype: str


def is_segmenter(store: TensorStore) -> bool:
    """Whether this is a segment-anything of some kind, supported or not."""
    return all(any(key.startswith(mark) for key in store.specs) for mark in MARKS)


def identify_segmenter(store: TensorStore) -> SegmenterInfo:
    """What a store is, by names and shapes.

    Raises:
        LayerLoomError: no segmenter, or one that segment-anything's classes cannot hold.
    """
    if not is_segmenter(store):
        raise LayerLoomError(
            f"{store.name} is not a segmenter: it holds none of segment-anything's weights; "
            f"supported are {SUPPORTED}."
        )
    own = METADATA_KEY in store.metadata
    if own:
        settings, variant = _own(store)
    else:
        settings = _from_shapes(store)
        variant = next((name for name, known in PUBLISHED.items() if known == settings), "custom")
    _check_shapes(store, settings)
    kinds: Counter[str] = Counter()
    for spec in store.specs.values():
        kinds[str(spec.dtype).removeprefix("torch.")] += spec.bytes
    return SegmenterInfo(
        family=FAMILY,
        variant=variant,
        source="layerloom" if own else "segment-anything",
        settings=asdict(settings),
        parameters=sum(spec.elements for spec in store.specs.values()),
        bytes=store.size or sum(spec.bytes for spec in store.specs.values()),
        dtype=kinds.most_common(1)[0][0],
    )


def load_segmenter(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Sam, SegmenterInfo]:
    """The network of a file, in float32 and ready to use.

    Raises:
        LayerLoomError: missing, damaged, or no segmenter.
    """
    store = open_tensors(path)
    info = identify_segmenter(store)
    with torch.device("meta"):
        network = build_segmenter(SegmenterSettings(**info.settings))
    state = {name: store.read(name).to(device, torch.float32) for name in store.specs}
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).to(device), info


def save_segmenter(
    path: str | Path,
    state: Mapping[str, torch.Tensor],
    settings: SegmenterSettings,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a segmenter in half precision with its settings inside.

    Raises:
        LayerLoomError: no such folder, no permission, or the disk is full.
    """
    content = {
        **(metadata or {}),
        "format": FORMAT,
        "family": FAMILY,
        "variant": "starter",
        "settings": asdict(settings),
    }
    half = {name: tensor.half() for name, tensor in state.items()}
    save_tensors(path, half, {METADATA_KEY: json.dumps(content)})


def _own(store: TensorStore) -> tuple[SegmenterSettings, str]:
    try:
        metadata = json.loads(store.metadata[METADATA_KEY])
        found, family, variant = (metadata[key] for key in ("format", "family", "variant"))
        if found == FORMAT and family == FAMILY:
            known = {field.name for field in fields(SegmenterSettings)}
            entries = {key: value for key, value in metadata["settings"].items() if key in known}
            return SegmenterSettings(**entries), str(variant)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LayerLoomError(
            f"{store.name} carries LayerLoom metadata that cannot be read; train or copy it again."
        ) from None
    raise LayerLoomError(
        f"{store.name} is LayerLoom format {found}, family {family!r}; this version reads format "
        f"{FORMAT}, family {FAMILY!r}: update LayerLoom."
    )


def _from_shapes(store: TensorStore) -> SegmenterSettings:
    """Settings that shapes tell; the mask decoder's heads are the published eight."""
    shapes = {name: spec.shape for name, spec in store.specs.items()}
    try:
        width, _, patch, _ = shapes[PATCHES]
        grid = shapes["image_encoder.pos_embed"][1]
        depth = _count(shapes, r"image_encoder\.blocks\.(\d+)\.")
        reach = [
            (shapes[f"image_encoder.blocks.{block}.attn.rel_pos_h"][0] + 1) // 2
            for block in range(depth)
        ]
        head = shapes["image_encoder.blocks.0.attn.rel_pos_h"][1]
        return SegmenterSettings(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=width // head,
            mlp=shapes["image_encoder.blocks.0.mlp.lin1.weight"][0],
            window=next((side for side in reach if side != grid), 0),
            global_blocks=tuple(block for block, side in enumerate(reach) if side == grid),
            channels=shapes["image_encoder.neck.0.weight"][0],
            mask_channels=4 * shapes["prompt_encoder.mask_downscaling.0.weight"][0],
            decoder_depth=_count(shapes, r"mask_decoder\.transformer\.layers\.(\d+)\."),
            decoder_mlp=shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
            score_depth=_count(shapes, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
            score_width=shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise LayerLoomError(
            f"{store.name} is a segment-anything with another image encoder or another format; "
            f"supported are {SUPPORTED}."
        ) from None


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _check_shapes(store: TensorStore, settings: SegmenterSettings) -> None:
    try:
        with torch.device("meta"):
            expected = build_segmenter(settings).state_dict()
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise LayerLoomError(
            f"{store.name} has sizes that do not fit together; download or copy it again."
        ) from error
    for name in sorted(set(expected) | set(store.specs)):
        if name not in store.specs:
            raise LayerLoomError(f"{store.name} is incomplete: {name} is missing; copy it again.")
        if name not in expected:
            raise LayerLoomError(
                f"{store.name} holds weights that segment-anything does not have, such as {name}; "
                f"supported are {SUPPORTED}."
            )
        found, wanted = store.specs[name].shape, tuple(expected[name].shape)
        if found != wanted:
            raise LayerLoomError(
                f"{store.name} has {name} of shape {list(found)} where {list(wanted)} belongs "
                f"({CANDIDATES} candidates); supported are {SUPPORTED}."
            )
