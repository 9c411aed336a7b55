"""Reads the frames an entry needs, scaled and cropped to its bucket, and pastes mattes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...media import read_clip
from .buckets import Size, cover_box
from .plan import Placement
from .probes import Probe

Layers = dict[str, np.ndarray]


def fit(picture: np.ndarray, size: Size) -> np.ndarray:
    """A picture uint8 [H, W] or [H, W, 3 or 4] covering ``size``, its middle kept.

    Pillow scales colours weighted by their transparency, so none bleed in from what is unseen.
    """
    box = cover_box(picture.shape[:2], size)
    image = Image.fromarray(picture)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


def shrink(picture: np.ndarray, size: Size) -> np.ndarray:
    """A picture uint8 [H, W, 4] scaled to (height, width)."""
    image = Image.fromarray(picture)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


class ClipReader:
    """Frames of clips by number, each clip read once.

    wanted: the numbers that will be asked for; a clip of one picture gives it for every number.
    """

    def __init__(self, wanted: Sequence[int]):
        self.wanted = sorted(set(wanted))

    def frames(self, path: Path, what: str, change=lambda number, picture: picture) -> Frames:
        """The wanted frames, ``change(number, picture)`` [H, W, 3 or 4] of each."""
        kept: dict[int, np.ndarray] = {}
        wanted, count = set(self.wanted), 0

        def keep(picture: np.ndarray) -> np.ndarray:
            nonlocal count
            # A single picture is all frames, whichever are wanted.
            if count in wanted or count == 0:
                kept[count] = change(count, picture)
            count += 1
            return picture[:1, :1]

        read_clip(path, what, min_frames=1, max_frames=self.wanted[-1] + 1, each=keep)
        return Frames(kept, single=count == 1)


class Frames:
    """Pictures by frame number; a single one answers to all."""

    def __init__(self, kept: Mapping[int, np.ndarray], single: bool):
        self.kept, self.single = kept, single

    def __getitem__(self, number: int) -> np.ndarray:
        return self.kept[0 if self.single else number]

    def stack(self, numbers: Sequence[int]) -> np.ndarray:
        return np.stack([self[number] for number in numbers])


def read_rgba(
    layers: Mapping[str, Path], probes: Mapping[str, Probe], wanted: Sequence[int], change
) -> Frames:
    """A foreground's frames [H, W, 4], its matte from its own file where there is one.

    change: applied to each whole picture.
    """
    reader, matte = ClipReader(wanted), None
    if "alpha" in layers:
        transparent = probes["alpha"].alpha is not None
        matte = reader.frames(
            layers["alpha"], "alpha", lambda _, picture: as_matte(picture, transparent)
        )

    def whole(number: int, picture: np.ndarray) -> np.ndarray:
        if matte is not None:
            picture = np.dstack([picture[..., :3], matte[number]])
        return change(picture)

    return reader.frames(layers["foreground"], "foreground", whole)


def as_matte(picture: np.ndarray, transparent: bool) -> np.ndarray:
    """The matte uint8 [H, W] of a picture: its transparency, or its brightness (Rec. 601)."""
    if transparent and picture.shape[-1] == 4:
        return picture[..., 3]
    luma = picture[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.rint(luma).astype(np.uint8)


def read_opaque(path: Path, what: str, wanted: Sequence[int], size: Size) -> Frames:
    """A background's or scene's frames [h, w, 3] at a bucket's size; transparent is black."""

    def opaque(_: int, picture: np.ndarray) -> np.ndarray:
        if picture.shape[-1] == 4:
            weight = picture[..., 3:].astype(np.float32) / 255
            picture = np.rint(picture[..., :3] * weight).astype(np.uint8)
        return fit(picture, size)

    return ClipReader(wanted).frames(path, what, opaque)


def read_layers(
    layers: Mapping[str, Path],
    probes: Mapping[str, Probe],
    stretches: Sequence[Sequence[int]],
    size: Size,
) -> list[Layers]:
    """The layers of some stretches of a sample, each file read once.

    stretches: frame numbers. Returns uint8 foreground, background, blended [F, h, w, 3] and alpha
    [F, h, w]; the scene is put together where the sample has no blended file.
    """
    wanted = [number for stretch in stretches for number in stretch]
    rgba = read_rgba(layers, probes, wanted, lambda picture: fit(picture, size))
    below = read_opaque(layers["background"], "background", wanted, size)
    scene = None
    if "blended" in layers:
        scene = read_opaque(layers["blended"], "blended", wanted, size)
    result = []
    for stretch in stretches:
        top, background = rgba.stack(stretch), below.stack(stretch)
        blended = over(top, background) if scene is None else scene.stack(stretch)
        result.append(
            {
                "foreground": top[..., :3],
                "alpha": top[..., 3],
                "background": background,
                "blended": blended,
            }
        )
    return result


def paste(
    matte: tuple[Mapping[str, Path], Mapping[str, Probe], Sequence[int]],
    background: tuple[Path, Sequence[int]],
    placement: Placement,
    size: Size,
) -> Layers:
    """The layers of a matte laid over a background, as ``read_layers`` gives them.

    Of the matte only the box that ever shows anything counts as its extent.
    matte: its files, their probes and its frame numbers; background: its file and frame numbers.
    """
    files, probes, numbers = matte
    x0, y0, x1, y1 = probes["alpha" if "alpha" in probes else "foreground"].box
    factor = placement.scale * min(size[0] / (y1 - y0), size[1] / (x1 - x0))
    inner = max(1, round((y1 - y0) * factor)), max(1, round((x1 - x0) * factor))
    top = round(placement.y * size[0] - inner[0] / 2)
    left = round(placement.x * size[1] - inner[1] / 2)
    rows = slice(max(0, top), min(size[0], top + inner[0]))
    columns = slice(max(0, left), min(size[1], left + inner[1]))

    def placed(picture: np.ndarray) -> np.ndarray:
        canvas = np.zeros((*size, 4), np.uint8)
        small = shrink(picture[y0:y1, x0:x1], inner)
        canvas[rows, columns] = small[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
        return canvas

    rgba = read_rgba(files, probes, numbers, placed).stack(numbers)
    below = read_opaque(background[0], "background", background[1], size).stack(background[1])
    return {
        "foreground": rgba[..., :3],
        "alpha": rgba[..., 3],
        "background": below,
        "blended": over(rgba, below),
    }


def over(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Straight RGBA [F, H, W, 4] over an opaque background [F, H, W, 3], all uint8."""
    weight = rgba[..., 3:].astype(np.float32) / 255
    mixed = weight * rgba[..., :3] + (1 - weight) * background
    return np.rint(mixed).astype(np.uint8)
