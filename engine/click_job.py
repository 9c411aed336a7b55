"""One run of `layerloom click`: checks options, finds the regions, makes and writes the clip."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .animate_job import AnimateReport
from .errors import LayerLoomError
from .versions import made_with

if TYPE_CHECKING:
    import numpy as np

    from .click_request import ClickRequest, ClickResult

_VIDEO, _SHEET, _MASK = "video.webm", "frames.png", "mask.png"
_RECORD, _ARRAYS = "run.json", "video.npz"
_PACKAGES = ("layerloom", "torch", "diffusers", "transformers", "segment-anything", "numpy")
_COLUMNS = 8
_TRAINING_STEPS = 1000
_MOST_FPS = 240
_SEPARATOR = "@"


@dataclass(frozen=True)
class RegionOption:
    """One region as it is asked for: points and boxes for the segmenter, or a mask's file."""

    phrase: str
    strength: float | None
    points: tuple[tuple[float, ...], ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    mask: Path | None = None


def read_region(text: str) -> RegionOption:
    """``WHERE@PHRASE`` or ``WHERE@PHRASE@STRENGTH``; WHERE is X,Y;X,Y,LABEL... or a mask's file.

    Raises:
        LayerLoomError: anything else.
    """
    from .conditioning.clicks import read_point

    where, *rest = (part.strip() for part in text.split(_SEPARATOR))
    strength = None
    if len(rest) == 2:
        try:
            strength = float(rest[1])
        except ValueError:
            rest = []
    if len(rest) not in (1, 2) or not where or not rest[0]:
        raise LayerLoomError(
            f"--region {text!r} is not of the form WHERE@PHRASE@STRENGTH; write '40,60@moves left"
            "@6' or 'mask.png@moves left'."
        )
    if Path(where).exists():
        return RegionOption(rest[0], strength, mask=Path(where))
    if not where[0].isdigit() and where[0] not in "-.":
        raise LayerLoomError(f"The mask {where} of --region does not exist; check the path.")
    points = tuple(read_point(part) for part in where.split(";"))
    return RegionOption(rest[0], strength, points=points)


@dataclass(frozen=True)
class ClickJob:
    """The options of `layerloom click`, by the same names; None leaves it to the checkpoint."""

    image: Path
    prompt: str | None
    out: Path
    points: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    mask: Path | None = None
    strength: float | None = None
    regions: tuple[str, ...] = ()
    caption: str = ""
    negative: str = ""
    segmenter: Path | None = None
    choose: int | None = None
    dilate: int = 0
    feather: float = 0.0
    hold_background: bool = False
    exact_first_frame: bool = False
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fps: float | None = None
    seed: int = 0
    checkpoint: Path | None = None
    base: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    arrays: bool = False
    device: str | None = None

    def wanted(self) -> list[RegionOption]:
        """The regions, the main options' first.

        Raises:
            LayerLoomError: none, or one without a place or a phrase.
        """
        from .conditioning.clicks import read_box, read_point

        found = []
        placed = bool(self.points or self.boxes or self.mask)
        if placed and self.mask and (self.points or self.boxes):
            raise LayerLoomError(
                "--mask and --point or --box say the same thing twice; give one of them."
            )
        if placed and not (self.prompt or "").strip():
            raise LayerLoomError("--prompt is empty; say what the region does, 'moves left' say.")
        if placed:
            found.append(
                RegionOption(
                    self.prompt.strip(),
                    self.strength,
                    tuple(map(read_point, self.points)),
                    tuple(map(read_box, self.boxes)),
                    self.mask,
                )
            )
        elif self.prompt or not self.regions:
            raise LayerLoomError(
                "Nothing says where to move; click on it with --point X,Y, or give --box, --mask "
                "or --region."
            )
        return [*found, *map(read_region, self.regions)]

    def check(self) -> None:
        """Raise LayerLoomError for whatever shows before a file is read or a model loaded."""
        if not self.image.exists():
            raise LayerLoomError(
                f"The image {self.image} does not exist; give a PNG, JPEG or WebP."
            )
        self.wanted()
        self._check_numbers()
        if self.dilate or self.feather:
            # Imported only where asked for: masks load torch.
            from .conditioning.masks import check_refinement

            check_refinement(self.dilate, self.feather)
        for option in ("mask", "segmenter", "checkpoint", "base", "vae", "text_encoder"):
            path = getattr(self, option)
            if path is not None and not path.exists():
                name = option.replace("_", "-")
                raise LayerLoomError(f"--{name} {path} does not exist; check the path.")

    def _check_numbers(self) -> None:
        for option, low, high, words in (
            ("steps", 1, _TRAINING_STEPS, f"a whole number from 1 to {_TRAINING_STEPS}"),
            ("frames", 1, math.inf, "a whole number from 1 up"),
            ("width", 1, math.inf, "a number of pixels above 0"),
            ("height", 1, math.inf, "a number of pixels above 0"),
            ("guidance", 0, 1000, "a number from 0 up, 1 for no guidance"),
            ("strength", 0, 1000, "a number from 0 up"),
            ("choose", 0, 2, "0, 1 or 2"),
            ("fps", 1e-3, _MOST_FPS, f"frames a second, up to {_MOST_FPS}"),
        ):
            value = getattr(self, option)
            # Written so that NaN is refused.
            if value is not None and not low <= value <= high:
                raise LayerLoomError(f"--{option} is {value:g}; give {words}.")
        if not 0 <= self.seed < 2**63:
            raise LayerLoomError(f"--seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")

    def run(
        self, note: Callable[[str], None], progress: Callable[[str, int, int], None]
    ) -> AnimateReport:
        """Do the work and write the files, all of them or none.

        note: told what was resized, cut or is untrained. progress: called with what is being done,
        how much is done, and of how much.
        Errors: LayerLoomError, before the first step except for a disk that fills up.
        """
        from .media import require_vp9
        from .staging import StagedFolder

        started = time.perf_counter()
        with StagedFolder(self.out, (_VIDEO, _SHEET, _MASK, _RECORD, _ARRAYS)) as staged:
            notes: list[str] = []
            request = self._request(notes)
            require_vp9()
            request.validate()
            # After the pictures: loading torch takes seconds.
            from .click import ClickPipeline

            pipeline = ClickPipeline.open(
                self.checkpoint, self.base, self.vae, self.text_encoder, device=self.device
            )
            notes += pipeline.prepare(request)
            for text in notes:
                note(text)
            result = pipeline.run(request, progress)
            _write(staged.path, result, self.arrays)
            record = self._record(result, notes, time.perf_counter() - started)
            text = json.dumps(record, indent=2, default=str)
            staged.path(_RECORD).write_text(text + "\n", encoding="utf-8")
        return AnimateReport(staged.files, record)

    def _request(self, notes: list[str]) -> ClickRequest:
        from .click_request import ClickRequest, Region
        from .conditioning.pictures import read_picture

        picture = read_picture(self.image, "image")
        if picture.transparent:
            notes.append("The image has transparent parts; they are taken as black.")
        if picture.moving:
            notes.append("The image is an animation; its first picture is taken.")
        wanted = self.wanted()
        masks = self._masks(wanted, picture.pixels)
        return ClickRequest(
            image=picture.pixels,
            regions=tuple(
                Region(mask, option.phrase, option.strength)
                for option, mask in zip(wanted, masks, strict=True)
            ),
            prompt=self.caption,
            negative=self.negative,
            hold_background=self.hold_background,
            exact_first_frame=self.exact_first_frame,
            frames=self.frames,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance=self.guidance,
            fps=self.fps,
            seed=self.seed,
        )

    def _masks(self, wanted: list[RegionOption], picture: np.ndarray) -> list[np.ndarray]:
        """Each region's mask, float32 [H, W]; the picture is embedded once for all clicks."""
        import torch

        from .conditioning.clicks import pixel_clicks
        from .conditioning.masks import read_mask, refine

        size, made = picture.shape[:2], []
        # Every point is checked before a segmenter is opened.
        clicks = [
            None if option.mask else pixel_clicks(option.points, option.boxes, size).require()
            for option in wanted
        ]
        segmenter = embedding = None
        for option, clicked in zip(wanted, clicks, strict=True):
            if clicked is None:
                mask = torch.from_numpy(read_mask(option.mask, size))
            else:
                if segmenter is None:
                    from .conditioning.segmenter import Segmenter

                    segmenter = Segmenter.open(self.segmenter, self.device)
                    embedding = segmenter.embed(picture)
                mask = segmenter.masks(embedding, clicked).mask(self.choose).cpu()
            made.append(refine(mask, self.dilate, self.feather).numpy())
        return made

    def _record(self, result: ClickResult, notes: list[str], seconds: float) -> dict[str, Any]:
        frames, height, width = result.frames.shape[:3]
        return {
            "image": str(self.image),
            "regions": [
                {
                    "points": [list(point) for point in option.points],
                    "boxes": [list(box) for box in option.boxes],
                    "mask": None if option.mask is None else str(option.mask),
                    "phrase": option.phrase,
                    "strength": option.strength,
                }
                for option in self.wanted()
            ],
            "caption": self.caption,
            "negative": self.negative,
            "checkpoint": "starter" if self.checkpoint is None else str(self.checkpoint),
            "segmenter": "starter" if self.segmenter is None else str(self.segmenter),
            "dilate": self.dilate,
            "feather": self.feather,
            "seed": self.seed,
            "settings": result.settings,
            "frames": frames,
            "width": width,
            "height": height,
            "fps": float(result.fps),
            "seconds_per_step": float(result.seconds_per_step),
            "seconds": seconds,
            "notes": notes,
            **made_with(_PACKAGES),
        }


def _write(path: Callable[[str], Path], result: ClickResult, arrays: bool) -> None:
    import numpy as np

    from .conditioning.masks import write_mask
    from .contact_sheet import contact_sheet
    from .media import write_webm

    write_webm(path(_VIDEO), result.frames, result.fps)
    contact_sheet({"video": result.frames}, columns=_COLUMNS).save(path(_SHEET))
    write_mask(path(_MASK), result.masks.any(0))
    if arrays:
        with path(_ARRAYS).open("wb") as file:
            np.savez_compressed(file, video=result.frames, masks=result.masks)
