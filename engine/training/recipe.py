"""Recipes: a TOML file names a stage and its settings; this builds the stage and trains it."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.dynamicrafter import QueryTransformer
from ..models.layered_transformer import LayeredTransformer
from ..models.starter_autoencoder import StarterAutoencoder
from ..models.video_unet import VideoUNet
from .autoencoder import AutoencoderStage, SpriteData, load_autoencoder
from .distributed import find_processes
from .settings import SamplingSettings, settings_from
from .trainer import Stage, Trainer, TrainingSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger("layerloom.training")
Recipe = dict[str, Any]
Progress = Callable[[str, int, int, Mapping[str, float]], None]
Note = Callable[[str], None]

STAGES = ("autoencoder", "layered", "lora", "animate", "segmenter", "click", "trajectory")
# Entries of a recipe by stage; tables are checked by what they are for.
COMMON = {"stage", "folder", "start", "data", "training"}
ENTRIES = {
    "autoencoder": COMMON | {"autoencoder", "loss"},
    "layered": COMMON
    | {"autoencoder", "scenes", "transformer", "text", "task", "sampling", "preview", "trainable"}
    | {"vae", "text_encoder", "variant", "layers"},
    "lora": COMMON
    | {"scenes", "task", "sampling", "preview", "adapter", "vae", "text_encoder", "layers"},
    "animate": COMMON
    | {"autoencoder", "unet", "projector", "text", "image", "noise", "task", "sampling"}
    | {"variant", "base", "trainable", "vae", "text_encoder", "image_encoder"},
    "segmenter": COMMON | {"segmenter"},
    "click": COMMON
    | {"autoencoder", "unet", "text", "task", "sampling", "trainable"}
    | {"base", "vae", "text_encoder"},
    "trajectory": COMMON
    | {
        "autoencoder",
        "unet",
        "text",
        "task",
        "sampling",
        "trainable",
        "reference",
        "placed_reference",
        "control",
    }
    | {"base", "vae", "text_encoder"},
}
# Tables that a stage cannot do without, beside data and training.
NEEDED = {"lora": {"adapter"}, "animate": {"task"}, "click": {"task"}, "trajectory": {"task"}}


def load_recipe(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe and replace entries named ``key`` or ``table.key``; values are TOML, or text.

    Raises:
        LayerLoomError: not TOML, or an override of an entry that the recipe does not have.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LayerLoomError(f"The recipe {path} cannot be read: {error}.") from error
    for key, text in (overrides or {}).items():
        *tables, name = key.split(".")
        place = recipe
        for table in tables:
            place = place.get(table)
            if not isinstance(place, dict):
                raise LayerLoomError(f"{key} is not in the recipe: it has no table [{table}].")
        if name not in place and place is recipe:
            raise LayerLoomError(
                f"{key} is not in the recipe; its entries are {', '.join(sorted(recipe))}."
            )
        try:
            place[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            place[name] = text
    return recipe


def check_recipe(recipe: Recipe, path: Path) -> TrainingSettings:
    """Check a recipe's entries and tables as far as nothing needs to be opened.

    Raises:
        LayerLoomError: an entry is missing, unknown or of another type.
    """
    stage = recipe.get("stage")
    if stage not in STAGES:
        raise LayerLoomError(
            f"Unknown stage {stage!r} in the recipe: use {', '.join(STAGES[:-1])} or {STAGES[-1]}."
        )
    tables = {"data", "training", "loss", "transformer", "text", "task", "sampling", "preview"}
    tables |= {"unet", "projector", "image", "noise", "segmenter", "control"}
    needed = {"data", "training", *NEEDED.get(stage, ())}
    for table in sorted(needed | (tables & set(recipe))):
        if not isinstance(recipe.get(table), dict):
            raise LayerLoomError(f"The recipe {path} has no table [{table}].")
    _refuse_unknown(recipe, ENTRIES[stage], "")
    settings = settings_from(recipe["training"], TrainingSettings)
    if stage == "animate":
        from .animate_recipe import check_animate

        check_animate(recipe)
        for table, made in (("unet", VideoUNet), ("projector", QueryTransformer)):
            _refuse_unknown(recipe.get(table, {}), _keywords(made), f"{table}.")
        return settings
    if stage == "click":
        from .click_recipe import check_click

        check_click(recipe)
        _refuse_unknown(recipe.get("unet", {}), _keywords(VideoUNet), "unet.")
        return settings
    if stage == "trajectory":
        from .trajectory_recipe import check_trajectory

        check_trajectory(recipe)
        _refuse_unknown(recipe.get("unet", {}), _keywords(VideoUNet), "unet.")
        return settings
    if "sampling" in recipe:
        settings_from(recipe["sampling"], SamplingSettings)
    if "transformer" in recipe:
        _refuse_unknown(recipe["transformer"], _keywords(LayeredTransformer), "transformer.")
    return settings


def _refuse_unknown(table: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise LayerLoomError(
            f"The recipe's key {prefix}{unknown[0]} is unknown; known are "
            f"{', '.join(sorted(known))}."
        )


def _keywords(made: type) -> set[str]:
    ours = {"operations", "device", "dtype", "vocabulary", "network", "config", "data", "batch"}
    return set(inspect.signature(made).parameters) - ours


def build_autoencoder_stage(recipe: Recipe, settings: TrainingSettings) -> AutoencoderStage:
    """The stage of a starter's autoencoder."""
    data = settings_from(recipe["data"], SpriteData)
    _refuse_unknown(recipe["autoencoder"], _keywords(StarterAutoencoder), "autoencoder.")
    _refuse_unknown(recipe["loss"], _keywords(AutoencoderStage), "loss.")
    loss, start = recipe["loss"], recipe.get("start")
    config = recipe["autoencoder"]
    network = StarterAutoencoder(**config)
    if start:
        config, network = load_autoencoder(Path(start))
    return AutoencoderStage(
        network,
        config,
        data,
        settings.batch,
        loss["noise"],
        loss["motion_weight"],
        loss["shares"],
        loss.get("edge_weight", 0.0),
    )


