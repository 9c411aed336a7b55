"""A person's folder of captioned clips for regions: what moves, and how strongly, by optical flow.

As ``clip_folder``; a line of ``captions.jsonl`` may hold a short "phrase" beside its "caption".
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...conditioning.encoders import TextFeatures
from ...conditioning.flow import RaftFlow, motion_mask, motion_strength
from ...errors import LayerLoomError
from ...models.follow_your_click import ClickSettings, latent_mask
from ..click_world import strength_of
from ..settings import settings_from
from .cache import cache_folder
from .click_sprites import ClickBatch
from .clip_folder import CaptionedClips, ClipFolder, ClipPlan, Piece, filled, plan_clips
from .clips import ClipParts
from .source import Pick

TEXTS = ("caption", "phrase")
# What stands for a strength of 0 in a label, whose zeros are outside of the mask.
_LEAST = 2.0**-10


class FlowLabels:
    """A piece's motion mask and strength in one picture: the strength inside, 0 outside.

    factor: pixels a latent position stands for, a side.
    """

    def __init__(self, raft: RaftFlow, factor: int):
        self.raft, self.model, self.factor = raft, raft.network, factor

    def label(self, pixels: torch.Tensor) -> torch.Tensor:
        """[h, w] of a piece [T, 3, H, W] in [-1, 1], as the paper labels its clips."""
        flow = self.raft.flow((pixels + 1) / 2).cpu()
        moving = motion_mask(flow)
        mean = motion_strength(flow, moving.float())
        strength = strength_of(float(mean), min(flow.shape[-2:]), len(flow))
        sides = tuple(side // self.factor for side in flow.shape[-2:])
        return latent_mask(moving.float(), sides) * max(strength, _LEAST)


class ClickFolder(ClipFolder):
    """Latents, texts and motion of a folder's pieces, made once."""

    def __init__(
        self,
        settings: CaptionedClips,
        plan: ClipPlan,
        parts: ClipParts,
        cache: Path,
    ):
        super().__init__(settings, plan, parts, cache)
        with torch.no_grad():
            self.empty = parts.text.encode([""])[0].cpu()

    def load(self, picks: Sequence[Pick]) -> ClickBatch:
        """What the picks stand for; a clip without a phrase is given its caption twice."""
        pieces = [self.plan.pieces[pick.index] for pick in picks]
        texts: dict[str, list[torch.Tensor]] = {name: [] for name in TEXTS}
        for pick, piece in zip(picks, pieces, strict=True):
            written, rng = self.plan.captions[piece.name].texts, random.Random(pick.wording)
            caption = rng.choice(written["caption"])
            phrase = rng.choice(written["phrase"]) if "phrase" in written else caption
            for name, text in zip(TEXTS, (caption, phrase), strict=True):
                texts[name].append(self._texts.read(text))
        labels = torch.stack([self._images.read(piece) for piece in pieces]).float()
        return ClickBatch(
            torch.stack([self._latents.read(piece) for piece in pieces]),
            torch.stack(texts["caption"]),
            torch.stack(texts["phrase"]),
            (labels > 0).float()[:, None],
            labels.flatten(1).amax(1),
        )

    def _looked_at(self, piece: Piece, pixels: torch.Tensor) -> torch.Tensor:
        return self.parts.image.label(pixels)


def open_click_folder(
    table: Mapping[str, Any], parts: ClipParts, text: TextFeatures
) -> ClickFolder:
    """Check a folder and plan what is drawn from it; LayerLoomError says what is wrong."""
    settings, raft = _settings(table, parts.frames, parts.size)
    labels = FlowLabels(RaftFlow.open(raft), parts.codec.spatial_factor)
    folder = Path(settings.path)
    cache = cache_folder(Path(settings.cache) if settings.cache else folder / ".layerloom")
    plan = plan_clips(settings, parts.multiple, cache / "clips.json", texts=TEXTS)
    return ClickFolder(settings, plan, replace(parts, text=text, image=labels), cache)


def look_at_click_folder(
    table: Mapping[str, Any], model: ClickSettings, multiple: int
) -> list[str]:
    """Check a folder without writing anything; lines about it."""
    settings, _ = _settings(table, model.frames, (model.height, model.width))
    plan = plan_clips(settings, multiple, texts=TEXTS)
    short = sum("phrase" in caption.texts for caption in plan.captions.values())
    return [
        f"{settings.path}: {len(plan.files)} clips, {short} with a short phrase, "
        f"{len(plan.pieces)} pieces."
    ]


def _settings(
    table: Mapping[str, Any], frames: int, size: tuple[int, int]
) -> tuple[CaptionedClips, Path]:
    entries = {key: value for key, value in table.items() if key not in ("kind", "raft")}
    if table.get("kind") != "folder" or not table.get("raft"):
        raise LayerLoomError(
            "Published weights are trained on a folder of clips, whose motion RAFT labels: set "
            "data.kind = 'folder', data.path and data.raft (torchvision's raft_large weights)."
        )
    raft = Path(table["raft"])
    if not raft.exists():
        raise LayerLoomError(f"The recipe's data.raft {raft} does not exist; check the path.")
    return filled(settings_from(entries, CaptionedClips), frames, size), raft
