"""Low-rank adapters to train: pairs beside a network's linear layers, its own weights untouched."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..checkpoints.lora import LoRA
from ..errors import LayerLoomError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Attribute of an adapted layer that lists its pairs: a plain list, so no part of its state_dict.
_PAIRS = "_layerloom_pairs"


class LowRank(nn.Module):
    """``B A x``: [..., in] to [..., out] through ``rank`` numbers; A Kaiming, B zero."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        device=None,
        dtype=None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        bound = math.sqrt(1 / inputs)  # kaiming_uniform_ with a = sqrt(5), as Linear has it
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(drawn.to(device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = nn.functional.linear
        return linear(linear(x.to(self.A.dtype), self.A), self.B).to(x.dtype)


class Strength:
    """What an adapter's output is multiplied with: one number, or one a sample [B].

    A tensor of its own, so that compiled code takes a new value without compiling anew; only
    whether it is off is compiled in.
    """

    def __init__(self, value: float | torch.Tensor):
        self.set(value)

    def set(self, value: float | torch.Tensor) -> None:
        self.value = torch.as_tensor(value, dtype=torch.float32).detach()
        self.off = self.value.ndim == 0 and float(self.value) == 0.0

    def like(self, y: torch.Tensor) -> torch.Tensor:
        """The factor for ``y`` [B, ...]."""
        if self.value.ndim == 0:
            return self.value
        factor = self.value.to(device=y.device, dtype=y.dtype)
        return factor.reshape(-1, *(1,) * (y.ndim - 1))


class Adapters(nn.Module):
    """One adapter attached to a network: its pairs, its strength, and their way out.

    ``parameters()`` are the pairs' alone; the network's own parameters, names and state_dict stay
    as they are (freeze them before training). Move it with ``.to`` like any module.
    """

    def __init__(self, name: str, rank: int, alpha: float, pairs: Mapping[str, LowRank]):
        super().__init__()
        self.name, self.rank, self.alpha = name, rank, float(alpha)
        self.targets = tuple(pairs)
        # Dots are not allowed in names of submodules.
        self.pairs = nn.ModuleList(pairs.values())
        self._strength = Strength(1.0)
        self._layers: list[nn.Module] = []

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def strength(self) -> torch.Tensor:
        """The number in use, or one a sample [B]; set it between forward passes.

        With gradient checkpointing, set it anew only after the backward pass.
        """
        return self._strength.value

    @strength.setter
    def strength(self, value: float | torch.Tensor) -> None:
        self._strength.set(value)

    def as_lora(self) -> LoRA:
        """The pairs as data: copies on the CPU."""
        weights = {
            module: tuple(half.detach().to("cpu", copy=True) for half in (pair.A, pair.B))
            for module, pair in zip(self.targets, self.pairs, strict=True)
        }
        return LoRA(self.name, self.rank, self.alpha, weights)

    @torch.no_grad()
    def load(self, lora: LoRA) -> None:
        """Take the pairs of ``lora``, rescaled where its alpha / rank is another.

        Raises:
            LayerLoomError: other modules or another rank.
        """
        if set(lora.targets) != set(self.targets):
            odd = sorted(set(lora.targets) ^ set(self.targets))[0]
            raise LayerLoomError(
                f"The adapter {lora.name} changes other modules than those being trained "
                f"({odd}, say); set blocks and rank as they were when it was made."
            )
        factor = lora.scale / self.scale
        for module, pair in zip(self.targets, self.pairs, strict=True):
            a, b = lora.weights[module]
            if (a.shape, b.shape) != (pair.A.shape, pair.B.shape):
                raise LayerLoomError(
                    f"The adapter {lora.name} has rank {a.shape[0]} for {module}, but "
                    f"{pair.A.shape[0]} is being trained; set the rank it was made with."
                )
            pair.A.copy_(a)
            pair.B.copy_(b if factor == 1 else b.to(pair.B.dtype) * factor)

    def detach(self) -> None:
        """Take the pairs off the network again; what they hold stays here."""
        for layer, pair in zip(self._layers, self.pairs, strict=True):
            entries = getattr(layer, _PAIRS)
            entries[:] = [entry for entry in entries if entry[0] is not pair]
            if not entries:
                delattr(layer, _PAIRS)
                layer.__class__ = type(layer).__bases__[1]
        self._layers = []


class _Adapted:
    """Mixed into the class of a linear layer while pairs are attached to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        for pair, strength, scale in getattr(self, _PAIRS):
            if not strength.off:
                y = y + pair(x) * (scale * strength.like(y))
        return y


@functools.cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    # One class a kind of layer: compiled code is then the same for all blocks.
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {})


def attach(
    network: nn.Module,
    name: str,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Adapters:
    """Add ``strength * alpha / rank * B A x`` to the named linear layers.

    The pairs are new (A Kaiming, B zero, so nothing changes yet), in ``dtype`` on each layer's
    device. Several adapters can be attached; each has its own strength.

    Args:
        targets: module paths, as ``targets_of`` gives them.
        generator: draws A on the CPU; the same seed, the same adapter.

    Raises:
        LayerLoomError: no targets, a path that is no linear layer, or a rank below 1.
    """
    if rank < 1:
        raise LayerLoomError(f"The adapter's rank is {rank}; give a whole number from 1 up.")
    if not targets:
        raise LayerLoomError("The adapter has no modules to change; name blocks that exist.")
    layers = {path: _linear(network, path) for path in dict.fromkeys(targets)}
    pairs = {
        path: LowRank(
            layer.in_features, layer.out_features, rank, layer.weight.device, dtype, generator
        )
        for path, layer in layers.items()
    }
    adapters = Adapters(name, rank, alpha, pairs)
    for path, layer in layers.items():
        if not isinstance(layer, _Adapted):
            # Another class, not a hook or a new forward: compiled code guards on the class.
            layer.__class__ = _adapted(type(layer))
            setattr(layer, _PAIRS, [])
        getattr(layer, _PAIRS).append((pairs[path], adapters._strength, adapters.scale))
    adapters._layers = list(layers.values())
    return adapters


def _linear(network: nn.Module, path: str) -> nn.Linear:
    try:
        layer = network.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise LayerLoomError(
            f"The network has no linear layer {path} for an adapter; name blocks that exist."
        )
    return layer


def targets_of(
    network: nn.Module, blocks: str | Sequence[int] = "all", kinds: Sequence[str] = ATTENTION
) -> tuple[str, ...]:
    """Paths of the layers to adapt: ``kinds`` of each chosen block.

    Args:
        blocks: "all", "sixth" (every sixth: 5, 11, 17, ... as LayerFlow trains, arXiv
            2506.04228), or block numbers from 0.
        kinds: of the attention ("to_q", "to_k", "to_v", "to_out.0") or the MLP
            ("ff.net.0.proj", "ff.net.2").

    Raises:
        LayerLoomError: there is no such block or layer.
    """
    count = len(network.transformer_blocks)
    if blocks == "all":
        chosen = list(range(count))
    elif blocks == "sixth":
        chosen = [index for index in range(count) if index % 6 == 5]
    elif isinstance(blocks, str):
        raise LayerLoomError(f"blocks is {blocks!r}; give all, sixth or a list of block numbers.")
    else:
        chosen = sorted(set(blocks))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise LayerLoomError(
            f"blocks {blocks!r} are not in this network, which has {count} (0 to {count - 1}); "
            "choose among those."
        )
    paths = tuple(
        f"transformer_blocks.{index}.{kind if re.match('(ff|attn1)[.]', kind) else f'attn1.{kind}'}"
        for index in chosen
        for kind in kinds
    )
    for path in paths:
        _linear(network, path)
    return paths
