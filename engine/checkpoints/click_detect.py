"""Says what a checkpoint for animating regions is: Follow-Your-Click, AnimateDiff, PIA, or ours.

Told from keys and shapes, or from our own metadata. Files of motion modules alone, and PIA's, stand
on Stable Diffusion 1.5, whose weights come from a second file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import LayerLoomError
from ..models.follow_your_click import VERSIONS, ClickSettings
from . import click_names as names
from .bases import joined, of_base
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
from .reader import TensorStore

FAMILY = "follow-your-click"
PARTS = ("unet", "vae", "text_encoder")
BASE = "Stable Diffusion 1.5's weights, a file or a folder"

# What the files are sampled with. AnimateDiff's own inference files give the noise schedule.
PUBLISHED = {
    "follow-your-click": ClickSettings(),
    "pia": ClickSettings(
        name="pia",
        picture="all",
        mask="affinity",
        prediction="eps",
        zero_terminal_snr=False,
        positions=32,
        steps=25,
    ),
    "animatediff": ClickSettings(
        name="animatediff",
        picture="none",
        mask="none",
        prediction="eps",
        zero_terminal_snr=False,
        steps=25,
    ),
    "stable-diffusion": ClickSettings(
        name="stable-diffusion",
        picture="none",
        mask="none",
        prediction="eps",
        zero_terminal_snr=False,
        betas="scaled",
        frames=1,
        positions=1,
    ),
}


@dataclass(frozen=True)
class ClickInfo:
    """What a checkpoint is.

    Attributes:
        family: "follow-your-click".
        variant: "follow-your-click", "pia", "animatediff-v1" (v2, v3), "stable-diffusion", or the
            name in our own metadata.
        source: whose names it is stored under: "follow-your-click", "animatediff" (the original
            names), "diffusers", "stable-diffusion" (the original names) or "layerloom".
        motion: version of the motion modules, "" where there are none.
        reading: where picture and mask go: "code", "paper" or "own"; "" where they do not.
        needs_base: the file holds no whole network and stands on Stable Diffusion 1.5.
        parts: what is inside: "unet", "vae", "text_encoder".
        unet: constructor keywords of ``VideoUNet``; empty where a base is needed.
        parameters: weights of the UNet that are inside.
        bytes: size on disk.
        dtype: element type of most UNet weights.
        ignored: stored tensors that nothing here reads.
    """

    family: str
    variant: str
    source: str
    motion: str
    reading: str
    needs_base: bool
    parts: tuple[str, ...]
    unet: dict[str, Any]
    parameters: int
    bytes: int
    dtype: str
    ignored: int = 0


def is_click(store: TensorStore) -> bool:
    """Whether a store is one of these checkpoints, or the Stable Diffusion 1.5 they stand on."""
    if METADATA_KEY in store.metadata:
        return stated(store).get("family") == FAMILY
    return names.find(store) is not None


def identify(store: TensorStore, base: TensorStore | None = None) -> Identified:
    """What a store is; ``base`` holds the weights that a file of motion modules stands on.

    With a base the plan's sources are those of ``bases.joined(store, base)``.

    Raises:
        LayerLoomError: no such checkpoint, or a base that does not fit.
    """
    if METADATA_KEY in store.metadata and is_click(store):
        return _own(store)
    found = names.find(store)
    if found is None:
        raise LayerLoomError(
            f"{store.name} is no checkpoint that animates regions: it has neither motion modules "
            "nor Stable Diffusion 1.5's UNet; give Follow-Your-Click's, AnimateDiff's or PIA's "
            "file, or one that LayerLoom wrote."
        )
    sources, origin = dict(found.unet), store
    parts = dict(found.parts)
    if base is not None and not found.complete:
        under = names.find(base)
        if under is None or not under.complete or under.kind != "stable-diffusion":
            raise LayerLoomError(f"{base.name} is not what {store.name} stands on; give {BASE}.")
        origin = joined(store, base)
        below = {name: of_base(source) for name, source in under.unet.items()}
        sources = {**below, **sources}
        parts = {
            part: {name: of_base(source) for name, source in entries.items()}
            for part, entries in under.parts.items()
        }
    complete = found.complete or base is not None
    specs = {name: source.spec(origin) for name, source in sources.items()}
    unet = names.unet_keywords(store.name, specs) if complete else {}
    version, positions = _version(found)
    settings = PUBLISHED[found.kind]
    if found.kind == "follow-your-click":
        unet["norm_over_frames"] = True
    if version:
        settings = replace(settings, positions=positions)
    if found.kind == "animatediff":
        settings = replace(settings, name=f"animatediff-{version}")
    plan: Plan = {"unet": sources, **parts}
    info = _info(origin, plan, settings, found.source, version, unet, not complete)
    metadata = {**own_metadata(settings, unet), "motion": version}
    return Identified(info, settings, metadata, plan, ())


def _version(found: names.Found) -> tuple[str, int]:
    """Version of the motion modules and their positions; "" where there are none."""
    if not any(".motion_modules." in name for name in found.unet):
        return "", 1
    middle = any(name.startswith("mid_block.motion_modules.") for name in found.unet)
    for version, (has_middle, length) in VERSIONS.items():
        if middle == has_middle and found.positions in (None, length):
            return version, length
    return ("v2" if middle else "v1"), found.positions


def _own(store: TensorStore) -> Identified:
    def read(metadata: dict[str, Any]) -> tuple[dict[str, Any], ClickSettings, dict[str, Any]]:
        stored = dict(metadata["settings"])
        stored["strength_range"] = tuple(stored["strength_range"])
        return metadata, ClickSettings(**stored), unet_from_json(metadata["unet"])

    metadata, settings, unet = read_stated(store, read)
    plan, left_over = plan_parts(store, PARTS)
    motion = unet.get("motion_modules") or {}
    version = str(metadata.get("motion", "v2" if motion.get("middle") else "v1" if motion else ""))
    info = _info(store, plan, settings, "layerloom", version, unet, False)
    return Identified(info, settings, metadata, plan, left_over)


def _info(
    store: TensorStore,
    plan: Plan,
    settings: ClickSettings,
    source: str,
    version: str,
    unet: dict[str, Any],
    needs_base: bool,
) -> ClickInfo:
    return ClickInfo(
        family=FAMILY,
        variant=settings.name,
        source=source,
        motion=version,
        reading=settings.reading if settings.reads_regions else "",
        needs_base=needs_base,
        parts=tuple(part for part in PARTS if part in plan),
        unet=unet,
        ignored=len(unread(store, plan)),
        **unet_figures(store, plan),
    )


def own_metadata(
    settings: ClickSettings, unet: Mapping[str, Any], **parts: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What our own files say of themselves.

    ``parts`` are the settings of "vae" and "text_encoder" as their builders take them; None, or
    left out, is Stable Diffusion 1.5's.
    """
    return {
        "format": FORMAT,
        "family": FAMILY,
        "settings": asdict(settings),
        "unet": dict(unet),
        **{part: parts.get(part) for part in PARTS[1:]},
    }
