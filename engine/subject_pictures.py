"""Reads subjects' pictures from files, each cut out by a mask, by clicks or by its transparency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .conditioning.clicks import pixel_clicks, read_point
from .conditioning.masks import read_mask
from .conditioning.pictures import Picture, read_picture
from .conditioning.subjects import WHITE
from .trajectory_request import Subject


class SubjectReader:
    """Reads one subject after the other; a segmenter is opened where one is clicked.

    segmenter: weights, None for the starter. notes: is told what is taken otherwise than given.
    """

    def __init__(self, segmenter: Path | None, device: str | None, notes: list[str]):
        self.segmenter, self.device, self.notes = segmenter, device, notes
        self._opened = None

    def read(self, path: Path, mask: Path | None, points: Sequence[str]) -> Subject:
        """The subject of a picture, its mask by what is given.

        Raises:
            LayerLoomError: no picture, a mask that is not its own or empty, or a bad point.
        """
        picture = read_picture(path, "subject")
        if picture.moving:
            self.notes.append(f"{path.name} is an animation; its first picture is taken.")
        size = picture.pixels.shape[:2]
        if mask is not None:
            return Subject(picture.pixels, read_mask(mask, size))
        if points:
            return Subject(picture.pixels, self._clicked(picture, points))
        if picture.transparent:
            return _transparent(picture, read_mask(path, size))
        return Subject(picture.pixels)

    def _clicked(self, picture: Picture, points: Sequence[str]) -> np.ndarray:
        size = picture.pixels.shape[:2]
        # Checked before a segmenter is opened.
        clicks = pixel_clicks(tuple(map(read_point, points)), (), size).require()
        if self._opened is None:
            from .conditioning.segmenter import Segmenter

            self._opened = Segmenter.open(self.segmenter, self.device)
        embedding = self._opened.embed(picture.pixels)
        return self._opened.masks(embedding, clicks).mask(None).cpu().float().numpy()


def _transparent(picture: Picture, opacity: np.ndarray) -> Subject:
    """What is not wholly transparent, over white; the pixels are over black as they were read."""
    over = picture.pixels + WHITE * (1 - opacity[..., None])
    return Subject(np.rint(over).clip(0, WHITE).astype(np.uint8), (opacity > 0).astype(np.float32))
