"""Settings of a training run: dataclasses that a recipe's tables are checked against."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..conditioning.layers import GIVEN
from ..errors import LayerLoomError
from ..sampling.guidance import GUIDANCE_NAMES
from ..sampling.samplers import SAMPLER_NAMES

# TOML types that a settings field of a type may have.
ACCEPTED = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "precision": ("fp32", "bf16"),
    "frozen": ("fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
}


@dataclass(frozen=True)
class TrainingSettings:
    """How a stage is trained; the ``[training]`` table of a recipe.

    ``batch`` samples pass through the network at once on one process; a step sums the gradients
    of ``accumulate`` such passes on every process, so it sees batch * accumulate * processes.
    ``optimizer`` is "adamw", or "muon" (hidden matrices by Muon, the rest by AdamW).
    ``decay_from`` is the share of the run after which the learning rate falls to zero as a
    cosine; before it, it stays. ``ema`` is the largest decay of the weights' moving average.

    ``precision`` is "fp32" or "bf16" (autocast; what is trained stays in fp32), ``frozen`` the
    type that weights which are not trained are held in. ``gradient_checkpointing`` keeps a block's
    input alone and computes the block again for its gradients. ``offload`` keeps optimiser states,
    master weights and the moving average in the host's memory. ``parallel`` says how several
    processes share the work: "ddp" (each holds everything) or "fsdp" (each holds a part).
    ``compile`` runs the stage's blocks through torch.compile, which needs a C++ compiler.
    ``device`` is "cuda", "cpu", ...; empty takes a GPU where there is one. ``keep`` is how many
    of the last states stay on the disk.
    """

    steps: int
    batch: int
    learning_rate: float
    accumulate: int = 1
    optimizer: str = "adamw"
    warmup: int = 100
    decay_from: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "fp32"
    frozen: str = "fp32"
    gradient_checkpointing: bool = False
    offload: bool = False
    parallel: str = "ddp"
    compile: bool = False
    device: str = ""
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 1

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise LayerLoomError(f"The recipe's {name} must be at least 1.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise LayerLoomError(
                    f"Unknown {name} {getattr(self, name)!r}: use {' or '.join(choices)}."
                )
        if self.frozen == "bf16" and self.precision != "bf16":
            raise LayerLoomError(
                "frozen = 'bf16' holds weights that only precision = 'bf16' can compute with; set "
                "both or neither."
            )
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise LayerLoomError(
                "optimizer = 'muon' needs whole matrices, which parallel = 'fsdp' splits; "
                "use adamw or ddp."
            )
        if self.parallel == "fsdp" and self.offload:
            raise LayerLoomError(
                "offload = true and parallel = 'fsdp' do not go together; FSDP already splits what "
                "would be offloaded: use one of the two."
            )

    def rate(self, step: int) -> float:
        """Learning rate at a step (0-based): linear warm-up, constant, cosine to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        start = self.decay_from * self.steps
        done = max(0.0, (step - start) / max(1.0, self.steps - start))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class PreviewSettings:
    """The ``[preview]`` table: sheets of generated layers in TensorBoard every ``every`` steps.

    ``prompts`` lists pairs of a foreground's and a background's prompt, a sheet each. ``steps`` and
    ``guidance`` are the sampler's (DDIM); every sheet starts from the noise of ``seed``.
    """

    prompts: Sequence[Sequence[str]]
    every: int = 500
    steps: int = 20
    guidance: float = 2.5
    seed: int = 0

    def __post_init__(self):
        if self.every < 1 or self.steps < 1:
            raise LayerLoomError("The recipe's preview.every and preview.steps must be at least 1.")
        pairs = self.prompts if isinstance(self.prompts, list | tuple) else ()
        if not pairs or not all(
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(text, str) and text.strip() for text in pair)
            for pair in pairs
        ):
            raise LayerLoomError(
                "The recipe's preview.prompts must list pairs of a foreground's and a background's "
                'prompt, [["a red circle", "plain blue"]] say.'
            )


@dataclass(frozen=True)
class SamplingSettings:
    """The ``[sampling]`` table: the defaults that an exported checkpoint carries."""

    sampler: str = "ddim"
    steps: int = 30
    guidance: float = 2.5
    guidance_formula: str = "constant"
    guidance_by_task: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, choices in (("sampler", SAMPLER_NAMES), ("guidance_formula", GUIDANCE_NAMES)):
            if getattr(self, name) not in choices:
                raise LayerLoomError(
                    f"The recipe's sampling.{name} is {getattr(self, name)!r}; use one of "
                    f"{', '.join(choices)}."
                )
        if self.steps < 1:
            raise LayerLoomError("The recipe's sampling.steps must be at least 1.")
        check_numbers("sampling.guidance_by_task", self.guidance_by_task, GIVEN)


@dataclass(frozen=True)
class AdapterSettings:
    """The ``[adapter]`` table of a "lora" stage: which low-rank pairs are trained.

    ``name`` is "motion", "content" or another; strength 1 adds alpha / rank * B A. ``blocks`` is
    "all", "sixth" (every sixth, as LayerFlow trains) or block numbers. ``init`` is an adapter file
    (or a checkpoint that carries one of this name) to go on from.

    ``still`` and ``video`` are the strengths that the start's other adapters have on still clips
    and on moving ones while this one is trained; 0 where not given.
    ``inside`` also exports the whole checkpoint with its adapters. ``scale`` is the default
    strength that such a checkpoint gives the adapter.
    """

    name: str
    rank: int
    alpha: float
    blocks: str | list[int] = "all"
    init: str = ""
    still: Mapping[str, float] = field(default_factory=dict)
    video: Mapping[str, float] = field(default_factory=dict)
    inside: bool = False
    scale: float = 1.0

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise LayerLoomError("The recipe's adapter.rank and adapter.alpha must be above 0.")
        if not self.name or set(self.name) & set("./\\ "):
            raise LayerLoomError(
                f"The adapter's name is {self.name!r}; give a word without dots, slashes or spaces."
            )
        for name in ("still", "video"):
            check_numbers(f"adapter.{name}", getattr(self, name))


def check_numbers(table: str, entries: Any, known: Iterable[str] | None = None) -> None:
    """Raise LayerLoomError where a table is not names (of ``known``, where given) with numbers."""
    if not isinstance(entries, Mapping):
        raise LayerLoomError(f"The recipe's {table} is {entries!r}; it must be a table of numbers.")
    for name, value in entries.items():
        if known is not None and name not in known:
            raise LayerLoomError(
                f"The recipe's key {table}.{name} is unknown; known are {', '.join(known)}."
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LayerLoomError(f"The recipe's {table}.{name} is {value!r}; it must be a number.")


def settings_from(table: Mapping[str, Any], cls: type = TrainingSettings) -> Any:
    """Build a settings dataclass from a recipe table; an unknown or missing key is named."""
    known = {entry.name: str(entry.type) for entry in fields(cls)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise LayerLoomError(
            f"The recipe's key {unknown[0]!r} is unknown; known are {', '.join(sorted(known))}."
        )
    for entry in fields(cls):
        needed = entry.default is MISSING and entry.default_factory is MISSING
        if needed and entry.name not in table:
            raise LayerLoomError(f"The recipe's table is incomplete: it lacks {entry.name}.")
    for key, value in table.items():
        accepted = ACCEPTED.get(known[key])
        strange = isinstance(value, bool) and known[key] != "bool"
        if accepted and (strange or not isinstance(value, accepted)):
            raise LayerLoomError(
                f"The recipe's {key} is {value!r}; it must be of type {known[key]}."
            )
    return cls(**table)
