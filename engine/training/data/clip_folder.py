"""A person's folder of captioned clips as a source for animation.

``clips/`` holds videos, animations or folders of pictures; ``captions.jsonl`` has a line for each:
``{"sample": "clips/dog.mp4", "caption": "a dog runs to the left"}``, or a list of paraphrases.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import LayerLoomError
from ...media import natural_key
from ...models.dynamicrafter import Variant
from ..settings import settings_from
from .buckets import Size, bucket_sizes, nearest_bucket
from .cache import LatentCache, TextCache, cache_folder
from .captions import FILE, Caption, match_captions, read_captions
from .clips import ClipBatch, ClipParts
from .fingerprints import network_of, settings_digest, weights_digest
from .layout import READABLE
from .probes import Probe, ProbeStore
from .problems import Problem
from .reading import read_opaque
from .source import Pick, Progress
from .sprites import WORDINGS

CLIPS = "clips"
# Counts up when the way clips are cut or scaled changes.
FORMAT = 1


@dataclass(frozen=True)
class CaptionedClips:
    """The ``[data]`` table of kind "folder" for animation.

    path: the folder. frames, width, height: a clip's length and size; 0 takes the model's.
    buckets: also other shapes of that area, as the clips need; else all are cropped to it.
    strides: smallest and largest distance of the frames that are taken; each piece draws its own
    as far as the clip is long enough, and the network is told (as stride, or as frames a second).
    pieces: how many such pieces a clip gives. pictures: how many frames of a piece may be its
    picture, the first and the last among them. seed: of strides and places. cache: where encoded
    clips are kept; default: ``.layerloom`` in the folder.
    """

    path: str
    frames: int = 0
    width: int = 0
    height: int = 0
    buckets: bool = True
    strides: Sequence[int] = (1, 3)
    pieces: int = 4
    pictures: int = 4
    seed: int = 0
    cache: str = ""

    def __post_init__(self):
        lowest = {"pieces": 1, "pictures": 2, "width": 0, "height": 0, "frames": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise LayerLoomError(
                    f"The recipe's data.{name} is {getattr(self, name)}; it must be at least {low}."
                )
        strides = self.strides
        if not (
            isinstance(strides, list | tuple)
            and len(strides) == 2
            and all(isinstance(s, int) and not isinstance(s, bool) for s in strides)
            and 1 <= strides[0] <= strides[1]
        ):
            raise LayerLoomError(
                f"The recipe's data.strides is {strides!r}; give the smallest and the largest, "
                "[1, 3] say."
            )


@dataclass(frozen=True)
class Piece:
    """Frames ``start``, ``start + stride`` ... of a clip, at a bucket's size."""

    name: str
    bucket: Size
    start: int
    stride: int

    @property
    def key(self) -> dict[str, Any]:
        """What its latents depend on besides files, weights and settings."""
        return {"name": self.name, "start": self.start, "stride": self.stride}

    def numbers(self, frames: int) -> list[int]:
        return [self.start + i * self.stride for i in range(frames)]


@dataclass(frozen=True)
class ClipPlan:
    """What is drawn from a folder. files, probes and captions go by a clip's name."""

    files: Mapping[str, Path]
    probes: Mapping[str, Probe]
    captions: Mapping[str, Caption]
    pieces: tuple[Piece, ...]


def plan_clips(
    settings: CaptionedClips,
    multiple: int,
    store: Path | None = None,
    progress: Progress | None = None,
    texts: Sequence[str] = ("caption",),
) -> ClipPlan:
    """Read every clip of a folder to its end and plan what is drawn from it.

    settings: with frames, width and height filled in. multiple: what sides divide by. texts: what
    a line of captions may hold; the first is needed.

    Raises:
        LayerLoomError: there is no such folder, or clips or captions that cannot be used.
    """
    folder = Path(settings.path)
    if not (folder / CLIPS).is_dir():
        raise LayerLoomError(
            f"The recipe's data.path {folder} has no folder {CLIPS}/; put the videos there and "
            f"their captions into {FILE} beside it."
        )
    files = {
        f"{CLIPS}/{entry.name}": entry
        for entry in sorted((folder / CLIPS).iterdir(), key=lambda e: natural_key(e.name))
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in READABLE)
    }
    if not files:
        raise LayerLoomError(f"{folder / CLIPS} holds no videos; put some there.")
    written, problems = read_captions(folder, texts)
    captions: dict[str, Caption] = {}
    if (folder / FILE).exists():
        captions, faults = match_captions(written, list(files), {CLIPS: tuple(texts[:1])})
        problems += faults
    store_ = ProbeStore(folder, store)
    probes: dict[str, Probe] = {}
    for number, (name, path) in enumerate(files.items(), start=1):
        try:
            probes[name] = store_.get(path, "clip")
        except (LayerLoomError, OSError) as error:
            problems.append(Problem(name, f"cannot be used ({str(error).rstrip('.')})"))
        else:
            found = probes[name].frames
            if found < settings.frames:
                text = f"has {found} frames; give at least {settings.frames}, or take it out"
                problems.append(Problem(name, text))
        if progress:
            progress(number, len(files))
    store_.save()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LayerLoomError(f"{folder} cannot be used: {problems[0]}{more}.")
    buckets = bucket_sizes((settings.height, settings.width), multiple, settings.buckets)
    pieces = tuple(
        piece for name in files for piece in _pieces(name, probes[name], settings, buckets)
    )
    return ClipPlan(files, probes, captions, pieces)


