"""How much memory and time a training run will take, worked out from shapes before it starts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .settings import TrainingSettings

GIB = 2**30
CARDS = (24, 48, 80)
# What a GPU holds before the first tensor (context, libraries), and the share its allocator loses.
CONTEXT, FRAGMENTED = 0.8 * GIB, 0.05
# Bytes of a number.
FP32, BF16 = 4, 2
# Runs with fewer trained weights than this have nothing worth offloading or sharding.
LARGE = 50_000_000
# Steps after the first (which compiles and warms up) that the speed is measured over.
TIMED_STEPS = 5


@dataclass(frozen=True)
class BlockWork:
    """One transformer block: its weights, how many are trained, its adapters' weights and pairs.

    ``saves`` is whether gradients flow through it: blocks before the first that is trained keep
    nothing.
    """

    weights: int
    trained: int
    adapter: int = 0
    saves: bool = True


@dataclass(frozen=True)
class Work:
    """What a training step computes.

    dim, heads: of the transformer. tokens: text and video of one sample. batch: samples at once.
    outside, outside_trained: weights that are in no block.
    """

    dim: int
    heads: int
    tokens: int
    batch: int
    blocks: tuple[BlockWork, ...]
    outside: int
    outside_trained: int

    @property
    def weights(self) -> int:
        return self.outside + sum(b.weights + b.adapter for b in self.blocks)

    @property
    def trained(self) -> int:
        return self.outside_trained + sum(b.trained + b.adapter for b in self.blocks)


def work_of(network: nn.Module, tokens: int, batch: int) -> Work:
    """The work of a ``LayeredNetwork``, with or without an adapter; its tensors may be meta."""
    transformer, adapter = network.transformer, getattr(network, "adapter", None)
    pairs = dict.fromkeys(range(len(transformer.transformer_blocks)), 0)
    if adapter is not None:
        for target, pair in zip(adapter.targets, adapter.pairs, strict=True):
            pairs[int(target.split(".")[1])] += _count(pair.parameters())
    inside = {id(p) for p in transformer.transformer_blocks.parameters()}
    inside |= {id(p) for p in (adapter.parameters() if adapter is not None else ())}
    outside = [p for p in network.parameters() if id(p) not in inside]
    trained = [p for p in outside if p.requires_grad]
    blocks, flows = [], bool(trained)
    for index, block in enumerate(transformer.transformer_blocks):
        learnt = _count(p for p in block.parameters() if p.requires_grad)
        flows = flows or bool(learnt or pairs[index])
        blocks.append(BlockWork(_count(block.parameters()), learnt, pairs[index], flows))
    return Work(
        transformer.dim,
        transformer.heads,
        tokens,
        batch,
        tuple(blocks),
        _count(outside),
        _count(trained),
    )


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device by what they are for, in the order they are printed; and FLOPs a step."""

    items: tuple[tuple[str, float], ...]
    flops: float

    @property
    def total(self) -> float:
        return sum(size for _, size in self.items)

    @property
    def needed(self) -> float:
        """Bytes a GPU must have: with its context and what the allocator loses."""
        return CONTEXT + self.total * (1 + FRAGMENTED)

    def of(self, name: str) -> float:
        return dict(self.items)[name]


def saved_bytes(work: Work, block: BlockWork, settings: TrainingSettings, cuda: bool) -> float:
    """Bytes that one sample's pass through a block leaves for its backward pass.

    Counted in numbers a token, in units of the width C; ``wide`` are LayerNorm's, which CUDA's
    autocast keeps in fp32:

    * always: the two norms' inputs and q, k before their norms (wide); q, k, v and the output of
      attention, and GELU's input, which is 4 C wide;
    * for weights that are trained: the two norms' outputs (wide), inputs of q, k, v (one, or three
      where autocast makes a copy for each) and of the MLP, GELU's output (4 C), and both branches
      for their gates;
    * for an adapter: the inputs of its A matrices, one (fp32) or four (autocast).

    Attention is fused: it keeps a log-sum-exp a head and token and no N x N matrix.
    """
    bf16 = settings.precision == "bf16"
    plain = BF16 if bf16 else FP32
    wide = FP32 if cuda else plain
    copies = 3 if wide != plain else 1
    units = 4 * wide + 8 * plain
    if block.trained:
        units += 2 * wide + (copies + 1 + 4 + 2) * plain
    if block.adapter:
        units += (4 if bf16 else 1) * plain
    # Mean and spread of the norms (two of the block, two a head) and the log-sum-exp, in fp32.
    statistics = FP32 * (4 + 4 * work.heads + work.heads)
    return (units * work.dim + statistics) * work.tokens


