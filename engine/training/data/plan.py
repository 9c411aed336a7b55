"""Decides what is drawn from a folder: pieces of clips, still frames, copy-pasted mattes.

Everything follows from the folder's files and the ``[data]`` table alone, so two runs agree.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...errors import LayerLoomError
from .buckets import Size, bucket_sizes, nearest_bucket
from .captions import Caption
from .layout import BACKGROUNDS, MATTES, Sample
from .probes import Probe

KINDS = ("clips", "images", MATTES)
TEMPORAL_FACTOR = 4
# A clip this much shorter than asked for is held on its last frame; a shorter one is refused.
SHORTEST = 0.75
# A pasted matte's size (1 fits into the frame, without its empty borders) and centre.
SCALES, PLACES = (0.35, 0.9), (0.25, 0.75)


@dataclass(frozen=True)
class FolderClips:
    """The ``[data]`` table of kind "folder".

    path: the folder. frames, width, height: a clip's length and size; 0 takes the model's.
    buckets: also other shapes of that area, as the samples need; else all are cropped to it.
    fps: frames are left out down to this rate; 0 takes all. pieces: a long clip gives up to so
    many clips that follow each other. copies: how often each matte is pasted over a background.
    still: share, 0 to 1, of what moves that is drawn as one frame repeated; images always are.
    shares: kind ("clips", "images", "mattes") -> how often it is drawn, 0 for kinds not named;
    without it every piece, image and copy counts the same. seed: of all that is drawn at random
    here. cache: where encoded samples are kept; default: ``.layerloom`` in the folder.
    """

    path: str
    frames: int = 0
    width: int = 0
    height: int = 0
    buckets: bool = True
    fps: float = 0.0
    pieces: int = 4
    copies: int = 4
    still: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    cache: str = ""

    def __post_init__(self):
        for name, low in (("pieces", 1), ("copies", 1), ("width", 0), ("height", 0), ("frames", 0)):
            if getattr(self, name) < low:
                raise LayerLoomError(
                    f"The recipe's data.{name} is {getattr(self, name)}; it must be at least {low}."
                )
        if self.frames % TEMPORAL_FACTOR:
            raise LayerLoomError(
                f"{self.frames} frames do not divide by {TEMPORAL_FACTOR}; use "
                f"{math.ceil(self.frames / TEMPORAL_FACTOR) * TEMPORAL_FACTOR}."
            )
        if not 0 <= self.still <= 1:
            raise LayerLoomError(
                f"The recipe's data.still is {self.still}; give a share from 0 to 1."
            )
        if not (math.isfinite(self.fps) and self.fps >= 0):
            raise LayerLoomError(
                f"The recipe's data.fps is {self.fps}; give frames a second, or 0 for all."
            )
        if not isinstance(self.buckets, bool):
            raise LayerLoomError(
                f"The recipe's data.buckets is {self.buckets!r}; write true or false."
            )
        self._check_shares()

    def _check_shares(self) -> None:
        shares = self.shares if isinstance(self.shares, Mapping) else {"": 0}
        unknown = sorted(set(shares) - set(KINDS))
        if unknown:
            raise LayerLoomError(
                f"The recipe's data.shares names {unknown[0]!r}; it takes {', '.join(KINDS)}."
            )
        numbers = [v for v in shares.values() if isinstance(v, int | float) and v >= 0]
        if shares and (len(numbers) < len(shares) or not 0 < sum(numbers) < math.inf):
            raise LayerLoomError(
                f"The recipe's data.shares is {dict(shares)}; give numbers from 0 up, one above."
            )


@dataclass(frozen=True)
class Placement:
    """How a matte lies over a background: centre in shares of the frame, scale 1 fits inside."""

    matte: str
    background: str
    background_piece: int
    x: float
    y: float
    scale: float


@dataclass(frozen=True)
class Entry:
    """One sample as it is drawn.

    name: of its files (a matte's where pasted). piece: which stretch of the clip. still: the
    frame within the piece that is repeated, or None where it moves. weight: how often it is drawn.
    """

    name: str
    bucket: Size
    piece: int = 0
    still: int | None = None
    placement: Placement | None = None
    moving: bool = True
    weight: float = 1.0

    @property
    def kind(self) -> str:
        return self.name.split("/", 1)[0]

    @property
    def stands_still(self) -> bool:
        return self.still is not None or not self.moving

    @property
    def key(self) -> dict[str, Any]:
        """What its latents depend on besides files, weights and settings."""
        placement = self.placement and asdict(self.placement)
        return {"name": self.name, "piece": self.piece, "still": self.still, "placed": placement}


def longest(probes: Mapping[str, Probe]) -> Probe:
    """The layer that gives a sample its length, the foreground before others."""
    return max(probes.values(), key=lambda found: found.frames)


def stretches(probe: Probe, frames: int, fps: float, pieces: int) -> list[list[int]]:
    """Frame numbers of each piece of a clip; none where it is too short.

    A single picture gives one piece. Pieces do not overlap; a clip down to ``SHORTEST`` of the
    length gives one, held on its last frame.
    """
    if probe.frames == 1:
        return [[0] * frames]
    step = max(1.0, probe.fps / fps) if fps else 1.0
    chosen = [int(i * step) for i in range(math.floor((probe.frames - 1) / step) + 1)]
    count = min(pieces, len(chosen) // frames)
    if count:
        return [chosen[i * frames : (i + 1) * frames] for i in range(count)]
    if len(chosen) < SHORTEST * frames:
        return []
    return [chosen + chosen[-1:] * (frames - len(chosen))]


def plan_entries(
    samples: Sequence[Sample],
    probes: Mapping[str, Mapping[str, Probe]],
    settings: FolderClips,
    multiple: int,
) -> list[Entry]:
    """All entries of samples that are in order; weights sum to 1.

    probes: sample name -> layer -> probe. multiple: what sides divide by.

    Raises:
        LayerLoomError: ``shares`` leaves nothing to draw.
    """
    buckets = bucket_sizes((settings.height, settings.width), multiple, settings.buckets)
    entries: list[Entry] = []
    for sample in samples:
        if sample.kind not in ("clips", "images"):
            continue
        found = longest(probes[sample.name])
        bucket = nearest_bucket((found.height, found.width), buckets)
        count = _pieces(found, settings)
        if sample.kind == "images":
            entries.append(Entry(sample.name, bucket, moving=False))
        else:
            entries += [Entry(sample.name, bucket, piece) for piece in range(count)]
    entries += _copies(samples, probes, settings, buckets)
    return _weighted(_with_stills(entries, settings), settings)


def _pieces(found: Probe, settings: FolderClips) -> int:
    return len(stretches(found, settings.frames, settings.fps, settings.pieces))


def _copies(
    samples: Sequence[Sample],
    probes: Mapping[str, Mapping[str, Probe]],
    settings: FolderClips,
    buckets: Sequence[Size],
) -> list[Entry]:
    mattes = [sample for sample in samples if sample.kind == MATTES]
    backgrounds = [sample for sample in samples if sample.kind == BACKGROUNDS]
    entries = []
    for matte in mattes if backgrounds else ():
        top = longest(probes[matte.name])
        for copy in range(settings.copies):
            rng = random.Random(f"copy-paste {settings.seed} {matte.name} {copy}")
            below = rng.choice(backgrounds)
            found = longest(probes[below.name])
            placement = Placement(
                matte=matte.name,
                background=below.name,
                background_piece=rng.randrange(_pieces(found, settings)),
                x=round(rng.uniform(*PLACES), 4),
                y=round(rng.uniform(*PLACES), 4),
                scale=round(rng.uniform(*SCALES), 4),
            )
            entries.append(
                Entry(
                    matte.name,
                    nearest_bucket((found.height, found.width), buckets),
                    piece=rng.randrange(_pieces(top, settings)),
                    placement=placement,
                    moving=top.frames > 1 or found.frames > 1,
                )
            )
    return entries


def _with_stills(entries: Sequence[Entry], settings: FolderClips) -> list[Entry]:
    """What moves, with its still twin where a share of them is wanted."""
    result = []
    for number, entry in enumerate(entries):
        moving = not entry.stands_still
        if not moving or settings.still < 1:
            result.append(replace(entry, weight=1 - settings.still if moving else 1.0))
        if moving and settings.still > 0:
            rng = random.Random(f"still frame {settings.seed} {number} {entry.key}")
            frame = rng.randrange(settings.frames)
            result.append(replace(entry, still=frame, weight=settings.still))
    return result


def _weighted(entries: Sequence[Entry], settings: FolderClips) -> list[Entry]:
    totals = {kind: sum(e.weight for e in entries if e.kind == kind) for kind in KINDS}
    shares = dict(settings.shares) or totals
    drawn = [e for e in entries if shares.get(e.kind, 0) > 0]
    if entries and not drawn:
        raise LayerLoomError(
            f"The recipe's data.shares is {dict(settings.shares)}, but the folder has only "
            f"{' and '.join(kind for kind in KINDS if totals[kind])}; name one of those."
        )
    weights = [shares[e.kind] / totals[e.kind] * e.weight for e in drawn]
    total = sum(weights)
    return [replace(e, weight=w / total) for e, w in zip(drawn, weights, strict=True)]


def texts_of(entry: Entry, captions: Mapping[str, Caption]) -> Mapping[str, tuple[str, ...]]:
    """The paraphrases of an entry's layers; a copy-paste's come from its two captions."""
    texts = dict(captions[entry.name].texts)
    if entry.placement is None:
        return texts
    below = captions[entry.placement.background].texts["background"]
    return {"foreground": texts["foreground"], "background": below}


def latent_bytes(entries: Sequence[Entry], latent_frames: int, factor: int, channels: int) -> int:
    """Bytes of the entries' latents (2 each) for an autoencoder's spatial factor."""
    sides = [(h // factor) * (w // factor) for h, w in (entry.bucket for entry in entries)]
    return 2 * latent_frames * channels * sum(sides)