def _pieces(
    name: str, probe: Probe, settings: CaptionedClips, buckets: Sequence[Size]
) -> list[Piece]:
    bucket = nearest_bucket((probe.height, probe.width), buckets)
    rng = random.Random(f"clips {settings.seed} {name}")
    low, high = settings.strides
    longest = (probe.frames - 1) // max(1, settings.frames - 1)
    made = []
    for _ in range(settings.pieces):
        # Clips that are too short for the smallest stride give every frame.
        stride = rng.randint(min(low, longest), min(high, longest))
        spare = probe.frames - 1 - (settings.frames - 1) * stride
        piece = Piece(name, bucket, rng.randint(0, spare), stride)
        if piece not in made:
            made.append(piece)
    return made


def look_at_clips(table: Mapping[str, Any], variant: Variant, multiple: int) -> list[str]:
    """Check a folder without writing anything; lines about it."""
    entries = {key: value for key, value in table.items() if key != "kind"}
    settings = settings_from(entries, CaptionedClips)
    parts = (variant.frames, (variant.height, variant.width))
    plan = plan_clips(filled(settings, *parts), multiple)
    return [f"{settings.path}: {len(plan.files)} clips, {len(plan.pieces)} pieces."]


def filled(settings: CaptionedClips, frames: int, size: Size) -> CaptionedClips:
    """The settings with the model's length and size where they leave them open."""
    return replace(
        settings,
        frames=settings.frames or frames,
        height=settings.height or size[0],
        width=settings.width or size[1],
    )


def open_clip_folder(
    table: Mapping[str, Any], parts: ClipParts, progress: Progress | None = None
) -> ClipFolder:
    """Check a folder and plan what is drawn from it; LayerLoomError says what is wrong."""
    settings = filled(settings_from(dict(table), CaptionedClips), parts.frames, parts.size)
    if parts.text is None or parts.image is None:
        raise LayerLoomError(
            "A folder of clips needs frozen text and image encoders; a starter reads the words of "
            "sprite world alone: use data.kind = 'sprites'."
        )
    folder = Path(settings.path)
    cache = cache_folder(Path(settings.cache) if settings.cache else folder / ".layerloom")
    plan = plan_clips(settings, parts.multiple, cache / "clips.json", progress)
    return ClipFolder(settings, plan, parts, cache)


