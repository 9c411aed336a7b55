"""Golden cases: numbers made by the papers' official code, compared with what this engine gives.

A case is ``NAME.safetensors`` (``in.*`` fed, ``out.*`` expected) and ``NAME.json`` (shapes,
tolerances, configuration, and the weights or the recipe that makes them). The prefix of NAME says
which runner knows it; a paper that joins the engine adds its runners to ``runners()``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import LayerLoomError


@dataclass(frozen=True)
class GoldenCase:
    """One golden file pair."""

    name: str
    description: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def tolerance(self, tensor: str) -> tuple[float, float | None]:
        """``atol`` of an expected tensor, and its ``atol_strict`` where one was measured."""
        for entry in self.description["expected"]:
            if entry["tensor"] == tensor:
                return float(entry["atol"]), entry.get("atol_strict")
        raise KeyError(tensor)

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """Weights under their official names: stored ones, or made by the recipe."""
        if "weight_recipe" in self.description:
            made = recipe_weights(self.description["weight_recipe"])
            return {prefix + name: torch.from_numpy(array) for name, array in made.items()}
        reserved = ("in.", "out.", "rec.")
        return {name: t for name, t in self.tensors.items() if not name.startswith(reserved)}


@dataclass(frozen=True)
class CaseResult:
    """Verdict of one comparison.

    Attributes:
        case: file name and what was compared.
        max_error: largest absolute difference; None when skipped.
        tolerance: the case's own absolute tolerance; None when skipped.
        passed: None when skipped.
        note: the reason, when it was skipped or could not run.
        strict: six times the official code's own float32 rounding, where it was measured.
    """

    case: str
    max_error: float | None
    tolerance: float | None
    passed: bool | None
    note: str = ""
    strict: float | None = None


Runner = Callable[[GoldenCase], Iterable[CaseResult]]


def runners() -> dict[str, Runner]:
    """File-name prefix -> runner; the longest matching prefix wins."""
    from . import golden_click as click
    from . import golden_ddim as ddim
    from . import golden_dynamicrafter as dynamicrafter
    from . import golden_layerflow as layerflow

    return {
        "dc_unet_": dynamicrafter.run_forward,
        "dc_ckpt_": dynamicrafter.run_checkpoint,
        "dc_resampler": dynamicrafter.run_projector,
        "dc_schedule_": ddim.run_schedule,
        "dc_ddim_": ddim.run_whole,
        "fyc_unet_": click.run_forward,
        "fyc_schedule": click.run_schedule,
        "fyc_sample": click.run_sampling,
        "lf_schedule": layerflow.run_schedule,
        "lf_dit_": layerflow.run_forward,
        "lf_sample_": layerflow.run_sampling,
    }


def run_cases(
    folder: str | Path,
    on_result: Callable[[CaseResult], None] | None = None,
    pattern: str = "*",
) -> list[CaseResult]:
    """Run every golden case in a folder that a runner knows; others are listed as skipped.

    ``on_result`` gets each result as it comes. A case that cannot be run counts as failed.
    ``pattern`` limits the names, "lf_*" say.

    Raises:
        LayerLoomError: no such folder, or no case in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LayerLoomError(f"There is no folder {folder}; give a folder of golden cases.")
    names = sorted(path.stem for path in folder.glob(f"{pattern}.json"))
    if not names:
        raise LayerLoomError(
            f"{folder} holds no golden cases; expected pairs of NAME.json and NAME.safetensors."
        )
    results = []
    for name in names:
        for result in _run(folder, name):
            results.append(result)
            if on_result:
                on_result(result)
    return results


def _run(folder: Path, name: str) -> Iterable[CaseResult]:
    known = [prefix for prefix in runners() if name.startswith(prefix)]
    if not known:
        note = f"skipped: this version has no runner for {name.partition('_')[0]}_ cases"
        yield CaseResult(name, None, None, None, note)
        return
    try:
        yield from runners()[max(known, key=len)](load_case(folder, name))
    except LayerLoomError as error:
        yield CaseResult(name, None, None, False, str(error))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        # A case file that lacks something must not hide the verdict on the others.
        note = f"could not run ({type(error).__name__}: {error})"
        yield CaseResult(name, None, None, False, note)


def load_case(folder: str | Path, name: str) -> GoldenCase:
    """Read one pair of files.

    Raises:
        LayerLoomError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        description = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{name}.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise LayerLoomError(f"The case {name} cannot be read ({error}).") from None
    return GoldenCase(name, description, tensors)


def compare(
    case: GoldenCase,
    tensor: str,
    found: torch.Tensor | list,
    label: str = "",
    rounding: float = 0.0,
) -> CaseResult:
    """Compare a tensor with the expected one of that name, in float64.

    ``rounding`` is how far a float64 run lies from the float32 one, where that was measured: a
    case that rounding alone moves by more than its tolerance is held to six times that distance,
    the factor of the cases' own strict tolerances.
    """
    expected = case.tensors[tensor]
    tolerance, strict = case.tolerance(tensor)
    tolerance = max(tolerance, 6 * rounding)
    name = f"{case.name} {label or tensor.removeprefix('out.')}"
    found = torch.as_tensor(found).detach().cpu()
    if found.shape != expected.shape:
        note = f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        return CaseResult(name, None, tolerance, False, note, strict)
    error = float((found.double() - expected.double()).abs().max())
    # Written so that NaN fails.
    return CaseResult(name, error, tolerance, error <= tolerance, "", strict)


def recipe_weights(recipe: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights of a ``weight_recipe``: NAME -> float32 array, bit-exact on every machine.

    The generator is the one the recipe's ``how`` describes: a key from sha256("SEED:NAME"),
    splitmix64 over a counter, the top 24 bits as a uniform number in [-1, 1), scaled and shifted.

    Raises:
        LayerLoomError: the result does not have the recipe's ``sha256_all``.
    """
    weights = {
        name: _recipe_tensor(f"{recipe['seed']}:{name}", shape, scale, offset)
        for name, (shape, scale, offset) in recipe["tensors"].items()
    }
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode("ascii"))
        digest.update(weights[name].astype("<f4").tobytes())
    if digest.hexdigest() != recipe["sha256_all"]:
        raise LayerLoomError("The case's weight recipe gives other weights than its checksum says.")
    return weights


def _recipe_tensor(key: str, shape: list[int], scale: float, offset: float) -> np.ndarray:
    start = int.from_bytes(hashlib.sha256(key.encode("ascii")).digest()[:8], "little")
    counter = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    z = np.uint64(start) + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
    return (offset + uniform * scale).astype(np.float32).reshape(shape)
