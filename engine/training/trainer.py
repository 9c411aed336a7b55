"""The one trainer: stages give losses, it gives optimisers, EMA, checkpoints and resume."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import autocast, nn

from ..errors import LayerLoomError
from .distributed import Processes, checkpoint_blocks, whole
from .estimate import Speed
from .optimizers import Optimizers
from .settings import TrainingSettings, settings_from
from .shares import WHOLE, Shares
from .states import State, StateFiles, StateShards

__all__ = ["WHOLE", "Shares", "Stage", "Trainer", "TrainingSettings", "settings_from"]
log = logging.getLogger("layerloom.training")


class Stage(Protocol):
    """What is trained: networks, their loss, and how they are saved and looked at."""

    network: nn.Module
    """Parameters that require gradients are trained; the rest is left alone."""
    hidden: tuple[str, ...]
    """Parts of the names of hidden matrices, which Muon may train."""
    blocks: Iterable[nn.Module]
    """Repeated parts worth compiling, checkpointing and sharding."""

    def draw(self, generator: torch.Generator, shares: Shares) -> list[Any]:
        """A step's samples and noise, one entry a share of ours; all randomness is drawn here."""

    def loss(self, drawn: Any) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean loss of one drawn share and numbers worth logging."""

    def export(self, path: Path, state: State) -> None:
        """Write ``network``'s ``state`` (the moving average, on the CPU) as a usable checkpoint."""


