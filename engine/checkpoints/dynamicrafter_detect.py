"""Says what a DynamiCrafter checkpoint is from its keys and shapes, or from our own metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LayerLoomError
from ..models.dynamicrafter import VARIANTS, Variant
from . import dynamicrafter_names as names
from .detect import FORMAT, METADATA_KEY
from .identified import (
    Identified,
    Plan,
    plan_parts,
    read_stated,
    stated,
    unet_figures,
    unet_from_json,
    unread,
)
from .names import TensorSource
from .reader import TensorSpec, TensorStore
from .video_names import FIRST, plan_unet, unet_keywords

FAMILY = "dynamicrafter"
UNET_PREFIX = "model.diffusion_model."
# The networks this project runs, and the others a file may hold.
NETWORKS = ("unet", "image_projector")
PARTS = (*NETWORKS, "vae", "text_encoder", "image_encoder")
# Tells DynamiCrafter's UNet from its kin: the image stream, in the middle block of all sizes.
MARK = "middle_block.1.transformer_blocks.0.attn2.to_k_ip.weight"


@dataclass(frozen=True)
class DynamiCrafterInfo:
    """What a checkpoint is.

    Attributes:
        family: "dynamicrafter".
        variant: the published variant, or the name in our own metadata.
        variants: all published variants the file may be: 512, 1024 and 512_interp share every
            shape, and only the official files say more (their dynamic rescale).
        source: "dynamicrafter" (published names) or "layerloom".
        parts: what is inside: "unet", and of "image_projector", "vae", "text_encoder" and
            "image_encoder" what there is.
        unet, image_projector: constructor keywords of ``VideoUNet`` and ``QueryTransformer``.
        parameters: weights of the UNet.
        bytes: size on disk.
        dtype: element type of most UNet weights, such as "float16".
        ignored: stored tensors that nothing here reads.
    """

    family: str
    variant: str
    variants: tuple[str, ...]
    source: str
    parts: tuple[str, ...]
    unet: dict[str, Any]
    image_projector: dict[str, Any] | None
    parameters: int
    bytes: int
    dtype: str
    ignored: int = 0


def is_dynamicrafter(store: TensorStore) -> bool:
    """Whether a store is one of these checkpoints, by keys or by our own metadata."""
    if METADATA_KEY in store.metadata:
        return stated(store).get("family") == FAMILY
    return _unet_prefix(store.specs) is not None


def identify(store: TensorStore, variant: str | None = None) -> Identified:
    """What a store is; ``variant`` says which where its shapes leave that open.

    Raises:
        LayerLoomError: not a DynamiCrafter checkpoint, or not of that variant.
    """
    if METADATA_KEY in store.metadata and is_dynamicrafter(store):
        return _own(store, variant)
    prefix = _unet_prefix(store.specs)
    if prefix is None:
        raise LayerLoomError(
            f"{store.name} is no DynamiCrafter checkpoint: it has no video UNet with an image "
            "stream (middle_block...attn2.to_k_ip); give an official model.ckpt, a pruned "
            ".safetensors or a file that `layerloom convert` wrote."
        )
    return _published(store, prefix, variant)


def _unet_prefix(keys: Mapping[str, TensorSpec]) -> str | None:
    """What stands before the UNet's names, or None where there is none with an image stream."""
    for key in keys:
        if key.endswith(MARK):
            prefix = key.removesuffix(MARK)
            if prefix + FIRST in keys:
                return prefix
    return None


def _published(store: TensorStore, prefix: str, wanted: str | None) -> Identified:
    specs = {k.removeprefix(prefix): s for k, s in store.specs.items() if k.startswith(prefix)}
    unet = unet_keywords(store.name, specs)
    # DeepSpeed puts a prefix of its own before all parts' names.
    outer = prefix.removesuffix(UNET_PREFIX)
    variant, candidates = _choose(store, outer, unet["image_gate"], wanted)
    plan: Plan = {}
    plan["unet"], left_over = plan_unet(store.specs, prefix, unet)
    projector, unknown = names.plan_projector(store.specs, outer)
    keywords = None
    if projector:
        plan["image_projector"] = projector
        left_over += unknown
        keywords = _projector_keywords(store, projector, unet)
        unet["image_tokens_per_frame"] = keywords["queries"] // variant.frames
    for part, planner in (
        ("vae", names.plan_vae),
        ("text_encoder", names.plan_text),
        ("image_encoder", names.plan_image),
    ):
        found, unknown = planner(store.specs, outer)
        # Another autoencoder, such as ToonCrafter's, shares some names and is not this one.
        if found and not unknown:
            plan[part] = found
    info = _info(store, plan, variant.name, candidates, FAMILY, unet, keywords, left_over)
    metadata = own_metadata(variant, unet, keywords)
    return Identified(info, variant, metadata, plan, tuple(left_over))


