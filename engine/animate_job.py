"""One run of `layerloom animate`: checks the options, reads pictures, makes and writes the clip."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LayerLoomError
from .versions import made_with

if TYPE_CHECKING:
    from .animate_request import AnimateRequest, AnimateResult

_VIDEO, _SHEET, _RECORD, _ARRAYS = "video.webm", "frames.png", "run.json", "video.npz"
_PACKAGES = (
    "layerloom",
    "torch",
    "diffusers",
    "transformers",
    "kornia",
    "safetensors",
    "av",
    "numpy",
)
_COLUMNS = 8
_TRAINING_STEPS = 1000
# Past this a mistyped number is likelier than a wish: hours at the small size.
_MOST_FRAMES = 10_000
_MOST_FPS = 240


@dataclass(frozen=True)
class AnimateReport:
    """What a run wrote. files: paths; record: the contents of run.json."""

    files: list[Path]
    record: dict[str, Any]

    def summary(self) -> str:
        """Two lines for a person: the files, and what is in them."""
        names = ", ".join(path.name for path in self.files)
        record = self.record
        return (
            f"Wrote {names} to {self.files[0].parent}\n"
            f"{record['frames']} frames of {record['width']}x{record['height']} at"
            f" {record['fps']:g} frames a second; {record['seconds_per_step']:.3g} s a step,"
            f" {record['seconds']:.3g} s in all"
        )


@dataclass(frozen=True)
class AnimateJob:
    """The options of `layerloom animate`, by the same names; None leaves it to the checkpoint."""

    image: Path
    prompt: str
    out: Path
    negative: str = ""
    end: Path | None = None
    loop: bool = False
    via: tuple[Path, ...] = ()
    motion: float | None = None
    gate: float = 1.0
    gate_layers: str = "all"
    text_scale: float | None = None
    image_scale: float | None = None
    rescale: float | None = None
    frames: int | None = None
    overlap: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    exact_first_frame: bool = False
    fps: float | None = None
    seed: int = 0
    checkpoint: Path | None = None
    variant: str | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    image_encoder: Path | None = None
    arrays: bool = False
    device: str | None = None

    def check(self) -> None:
        """Raise LayerLoomError for whatever shows before a file is read or a model loaded."""
        if not self.prompt.strip():
            raise LayerLoomError("--prompt is empty; say in words what the clip shows.")
        if self.loop and self.end is not None:
            raise LayerLoomError(
                "--end and --loop cannot go together, since a loop ends on its first image; give"
                " one of them."
            )
        if self.via and not self.loop and self.end is None:
            raise LayerLoomError(
                "--via passes through images on the way to --end, or around a --loop; add one of"
                " them."
            )
        for option, path in (
            ("image", self.image),
            *(("--via image", path) for path in self.via),
            ("--end image", self.end),
        ):
            if path is not None and not path.exists():
                raise LayerLoomError(
                    f"The {option} {path} does not exist; give a PNG, JPEG or WebP."
                )
        self._check_numbers()
        if self.gate_layers not in ("all", "middle"):
            raise LayerLoomError(
                f"--gate-layers is {self.gate_layers!r}; give all or middle (layers 7 to 9)."
            )
        for option in ("checkpoint", "vae", "text_encoder", "image_encoder"):
            path = getattr(self, option)
            if path is not None and not path.exists():
                name = option.replace("_", "-")
                raise LayerLoomError(f"--{name} {path} does not exist; check the path.")

    def _check_numbers(self) -> None:
        for option, low, high, words in (
            ("steps", 1, _TRAINING_STEPS, f"a whole number from 1 to {_TRAINING_STEPS}"),
            ("frames", 1, _MOST_FRAMES, f"a whole number from 1 to {_MOST_FRAMES}"),
            ("overlap", 1, _MOST_FRAMES, "a number of frames from 1 up"),
            ("width", 1, math.inf, "a number of pixels above 0"),
            ("height", 1, math.inf, "a number of pixels above 0"),
            ("text_scale", 0, 1000, "a number from 0 up, 1 for no guidance"),
            ("image_scale", 0, 1000, "a number from 0 up, 1 for no guidance"),
            ("rescale", 0, 1, "a number from 0 to 1"),
            ("eta", 0, 1, "a number from 0 (no fresh noise) to 1 (as published)"),
            ("motion", 1e-3, 1000, "a number above 0"),
            ("gate", 0, 10, "a number from 0 (no image stream) to 10, 1 as trained"),
            ("fps", 1e-3, _MOST_FPS, f"frames a second, up to {_MOST_FPS}"),
        ):
            value = getattr(self, option)
            # Written so that NaN is refused.
            if value is not None and not low <= value <= high:
                name = option.replace("_", "-")
                raise LayerLoomError(f"--{name} is {value:g}; give {words}.")
        if not 0 <= self.seed < 2**63:
            raise LayerLoomError(f"--seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")
        if self.spacing is not None:
            # Imported only where asked for: the schedules load torch.
            from .sampling.latent_schedules import SPACINGS

            if self.spacing not in SPACINGS:
                raise LayerLoomError(
                    f"--spacing is {self.spacing!r}; give one of {', '.join(SPACINGS)}."
                )

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
        with StagedFolder(self.out, (_VIDEO, _SHEET, _RECORD, _ARRAYS)) as staged:
            notes: list[str] = []
            request = self._request(notes)
            require_vp9()
            request.validate()
            # After the pictures: loading torch takes seconds.
            from .animate import AnimatePipeline

            pipeline = AnimatePipeline.open(
                self.checkpoint,
                self.vae,
                self.text_encoder,
                self.image_encoder,
                device=self.device,
                variant=self.variant,
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

    def _request(self, notes: list[str]) -> AnimateRequest:
        from .animate_request import AnimateRequest
        from .conditioning.pictures import read_picture

        def read(path: Path, what: str) -> Any:
            picture = read_picture(path, what)
            if picture.transparent:
                notes.append(f"The {what} has transparent parts; they are taken as black.")
            if picture.moving:
                notes.append(f"The {what} is an animation; its first picture is taken.")
            return picture.pixels

        return AnimateRequest(
            image=read(self.image, "image"),
            prompt=self.prompt,
            negative=self.negative,
            end=None if self.end is None else read(self.end, "end image"),
            loop=self.loop,
            key_images=tuple(
                read(path, f"key image {number}") for number, path in enumerate(self.via, 1)
            ),
            motion=self.motion,
            gate=self.gate,
            gate_layers=self.gate_layers,
            text_scale=self.text_scale,
            image_scale=self.image_scale,
            rescale=self.rescale,
            frames=self.frames,
            overlap=self.overlap,
            width=self.width,
            height=self.height,
            steps=self.steps,
            spacing=self.spacing,
            eta=self.eta,
            exact_first_frame=self.exact_first_frame,
            fps=self.fps,
            seed=self.seed,
        )

    def _record(self, result: AnimateResult, notes: list[str], seconds: float) -> dict[str, Any]:
        frames, height, width = result.frames.shape[:3]
        return {
            "prompt": self.prompt,
            "negative": self.negative,
            "image": str(self.image),
            "via": [str(path) for path in self.via],
            "end": None if self.end is None else str(self.end),
            "loop": self.loop,
            "checkpoint": "starter" if self.checkpoint is None else str(self.checkpoint),
            "seed": self.seed,
            "settings": result.settings,
            # Frames, counted from 0, that an image was given for.
            "key_frames": [frame for frame, _ in result.keys],
            "frames": frames,
            "width": width,
            "height": height,
            "fps": float(result.fps),
            "seconds_per_step": float(result.seconds_per_step),
            "seconds": seconds,
            "notes": notes,
            **made_with(_PACKAGES),
        }


def _write(path: Callable[[str], Path], result: AnimateResult, arrays: bool) -> None:
    import numpy as np

    from .contact_sheet import contact_sheet
    from .media import write_webm

    write_webm(path(_VIDEO), result.frames, result.fps)
    contact_sheet({"video": result.frames}, columns=_COLUMNS).save(path(_SHEET))
    if arrays:
        with path(_ARRAYS).open("wb") as file:
            np.savez_compressed(file, video=result.frames)
