"""Opens DynamiCrafter checkpoints: the official files, pruned ones, and LayerLoom's own.

Detected from keys and shapes: the UNet behind ``model.diffusion_model.`` (or bare, or as DeepSpeed
leaves it), with query transformer, autoencoder and CLIP encoders where they are inside. ToonCrafter
and CIL files share the UNet's and the query transformer's names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.dynamicrafter import VARIANTS, DynamiCrafter, Variant
from . import dynamicrafter_names as names
from .detect import FORMAT, METADATA_KEY
from .names import TensorSource
from .reader import TensorSpec, TensorStore, open_tensors
from .video_names import FIRST, plan_unet, unet_keywords

FAMILY = "dynamicrafter"
UNET_PREFIX = "model.diffusion_model."
# The networks this project runs, and the others a file may hold.
NETWORKS = ("unet", "image_projector")
PARTS = (*NETWORKS, "vae", "text_encoder", "image_encoder")
# Tells DynamiCrafter's UNet from its kin: the image stream, in the middle block of all sizes.
MARK = "middle_block.1.transformer_blocks.0.attn2.to_k_ip.weight"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Constructor keywords that JSON turns into lists.
TUPLES = ("block_channels", "attention_levels", "scalar_embeddings")


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


@dataclass(frozen=True)
class DynamiCrafterCheckpoint:
    """An open checkpoint; tensors are read when asked for.

    Attributes:
        info: what it is.
        variant: what it was trained and is sampled with.
        metadata: settings in our own format's shape, made up for published files.
        store: the stored tensors.
        plan: part -> engine name -> where it comes from.
        left_over: stored names of the UNet or projector that the engine does not know.
    """

    info: DynamiCrafterInfo
    variant: Variant
    metadata: dict[str, Any]
    store: TensorStore
    plan: dict[str, dict[str, TensorSource]]
    left_over: tuple[str, ...] = ()

    def iter_part(
        self, part: str, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Engine name and tensor of a part, one at a time, with memory of their own.

        ``dtype`` None keeps the stored types.

        Raises:
            LayerLoomError: the file holds no such part.
        """
        if part not in self.plan:
            raise LayerLoomError(
                f"{self.store.name} holds no {part.replace('_', ' ')}; name its file or folder."
            )
        store = self.store.owned()
        for name, source in self.plan[part].items():
            tensor = source.read(store).to(dtype)
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensor = tensor.clone()  # a piece would keep the whole of it
            yield name, tensor

    def part_state(self, part: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """``iter_part`` at once."""
        return dict(self.iter_part(part, dtype))

    def check(self) -> None:
        """Compare every name and shape with the networks' own, on the meta device.

        Raises:
            LayerLoomError: something is missing, left over or of another shape.
        """
        self._compare(self._build("meta", None, None))

    def _build(self, device: Any, dtype: torch.dtype | None, operations: Any) -> DynamiCrafter:
        try:
            return DynamiCrafter(
                unet=self.info.unet,
                image_projector=self.info.image_projector,
                device=device,
                dtype=dtype,
                operations=operations,
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise LayerLoomError(
                f"{self.store.name} describes a network this version cannot build ({error})."
            ) from error

    def _compare(self, network: DynamiCrafter) -> None:
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        found = {
            f"{part}.{name}": source.spec(self.store).shape
            for part in NETWORKS
            for name, source in self.plan.get(part, {}).items()
        }
        for problem, keys in (
            ("is missing", sorted(expected.keys() - found.keys())),
            (
                "is not part of the network",
                [*self.left_over, *sorted(found.keys() - expected.keys())],
            ),
            (
                "has an unexpected shape",
                [name for name in found if found[name] != expected.get(name, found[name])],
            ),
        ):
            if keys:
                more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
                raise LayerLoomError(
                    f"{self.store.name} looks like DynamiCrafter {self.info.variant} "
                    f"({self.info.source}) but {keys[0]} {problem}{more}; the file is incomplete "
                    "or of another version."
                )


def is_dynamicrafter(store: TensorStore) -> bool:
    """Whether a store is one of these checkpoints, by keys or by our own metadata."""
    if METADATA_KEY in store.metadata:
        return _own_metadata(store).get("family") == FAMILY
    return _unet_prefix(store.specs) is not None


def open_dynamicrafter(path: str | Path, variant: str | None = None) -> DynamiCrafterCheckpoint:
    """Open a checkpoint of any supported format.

    Args:
        path: the file.
        variant: which published variant it is, where its shapes leave that open.

    Raises:
        LayerLoomError: not a DynamiCrafter checkpoint, or not of that variant.
    """
    return from_store(open_tensors(path), variant)


def from_store(store: TensorStore, variant: str | None = None) -> DynamiCrafterCheckpoint:
    """The same over tensors that are already open."""
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


def load_dynamicrafter(
    checkpoint: DynamiCrafterCheckpoint | str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
) -> DynamiCrafter:
    """The networks with a checkpoint's weights, in eval mode; memory peaks at about one copy.

    Args:
        checkpoint: an open checkpoint, or its path.
        device, dtype: where and as what the weights end up; dtype None keeps the stored types,
            except that 8-bit floats, which torch does not compute with, become bfloat16.
        operations: the namespace layers are built from (``torch.nn`` when None).

    Raises:
        LayerLoomError: unknown file, or names and shapes that do not fit the network.
    """
    if not isinstance(checkpoint, DynamiCrafterCheckpoint):
        checkpoint = open_dynamicrafter(checkpoint)
    if dtype is None and getattr(torch, checkpoint.info.dtype) in FP8:
        dtype = torch.bfloat16
    network = checkpoint._build("meta", dtype, operations)
    checkpoint._compare(network)
    state = {
        f"{part}.{name}": tensor.to(device)
        for part in NETWORKS
        if part in checkpoint.plan
        for name, tensor in checkpoint.iter_part(part, dtype)
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


def _unet_prefix(keys: Mapping[str, TensorSpec]) -> str | None:
    """What stands before the UNet's names, or None where there is none with an image stream."""
    for key in keys:
        if key.endswith(MARK):
            prefix = key.removesuffix(MARK)
            if prefix + FIRST in keys:
                return prefix
    return None


def _published(store: TensorStore, prefix: str, variant: str | None) -> DynamiCrafterCheckpoint:
    specs = {k.removeprefix(prefix): s for k, s in store.specs.items() if k.startswith(prefix)}
    unet = unet_keywords(store.name, specs)
    plan: dict[str, dict[str, TensorSource]] = {}
    plan["unet"], left_over = plan_unet(store.specs, prefix, unet)
    # DeepSpeed puts a prefix of its own before all parts' names.
    outer = prefix.removesuffix(UNET_PREFIX)
    projector, unknown = names.plan_projector(store.specs, outer)
    if projector:
        plan["image_projector"] = projector
        left_over += unknown
    for part, planner in (
        ("vae", names.plan_vae),
        ("text_encoder", names.plan_text),
        ("image_encoder", names.plan_image),
    ):
        found, unknown = planner(store.specs, outer)
        # Another autoencoder, such as ToonCrafter's, shares some names and is not this one.
        if found and not unknown:
            plan[part] = found
    chosen, candidates = _choose(store, outer, unet["image_gate"], variant)
    keywords = _projector_keywords(store, projector, unet) if projector else None
    if keywords:
        unet["image_tokens_per_frame"] = keywords["queries"] // chosen.frames
    return _assemble(
        store, plan, chosen, candidates, "dynamicrafter", unet, keywords, None, tuple(left_over)
    )


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


def _own_metadata(store: TensorStore) -> dict[str, Any]:
    try:
        metadata = json.loads(store.metadata[METADATA_KEY])
    except (ValueError, TypeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _own(store: TensorStore, wanted: str | None) -> DynamiCrafterCheckpoint:
    metadata = _own_metadata(store)
    if metadata.get("format") != FORMAT:
        raise LayerLoomError(
            f"{store.name} is LayerLoom format {metadata.get('format')}; this version reads "
            f"format {FORMAT}: update LayerLoom."
        )
    try:
        stored = dict(metadata["variant"])
        stored["speed_range"] = tuple(stored["speed_range"])
        variant = Variant(**stored)
        unet, projector = dict(metadata["unet"]), metadata["image_projector"]
        unet |= {key: tuple(unet[key]) for key in TUPLES if key in unet}
    except (KeyError, TypeError, ValueError):
        raise LayerLoomError(
            f"{store.name} carries LayerLoom metadata that cannot be read; "
            "save or convert it again."
        ) from None
    if wanted not in (None, variant.name):
        raise LayerLoomError(
            f"{store.name} says it is {variant.name}, not {wanted}; leave the variant out or "
            "convert the original again."
        )
    plan: dict[str, dict[str, TensorSource]] = {}
    left_over = []
    for key in store.specs:
        part, _, name = key.partition(".")
        if part in PARTS:
            plan.setdefault(part, {})[name] = TensorSource(key)
        else:
            left_over.append(key)
    return _assemble(
        store,
        plan,
        variant,
        (variant.name,),
        "layerloom",
        unet,
        projector,
        metadata,
        tuple(left_over),
    )


def _assemble(
    store: TensorStore,
    plan: dict[str, dict[str, TensorSource]],
    variant: Variant,
    candidates: tuple[str, ...],
    source: str,
    unet: dict[str, Any],
    projector: dict[str, Any] | None,
    metadata: dict[str, Any] | None,
    left_over: tuple[str, ...],
) -> DynamiCrafterCheckpoint:
    specs = [entry.spec(store) for entry in plan.get("unet", {}).values()]
    kinds: Counter[str] = Counter()
    for spec in specs:
        kinds[str(spec.dtype).removeprefix("torch.")] += spec.bytes
    if not kinds:
        raise LayerLoomError(f"{store.name} holds no video UNet; download or convert it again.")
    read = {entry.key for entries in plan.values() for entry in entries.values()}
    info = DynamiCrafterInfo(
        family=FAMILY,
        variant=variant.name,
        variants=candidates,
        source=source,
        parts=tuple(part for part in PARTS if part in plan),
        unet=unet,
        image_projector=projector,
        parameters=sum(spec.elements for spec in specs),
        bytes=store.size or sum(spec.bytes for spec in store.specs.values()),
        dtype=kinds.most_common(1)[0][0],
        ignored=len(store.specs.keys() - read - set(left_over)),
    )
    made = metadata or own_metadata(variant, unet, projector)
    return DynamiCrafterCheckpoint(info, variant, made, store, plan, left_over)


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