def train_from_recipe(
    path: Path,
    overrides: Mapping[str, str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Note = log.info,
    dry_run: bool = False,
) -> Path | None:
    """Train a recipe's stage in its ``folder``; returns the checkpoint it exports.

    A recipe of ``stages`` runs them one after the other (``chain``). Without ``resume`` an
    unfinished run in the folder is refused rather than overwritten. With ``dry_run`` everything is
    checked and the estimate noted, but nothing is written; returns None.

    Raises:
        LayerLoomError: a bad recipe, a folder in use, a full disk, a loss that is not finite.
    """
    from .chain import is_chain, train_chain

    if is_chain(path):
        return train_chain(path, overrides or {}, progress, note, dry_run)
    recipe = load_recipe(path, overrides)
    settings = check_recipe(recipe, path)
    folder = Path(recipe.get("folder", f"runs/{path.stem}"))
    if not resume and not dry_run and _holds_a_run(folder):
        raise LayerLoomError(
            f"{folder} already holds a run; add --resume, or name another folder=... ."
        )
    try:
        torch.manual_seed(settings.seed)
        if dry_run:
            _rehearse(recipe, settings, note)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        trainer = _prepare(recipe, settings, folder, progress, note)
    except KeyError as error:
        raise LayerLoomError(f"The recipe {path} lacks the entry {error}.") from error
    except OSError as error:
        raise LayerLoomError(f"Cannot write to {folder}: {error.strerror}.") from error
    if resume and not trainer.resume():
        note(f"Nothing to resume in {folder}: starting afresh.")
    return trainer.run()


def _holds_a_run(folder: Path) -> bool:
    return (folder / "state.pt").exists() or any(folder.glob("state-*"))


def _rehearse(recipe: Recipe, settings: TrainingSettings, note: Note) -> None:
    if recipe["stage"] == "autoencoder":
        stage = build_autoencoder_stage(recipe, settings)
        count = sum(p.numel() for p in stage.network.parameters())
        note(f"{count:,} weights, all trained; {settings.batch} samples a step.")
        return
    if recipe["stage"] == "segmenter":
        from .segmenter import rehearse_segmenter as rehearse
    elif recipe["stage"] == "animate":
        from .animate_recipe import rehearse_animate as rehearse
    elif recipe["stage"] == "click":
        from .click_recipe import rehearse_click as rehearse
    elif recipe["stage"] == "trajectory":
        from .trajectory_recipe import rehearse_trajectory as rehearse
    else:
        from .layered_recipe import rehearse

    for line in rehearse(recipe, settings):
        note(line)


def _prepare(
    recipe: Recipe,
    settings: TrainingSettings,
    folder: Path,
    progress: Progress | None,
    note: Note,
) -> Trainer:
    processes = find_processes(settings)
    if not processes.main:
        progress, note = None, _quiet
    report = (lambda *numbers: progress("training", *numbers)) if progress else None
    stage: Stage
    if recipe["stage"] == "autoencoder":
        stage, preview = build_autoencoder_stage(recipe, settings), None
    elif recipe["stage"] == "segmenter":
        from .segmenter import build_segmenter_stage

        stage, preview = build_segmenter_stage(recipe, settings), None
    elif recipe["stage"] == "animate":
        from .animate_recipe import build_animate_stage

        stage = build_animate_stage(recipe, settings, folder, processes, progress, note)
        preview = None
    elif recipe["stage"] == "click":
        from .click_recipe import build_click_stage

        stage = build_click_stage(recipe, settings, folder, processes, progress, note)
        preview = None
    elif recipe["stage"] == "trajectory":
        from .trajectory_recipe import build_trajectory_stage

        stage = build_trajectory_stage(recipe, settings, folder, processes, progress, note)
        preview = None
    else:
        from .layered_recipe import build_layered_stage

        stage, preview = build_layered_stage(recipe, settings, folder, processes, progress, note)
    return Trainer(stage, settings, folder, report, note, preview, processes)


def _quiet(text: str) -> None:
    pass