def _choose(
    store: TensorStore, outer: str, gate: bool, wanted: str | None
) -> tuple[Variant, tuple[str, ...]]:
    """The variant, and all that the file may be."""
    fitting = [v for v in VARIANTS.values() if v.image_gate == gate]
    table = outer + "scale_arr"
    if table in store.specs:
        spec = store.specs[table]
        base = float(store.read(table)[-1]) if spec.elements else None
        # The official files keep the dynamic rescale's table; its end is the base.
        exact = [v for v in fitting if v.rescale_base and abs(v.rescale_base - base) < 1e-3]
        fitting = exact or fitting
    candidates = tuple(v.name for v in fitting)
    if wanted is None:
        return fitting[0], candidates
    if wanted not in VARIANTS:
        raise LayerLoomError(
            f"{wanted!r} is no DynamiCrafter variant; give one of {', '.join(VARIANTS)}."
        )
    if wanted not in candidates:
        raise LayerLoomError(
            f"{store.name} is not DynamiCrafter {wanted}: its weights are those of "
            f"{' or '.join(candidates)}."
        )
    return VARIANTS[wanted], (wanted,)


def _projector_keywords(
    store: TensorStore, projector: Mapping[str, TensorSource], unet: Mapping[str, Any]
) -> dict[str, Any]:
    """``QueryTransformer`` keywords that shapes tell."""
    specs = {name: source.spec(store) for name, source in projector.items()}
    try:
        _, queries, dim = specs["latents"].shape
        inner = specs["layers.0.attn.to_q.weight"].shape[0]
        # The heads are in no shape: 64 wide as released, or as wide as the UNet's.
        head_dim = 64 if inner % 64 == 0 and unet["head_dim"] == 64 else unet["head_dim"]
        return {
            "dim": dim,
            "depth": len({name.split(".")[1] for name in specs if name.startswith("layers.")}),
            "heads": inner // head_dim,
            "head_dim": head_dim,
            "queries": queries,
            "in_dim": specs["proj_in.weight"].shape[1],
            "out_dim": specs["proj_out.weight"].shape[0],
            "mlp_ratio": specs["layers.0.ff.1.net.0.proj.weight"].shape[0] // dim,
        }
    except (KeyError, ValueError) as error:
        raise LayerLoomError(
            f"{store.name} is incomplete: its image projector lacks {error.args[0]}."
        ) from None


def _own(store: TensorStore, wanted: str | None) -> Identified:
    def read(metadata: dict[str, Any]) -> tuple[dict[str, Any], Variant, dict[str, Any], Any]:
        stored = dict(metadata["variant"])
        stored["speed_range"] = tuple(stored["speed_range"])
        unet = unet_from_json(metadata["unet"])
        return metadata, Variant(**stored), unet, metadata["image_projector"]

    metadata, variant, unet, projector = read_stated(store, read)
    if wanted not in (None, variant.name):
        raise LayerLoomError(
            f"{store.name} says it is {variant.name}, not {wanted}; leave the variant out or "
            "convert the original again."
        )
    plan, left_over = plan_parts(store, PARTS)
    info = _info(
        store, plan, variant.name, (variant.name,), "layerloom", unet, projector, left_over
    )
    return Identified(info, variant, metadata, plan, left_over)


def _info(
    store: TensorStore,
    plan: Plan,
    variant: str,
    candidates: tuple[str, ...],
    source: str,
    unet: dict[str, Any],
    projector: dict[str, Any] | None,
    left_over: Sequence[str],
) -> DynamiCrafterInfo:
    return DynamiCrafterInfo(
        family=FAMILY,
        variant=variant,
        variants=candidates,
        source=source,
        parts=tuple(part for part in PARTS if part in plan),
        unet=unet,
        image_projector=projector,
        ignored=len(unread(store, plan) - set(left_over)),
        **unet_figures(store, plan),
    )


def own_metadata(
    variant: Variant,
    unet: Mapping[str, Any],
    image_projector: Mapping[str, Any] | None,
    **parts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What our own files say of themselves.

    ``parts`` are the settings of "vae", "text_encoder" and "image_encoder" as their builders take
    them; None, or left out, is the published one.
    """
    return {
        "format": FORMAT,
        "family": FAMILY,
        "variant": asdict(variant),
        "unet": dict(unet),
        "image_projector": None if image_projector is None else dict(image_projector),
        **{part: parts.get(part) for part in PARTS if part not in NETWORKS},
    }
