"""Trains an adapter on a network that somebody else loaded and manages, a host's MODEL say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.lora import LoRA, save_lora
from ..errors import LayerLoomError
from ..models.lora import Adapters, attach, targets_of
from .adapter import AdapterStage, attach_others
from .card import Card
from .data.source import LatentSource
from .distributed import Processes, Step
from .estimate import estimate, work_of
from .layered import LayeredTask
from .settings import AdapterSettings, TrainingSettings
from .trainer import Trainer

# Draws that the loss before and after training is compared on.
CHECKS = 4
Report = Callable[[int, list[float]], None]


class BorrowedNetwork(nn.Module):
    """A trained adapter and those beside it; the network they are attached to stays outside.

    What moves, casts, freezes or saves this module leaves the network to its owner.
    """

    text_encoder = None

    def __init__(self, transformer: Any, trained: Adapters, others: Mapping[str, Adapters]):
        super().__init__()
        object.__setattr__(self, "transformer", transformer)  # no submodule
        self.adapter = trained
        self.others = nn.ModuleDict(others)


def borrow(
    network: nn.Module,
    transformer: Any,
    settings: AdapterSettings,
    others: Mapping[str, LoRA],
    start: LoRA | None = None,
    seed: int = 0,
    owner: str = "the model",
) -> BorrowedNetwork:
    """Attach a new adapter, or one to go on from, and the others to a network.

    Args:
        network: whose linear layers are adapted; its parameters are left as they are, frozen or
            not, so freeze them before.
        transformer: what the stage calls in ``LayeredTransformer``'s way; the network itself, or
            what stands before it.
        start: an adapter to go on from; ``settings`` must have its rank and alpha.

    Raises:
        LayerLoomError: no such blocks, or adapters that do not fit.
    """
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    for lora in (*others.values(), *([start] if start else ())):
        lora.check(shapes, owner)
    targets = start.targets if start else targets_of(network, settings.blocks)
    generator = torch.Generator().manual_seed(seed)
    trained = attach(
        network, settings.name, settings.rank, settings.alpha, targets, generator=generator
    )
    if start:
        trained.load(start)
    beside = attach_others(network, others, torch.float32)
    made = BorrowedNetwork(transformer, trained, beside)
    device = next(network.parameters()).device
    return made.to(device)


class InPlace(Processes):
    """One process whose networks are where they belong already."""

    def wrap(self, stage: Any) -> nn.Module:
        return Step(stage)


def borrowed_stage(
    network: BorrowedNetwork,
    settings: AdapterSettings,
    source: LatentSource,
    task: LayeredTask,
    batch: int,
    schedule: Any,
) -> AdapterStage:
    """The stage that trains the adapter of a borrowed network."""
    # Only what an adapter's file says is asked of it.
    card = Card("", {}, source.sequence, {}, {})
    return AdapterStage(network, settings, source, task, batch, card, schedule=schedule)


class AdapterRun(Trainer):
    """``Trainer`` whose only file is the adapter itself.

    It is written every ``checkpoint_every`` steps, at the end, and when the run is stopped: the
    moving average after the last whole step. A stop before the first leaves no file.

    Args:
        file: where the adapter goes, in the host's naming.
        report: called after each step with (steps done, losses so far); what it raises stops the
            run.
        notes: further entries for the file's header.
    """

    def __init__(
        self,
        stage: AdapterStage,
        settings: TrainingSettings,
        file: Path,
        report: Report | None = None,
        note: Callable[[str], None] = str,
        notes: Mapping[str, Any] | None = None,
    ):
        device = next(stage.network.parameters()).device
        super().__init__(
            stage,
            replace(settings, log_every=1),
            file.parent,
            progress=self._after_step,
            note=note,
            processes=InPlace(device),
            tensorboard=False,
        )
        self.file, self.report, self.notes = file, report, dict(notes or {})
        self.losses: list[float] = []
        self.saved_step = 0

    def _after_step(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        self.losses.append(numbers["loss"])
        if self.report:
            self.report(step, self.losses)

    def adapter(self) -> LoRA:
        """The moving average as data."""
        average = {
            name: value.detach().to("cpu", copy=True) for name, value in self.average.items()
        }
        return self.stage.adapter(average)

    def save(self) -> None:
        """Write the adapter, whole or not at all, if there were steps since the last time."""
        if self.step > self.saved_step:
            save_lora(self.file, self.adapter(), "host", {**self.notes, "steps": self.step})
            self.saved_step = self.step

    def resume(self) -> bool:
        raise LayerLoomError("An adapter's run keeps no state; go on from its file instead.")

    def export(self) -> Path:
        return self.file

    @torch.no_grad()
    def check(self) -> float:
        """The moving average's mean loss on the same few draws at every call."""
        self.averaged()
        try:
            losses = []
            for number in range(CHECKS):
                generator = torch.Generator().manual_seed(number)
                (drawn,) = self.stage.draw(generator)
                losses.append(self.stage.loss(drawn)[0].item())
        finally:
            self.restore()
        return sum(losses) / len(losses)


def step_memory(
    network: BorrowedNetwork, tokens: int, settings: TrainingSettings, bf16: bool
) -> float:
    """Bytes that a step needs on its device beside the network's weights.

    Args:
        tokens: text and video of one sample.
        bf16: the network computes in 16 bit numbers.
    """
    if bf16:
        settings = replace(settings, precision="bf16", frozen="bf16")
    found = estimate(work_of(network, tokens, settings.batch), settings)
    return found.total - found.of("weights")
