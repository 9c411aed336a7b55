"""Recipes: a TOML file names a stage and its settings; this builds the stage and trains it."""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.layered_transformer import LayeredTransformer
from ..models.starter_autoencoder import StarterAutoencoder
from ..models.starter_text import WordEncoder
from .autoencoder import AutoencoderStage, SpriteData, load_autoencoder
from .layered import LayeredStage, LayeredTask, encode_scenes
from .trainer import Stage, Trainer, TrainingSettings, settings_from

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger("layerloom.training")
Recipe = dict[str, Any]
Progress = Callable[[str, int, int, Mapping[str, float]], None]


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


def check_keywords(recipe: Recipe, table: str, made: type) -> None:
    """Raise LayerLoomError for an entry of a table that ``made`` is not built with."""
    ours = {"operations", "device", "dtype", "vocabulary", "network", "config", "data", "batch"}
    known = sorted(set(inspect.signature(made).parameters) - ours)
    unknown = sorted(set(recipe[table]) - set(known))
    if unknown:
        raise LayerLoomError(
            f"The recipe's key {table}.{unknown[0]} is unknown; known are {', '.join(known)}."
        )


def build_stage(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Stage:
    """The stage a recipe asks for, with its data prepared."""
    stage = recipe.get("stage")
    batch = recipe["training"]["batch"]
    data = settings_from(recipe["data"], SpriteData)
    if stage == "autoencoder":
        check_keywords(recipe, "autoencoder", StarterAutoencoder)
        check_keywords(recipe, "loss", AutoencoderStage)
        loss = recipe["loss"]
        config, start = recipe["autoencoder"], recipe.get("start")
        network = StarterAutoencoder(**config)
        if start:
            config, network = load_autoencoder(Path(start))
        return AutoencoderStage(
            network, config, data, batch, loss["noise"], loss["motion_weight"], loss["shares"]
        )
    if stage == "layered":
        check_keywords(recipe, "transformer", LayeredTransformer)
        check_keywords(recipe, "text", WordEncoder)
        config, autoencoder = load_autoencoder(Path(recipe["autoencoder"]))
        autoencoder.eval().requires_grad_(False)
        latents = cached_latents(recipe, folder, autoencoder, progress)
        layered = LayeredStage(
            recipe["transformer"],
            recipe["text"],
            data,
            settings_from(recipe["task"], LayeredTask),
            batch,
            (config, autoencoder),
            latents,
            recipe["sampling"],
        )
        if recipe.get("start"):
            layered.start_from(Path(recipe["start"]))
        return layered
    raise LayerLoomError(f"Unknown stage {stage!r} in the recipe: use autoencoder or layered.")


def cached_latents(
    recipe: Recipe, folder: Path, autoencoder: torch.nn.Module, progress: Progress | None
) -> torch.Tensor:
    """Latents of the training scenes, encoded once and kept in the run's folder."""
    from safetensors import safe_open

    from ..checkpoints.save import save_tensors
    from ..conditioning.layers import LayerSequence

    file = folder / "latents.safetensors"
    scenes, data = recipe["scenes"], settings_from(recipe["data"], SpriteData)
    mark = fingerprint(autoencoder, f"{data} {scenes}")
    if file.exists():
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("fingerprint") == mark:
                return stored.get_tensor("latents")
    sequence = LayerSequence(frames=data.frames)
    step = (lambda done, total: progress("encoding", done, total, {})) if progress else None
    latents = encode_scenes(autoencoder, data, sequence, scenes, step)
    save_tensors(file, {"latents": latents}, {"fingerprint": mark})
    return latents


def fingerprint(network: torch.nn.Module, settings: str) -> str:
    """A digest of a network's weights and some settings, to tell whether a cache is stale."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_from_recipe(
    path: Path,
    overrides: Mapping[str, str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train a recipe's stage in its ``folder``; returns the checkpoint it exports.

    Without ``resume`` an unfinished run in the folder is refused rather than overwritten.

    Raises:
        LayerLoomError: a bad recipe, a folder in use, a full disk, a loss that is not finite.
    """
    recipe = load_recipe(path, overrides)
    for table in ("data", "training"):
        if not isinstance(recipe.get(table), dict):
            raise LayerLoomError(f"The recipe {path} has no table [{table}].")
    settings = settings_from(recipe["training"], TrainingSettings)
    folder = Path(recipe.get("folder", f"runs/{path.stem}"))
    if (folder / "state.pt").exists() and not resume:
        raise LayerLoomError(
            f"{folder} already holds a run; add --resume, or name another folder=... ."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        stage = build_stage(recipe, folder, progress)
    except KeyError as error:
        raise LayerLoomError(f"The recipe {path} lacks the entry {error}.") from error
    except OSError as error:
        raise LayerLoomError(f"Cannot write to {folder}: {error.strerror}.") from error
    report = (lambda *numbers: progress("training", *numbers)) if progress else None
    trainer = Trainer(stage, settings, folder, report)
    if resume and not trainer.resume():
        log.info("Nothing to resume in %s: starting afresh.", folder)
    return trainer.run()
