"""Stage: a low-rank adapter beside a frozen layered transformer (LayerFlow's motion and content).

Motion (arXiv 2506.04228, section 3): still clips made of one repeated frame, so that strength 1
means standing still. Content: layered pictures as still clips with the motion adapter at 1, mixed
with moving clips with it at 0, so that what is learnt from pictures does not bring their stillness.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.load import Checkpoint
from ..checkpoints.lora import LoRA, read_lora, save_lora
from ..errors import LayerLoomError
from ..models.lora import Adapters, attach, targets_of
from .card import Card
from .data.source import LatentSource
from .layered import Drawn, LayeredStage, LayeredTask
from .networks import LayeredNetwork
from .settings import AdapterSettings


class AdaptedNetwork(LayeredNetwork):
    """A frozen layered network, the adapter that is trained, and those that only take part."""

    def __init__(self, base: LayeredNetwork, trained: Adapters, others: Mapping[str, Adapters]):
        super().__init__(base.transformer, base.text_encoder)
        self.adapter = trained
        self.others = nn.ModuleDict(others)


def adapted_network(
    base: LayeredNetwork,
    settings: AdapterSettings,
    others: Mapping[str, LoRA],
    seed: int = 0,
    frozen: torch.dtype = torch.float32,
) -> AdaptedNetwork:
    """Freeze ``base`` and attach a new adapter (or the one of ``init``) and the others to it.

    Raises:
        LayerLoomError: no such blocks, or an adapter file that does not fit.
    """
    base.requires_grad_(False)
    transformer = base.transformer
    targets = targets_of(transformer, settings.blocks)
    generator = torch.Generator().manual_seed(seed)
    trained = attach(
        transformer, settings.name, settings.rank, settings.alpha, targets, generator=generator
    )
    if settings.init:
        trained.load(_initial(settings))
    return AdaptedNetwork(base, trained, attach_others(transformer, others, frozen))


def attach_others(
    transformer: nn.Module, others: Mapping[str, LoRA], dtype: torch.dtype
) -> dict[str, Adapters]:
    """Attach adapters that take part without being trained."""
    beside = {}
    for name, lora in others.items():
        beside[name] = attach(transformer, name, lora.rank, lora.alpha, lora.targets, dtype=dtype)
        beside[name].load(lora)
        beside[name].requires_grad_(False)
    return beside


def _initial(settings: AdapterSettings) -> LoRA:
    path = Path(settings.init)
    if not path.exists():
        raise LayerLoomError(
            f"The recipe's adapter.init is {path}, which does not exist; give an adapter file."
        )
    try:
        return read_lora(path, settings.name)
    except LayerLoomError:
        return read_lora(path)


def other_adapters(start: Checkpoint, settings: AdapterSettings) -> dict[str, LoRA]:
    """The start's adapters that take part while this one is trained.

    Raises:
        LayerLoomError: the recipe sets the strength of one that the start does not have.
    """
    for name in (*settings.still, *settings.video):
        if name not in start.info.adapters or name == settings.name:
            has = ", ".join(n for n in start.info.adapters if n != settings.name) or "none"
            raise LayerLoomError(
                f"The recipe sets the strength of the adapter {name!r} while {settings.name} is "
                f"trained, but {start.store.name} carries {has}; train {name} first."
            )
    return {name: start.lora(name) for name in {**settings.still, **settings.video}}


class AdapterStage(LayeredStage):
    """The layered stage's loss with only an adapter's pairs trained."""

    def __init__(
        self,
        network: AdaptedNetwork,
        settings: AdapterSettings,
        source: LatentSource,
        task: LayeredTask,
        batch: int,
        card: Card,
        **rest: Any,
    ):
        super().__init__(network, source, task, batch, card, **rest)
        self.settings = settings

    def set_strengths(self, still: bool) -> None:
        """The others' strengths for a kind of clip; the trained adapter is always at 1."""
        strengths = self.settings.still if still else self.settings.video
        for name, other in self.network.others.items():
            other.strength = float(strengths.get(name, 0.0))

    def loss(self, drawn: Drawn) -> tuple[torch.Tensor, dict[str, float]]:
        still = bool(drawn.samples.still[0])
        self.set_strengths(still)
        loss, numbers = super().loss(drawn)
        return loss, {**numbers, f"loss/{'still' if still else 'video'}": loss.item()}

    def adapter(self, state: Mapping[str, torch.Tensor]) -> LoRA:
        """The trained pairs of a state as data."""
        weights = {
            target: tuple(state[f"adapter.pairs.{index}.{half}"] for half in ("A", "B"))
            for index, target in enumerate(self.network.adapter.targets)
        }
        return LoRA(self.settings.name, self.settings.rank, self.settings.alpha, weights)

    def export(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """The adapter alone as ``<name>.safetensors``; at ``path`` the same, or all with it."""
        lora, settings = self.adapter(state), self.settings
        notes = {"trained_with": self.card.metadata.get("trained_with")}
        save_lora(path.with_name(f"{settings.name}.safetensors"), lora, metadata=notes)
        if settings.inside:
            self.card.write(path, state, {settings.name: (lora, settings.scale)})
        else:
            save_lora(path, lora, metadata=notes)
