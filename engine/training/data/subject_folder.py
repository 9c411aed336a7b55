"""A person's folder of captioned clips with masks of their subjects, for paths of boxes.

As ``clip_folder``, and masks as ``subject_masks`` has them. Boxes are those of the masks; a
subject's picture is cut out of a random frame of its piece, as in DreamVideo-2's training (arXiv
2410.13830, section 4.1).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...clips import as_signed
from ...conditioning.encoders import TextFeatures
from ...conditioning.subjects import on_white
from ...errors import LayerLoomError
from ...models.dreamvideo import TrajectorySettings
from ..settings import settings_from
from .buckets import Size
from .cache import cache_folder
from .clip_folder import CaptionedClips, ClipFolder, ClipPlan, Piece, filled, plan_clips
from .clips import ClipParts
from .fingerprints import network_of, settings_digest
from .probes import ProbeStore
from .problems import Problem
from .reading import ClipReader
from .source import Pick
from .subject_masks import (
    MASKS,
    Box,
    Sight,
    box_clip,
    boxes_within,
    check_sight,
    mask_of,
    match_masks,
    sight,
)
from .trajectory_sprites import TrajectoryBatch

# Of a piece's frames each subject must be in so many; where it is not, its box is in between.
SEEN = 0.5


@dataclass(frozen=True)
class SubjectPlan(ClipPlan):
    """What is drawn from a folder. masks, sights: by a clip's name, the foremost subject first."""

    masks: Mapping[str, tuple[Path, ...]]
    sights: Mapping[str, tuple[Sight, ...]]

    def boxes(self, piece: Piece, frames: int) -> list[list[Box | None]]:
        """A box a frame of each of a piece's subjects."""
        numbers = piece.numbers(frames)
        return [boxes_within(seen, numbers, piece.bucket) for seen in self.sights[piece.name]]


def plan_subjects(
    settings: CaptionedClips, multiple: int, cache: Path | None = None
) -> SubjectPlan:
    """Read every clip and mask of a folder to its end and plan what is drawn from them.

    settings: with frames, width and height filled in. cache: keeps what was seen.

    Raises:
        LayerLoomError: no such folder, or clips, captions or masks that cannot be used.
    """
    plan = plan_clips(settings, multiple, None if cache is None else cache / "clips.json")
    folder = Path(settings.path)
    masks, problems = match_masks(folder, list(plan.files))
    file = None if cache is None else cache / f"{MASKS}.json"
    store = ProbeStore(folder, file, sight, Sight)
    sights: dict[str, tuple[Sight, ...]] = {}
    for name, paths in masks.items():
        found = []
        for path in paths:
            place = path.relative_to(folder).as_posix()
            try:
                found.append(store.get(path, "mask"))
            except (LayerLoomError, OSError) as error:
                problems.append(Problem(place, f"cannot be used ({str(error).rstrip('.')})"))
                continue
            if fault := check_sight(found[-1], plan.probes[name]):
                problems.append(Problem(place, fault))
        sights[name] = tuple(found)
    store.save()
    if not problems:
        whole = SubjectPlan(**vars(plan), masks=masks, sights=sights)
        pieces = tuple(p for p in plan.pieces if _is_seen(whole.boxes(p, settings.frames)))
        kept = {piece.name for piece in pieces}
        text = "shows its subject in too few frames of any piece; give more pieces, or take it out"
        problems = [Problem(name, text) for name in plan.files if name not in kept]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LayerLoomError(f"{folder} cannot be used: {problems[0]}{more}.")
    return replace(whole, pieces=pieces)


def _is_seen(boxes: Sequence[Sequence[Box | None]]) -> bool:
    return all(sum(box is not None for box in track) >= SEEN * len(track) for track in boxes)


