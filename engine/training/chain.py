"""Runs a list of recipes one after the other: finished ones are skipped, unfinished resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints.save import atomic_file
from ..errors import LayerLoomError

ENTRIES = {"stages", "export"}
Note = Callable[[str], None]


def is_chain(path: Path) -> bool:
    """Whether a file lists stages instead of describing one; unreadable ones are no chain."""
    from .recipe import load_recipe

    with suppress(LayerLoomError):
        return "stages" in load_recipe(path)
    return False


def train_chain(
    path: Path,
    overrides: Mapping[str, str],
    progress: Any = None,
    note: Note = lambda text: None,
    dry_run: bool = False,
) -> Path | None:
    """Train every stage that is not finished, in order; returns the last one's checkpoint.

    ``stages`` names shipped recipes or files beside ``path``; ``export`` is where the last
    checkpoint is copied to, seen from ``path``. Overrides are named ``STAGE.key`` or
    ``STAGE.table.key``. A stage is finished when its folder holds ``final.safetensors``: delete a
    folder to train it and, with theirs, those after it again.

    Raises:
        LayerLoomError: an unknown stage or override, or whatever stops a stage.
    """
    from .recipe import load_recipe, train_from_recipe

    if not _first_process():
        progress, note = None, lambda text: None
    chain = load_recipe(path, {k: v for k, v in overrides.items() if k in ENTRIES})
    _check(chain, path)
    recipes = {name: find_recipe(name, path.parent) for name in chain["stages"]}
    changes = _by_stage(overrides, list(recipes))
    folders = {
        name: Path(load_recipe(recipe, changes[name]).get("folder", f"runs/{name}"))
        for name, recipe in recipes.items()
    }
    final = None
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        final = folders[name] / "final.safetensors"
        label = f"Stage {number} of {len(recipes)}, {name}"
        if final.exists():
            note(f"{label}: finished, {final} is there.")
            continue
        note(f"{label}.")
        if dry_run:
            _rehearse(recipe, changes[name], note)
            continue
        final = train_from_recipe(recipe, changes[name], True, progress, note)
    if dry_run:
        return None
    if "export" in chain and _first_process():
        target = path.parent / chain["export"]
        _copy(final, target)
        return target
    return final


def _rehearse(recipe: Path, changes: Mapping[str, str], note: Note) -> None:
    from .recipe import train_from_recipe

    try:
        train_from_recipe(recipe, changes, True, None, note, dry_run=True)
    except LayerLoomError as error:
        # What an earlier stage will make is not there yet.
        note(f"Not checked yet: {error}")


def _check(chain: Mapping[str, Any], path: Path) -> None:
    unknown = sorted(set(chain) - ENTRIES)
    if unknown:
        raise LayerLoomError(
            f"The recipe {path} lists stages; its key {unknown[0]!r} is unknown, known are "
            f"{', '.join(sorted(ENTRIES))}."
        )
    names = chain["stages"]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise LayerLoomError(f"The recipe {path} must list the names of its stages.")


def find_recipe(name: str, beside: Path) -> Path:
    """A recipe's file: beside another one, or a shipped one of that name.

    Raises:
        LayerLoomError: there is none.
    """
    shipped = Path(__file__).parent / "recipes"
    for file in (beside / name, beside / f"{name}.toml", shipped / f"{name}.toml"):
        if file.is_file():
            return file
    known = ", ".join(sorted(entry.stem for entry in shipped.glob("*.toml")))
    raise LayerLoomError(
        f"The recipe {name} is neither a file nor a shipped one; shipped are: {known}."
    )


def _by_stage(overrides: Mapping[str, str], names: list[str]) -> dict[str, dict[str, str]]:
    changes: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in overrides.items():
        if key in ENTRIES:
            continue
        name, dot, rest = key.partition(".")
        if name not in changes or not dot:
            raise LayerLoomError(
                f"{key} names no stage; write STAGE.key=value with one of {', '.join(names)}."
            )
        changes[name][rest] = value
    return changes


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, atomic_file(target, source.stat().st_size) as writer:
        shutil.copyfileobj(reader, writer)