class Trainer:
    """Runs a stage in ``folder``: ``state.pt`` to resume from, ``final.safetensors`` at the end.

    Each step draws its randomness from the seed and the step number alone, so a resumed run
    sees the batches an uninterrupted one would have seen.

    Args:
        progress: called with (step, steps, mean numbers since the last call).
        note: called with lines for people.
        preview: (how often in steps, what to draw): pictures by name, of the moving average.
        processes: this process by itself unless given.
        tensorboard: write numbers and previews into ``folder``/log.
    """

    def __init__(
        self,
        stage: Stage,
        settings: TrainingSettings,
        folder: Path,
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
        note: Callable[[str], None] = log.info,
        preview: tuple[int, Callable[[], dict[str, Any]]] | None = None,
        processes: Processes | None = None,
        tensorboard: bool = True,
    ):
        self.stage, self.settings, self.folder = stage, settings, folder
        self.progress, self.note, self.preview = progress, note, preview
        self.tensorboard = tensorboard
        self.processes = processes or Processes(next(stage.network.parameters()).device)
        self.network = stage.network
        if settings.gradient_checkpointing:
            checkpoint_blocks(stage.blocks)
        for block in stage.blocks if settings.compile else ():
            block.compile(dynamic=False)
        self.forward = self.processes.wrap(stage)
        self.optimizers = Optimizers(self.network, stage.hidden, settings)
        frozen = {name for name, p in self.network.named_parameters() if not p.requires_grad}
        # Buffers belong to what is trained.
        self.kept = [name for name in self.network.state_dict() if name not in frozen]
        self.frozen = sorted(frozen)
        self.average = {name: self._home(value) for name, value in self._current().items()}
        kind = StateShards if self.processes.sharded else StateFiles
        self.states = kind(folder, settings.keep, self.processes.main)
        if self.processes.sharded:
            self.states.wait = self.processes.wait
        self.step, self._consistent = 0, True

    def _current(self) -> State:
        state = self.network.state_dict()
        return {name: state[name].detach() for name in self.kept}

    def _home(self, value: torch.Tensor) -> torch.Tensor:
        """A copy where the moving average lives."""
        if self.settings.offload:
            return value.to("cpu", copy=True)
        return value.clone()

    # States

    @property
    def state_file(self) -> Path:
        return self.states.newest

    def state(self) -> State:
        """All that a resume needs; weights that are not trained come from the recipe."""
        state = {
            "step": self.step,
            "network": self._current(),
            "average": self.average,
            "optimizers": self._optimizer_states(),
        }
        return {**state, "frozen": self._digest()} if self.frozen else state

    def _optimizer_states(self) -> list[State]:
        if not self.processes.sharded:
            return [optimizer.state_dict() for optimizer in self.optimizers.each]
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return [get_optimizer_state_dict(self.forward, each) for each in self.optimizers.each]

    def _digest(self) -> str:
        """Tells other frozen weights from the ones the run began with."""
        state, digest = self.network.state_dict(), hashlib.sha256()
        for name in self.frozen:
            tensor = whole(state[name])
            digest.update(f"{name} {float(tensor.double().sum()):.9e}".encode())
        return digest.hexdigest()

    def save(self) -> None:
        """Write all that a resume needs, whole or not at all."""
        self.states.save(self.state())

    def resume(self) -> bool:
        """Load the newest state if there is one; False when starting afresh."""
        if not self.states.exists():
            return False
        with self.states.opened(self.state() if self.processes.sharded else {}) as state:
            if set(state["network"]) != set(self.kept):
                raise ValueError("another selection of weights")
            if self.frozen and state.get("frozen", "") != self._digest():
                raise LayerLoomError(
                    f"{self.state_file} was begun from other weights than the recipe's start; "
                    "give it the start it had, or name another folder=... ."
                )
            self.network.load_state_dict(state["network"], strict=False)
            self.average = {name: self._like(name, v) for name, v in state["average"].items()}
            for optimizer, saved in zip(self.optimizers.each, state["optimizers"], strict=True):
                self._load_optimizer(optimizer, saved)
            self.optimizers.adopt()
            self.step = int(state["step"])
        return True

    def _like(self, name: str, value: torch.Tensor) -> torch.Tensor:
        place = self.average[name]
        if place.shape != value.shape:
            raise ValueError(f"{name} has another shape")
        return value.to(place.device)

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, saved: State) -> None:
        if not self.processes.sharded:
            optimizer.load_state_dict(saved)
            return
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self.forward, optimizer, saved)

    # The moving average

    def averaged(self) -> nn.Module:
        """The network with the moving average's weights, in place; ``restore`` undoes it."""
        self._before = {name: value.clone() for name, value in self._current().items()}
        self.network.load_state_dict(self.average, strict=False)
        return self.network.eval()

    def restore(self) -> None:
        self.network.load_state_dict(self._before, strict=False)
        del self._before
        self.network.train()

    def _follow(self) -> None:
        """Move the average: decay min(ema, (1 + step) / (10 + step)), so that it starts fast."""
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self._current().items():
                self.average[name].lerp_(value.to(self.average[name].device), 1 - decay)

    # Steps

    def draw(self) -> list[Any]:
        """What this process computes in this step."""
        passes, processes = self.settings.accumulate, self.processes
        own = range(processes.rank * passes, (processes.rank + 1) * passes)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        try:
            return self.stage.draw(generator, Shares(own, processes.count * passes))
        except (OSError, EOFError, ValueError) as error:
            raise LayerLoomError(
                f"The samples of step {self.step} cannot be read ({error}); mend them and resume."
            ) from error

    def backward(self) -> dict[str, float]:
        """Gradients of one step's loss; returns the loss and the stage's numbers."""
        passes, bf16 = self.settings.accumulate, self.settings.precision == "bf16"
        device = self.processes.device.type
        window: dict[str, list[float]] = {}
        drawn = self.draw()
        for index, share in enumerate(drawn):
            last = index == len(drawn) - 1
            with nullcontext() if last else self.processes.held_back(self.forward):
                with autocast(device, torch.bfloat16) if bf16 else nullcontext():
                    loss, numbers = self.forward(share)
                (loss / passes if passes > 1 else loss).backward()
            for name, value in {"loss": loss.item(), **numbers}.items():
                window.setdefault(name, []).append(value)
        return self.processes.means({name: fmean(values) for name, values in window.items()})

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns numbers for the log."""
        settings, parameters = self.settings, self.optimizers.parameters
        numbers = self.backward()
        norm = float(whole(nn.utils.clip_grad_norm_(parameters, settings.clip)))
        for what, value in (("loss is", numbers["loss"]), ("gradients are", norm)):
            # Before the step: what is saved on the way out must be fit to resume from.
            if not torch.isfinite(torch.tensor(value)):
                raise LayerLoomError(
                    f"The {what} {value} at step {self.step}: lower learning_rate and resume."
                )
        rate = settings.rate(self.step)
        self._consistent = False
        self.optimizers.step(rate)
        self._follow()
        self.step += 1
        self._consistent = True
        loss = numbers.pop("loss")
        return {"loss": loss, "grad_norm": norm, "rate": rate, **numbers}

    def run(self) -> Path:
        """Train to the end; a stop (Ctrl-C) saves first. Returns the exported checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = self._writer()
        self.network.train()
        window: dict[str, list[float]] = {}
        since, steps = time.monotonic(), self.settings.steps
        speed = Speed(self.step, steps)
        try:
            while self.step < steps:
                for key, value in self.train_step().items():
                    window.setdefault(key, []).append(value)
                if (said := speed.after(self.step)) and self.processes.main:
                    self.note(said)
                if self.step % self.settings.log_every == 0:
                    now = time.monotonic()
                    # A number that not every step gives is the mean of the steps that did.
                    numbers = {key: fmean(values) for key, values in window.items()}
                    numbers["seconds_per_step"] = (now - since) / len(window["loss"])
                    self._report(writer, numbers)
                    window, since = {}, now
                if self.preview and self.step % self.preview[0] == 0:
                    self._look(writer)
                if self.step % self.settings.checkpoint_every == 0 and self.step < steps:
                    self.save()
            self.save()
        except BaseException:
            # What stopped between an optimiser's step and the average's fits nothing; with split
            # weights the others may be elsewhere. The last state is still there.
            if self._consistent and not self.processes.sharded:
                self.save()
            raise
        finally:
            if writer:
                writer.close()
        return self.export()

    def export(self) -> Path:
        """Write the moving average as the stage's checkpoint."""
        final = self.folder / "final.safetensors"
        state = {**self.network.state_dict(), **self.average}
        gathered = {name: whole(value) for name, value in state.items()}
        if self.processes.main:
            self.stage.export(final, gathered)
        self.processes.wait()
        return final

    def _writer(self) -> Any:
        if not self.tensorboard or not self.processes.main:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise LayerLoomError(
                "Training logs to tensorboard, which is missing; pip install 'layerloom[train]'."
            ) from error
        return SummaryWriter(str(self.folder / "log"), purge_step=self.step)

    def _report(self, writer: Any, numbers: dict[str, float]) -> None:
        for key, value in numbers.items() if writer else ():
            writer.add_scalar(key, value, self.step)
        if self.progress:
            self.progress(self.step, self.settings.steps, numbers)

    def _look(self, writer: Any) -> None:
        """Draw the previews; split weights need all processes for it, whole ones the first."""
        if writer is None and not self.processes.sharded:
            return
        self.averaged()
        try:
            pictures = self.preview[1]()
        finally:
            self.restore()
        for name, picture in pictures.items() if writer else ():
            writer.add_image(name, picture, self.step, dataformats="HWC")
