"""Looks through a folder before training: every fault with its file, and what would be made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import LayerLoomError
from .layout import BACKGROUNDS, MATTES, NEEDED_TEXTS, Layout, Sample, read_layout
from .plan import (
    SHORTEST,
    Entry,
    FolderClips,
    latent_bytes,
    longest,
    plan_entries,
    stretches,
    texts_of,
)
from .probes import NEARLY, Probe, ProbeStore

Progress = Callable[[int, int], None]
_SAVE_EVERY = 50
# What the estimate of the cache takes for granted: CogVideoX's VAE and T5-XXL (LayerFlow); the
# starters' autoencoder has as many channels and a shorter side by as much.
CHANNELS, FACTOR, TEXT_TOKENS, TEXT_WIDTH = 16, 8, 226, 4096


@dataclass
class FolderReport:
    """A folder's samples, what is wrong with them, and what training would draw from it.

    layout: all samples and problems. probes: sample name -> layer -> probe. good: samples without
    a fault. entries: what is drawn from those. notes: what a person may want to know.
    """

    layout: Layout
    probes: dict[str, dict[str, Probe]]
    good: list[Sample]
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each kind, faulty ones too, and entries that would be drawn."""
        kinds = Counter(sample.kind for sample in self.layout.samples)
        copies = sum(e.placement is not None and e.still is None for e in self.entries)
        names = ("clips", "images", MATTES, BACKGROUNDS)
        return {**{kind: kinds[kind] for kind in names}, "copies": copies}

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """(height, width) -> number of entries."""
        return dict(Counter(entry.bucket for entry in self.entries).most_common())

    def cache_bytes(self, frames: int) -> tuple[int, int]:
        """Bytes that latents, and T5's features of the prompts where it is used, will take."""
        latents = latent_bytes(self.entries, frames, FACTOR, CHANNELS)
        texts = {
            (index, text)
            for entry in self.entries
            for index, wordings in enumerate(texts_of(entry, self.layout.captions).values())
            for text in wordings
        }
        return latents, 2 * len(texts) * TEXT_TOKENS * TEXT_WIDTH

    def record(self, settings: FolderClips) -> dict[str, Any]:
        """Everything as plain values, for --json."""
        latents, text = self.cache_bytes(settings.frames)
        return {
            "folder": str(self.layout.folder),
            "problems": [
                {"file": p.file, "line": p.line, "text": p.text} for p in self.layout.problems
            ],
            "notes": self.notes,
            "counts": self.counts,
            "frames": settings.frames,
            "buckets": [
                {"width": width, "height": height, "samples": count}
                for (height, width), count in self.buckets.items()
            ],
            "cache_bytes": {"latents": latents, "t5_features": text},
        }


def check_folder(
    folder: Path,
    settings: FolderClips,
    multiple: int,
    store: ProbeStore | None = None,
    progress: Progress | None = None,
) -> FolderReport:
    """Read every clip of a folder to its end and plan what would be drawn.

    settings: with frames, width and height filled in. multiple: what sides divide by.
    store: keeps what was seen. progress: gets (files read, files).

    Raises:
        LayerLoomError: ``folder`` is none, or ``shares`` leaves nothing.
    """
    if not folder.is_dir():
        raise LayerLoomError(
            f"{folder} is not a folder; give the folder that holds clips, images or mattes."
        )
    try:
        layout = read_layout(folder)
    except OSError as error:
        raise LayerLoomError(
            f"{folder} cannot be looked through ({error.strerror or error}); check its permissions."
        ) from error
    store = store or ProbeStore(folder)
    report = FolderReport(layout, {}, [])
    total, done = sum(len(sample.layers) for sample in layout.samples), 0
    try:
        for sample in layout.samples:
            before = len(layout.problems)
            probes = report.probes[sample.name] = {}
            for layer, path in sample.layers.items():
                what = "clip" if sample.kind in (MATTES, BACKGROUNDS) else layer
                try:
                    probes[layer] = store.get(path, what)
                except LayerLoomError as error:
                    layout.add(path, _shortened(str(error), path, what))
                except OSError as error:
                    layout.add(path, f"cannot be read ({error.strerror}); check its permissions")
                done += 1
                if progress:
                    progress(done, total)
                if done % _SAVE_EVERY == 0:
                    store.save()
            if len(layout.problems) == before:
                _check_sample(sample, probes, settings, report)
            captioned = sample.name in layout.captions
            if len(layout.problems) == before and captioned and _texts(layout, sample):
                report.good.append(sample)
    finally:
        store.save()
    report.entries = plan_entries(report.good, report.probes, settings, multiple)
    _note_sizes(report)
    return report