def estimate(
    work: Work, settings: TrainingSettings, processes: int = 1, cuda: bool = True
) -> Estimate:
    """Memory of one device and FLOPs of one of its steps.

    With "fsdp" weights, gradients, states and average are split among ``processes`` and the
    largest block is gathered twice (the next one is fetched early).
    """
    split = processes if settings.parallel == "fsdp" else 1
    bf16, recompute = settings.precision == "bf16", settings.gradient_checkpointing
    held = BF16 if settings.frozen == "bf16" else FP32
    trained, frozen = work.trained, work.weights - work.trained
    largest = max((b.weights + b.adapter for b in work.blocks), default=0)
    weights = (trained * FP32 + frozen * held) / split
    if split > 1:
        weights += 2 * largest * FP32
    kept_here = 0 if settings.offload else 1
    saving = [b for b in work.blocks if b.saves]
    saved = [work.batch * saved_bytes(work, b, settings, cuda) for b in saving]
    stream = work.batch * work.tokens * work.dim * (BF16 if bf16 else FP32)
    # fp32 weights are cast for autocast: copies that backward needs, and those of trained weights
    # stay until the pass ends.
    casts = 0.0
    if bf16:
        cast = [b for b in saving if b.trained or held == FP32]
        if recompute:
            cast = [b for b in cast if b.trained]
        casts = BF16 * sum(b.weights for b in cast)
    if recompute:
        activations, again = stream * len(saving), max(saved, default=0.0)
    else:
        activations, again = sum(saved), 0.0
    items = (
        ("weights", weights),
        ("gradients", trained * FP32 / split),
        ("optimiser states", kept_here * state_bytes(work, settings) / split),
        ("moving average", kept_here * trained * FP32 / split),
        ("bf16 copies of weights", casts),
        ("activations kept for the backward pass", activations),
        ("one block computed again", again),
        # The widest moment: the MLP's 4 C wide tensor, its gradient before and after GELU, and
        # the stream's gradient with the branch's.
        ("passing values", 14 * stream),
    )
    return Estimate(items, step_flops(work, settings))


def state_bytes(work: Work, settings: TrainingSettings) -> float:
    """AdamW keeps two numbers a weight; Muon one for the blocks' matrices."""
    if settings.optimizer == "muon":
        inside = sum(b.trained for b in work.blocks)
        return FP32 * (inside + 2 * (work.trained - inside))
    return 2 * FP32 * work.trained


def step_flops(work: Work, settings: TrainingSettings) -> float:
    """Multiplications and additions of one process's step.

    A block's forward is 2 a weight and token in its 12 C^2 of linear layers, and 4 N^2 C in its
    attention. Backward is once that for the inputs' gradients and once for those of trained
    weights (attention: 2.5 times, as fused kernels compute scores again); checkpointing adds one
    forward.
    """
    linear = 24 * work.dim**2 * work.tokens
    attention = 4 * work.tokens**2 * work.dim
    total = 0.0
    for block in work.blocks:
        total += linear + attention
        if block.saves:
            total += linear + 2.5 * attention
            total += linear if block.trained else 0
            total += linear + attention if settings.gradient_checkpointing else 0
    return total * work.batch * settings.accumulate


