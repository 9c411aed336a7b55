"""Opens checkpoints of every supported format and builds the network with their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError
from ..models.layered_transformer import LayeredTransformer
from .adapters import lora_delta
from .detect import CheckpointInfo, TableLayout, identify
from .lora import LoRA
from .names import Plan
from .reader import TensorStore, open_tensors


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; tensors are read when asked for.

    Attributes:
        info: what it is.
        metadata: settings in our own format's shape, made up for published files.
        store: the stored tensors.
        plan: where each engine tensor comes from.
    """

    info: CheckpointInfo
    metadata: dict[str, Any]
    store: TensorStore
    plan: Plan

    @property
    def adapter_scales(self) -> dict[str, float]:
        """Default strength of each adapter."""
        stored = self.metadata.get("adapters") or {}
        return {name: float(stored.get(name, {}).get("scale", 1.0)) for name in self.info.adapters}

    @property
    def adapter_alphas(self) -> dict[str, float]:
        """Alpha of each adapter: its scale is alpha / rank, 1 / rank in LayerFlow's files."""
        stored = self.metadata.get("adapters") or {}
        return {name: float(stored.get(name, {}).get("alpha", 1.0)) for name in self.info.adapters}

    def transformer_state(
        self,
        adapters: Mapping[str, float] | None = None,
        loras: Sequence[tuple[LoRA, float]] = (),
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor]:
        """Engine name -> tensor with the adapters folded in.

        ``adapters`` gives strengths by name; those left out keep their default (LayerFlow: motion
        0, content 1). ``loras`` are further adapters with their strengths; check them with
        ``check_loras`` first. ``dtype`` None keeps the stored types. Tensors may share memory
        with the file: copy before writing into them.
        """
        return dict(self.iter_transformer(adapters, loras, dtype))

    def iter_transformer(
        self,
        adapters: Mapping[str, float] | None = None,
        loras: Sequence[tuple[LoRA, float]] = (),
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``transformer_state`` one tensor at a time."""
        strengths = self.strengths(adapters)
        for name, source in self.plan.transformer.items():
            tensor = source.read(self.store)
            total = None
            if name.endswith(".weight"):
                total = self._delta(name.removesuffix(".weight"), strengths, loras)
            if total is not None:
                # Rounded once, to the type it will have.
                tensor = (tensor.to(total.dtype) + total).to(dtype or tensor.dtype)
            yield name, tensor if dtype is None else tensor.to(dtype)

    def strengths(self, adapters: Mapping[str, float] | None) -> dict[str, float]:
        """Strength of every adapter, with the defaults filled in.

        Raises:
            LayerLoomError: an adapter this checkpoint does not have.
        """
        for name in adapters or {}:
            if name not in self.info.adapters:
                has = ", ".join(self.info.adapters) or "none"
                raise LayerLoomError(
                    f"{self.store.name} has no adapter {name!r}; its adapters: {has}."
                )
        return {**self.adapter_scales, **(adapters or {})}

    def _delta(
        self,
        module: str,
        strengths: Mapping[str, float],
        loras: Sequence[tuple[LoRA, float]],
    ) -> torch.Tensor | None:
        """What all adapters together add to a module's weight, in float32; None for nothing."""
        total, alphas = None, self.adapter_alphas
        for adapter, strength in strengths.items():
            halves = self.plan.adapters[adapter].get(module)
            if halves and strength:
                a, b = halves["A"].read(self.store), halves["B"].read(self.store)
                delta = strength * lora_delta(a, b, alphas[adapter] / a.shape[0])
                total = delta if total is None else total + delta
        for lora, strength in loras:
            if module in lora.weights and strength:
                delta = strength * lora.delta(module)
                total = delta if total is None else total + delta
        return total

    def adapter_state(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module path -> (A [rank, in], B [out, rank]) of one adapter."""
        self.strengths({name: 1.0})
        return {
            module: (halves["A"].read(self.store), halves["B"].read(self.store))
            for module, halves in self.plan.adapters[name].items()
        }

    def lora(self, name: str) -> LoRA:
        """One adapter as data, with its alpha; LayerLoomError where there is none."""
        alpha, weights = self.adapter_alphas.get(name, 1.0), self.adapter_state(name)
        scales = {module: alpha / a.shape[0] for module, (a, _) in weights.items()}
        return LoRA.of(name, weights, scales)

    def check_loras(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Raise LayerLoomError where an adapter does not fit this checkpoint's network."""
        shapes = {
            name: source.spec(self.store).shape for name, source in self.plan.transformer.items()
        }
        for lora, _ in loras:
            lora.check(shapes, self.store.name)

    def part_state(self, part: str) -> dict[str, torch.Tensor]:
        """Parameters of a part in the file: "vae" or "text_encoder".

        Raises:
            LayerLoomError: the file holds no such part.
        """
        if part not in self.plan.parts:
            raise LayerLoomError(
                f"{self.store.name} holds no {part.replace('_', ' ')}; name its file or folder."
            )
        return {name: source.read(self.store) for name, source in self.plan.parts[part].items()}

    def check(self) -> None:
        """Compare every name and shape with the network's own, on the meta device.

        Raises:
            LayerLoomError: something is missing, left over or of another shape.
        """
        self._compare(_build(self, "meta", None, None))

    def _compare(self, network: LayeredTransformer) -> None:
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        found = {
            name: source.spec(self.store).shape for name, source in self.plan.transformer.items()
        }
        left_over = [*self.plan.left_over, *sorted(found.keys() - expected.keys())]
        wrong = [name for name in found if found[name] != expected.get(name, found[name])]
        modules = {name.removesuffix(".weight") for name in expected}
        for adapter, pairs in self.plan.adapters.items():
            for module, halves in pairs.items():
                if module not in modules:
                    left_over.append(f"{adapter} adapter of {module}")
                    continue
                (rank, wide), (tall, again) = (
                    halves[half].spec(self.store).shape for half in ("A", "B")
                )
                if rank != again or (tall, wide) != expected[f"{module}.weight"]:
                    wrong.append(f"{adapter} adapter of {module}")
        for problem, names in (
            ("is missing", sorted(expected.keys() - found.keys())),
            ("is not part of the network", left_over),
            ("has an unexpected shape", wrong),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise LayerLoomError(
                    f"{self.store.name} looks like {self.info.variant} ({self.info.source}) but "
                    f"{names[0]} {problem}{more}; the file is incomplete or of another version."
                )


def open_checkpoint(path: str | Path, layout: TableLayout | None = None) -> Checkpoint:
    """Open a checkpoint of any supported format.

    Args:
        path: a file, or a folder in diffusers' layout.
        layout: how the stored position table is cut, where it differs from the published 226
            tokens a prompt and 60x90 latents.

    Raises:
        LayerLoomError: not a checkpoint, or none that LayerLoom knows.
    """
    return from_store(open_tensors(path), layout)


def from_store(store: TensorStore, layout: TableLayout | None = None) -> Checkpoint:
    """The same over tensors that are already open."""
    info, plan, metadata = identify(store, layout)
    return Checkpoint(info, metadata, store, plan)


def load_transformer(
    checkpoint: Checkpoint | str | Path,
    *,
    adapters: Mapping[str, float] | None = None,
    loras: Sequence[tuple[LoRA, float]] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = None,
) -> LayeredTransformer:
    """The network with a checkpoint's weights, in eval mode; memory peaks at about one copy.

    Args:
        checkpoint: an open checkpoint, or its path.
        adapters: strengths by adapter name; defaults as in the file.
        loras: further adapters with their strengths.
        device, dtype: where and as what the weights end up; dtype None keeps the stored types.
        operations: the namespace layers are built from (``torch.nn`` when None).

    Raises:
        LayerLoomError: unknown file or adapter, or names and shapes that do not fit the network.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    network = _build(checkpoint, "meta", dtype, operations)
    checkpoint._compare(network)
    checkpoint.check_loras(loras)
    # Copies, so that the network neither keeps the file open nor changes with it.
    state = {
        name: tensor.to(device=device, copy=True)
        for name, tensor in checkpoint.iter_transformer(adapters, loras, dtype)
    }
    network.load_state_dict(state, assign=True)
    return network.eval()


def _build(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype | None, operations: Any
) -> LayeredTransformer:
    try:
        return LayeredTransformer(
            **checkpoint.info.transformer, device=device, dtype=dtype, operations=operations
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise LayerLoomError(
            f"{checkpoint.store.name} describes a network this version cannot build ({error})."
        ) from error
