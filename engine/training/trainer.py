"""The one trainer: stages give losses, it gives optimisers, EMA, checkpoints and resume."""

from __future__ import annotations

import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import autocast, nn

from ..errors import LayerLoomError

log = logging.getLogger("layerloom.training")
# TOML types that a settings field of a type may have.
ACCEPTED = {"int": (int,), "float": (int, float), "str": (str,)}


@dataclass(frozen=True)
class TrainingSettings:
    """How a stage is trained; the ``[training]`` table of a recipe.

    ``optimizer`` is "adamw", or "muon" (hidden matrices by Muon, the rest by AdamW).
    ``decay_from`` is the share of the run after which the learning rate falls to zero as a
    cosine; before it, it stays. ``ema`` is the largest decay of the weights' moving average.
    ``precision`` is "fp32" or "bf16" (autocast). ``compile`` runs the stage's blocks through
    torch.compile, which needs a C++ compiler.
    """

    steps: int
    batch: int
    learning_rate: float
    optimizer: str = "adamw"
    warmup: int = 100
    decay_from: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500

    def __post_init__(self):
        for name, low in (("steps", 1), ("batch", 1), ("log_every", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < low:
                raise LayerLoomError(f"The recipe's {name} must be at least {low}.")
        if self.optimizer not in ("adamw", "muon"):
            raise LayerLoomError(f"Unknown optimizer {self.optimizer!r}: use adamw or muon.")
        if self.precision not in ("fp32", "bf16"):
            raise LayerLoomError(f"Unknown precision {self.precision!r}: use fp32 or bf16.")

    def rate(self, step: int) -> float:
        """Learning rate at a step (0-based): linear warm-up, constant, cosine to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        start = self.decay_from * self.steps
        done = max(0.0, (step - start) / max(1.0, self.steps - start))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Stage(Protocol):
    """What is trained: networks, their loss, and how they are saved and looked at."""

    network: nn.Module
    hidden: tuple[str, ...]
    """Parts of the names of hidden matrices, which Muon may train."""
    blocks: Iterable[nn.Module]
    """Repeated parts worth compiling."""

    def loss(self, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """One batch's loss and numbers worth logging; all randomness from ``generator``."""

    def export(self, path: Path, network: nn.Module) -> None:
        """Write ``network`` (the moving average) as a usable checkpoint."""


def settings_from(table: dict[str, Any], cls: type = TrainingSettings) -> Any:
    """Build a settings dataclass from a recipe table; an unknown or missing key is named."""
    known = {field.name: str(field.type) for field in fields(cls)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise LayerLoomError(
            f"The recipe's key {unknown[0]!r} is unknown; known are {', '.join(sorted(known))}."
        )
    for key, value in table.items():
        accepted = ACCEPTED.get(known[key])
        if accepted and (isinstance(value, bool) or not isinstance(value, accepted)):
            raise LayerLoomError(
                f"The recipe's {key} is {value!r}; it must be of type {known[key]}."
            )
    try:
        return cls(**table)
    except TypeError as error:
        raise LayerLoomError(f"The recipe's table is incomplete: {error}.") from error


def build_optimizers(
    network: nn.Module, hidden: tuple[str, ...], settings: TrainingSettings
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Muon: K. Jordan et al. 2024; updates are scaled to AdamW's size (Moonlight, arXiv 2502.16982),
    so one learning rate serves both.
    """
    matrices, rest = [], []
    for name, parameter in network.named_parameters():
        matrix = parameter.ndim == 2 and any(part in name for part in hidden)
        (matrices if matrix and settings.optimizer == "muon" else rest).append(parameter)
    betas, decay = (0.9, 0.98), settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.learning_rate, betas=betas, weight_decay=decay)
    ]
    if matrices:
        if not hasattr(torch.optim, "Muon"):
            raise LayerLoomError("optimizer = 'muon' needs torch 2.9 or newer; use adamw.")
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


class Trainer:
    """Runs a stage in ``folder``: ``state.pt`` to resume from, ``final.safetensors`` at the end.

    Each step draws its randomness from the seed and the step number alone, so a resumed run
    sees the batches an uninterrupted one would have seen.
    """

    def __init__(
        self,
        stage: Stage,
        settings: TrainingSettings,
        folder: Path,
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
    ):
        self.stage, self.settings, self.folder = stage, settings, folder
        self.progress = progress
        self.network = stage.network
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        for block in stage.blocks if settings.compile else ():
            block.compile(dynamic=False)
        self.optimizers = build_optimizers(self.network, stage.hidden, settings)
        self.step = 0

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write all that a resume needs, whole or not at all."""
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.state_file.with_suffix(".partial")
        try:
            torch.save(state, partial)
            os.replace(partial, self.state_file)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise LayerLoomError(
                f"Could not write {self.state_file} ({error}); the last whole checkpoint is kept, "
                "free some space and resume."
            ) from error

    def resume(self) -> bool:
        """Load ``state.pt`` if there is one; False when starting afresh."""
        if not self.state_file.exists():
            return False
        try:
            state = torch.load(self.state_file, weights_only=True, map_location="cpu")
            self.network.load_state_dict(state["network"])
            self.average = state["average"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise LayerLoomError(
                f"{self.state_file} is damaged or of a run with another network or optimizer; "
                "resume with the recipe it was started with, or name another folder=... ."
            ) from error
        return True

    def averaged(self) -> nn.Module:
        """The network with the moving average's weights, in place; ``restore`` undoes it."""
        self._current = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        return self.network.eval()

    def restore(self) -> None:
        self.network.load_state_dict(self._current)
        self.network.train()

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns numbers for the log."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        bf16 = settings.precision == "bf16"
        device = next(self.network.parameters()).device.type
        with autocast(device, torch.bfloat16) if bf16 else nullcontext():
            loss, numbers = self.stage.loss(generator)
        if not torch.isfinite(loss):
            raise LayerLoomError(
                f"The loss is {loss.item()} at step {self.step}: lower learning_rate and resume."
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        if not torch.isfinite(norm):
            # Before the step: what is saved on the way out must be fit to resume from.
            raise LayerLoomError(
                f"The gradients are {norm.item()} at step {self.step}: lower learning_rate and "
                "resume."
            )
        rate = settings.rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.network.state_dict().items():
                self.average[key].lerp_(value, 1 - decay)
        self.step += 1
        return {"loss": loss.item(), "grad_norm": norm.item(), "rate": rate, **numbers}

    def run(self) -> Path:
        """Train to the end; a stop (Ctrl-C) saves first. Returns the exported checkpoint."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise LayerLoomError(
                "Training logs to tensorboard, which is missing; pip install 'layerloom[train]'."
            ) from error

        self.folder.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(self.folder / "log"), purge_step=self.step)
        self.network.train()
        window: dict[str, list[float]] = {}
        since, steps = time.monotonic(), self.settings.steps
        try:
            while self.step < steps:
                for key, value in self.train_step().items():
                    window.setdefault(key, []).append(value)
                if self.step % self.settings.log_every == 0:
                    now = time.monotonic()
                    # A number that not every step gives is the mean of the steps that did.
                    numbers = {key: fmean(values) for key, values in window.items()}
                    numbers["seconds_per_step"] = (now - since) / len(window["loss"])
                    for key, value in numbers.items():
                        writer.add_scalar(key, value, self.step)
                    if self.progress:
                        self.progress(self.step, steps, numbers)
                    window, since = {}, now
                if self.step % self.settings.checkpoint_every == 0:
                    self.save()
        finally:
            writer.close()
            self.save()
        final = self.folder / "final.safetensors"
        self.stage.export(final, self.averaged())
        self.restore()
        return final