class SubjectFolder(ClipFolder):
    """Latents, texts and subjects' pictures of a folder's pieces, made once.

    All clips of a step have as many subjects.
    """

    plan: SubjectPlan

    def __init__(self, settings: CaptionedClips, plan: SubjectPlan, parts: ClipParts, cache: Path):
        super().__init__(settings, plan, parts, cache)
        groups: dict[tuple[Size, int], list[int]] = {}
        for index, piece in enumerate(plan.pieces):
            groups.setdefault((piece.bucket, len(plan.masks[piece.name])), []).append(index)
        self._kinds = groups
        self._groups = list(groups.values())
        with torch.no_grad():
            self.empty = parts.text.encode([""])[0].cpu()

    def describe(self) -> list[str]:
        kinds = ", ".join(
            f"{width}x{height} with {_counted(count, 'subject')} {len(group)}"
            for ((height, width), count), group in self._kinds.items()
        )
        return [
            f"{self.settings.path}: {len(self.plan.files)} clips, {len(self)} pieces of "
            f"{self.frames} frames: {kinds}",
            f"encoded clips are kept in {self._latents.folder.parent}",
        ]

    def load(self, picks: Sequence[Pick]) -> TrajectoryBatch:
        """What the picks stand for: the same pick gives the same caption and pictures."""
        pieces = [self.plan.pieces[pick.index] for pick in picks]
        texts, masks, subjects = [], [], []
        for pick, piece in zip(picks, pieces, strict=True):
            rng = random.Random(pick.wording)
            written = rng.choice(self.plan.captions[piece.name].texts["caption"])
            texts.append(self._texts.read(written))
            tracks = self.plan.boxes(piece, self.frames)
            masks.append(np.stack([box_clip(boxes, piece.bucket) for boxes in tracks]))
            pictures = self._images.read(piece)
            subjects.append(pictures[:, rng.randrange(pictures.shape[1])])
        return TrajectoryBatch(
            torch.stack([self._latents.read(piece) for piece in pieces]),
            torch.stack(texts),
            torch.from_numpy(np.stack(masks)).float(),
            torch.stack(subjects).float(),
        )

    def _files(self, name: str) -> list[Path]:
        return [*super()._files(name), *self.plan.masks[name]]

    def _looked_at(self, piece: Piece, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [S, pictures, C, h, w] of a piece's subjects, each cut out of whole frames."""
        numbers, plan = piece.numbers(self.frames), self.plan
        codec = self.parts.codec
        # The posterior's noise is the piece's own, and another than its frames'.
        seed = int(settings_digest({**piece.key, "of": "subjects"})[:12], 16)
        generator = torch.Generator().manual_seed(seed)
        found = []
        for boxes, path in zip(plan.boxes(piece, self.frames), plan.masks[piece.name], strict=True):
            seen = [number for number, box in zip(numbers, boxes, strict=True) if box is not None]
            last = len(seen) - 1
            count = self.settings.pictures
            wanted = [seen[round(i * last / (count - 1))] for i in range(count)]
            frames = ClipReader(wanted).frames(plan.files[piece.name], "clip")
            masks = ClipReader(wanted).frames(path, "mask", lambda _, picture: mask_of(picture))
            cut = [_cut_out(frames[n], masks[n], piece.bucket) for n in wanted]
            shown = as_signed(np.stack(cut)).to(pixels)
            found.append(torch.cat([codec.encode(one[None], generator) for one in shown]))
        return torch.stack(found)


def _cut_out(picture: np.ndarray, mask: np.ndarray, size: Size) -> np.ndarray:
    """A frame's subject on white, at the size that the network reads."""
    from PIL import Image

    if mask.shape != picture.shape[:2]:
        # The mask stays as it is: of a small one nothing may be left.
        height, width = mask.shape
        scaled = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        picture = np.asarray(scaled)
    return on_white(picture[..., :3], mask.astype(np.float32) / 255, size)


def open_subject_folder(
    table: Mapping[str, Any], parts: ClipParts, text: TextFeatures
) -> SubjectFolder:
    """Check a folder and plan what is drawn from it; LayerLoomError says what is wrong."""
    settings = _settings(table, parts.frames, parts.size)
    folder = Path(settings.path)
    cache = cache_folder(Path(settings.cache) if settings.cache else folder / ".layerloom")
    plan = plan_subjects(settings, parts.multiple, cache)
    # Subjects are encoded as frames are: their network is the autoencoder's.
    image = _Pictures(network_of(parts.codec))
    return SubjectFolder(settings, plan, replace(parts, text=text, image=image), cache)


def look_at_subject_folder(
    table: Mapping[str, Any], model: TrajectorySettings, multiple: int
) -> list[str]:
    """Check a folder without writing anything; lines about it."""
    settings = _settings(table, model.frames, (model.height, model.width))
    plan = plan_subjects(settings, multiple)
    several = sum(len(masks) > 1 for masks in plan.masks.values())
    return [
        f"{settings.path}: {len(plan.files)} clips, {several} with several subjects, "
        f"{len(plan.pieces)} pieces."
    ]


@dataclass(frozen=True)
class _Pictures:
    """What makes subjects' latents; a digest of it tells whether they are stale."""

    model: torch.nn.Module


def _settings(table: Mapping[str, Any], frames: int, size: Size) -> CaptionedClips:
    entries = {key: value for key, value in table.items() if key != "kind"}
    if table.get("kind") != "folder" or not table.get("path"):
        raise LayerLoomError(
            "Published weights are trained on a folder of clips and masks of their subjects: set "
            "data.kind = 'folder' and data.path."
        )
    return filled(settings_from(entries, CaptionedClips), frames, size)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
