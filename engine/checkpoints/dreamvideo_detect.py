"""Says what a checkpoint of the DreamVideo-2 family is: its base, ModelScope's, or one of ours.

Nothing was published under the paper's name, so the whole network exists in our own format alone:
with its base inside, or as additions that stand on a base in a second file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LayerLoomError
from ..models.dreamvideo import TrajectorySettings
from .bases import joined, of_base
from .detect import FORMAT, METADATA_KEY
from .dreamvideo_names import find
from .identified import (
    Identified,
    Plan,
    plan_parts,
    read_stated,
    stated,
    unet_from_json,
    unread,
)
from .reader import TensorStore

FAMILY = "dreamvideo"
ADDITIONS = ("reference", "box_encoder", "control")
NETWORKS = ("unet", *ADDITIONS)
AROUND = ("vae", "text_encoder")
PARTS = (*NETWORKS, *AROUND)
BASE_NAME = "modelscope"
BASE = "ModelScope's text-to-video weights, a file or a folder"


@dataclass(frozen=True)
class TrajectoryInfo:
    """What a checkpoint is.

    Attributes:
        family: "dreamvideo".
        variant: "modelscope" for the base alone, or the name in our own metadata.
        source: whose names it is stored under: "modelscope" (the original names), "diffusers" or
            "layerloom".
        needs_base: the file holds additions alone and stands on a base.
        reference: whether it reads subjects' pictures.
        control: ``BoxEncoder`` keywords, or None where it reads no boxes.
        parts: what is inside: "unet", "reference", "box_encoder", "control", "vae",
            "text_encoder".
        unet: constructor keywords of ``VideoUNet``.
        parameters: weights of the networks that are inside.
        bytes: size on disk.
        dtype: element type of most of them.
        ignored: stored tensors that nothing here reads.
    """

    family: str
    variant: str
    source: str
    needs_base: bool
    reference: bool
    control: dict[str, Any] | None
    parts: tuple[str, ...]
    unet: dict[str, Any]
    parameters: int
    bytes: int
    dtype: str
    ignored: int = 0


def is_dreamvideo(store: TensorStore) -> bool:
    """Whether a store is one of these checkpoints, by keys or by our own metadata."""
    if METADATA_KEY in store.metadata:
        return stated(store).get("family") == FAMILY
    return find(store) is not None


def identify(store: TensorStore, base: TensorStore | None = None) -> Identified:
    """What a store is; ``base`` holds the weights that a file of additions stands on.

    With a base the plan's sources are those of ``bases.joined(store, base)``.

    Raises:
        LayerLoomError: no such checkpoint, or a base that does not fit.
    """
    if METADATA_KEY in store.metadata and is_dreamvideo(store):
        return _own(store, base)
    found = None if METADATA_KEY in store.metadata else find(store)
    if found is None:
        raise LayerLoomError(
            f"{store.name} is no checkpoint that moves subjects along boxes: it has no UNet like "
            "that of ModelScope's text-to-video; give its weights to train on, or a file that "
            "LayerLoom wrote."
        )
    settings = TrajectorySettings(name=BASE_NAME)
    plan: Plan = {"unet": found.plan}
    metadata = own_metadata(settings, found.unet, False, None)
    info = _info(store, plan, metadata, found.source, found.left_over, False)
    return Identified(info, settings, metadata, plan, found.left_over)


def _own(store: TensorStore, base: TensorStore | None) -> Identified:
    def read(metadata: dict[str, Any]) -> tuple[dict[str, Any], TrajectorySettings]:
        made = {**metadata, "unet": unet_from_json(metadata["unet"])}
        made["reference"] = bool(metadata["reference"])
        if metadata["control"] is not None:
            made["control"] = dict(metadata["control"])
            made["control"]["widths"] = tuple(metadata["control"]["widths"])
        return made, TrajectorySettings(**metadata["settings"])

    metadata, settings = read_stated(store, read)
    plan, left_over = plan_parts(store, PARTS)
    needs_base = "unet" not in plan
    whole = store
    if needs_base and base is not None:
        under = identify(base)
        if under.metadata["unet"] != metadata["unet"] or "unet" not in under.plan:
            raise LayerLoomError(
                f"{base.name} is not what {store.name} stands on; give {BASE}, the one that it "
                "was trained on."
            )
        whole, needs_base = joined(store, base), False
        for part in ("unet", *AROUND):
            if part in under.plan and part not in plan:
                plan[part] = {name: of_base(s) for name, s in under.plan[part].items()}
                metadata[part] = under.metadata[part]
    info = _info(whole, plan, metadata, "layerloom", left_over, needs_base)
    return Identified(info, settings, metadata, plan, left_over)


def _info(
    store: TensorStore,
    plan: Plan,
    metadata: Mapping[str, Any],
    source: str,
    left_over: tuple[str, ...],
    needs_base: bool,
) -> TrajectoryInfo:
    specs = [s.spec(store) for part in NETWORKS for s in plan.get(part, {}).values()]
    kinds: Counter[str] = Counter()
    for spec in specs:
        kinds[str(spec.dtype).removeprefix("torch.")] += spec.bytes
    if not kinds:
        raise LayerLoomError(f"{store.name} holds no networks; download or convert it again.")
    return TrajectoryInfo(
        family=FAMILY,
        variant=metadata["settings"]["name"],
        source=source,
        needs_base=needs_base,
        reference=metadata["reference"],
        control=metadata["control"],
        parts=tuple(part for part in PARTS if part in plan),
        unet=metadata["unet"],
        parameters=sum(spec.elements for spec in specs),
        bytes=store.size or sum(spec.bytes for spec in store.specs.values()),
        dtype=kinds.most_common(1)[0][0],
        ignored=len(unread(store, plan) - set(left_over)),
    )


def own_metadata(
    settings: TrajectorySettings,
    unet: Mapping[str, Any],
    reference: bool,
    control: Mapping[str, Any] | None,
    **parts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What our own files say of themselves.

    ``reference`` and ``control`` are ``DreamVideo``'s keywords; ``parts`` the settings of "vae" and
    "text_encoder" as their builders take them, where None, or left out, is ModelScope's.
    """
    return {
        "format": FORMAT,
        "family": FAMILY,
        "settings": asdict(settings),
        "unet": dict(unet),
        "reference": reference,
        "control": None if control is None else dict(control),
        **{part: parts.get(part) for part in AROUND},
    }
