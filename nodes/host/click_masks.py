"""Answers clicks on pictures in the host's folders, for the click editor; knows no HTTP."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ...engine.conditioning.clicks import parse_clicks
from ...engine.conditioning.masks import check_refinement
from ...engine.conditioning.pictures import read_picture
from ...engine.conditioning.segmenter import Embedding, Segmenter
from ...engine.errors import LayerLoomError
from .segmenter import BEST, CANDIDATES, clicked_mask

KINDS = ("input", "output", "temp")
# Larger pictures are refused before they are decoded; bytes of the file, and pixels.
MOST_BYTES = 256 * 2**20
MOST_PIXELS = 64 * 10**6
# The longer side of a mask that is sent: an editor in a graph shows no more.
LONGEST = 1024
# Of each kind, what was used last; a published embedding takes 4 MiB.
KEPT_EMBEDDINGS, KEPT_SEGMENTERS = 8, 1


class Recent:
    """What was made last, by key: so many at most."""

    def __init__(self, size: int):
        self.size, self._kept = size, OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What belongs to a key; made where it is not kept."""
        if key not in self._kept:
            # Room first: two large networks may not fit next to each other.
            while len(self._kept) >= self.size:
                self._kept.popitem(last=False)
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)


@dataclass(frozen=True)
class Wish:
    """What an editor asks for, checked as far as it can be without opening anything."""

    picture: Path
    segmenter: str
    clicks: Any
    candidate: str
    dilate: int
    feather: float


class ClickMasks:
    """Masks for clicks; networks run on the CPU, beside whatever the host computes.

    Each picture is looked at once. Not for several threads at once.

    folder: the path of "input", "output" or "temp". find: the file of a segmenter's listed name.
    """

    def __init__(self, folder: Callable[[str], str], find: Callable[[str], Path]):
        self._folder, self._find = folder, find
        self._segmenters, self._embeddings = Recent(KEPT_SEGMENTERS), Recent(KEPT_EMBEDDINGS)

    def answer(self, request: Any) -> dict[str, Any]:
        """The mask for ``{"picture": {"filename", "subfolder", "type"}, "segmenter", "clicks",
        "candidate", "dilate", "feather"}``, the last three optional.

        Returns mask (the address of a PNG whose transparency is the mask, its longer side
        ``LONGEST`` at most), width and height (the picture's), share (of the picture that the mask
        covers), score, scores and candidate.

        Raises:
            LayerLoomError: malformed, outside the host's folders, no picture or too large, no such
                segmenter, clicks that are malformed or select nothing.
        """
        wish = self._read(request)
        segmenter_file = self._find(wish.segmenter)
        _check_size(wish.picture)
        key = _stamp(segmenter_file)
        segmenter = self._segmenters.get(key, lambda: Segmenter.open(segmenter_file, "cpu"))
        embedding: Embedding = self._embeddings.get(
            (key, _stamp(wish.picture)), lambda: segmenter.embed(_pixels(wish.picture))
        )
        height, width = embedding.size
        scale = min(1.0, LONGEST / max(height, width))
        # Points are shares of the picture, so that a smaller one asks for the same mask.
        shown = replace(embedding, size=(_scaled(height, scale), _scaled(width, scale)))
        made = clicked_mask(
            segmenter,
            shown,
            parse_clicks(wish.clicks, embedding.size),
            wish.candidate,
            round(wish.dilate * scale),
            wish.feather * scale,
        )
        return {
            "mask": _as_address(made.mask),
            "width": width,
            "height": height,
            "share": made.share,
            "score": made.scores[made.candidate],
            "scores": made.scores,
            "candidate": made.candidate,
        }

    def _read(self, request: Any) -> Wish:
        if not isinstance(request, Mapping):
            raise LayerLoomError(
                "The request is not a JSON object; send one with picture, segmenter and clicks."
            )
        for name, kind, said in (
            ("picture", Mapping, "an object with filename, subfolder and type"),
            ("segmenter", str, "the name of a segmenter"),
            ("clicks", (str, Mapping, list), "an object with points and boxes"),
        ):
            if not isinstance(request.get(name), kind):
                raise LayerLoomError(f"The request has no {name}; give {said}.")
        candidate = request.get("candidate", BEST)
        if candidate not in CANDIDATES:
            raise LayerLoomError(
                f"There is no candidate {_short(candidate)}; give {', '.join(CANDIDATES)}."
            )
        dilate, feather = request.get("dilate", 0), request.get("feather", 0.0)
        for name, value in (("dilate", dilate), ("feather", feather)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise LayerLoomError(f"{name} is {_short(value)}; give a number of pixels.")
        if dilate != dilate or feather != feather:
            raise LayerLoomError("dilate or feather is not a number; give pixels.")
        check_refinement(dilate, feather)
        return Wish(
            self._inside(request["picture"]),
            request["segmenter"],
            request["clicks"],
            candidate,
            round(dilate),
            float(feather),
        )

    def _inside(self, picture: Mapping[str, Any]) -> Path:
        """The file of a picture as the host names it, inside one of the host's folders."""
        kind, name = picture.get("type", "input"), picture.get("filename")
        subfolder = picture.get("subfolder", "")
        if kind not in KINDS:
            raise LayerLoomError(f"The picture's type is {_short(kind)}; give {', '.join(KINDS)}.")
        if not isinstance(name, str) or not name or not isinstance(subfolder, str):
            raise LayerLoomError("The picture has no filename; give one and its subfolder.")
        # Links are followed before it is judged where they lead.
        base = os.path.realpath(self._folder(kind))
        try:
            path = os.path.realpath(os.path.join(base, subfolder, name))
            inside = os.path.commonpath((base, path)) == base
        except ValueError:
            # A zero byte, or another drive.
            inside = False
        if not inside:
            raise LayerLoomError(
                f"The picture {_short(name)} lies outside the {kind} folder; choose one inside."
            )
        if not os.path.isfile(path):
            raise LayerLoomError(
                f"The picture {_short(name)} is not in the {kind} folder any more; run the "
                "workflow again."
            )
        return Path(path)


def _check_size(path: Path) -> None:
    limit = f"a click editor takes up to {MOST_PIXELS // 10**6} million pixels"
    if path.stat().st_size > MOST_BYTES:
        raise LayerLoomError(
            f"The file {path.name} is larger than {MOST_BYTES // 2**20} MiB; {limit}: scale it "
            "down."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise LayerLoomError(
            f"The picture {path.name} is too large; {limit}: scale it down."
        ) from None
    except (OSError, ValueError, SyntaxError):
        raise _no_picture(path) from None
    if width * height > MOST_PIXELS:
        raise LayerLoomError(
            f"The picture {path.name} has {width}x{height} pixels; {limit}: scale it down."
        )


def _pixels(path: Path) -> np.ndarray:
    try:
        picture = read_picture(path)
        if not picture.transparent:
            return picture.pixels
        # The host's Load Image drops transparency and shows the colours below it.
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except LayerLoomError:
        # Its sentence holds the whole path, which is nobody's business on the network.
        raise _no_picture(path) from None


def _no_picture(path: Path) -> LayerLoomError:
    return LayerLoomError(
        f"The file {path.name} is not a picture that can be opened; give a PNG, JPEG or WebP."
    )


def _stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    state = path.stat()
    return str(path), state.st_mtime_ns, state.st_size


def _scaled(side: int, scale: float) -> int:
    return max(1, round(side * scale))


def _as_address(mask: torch.Tensor) -> str:
    alpha = Image.fromarray((mask * 255).round().byte().numpy())
    picture = Image.merge("LA", (Image.new("L", alpha.size, 255), alpha))
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
