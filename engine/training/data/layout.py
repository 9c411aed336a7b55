"""Finds the samples in a person's folder and the file of each layer, by name alone.

``clips/<name>/`` and ``images/<name>/`` hold one sample each: ``foreground``, ``background`` and,
where wanted, ``alpha`` and ``blended``. ``mattes/`` and ``backgrounds/`` hold one clip or picture
an entry, for copy-paste.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...media import PICTURE_SUFFIXES, natural_key
from .captions import FILE, Caption, match_captions, read_captions
from .problems import Problem

LAYERS = ("foreground", "alpha", "background", "blended")
SAMPLES = ("clips", "images")
MATTES, BACKGROUNDS = "mattes", "backgrounds"
# The texts that a sample's caption cannot do without.
NEEDED_TEXTS = {
    "clips": ("foreground", "background"),
    "images": ("foreground", "background"),
    MATTES: ("foreground",),
    BACKGROUNDS: ("background",),
}
_VIDEO_SUFFIXES = (
    *(".webm", ".mov", ".mp4", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv", ".wmv", ".ts"),
    *(".gif", ".apng"),
)
READABLE = (*PICTURE_SUFFIXES, *_VIDEO_SUFFIXES)
_NEVER_MEANT = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Sample:
    """Files that belong together: layer name -> file, or folder of pictures.

    name: "clips/dog", "images/cup", "mattes/cat.png" or "backgrounds/beach.mp4".
    """

    name: str
    layers: Mapping[str, Path]

    @property
    def kind(self) -> str:
        return self.name.split("/", 1)[0]


@dataclass
class Layout:
    """What a folder holds, and what is wrong with it as far as names and captions go."""

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    captions: dict[str, Caption] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def of(self, kind: str) -> list[Sample]:
        """The samples of one kind."""
        return [sample for sample in self.samples if sample.kind == kind]

    def add(self, path: Path, text: str) -> None:
        """Note a problem of a file inside the folder."""
        self.problems.append(Problem(path.relative_to(self.folder).as_posix(), text))


def read_layout(folder: Path) -> Layout:
    """Look through a folder without opening a clip."""
    layout = Layout(folder)
    present = [kind for kind in NEEDED_TEXTS if (folder / kind).is_dir()]
    if not present:
        kinds = ", ".join(f"{kind}/" for kind in SAMPLES)
        text = f"holds none of {kinds}, or {MATTES}/ with {BACKGROUNDS}/; put samples into those"
        layout.problems.append(Problem(str(folder), text))
        return layout
    for kind in present:
        entries = _entries(folder / kind)
        if not entries:
            layout.problems.append(Problem(f"{kind}/", "is empty; put samples in it or remove it"))
        for entry in entries:
            read = _sample_folder if kind in SAMPLES else _single
            sample = read(kind, entry, layout.problems)
            if sample is not None:
                layout.samples.append(sample)
    for one, other in ((MATTES, BACKGROUNDS), (BACKGROUNDS, MATTES)):
        if one in present and other not in present:
            text = f"is of no use without {other}/; copy-paste lays {MATTES} over {BACKGROUNDS}"
            layout.problems.append(Problem(f"{one}/", text))
    written, faults = read_captions(folder)
    layout.problems += faults
    if (folder / FILE).exists():
        names = [sample.name for sample in layout.samples]
        # A caption of what was left out for its files is no further fault.
        known = {f"{kind}/{entry.name}" for kind in present for entry in _entries(folder / kind)}
        left_out = sorted(known - set(names))
        layout.captions, faults = match_captions(written, names, NEEDED_TEXTS, left_out)
        layout.problems += faults
    return layout


def _entries(folder: Path) -> list[Path]:
    entries = [
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.name.lower() not in _NEVER_MEANT
    ]
    return sorted(entries, key=lambda entry: natural_key(entry.name))


def _layer_files(folder: Path, layer: str) -> list[Path]:
    """Entries named as the layer, or ending in its name as exported files do."""
    return [
        entry
        for entry in _entries(folder)
        if entry.stem.lower() == layer or entry.stem.lower().endswith(f"_{layer}")
    ]


def _layers_of(name: str, folder: Path, problems: list[Problem]) -> dict[str, Path] | None:
    """The file of each layer in a sample's folder; None where one of them cannot be told."""
    layers, good = {}, True
    for layer in LAYERS:
        files = _layer_files(folder, layer)
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            problems.append(Problem(name, f"has {names} for the {layer}; keep one of them"))
            good = False
        elif files and not _readable(files[0]):
            text = f"is no video, picture or folder of pictures; convert the {layer} to one"
            problems.append(Problem(f"{name}/{files[0].name}", text))
            good = False
        elif files:
            layers[layer] = files[0]
    return layers if good else None


def _readable(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in READABLE


def _sample_folder(kind: str, entry: Path, problems: list[Problem]) -> Sample | None:
    name = f"{kind}/{entry.name}"
    if not entry.is_dir():
        text = f"is a file; put each sample of {kind}/ into a folder of its own"
        problems.append(Problem(name, text))
        return None
    layers = _layers_of(name, entry, problems)
    if layers is None:
        return None
    missing = [layer for layer in ("foreground", "background") if layer not in layers]
    for layer in missing:
        example = f"{layer}.png" if kind == "images" else f"{layer}.webm"
        problems.append(Problem(name, f"has no {layer}; add {example}, say"))
    return None if missing else Sample(name, layers)


def _single(kind: str, entry: Path, problems: list[Problem]) -> Sample | None:
    name = f"{kind}/{entry.name}"
    layer = "foreground" if kind == MATTES else "background"
    if entry.is_dir() and kind == MATTES and _layer_files(entry, "foreground"):
        layers = _layers_of(name, entry, problems)
        return None if layers is None else Sample(name, _only(layers, "foreground", "alpha"))
    if not _readable(entry):
        problems.append(Problem(name, "is no video, picture or folder of pictures; remove it"))
        return None
    return Sample(name, {layer: entry})


def _only(layers: Mapping[str, Path], *names: str) -> dict[str, Path]:
    return {layer: layers[layer] for layer in names if layer in layers}