class ClipFolder:
    """Latents, captions and pictures of a folder's pieces, encoded once."""

    def __init__(self, settings: CaptionedClips, plan: ClipPlan, parts: ClipParts, cache: Path):
        self.settings, self.plan, self.parts = settings, plan, parts
        self.frames = settings.frames
        last = self.frames - 1
        count = min(settings.pictures, self.frames)
        self.pictures = tuple(sorted({round(i * last / (count - 1)) for i in range(count)}))
        groups: dict[Size, list[int]] = {}
        for index, piece in enumerate(plan.pieces):
            groups.setdefault(piece.bucket, []).append(index)
        self.sizes = tuple(sorted(groups, key=lambda size: (-size[0] * size[1], size)))
        self._groups = [groups[size] for size in self.sizes]
        shared = {"format": FORMAT, "frames": self.frames}
        codec = weights_digest(network_of(parts.codec))
        mark = settings_digest({**shared, "codec": codec})
        self._latents = LatentCache(cache_folder(cache / f"clips-{mark[:12]}"), mark)
        image = weights_digest(network_of(parts.image))
        mark = settings_digest({**shared, "image": image, "pictures": list(self.pictures)})
        self._images = LatentCache(cache_folder(cache / f"pictures-{mark[:12]}"), mark)
        text = weights_digest(network_of(parts.text), type(parts.text).__name__)
        self._texts = TextCache(cache_folder(cache / f"captions-{text[:12]}"))

    def __len__(self) -> int:
        return len(self.plan.pieces)

    def describe(self) -> list[str]:
        sizes = ", ".join(
            f"{width}x{height} {len(group)}"
            for (height, width), group in zip(self.sizes, self._groups, strict=True)
        )
        return [
            f"{self.settings.path}: {len(self.plan.files)} clips, {len(self)} pieces of "
            f"{self.frames} frames: {sizes}",
            f"encoded clips are kept in {self._latents.folder.parent}",
        ]

    def encode(self, progress: Progress | None = None, rank: int = 0, world: int = 1) -> None:
        by_clip: dict[str, list[Piece]] = {}
        for piece in self.plan.pieces:
            files = self._files(piece.name)
            fresh = all(c.is_fresh(piece, files) for c in (self._latents, self._images))
            if not fresh:
                by_clip.setdefault(piece.name, []).append(piece)
        names = list(by_clip)[rank::world]
        every = (t for c in self.plan.captions.values() for t in c.texts.values())
        texts = sorted({text for wordings in every for text in wordings})
        texts = [text for text in texts[rank::world] if not self._texts.is_fresh(text)]
        total, done = sum(len(by_clip[name]) for name in names) + len(texts), 0
        for name in names:
            for _ in self._encoded(name, by_clip[name]):
                done += 1
                if progress:
                    progress(done, total)
        for text in texts:
            with torch.no_grad():
                self._texts.write(text, self.parts.text.encode([text])[0].bfloat16().cpu())
            done += 1
            if progress:
                progress(done, total)

    def _files(self, name: str) -> list[Path]:
        """All that is read for a clip's pieces."""
        return [self.plan.files[name]]

    @torch.no_grad()
    def _encoded(self, name: str, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Encode a clip's pieces, yielding each when it is written."""
        parts, path = self.parts, self.plan.files[name]
        device = next(network_of(parts.codec).parameters()).device
        wanted = sorted({n for piece in pieces for n in piece.numbers(self.frames)})
        frames = read_opaque(path, "clip", wanted, pieces[0].bucket)
        for piece in pieces:
            clip = torch.from_numpy(frames.stack(piece.numbers(self.frames)))
            pixels = (clip.movedim(-1, 1).float() / 127.5 - 1).to(device)
            # The posterior's noise is the piece's own, whatever is encoded before it.
            generator = torch.Generator().manual_seed(int(settings_digest(piece.key)[:12], 16))
            # One by one: a frame of 1024x576 takes gigabytes on its way through.
            latents = torch.cat([parts.codec.encode(frame[None], generator) for frame in pixels])
            if not torch.isfinite(latents).all():
                raise LayerLoomError(
                    f"The autoencoder gives no finite numbers for {name}; take the clip out."
                )
            files = self._files(name)
            self._images.write(piece, files, self._looked_at(piece, pixels).bfloat16().cpu())
            self._latents.write(piece, files, latents.bfloat16().cpu())
            yield piece

    def _looked_at(self, piece: Piece, pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens [pictures, N, D] of a piece whose frames are [T, 3, H, W]."""
        return torch.cat([self.parts.image.encode(pixels[i : i + 1]) for i in self.pictures])

    def release(self) -> None:
        self.parts = replace(self.parts, codec=None, text=None, image=None)

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]:
        weights = torch.tensor([float(len(group)) for group in self._groups])
        group = self._groups[int(torch.multinomial(weights, 1, generator=generator))]
        rows = torch.randint(len(group), (batch,), generator=generator).tolist()
        words = torch.randint(WORDINGS, (batch,), generator=generator).tolist()
        return [Pick(group[row], word) for row, word in zip(rows, words, strict=True)]

    def load(self, picks: Sequence[Pick], frames: Sequence[int]) -> ClipBatch:
        pieces = [self.plan.pieces[pick.index] for pick in picks]
        texts = [
            random.Random(pick.wording).choice(self.plan.captions[piece.name].texts["caption"])
            for pick, piece in zip(picks, pieces, strict=True)
        ]
        images = [
            self._images.read(piece)[self.pictures.index(frame)]
            for piece, frame in zip(pieces, frames, strict=True)
        ]
        return ClipBatch(
            torch.stack([self._latents.read(piece) for piece in pieces]),
            torch.stack([self._texts.read(text) for text in texts]),
            torch.stack(images),
            torch.tensor([self._motion(piece) for piece in pieces]),
        )

    def _motion(self, piece: Piece) -> float:
        if self.parts.speed == "fps":
            return self.plan.probes[piece.name].fps / piece.stride
        return float(piece.stride)