def largest_batch(work: Work, settings: TrainingSettings, room: float, processes: int = 1) -> int:
    """The largest ``batch`` whose needs fit into ``room`` bytes; 0 when one sample does not."""
    one = estimate(replace(work, batch=1), settings, processes).needed
    each = estimate(replace(work, batch=2), settings, processes).needed - one
    return 0 if one > room else 1 + int((room - one) / each)


def choices(work: Work, settings: TrainingSettings) -> list[tuple[str, TrainingSettings, int]]:
    """(what it is called, settings, processes) of the ways to run that are worth comparing."""
    plain = replace(settings, gradient_checkpointing=False, offload=False, parallel="ddp")
    found: list[tuple[str, TrainingSettings, int]] = []
    types = ["bf16", "fp32"] if work.trained < work.weights else [settings.frozen]
    for kind in types:
        if kind == "bf16" and settings.precision != "bf16":
            continue
        name = f"frozen weights in {kind}" if len(types) > 1 else "as it is"
        held = replace(plain, frozen=kind)
        again = replace(held, gradient_checkpointing=True)
        found += [(name, held, 1), (f"{name}, checkpointing", again, 1)]
        if work.trained > LARGE:
            found.append((f"{name}, checkpointing, offload", replace(again, offload=True), 1))
    if work.trained > LARGE and settings.optimizer == "adamw":
        split = replace(plain, frozen="fp32", gradient_checkpointing=True, parallel="fsdp")
        found += [(f"checkpointing, fsdp on {n} GPUs", split, n) for n in (2, 8)]
    return found


def table(work: Work, settings: TrainingSettings, cards: Sequence[int] = CARDS) -> list[str]:
    """Lines: each way to run, what a batch of 1 needs, and the largest batch on each card."""
    one = replace(work, batch=1)
    rows = []
    for name, chosen, processes in choices(work, settings):
        needed = estimate(one, chosen, processes).needed
        fits = [largest_batch(work, chosen, card * GIB, processes) for card in cards]
        cells = [f"batch {n}" if n else "-" for n in fits]
        rows.append((name, f"{needed / GIB:.1f} GiB", *cells))
    heads = ("", "batch 1 needs", *(f"{card} GB" for card in cards))
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]


def report(
    work: Work, settings: TrainingSettings, processes: int = 1, device: str = "cuda"
) -> list[str]:
    """What is printed before the first step."""
    found = estimate(work, settings, processes, device == "cuda")
    share = 100 * work.trained / max(1, work.weights)
    together = settings.batch * settings.accumulate * processes
    lines = [
        f"{work.weights:,} weights, {work.trained:,} trained ({share:.3g} %); "
        f"{work.tokens:,} tokens a sample, {together} samples a step"
        + (f" ({settings.batch} x {settings.accumulate} x {processes})" if together > 1 else ""),
        f"Estimated memory on {'each ' if processes > 1 else ''}{device}:",
    ]
    lines += [f"  {name:<40}{size / GIB:8.2f} GiB" for name, size in found.items if size]
    lines.append(f"  {'together':<40}{found.total / GIB:8.2f} GiB")
    if settings.offload:
        host = (state_bytes(work, settings) + 2 * work.trained * FP32) / GIB
        lines.append(f"  in the host's memory: {host:.2f} GiB of masters, states and average")
    lines.append(
        f"{found.flops / 1e12:,.3g} TFLOP a step: {found.flops / 1e14:.3g} s at 100 TFLOP/s."
    )
    return lines


class Speed:
    """Says once, after the first few steps, how long the rest will take."""

    def __init__(self, step: int, steps: int):
        self.first, self.steps, self.since = step + 1, steps, 0.0

    def after(self, step: int) -> str | None:
        if step == self.first:
            self.since = time.monotonic()
        if step != self.first + TIMED_STEPS:
            return None
        seconds = (time.monotonic() - self.since) / TIMED_STEPS
        left = (self.steps - step) * seconds
        return (
            f"Measured {seconds:.3g} s a step: {_duration(left)} for the {self.steps - step:,} "
            f"steps left.{_peak()}"
        )


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f" The GPU's peak is {torch.cuda.max_memory_reserved() / GIB:.1f} GiB."


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