def _texts(layout: Layout, sample: Sample) -> bool:
    return all(key in layout.captions[sample.name].texts for key in NEEDED_TEXTS[sample.kind])


def _shortened(message: str, path: Path, what: str) -> str:
    """A reader's sentence without the file's name, which the report already gives."""
    for start in (f"The {what} {path} ", f"The {what} folder {path} "):
        if message.startswith(start):
            return message.removeprefix(start).rstrip(".")
    return message.rstrip(".")


def _check_sample(
    sample: Sample, probes: Mapping[str, Probe], settings: FolderClips, report: FolderReport
) -> None:
    layout, lead = report.layout, longest(probes)
    first = next(layer for layer, found in probes.items() if found is lead)
    for layer, found in probes.items():
        path = sample.layers[layer]
        if (found.height, found.width) != (lead.height, lead.width):
            layout.add(
                path,
                f"is {found.size} and the {first} {lead.size}; make all layers of a sample alike",
            )
        # One picture may serve all frames of a clip, as a background that stands still does.
        elif found.frames != lead.frames and (found.frames > 1 or layer == "blended"):
            text = f"has {_frames(found)} and the {first} {lead.frames}; give layers of one length"
            layout.add(path, text)
    if sample.kind == "images":
        for layer, found in probes.items():
            if found.frames > 1:
                text = f"has {_frames(found)}; put samples that move into clips/"
                layout.add(sample.layers[layer], text)
    elif sample.kind == "clips" and lead.frames == 1:
        layout.add(sample.layers[first], "is a single picture; put still samples into images/")
    elif not stretches(lead, settings.frames, settings.fps, 1):
        rate = f" at {settings.fps:g} a second" if settings.fps else ""
        least = math.ceil(SHORTEST * settings.frames)
        text = f"has {_frames(lead)}, too few for {settings.frames}{rate}"
        layout.add(sample.layers[first], f"{text}; give at least {least}, or ask for fewer frames")
    _check_alpha(sample, probes, layout)
    if "background" in probes and probes["background"].alpha is not None:
        report.notes.append(
            f"{_name(layout, sample.layers['background'])} has transparent parts, taken as black"
        )


def _check_alpha(sample: Sample, probes: Mapping[str, Probe], layout: Layout) -> None:
    if "foreground" not in probes:
        return
    if "alpha" in probes:
        path, limits = sample.layers["alpha"], probes["alpha"].matte
    else:
        path, limits = sample.layers["foreground"], probes["foreground"].alpha
    if limits is None:
        ways = "WebM VP9 with alpha, ProRes 4444 or PNG"
        layout.add(path, f"has no alpha; give it as {ways}, or add alpha.webm or alpha.png")
    elif limits[1] <= NEARLY:
        layout.add(path, "is transparent everywhere; white, or opaque, is where the foreground is")
    elif limits[0] >= 255 - NEARLY:
        layout.add(path, "is opaque everywhere; black, or transparent, is where nothing is")


def _frames(found: Probe) -> str:
    return "one frame" if found.frames == 1 else f"{found.frames} frames"


def _name(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.folder).as_posix()


def _note_sizes(report: FolderReport) -> None:
    """Say what is enlarged: training on it teaches blur."""
    small = {}
    for entry in report.entries:
        source = entry.placement.background if entry.placement else entry.name
        found = next(iter(report.probes[source].values()))
        factor = max(entry.bucket[0] / found.height, entry.bucket[1] / found.width)
        if factor > 1.05:
            small[source] = (factor, found.size)
    for name, (factor, size) in sorted(small.items()):
        report.notes.append(f"{name} is {size} and is enlarged {factor:.2g} times")


def refuse(report: FolderReport) -> None:
    """Raise LayerLoomError where a folder has problems or nothing to draw."""
    problems, folder = report.layout.problems, report.layout.folder
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise LayerLoomError(
            f"{folder} has {count}, the first is {str(problems[0]).replace('; ', ', ')}; see all "
            f"with `layerloom data check {folder}`."
        )
    if not report.entries:
        raise LayerLoomError(
            f"{folder} has no sample to train on; put some into clips/, images/ or mattes/."
        )


def with_defaults(settings: FolderClips, frames: int, size: tuple[int, int]) -> FolderClips:
    """The settings with the model's frames and (height, width) where they leave them to it."""
    return replace(
        settings,
        frames=settings.frames or frames,
        height=settings.height or size[0],
        width=settings.width or size[1],
    )
