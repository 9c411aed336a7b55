"""One run of `layerloom layered`: checks the options, reads clips, makes and writes layers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_options import AdapterOptions
from .errors import LayerLoomError
from .versions import made_with

if TYPE_CHECKING:
    import numpy as np

    from .layered import LayeredResult
    from .media import Clip
    from .reuse import GivenReuse

_LAYERS = ("foreground", "alpha", "background", "blended")
_SHEET, _RECORD, _ARRAYS = "layers.png", "run.json", "layers.npz"
_PACKAGES = ("layerloom", "torch", "diffusers", "transformers", "safetensors", "av", "numpy")
# No checkpoint takes more frames a layer; reading on would only cost memory.
_FRAMES_READ = 64
_TRAINING_STEPS = 1000
_DEFAULT_FPS = 8.0


@dataclass(frozen=True)
class LayeredReport:
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
class LayeredJob:
    """The options of `layerloom layered`, by the same names; None leaves it to the checkpoint."""

    foreground: str
    background: str
    out: Path
    blended: str | None = None
    given_foreground: Path | None = None
    given_alpha: Path | None = None
    given_background: Path | None = None
    decompose: Path | None = None
    checkpoint: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_mode: str | None = None
    sampler: str | None = None
    seed: int = 0
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    adapters: AdapterOptions = AdapterOptions()
    reuse_given: bool = False
    reuse_refresh: int | None = None
    reuse_memory: float | None = None
    arrays: bool = False
    device: str | None = None

    @property
    def task(self) -> str:
        """generate, foreground, background or decompose: what the clips given ask for."""
        if self.given_foreground is not None:
            return "foreground"
        if self.given_background is not None:
            return "background"
        return "generate" if self.decompose is None else "decompose"

    def check(self) -> None:
        """Raise LayerLoomError for whatever shows before a file is read or a model loaded."""
        for option, text in (("foreground", self.foreground), ("background", self.background)):
            if not text.strip():
                raise LayerLoomError(f"--{option} is empty; say in words what the layer shows.")
        if self.blended is not None and not self.blended.strip():
            raise LayerLoomError("--blended is empty; describe the whole scene or leave it out.")
        self.adapters.check()
        self._check_clips()
        self._check_numbers()
        self._check_names()
        for option in ("checkpoint", "vae", "text_encoder"):
            path = getattr(self, option)
            if path is not None and not path.exists():
                name = option.replace("_", "-")
                raise LayerLoomError(f"--{name} {path} does not exist; check the path.")

    def _check_clips(self) -> None:
        clips = {
            "--given-foreground": self.given_foreground,
            "--given-background": self.given_background,
            "--decompose": self.decompose,
        }
        chosen = [option for option, path in clips.items() if path is not None]
        if len(chosen) > 1:
            raise LayerLoomError(
                f"{chosen[0]} and {chosen[1]} cannot go together, since each is a task of its own;"
                " give one of them."
            )
        if self.given_alpha is not None and self.given_foreground is None:
            raise LayerLoomError(
                "--given-alpha belongs to a foreground; add --given-foreground or leave it out."
            )
        for option, path in (*clips.items(), ("--given-alpha", self.given_alpha)):
            if path is not None and not path.exists():
                raise LayerLoomError(
                    f"{option} {path} does not exist; give a video, a folder of PNGs, or an"
                    " animated GIF, PNG or WebP."
                )

    def _check_numbers(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= _TRAINING_STEPS:
            raise LayerLoomError(
                f"--steps is {self.steps}; give a whole number from 1 to {_TRAINING_STEPS}."
            )
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise LayerLoomError(
                f"--guidance is {self.guidance:g}; give a number from 0 up, 1 for no guidance."
            )
        if not 0 <= self.seed < 2**63:
            raise LayerLoomError(f"--seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")
        if self.frames is not None and self.frames < 1:
            raise LayerLoomError(f"--frames is {self.frames}; at least 1 is needed.")
        self._check_reuse()
        for option, value in (("width", self.width), ("height", self.height)):
            # Two latent pixels a side make a token, so no checkpoint takes an odd size.
            if value is not None and (value < 1 or value % 2):
                raise LayerLoomError(
                    f"--{option} is {value}, but sizes are even numbers of pixels; give"
                    f" {max(2, value + 1)}, say."
                )

    def _check_reuse(self) -> None:
        if self.reuse_given and self.task == "generate":
            raise LayerLoomError(
                "--reuse-given has nothing to reuse, since no layer is given; give a clip or leave"
                " it out."
            )
        for option in ("reuse_refresh", "reuse_memory"):
            if getattr(self, option) is not None and not self.reuse_given:
                name = option.replace("_", "-")
                raise LayerLoomError(
                    f"--{name} belongs to --reuse-given; add that or leave it out."
                )
        if self.reuse_refresh is not None and self.reuse_refresh < 0:
            raise LayerLoomError(
                f"--reuse-refresh is {self.reuse_refresh}; give a number of steps, 0 for never."
            )
        if self.reuse_memory is not None and not (0 < self.reuse_memory < math.inf):
            raise LayerLoomError(
                f"--reuse-memory is {self.reuse_memory:g}; give a number of GiB above 0."
            )

    def _check_names(self) -> None:
        # Imported only where asked for: the samplers load torch.
        if self.sampler is not None:
            from .sampling.samplers import SAMPLER_NAMES

            _check_name("--sampler", self.sampler, SAMPLER_NAMES)
        if self.guidance_mode is not None:
            from .sampling.guidance import GUIDANCE_NAMES

            _check_name("--guidance-mode", self.guidance_mode, GUIDANCE_NAMES)

    def run(
        self, note: Callable[[str], None], progress: Callable[[int, int], None]
    ) -> LayeredReport:
        """Do the work and write the files, all of them or none.

        note: told what was resized, cut or left out. progress: called with (step, steps).
        Errors: LayerLoomError, before the first step except for a disk that fills up.
        """
        from .media import require_vp9
        from .staging import StagedFolder

        names = [f"{layer}.webm" for layer in _LAYERS] + [_SHEET, _RECORD, _ARRAYS]
        started = time.perf_counter()
        with StagedFolder(self.out, names) as staged:
            notes: list[str] = []
            given, fps = self._read_clips(notes)
            require_vp9()
            # After the clips: loading torch takes seconds.
            from .layered import LayeredPipeline, LayeredRequest

            request = LayeredRequest(
                task=self.task,
                foreground=self.foreground,
                background=self.background,
                blended=self.blended,
                given=given,
                fps=fps,
                frames=self.frames,
                width=self.width,
                height=self.height,
                steps=self.steps,
                guidance=self.guidance,
                guidance_mode=self.guidance_mode,
                sampler=self.sampler,
                seed=self.seed,
                reuse=self._reuse(),
            )
            request.validate()
            pipeline = LayeredPipeline.open(
                self.checkpoint,
                self.vae,
                self.text_encoder,
                device=self.device,
                adapters=self.adapters.strengths,
                loras=self.adapters.read(),
            )
            notes += pipeline.prepare(request)
            for text in notes:
                note(text)
            result = pipeline.run(request, lambda info: progress(info.step, info.total))
            _write_layers(staged.path, result, self.arrays)
            record = self._record(result, notes, time.perf_counter() - started)
            text = json.dumps(record, indent=2, default=str)
            staged.path(_RECORD).write_text(text + "\n", encoding="utf-8")
        return LayeredReport(staged.files, record)

    def _reuse(self) -> GivenReuse | None:
        if not self.reuse_given:
            return None
        from .reuse import MEMORY_GIB, REFRESH_EVERY, GivenReuse

        refresh = REFRESH_EVERY if self.reuse_refresh is None else self.reuse_refresh
        return GivenReuse(refresh=refresh or None, memory=self.reuse_memory or MEMORY_GIB)

    def _read_clips(self, notes: list[str]) -> tuple[dict[str, np.ndarray], float]:
        """The given layers by name, uint8, and the frames a second to write."""
        if self.task == "generate":
            return {}, _DEFAULT_FPS
        if self.task == "foreground":
            return self._read_foreground(notes)
        layer = "background" if self.task == "background" else "blended"
        clip = self._read(self.given_background or self.decompose, layer, notes)
        if clip.alpha is not None:
            notes.append(f"The {layer} has transparent parts; they are taken as black.")
        return {layer: clip.over((0, 0, 0))}, clip.fps

    def _read_foreground(self, notes: list[str]) -> tuple[dict[str, np.ndarray], float]:
        clip = self._read(self.given_foreground, "foreground", notes)
        given = {"foreground": clip.frames}
        if self.given_alpha is not None:
            matte = self._read(self.given_alpha, "alpha", notes)
            if matte.frames.shape != clip.frames.shape:
                raise LayerLoomError(
                    f"The alpha {self.given_alpha} ({_shape(matte)}) does not match the foreground"
                    f" {self.given_foreground} ({_shape(clip)}); give clips of one size and length."
                )
            given["alpha"] = matte.as_alpha()
        elif clip.alpha is not None:
            given["alpha"] = clip.alpha
        return given, clip.fps

    def _read(self, path: Path, what: str, notes: list[str]) -> Clip:
        from .media import read_clip

        clip = read_clip(path, what, max_frames=max(self.frames or 0, _FRAMES_READ))
        if clip.truncated:
            notes.append(f"Only the first {len(clip.frames)} frames of {path} were read.")
        return clip

    def _record(self, result: LayeredResult, notes: list[str], seconds: float) -> dict[str, Any]:
        frames, height, width = result.blended.shape[:3]
        return {
            "task": self.task,
            "prompts": {
                "foreground": self.foreground,
                "background": self.background,
                "blended": self.blended,
            },
            "given": {
                name: str(getattr(self, name))
                for name in ("given_foreground", "given_alpha", "given_background", "decompose")
                if getattr(self, name) is not None
            },
            "checkpoint": "starter" if self.checkpoint is None else str(self.checkpoint),
            "loras": self.adapters.record(),
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


def _check_name(option: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise LayerLoomError(f"{option} is {name!r}; give one of {', '.join(known)}.")


def _write_layers(path: Callable[[str], Path], result: LayeredResult, arrays: bool) -> None:
    import numpy as np

    from .contact_sheet import contact_sheet
    from .media import write_webm

    layers = {layer: getattr(result, layer) for layer in _LAYERS}
    # Checkpoints of opaque layers make no alpha.
    layers = {layer: frames for layer, frames in layers.items() if frames is not None}
    alpha = layers.get("alpha")
    for layer, frames in layers.items():
        matte = alpha if layer == "foreground" else None
        write_webm(path(f"{layer}.webm"), frames, result.fps, matte)
    rows = {layer: frames for layer, frames in layers.items() if layer != "alpha"}
    if result.recomposed is not None:
        rows["recomposed"] = result.recomposed
    contact_sheet(rows, alpha).save(path(_SHEET))
    if arrays:
        with path(_ARRAYS).open("wb") as file:
            np.savez_compressed(file, **layers)


def _shape(clip: Clip) -> str:
    frames, height, width = clip.frames.shape[:3]
    return f"{frames} frames of {width}x{height}"
