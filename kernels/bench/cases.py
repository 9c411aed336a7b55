"""What is measured: named sequence shapes, named masks, and the random tensors of a case."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import (
    Segment,
    SegmentMask,
    SequenceLayout,
    blended_sees_all,
    full,
    layer_isolated,
    prompt_isolated,
)
from ..plan import AttentionPlan, plan_attention

LAYERS = ("foreground", "alpha", "background", "blended")
PROMPT_TOKENS = 226
WINDOW = 2
"""Frames that the mask `window` lets a token see to either side, along the concatenated clip."""

_MASKS = {
    "full": full,
    "prompt_isolated": prompt_isolated,
    "layer_isolated": layer_isolated,
    "blended_sees_all": blended_sees_all,
}
MASKS = (*_MASKS, "blended_sees_all+bias", "window")
"""The masks of the published tables; `make_mask` knows more combinations."""


@dataclass(frozen=True)
class Shape:
    """A layered sequence: one prompt a layer (alpha has none), then the layers' tokens.

    Args:
        name: what a user calls it.
        layers: names, in order.
        frames: latent frames a layer.
        height, width: patches.
        text: tokens a prompt.
        heads, head_dim: of the network that it belongs to.
    """

    name: str
    layers: tuple[str, ...]
    frames: int
    height: int
    width: int
    text: int = PROMPT_TOKENS
    heads: int = 30
    head_dim: int = 64

    @property
    def layout(self) -> SequenceLayout:
        grid = (self.frames, self.height, self.width)
        prompted = [name for name in self.layers if name != "alpha"] if self.text else []
        text = [Segment(f"text:{name}", "text", self.text, name) for name in prompted]
        video = [Segment(name, "video", math.prod(grid), name, grid) for name in self.layers]
        return SequenceLayout((*text, *video))

    @property
    def description(self) -> str:
        """Its numbers in words."""
        layout = self.layout
        prompts = sum(segment.kind == "text" for segment in layout.segments)
        return (
            f"{layout.length:,} tokens: {prompts} x {self.text} of text, {len(self.layers)} layers"
            f" of {self.frames} x {self.height} x {self.width}"
        )


# LayerFlow on CogVideoX-2B (arXiv 2506.04228): 30 heads of 64, prompts of 226 tokens, 480x720
# pixels as 30 x 45 patches a latent frame.
SHAPES = {
    shape.name: shape
    for shape in (
        # Four layers of 49 frames (13 latent ones): 70,878 tokens.
        Shape("A", LAYERS, 13, 30, 45),
        # The published RGBA generation, 16 frames a layer: 22,278 tokens.
        Shape("B", LAYERS, 4, 30, 45),
        # The published RGB generation: 16,878 tokens.
        Shape("rgb", ("foreground", "background", "blended"), 4, 30, 45),
        # RGBA at 240x352 pixels: 5,958 tokens.
        Shape("preview", LAYERS, 4, 15, 22),
        # The shipped starter: 96x96 pixels, 8 frames.
        Shape("starter", LAYERS, 2, 6, 6, text=16, heads=3),
        # Small enough for a test.
        Shape("tiny", LAYERS, 2, 2, 3, text=5, heads=2, head_dim=32),
    )
}
_CUSTOM = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?:\+(\d+))?")


def find_shape(name: str, heads: int | None = None, head_dim: int | None = None) -> Shape:
    """The shape called `name`, or "layersxframesxheightxwidth[+tokens a prompt]".

    Raises:
        ValueError: neither; the message names the known ones.
    """
    shape = SHAPES.get(name)
    if shape is None:
        numbers = _CUSTOM.fullmatch(name)
        if numbers is None:
            raise ValueError(
                f"the shape {name!r} is not known; there are {', '.join(SHAPES)} and "
                "LAYERSxFRAMESxHEIGHTxWIDTH, 4x4x15x22 for instance"
            )
        layers, frames, height, width = (int(number) for number in numbers.groups()[:4])
        if not 0 < layers <= 16 or 0 in (frames, height, width):
            raise ValueError(
                f"the shape {name!r} holds nothing; it takes 1 to 16 layers and sides above 0"
            )
        text = PROMPT_TOKENS if numbers[5] is None else int(numbers[5])
        shape = Shape(name, _layer_names(layers), frames, height, width, text)
    return Shape(
        shape.name,
        shape.layers,
        shape.frames,
        shape.height,
        shape.width,
        shape.text,
        heads or shape.heads,
        head_dim or shape.head_dim,
    )


def make_mask(name: str, layout: SequenceLayout) -> SegmentMask:
    """A preset, with `+bias` and `+window` added to it if the name says so; or `window` alone.

    The bias favours a layer's own prompt by 0.5 and weighs other layers and prompts by -0.5, so
    that most queries meet several biases.

    Raises:
        ValueError: no such mask.
    """
    base, *extras = ("full+window" if name == "window" else name).split("+")
    if base not in _MASKS or len(set(extras)) < len(extras) or set(extras) - {"bias", "window"}:
        raise ValueError(
            f"the mask {name!r} is not known; there are {', '.join(MASKS)}, and +bias or +window "
            "goes with each preset"
        )
    visibility = _MASKS[base](layout).visibility
    bias = None
    if "bias" in extras:
        bias = [[_bias(query, key) for key in layout.segments] for query in layout.segments]
    return SegmentMask(visibility, bias, WINDOW if "window" in extras else None)


class AnyCase(Protocol):
    """What suites and reports ask of a case."""

    @property
    def title(self) -> str: ...

    @property
    def description(self) -> str:
        """One sentence without its full stop."""

    def record(self) -> dict[str, Any]:
        """What the case is, in types that JSON has."""


@dataclass(frozen=True)
class Case:
    """One row of a table: a shape, a mask, a type of numbers."""

    shape: Shape
    mask: str
    dtype: torch.dtype
    device: torch.device
    batch: int = 1

    def plan(self) -> AttentionPlan:
        layout, shape = self.shape.layout, self.shape
        mask = make_mask(self.mask, layout)
        return plan_attention(layout, mask, shape.heads, shape.head_dim, self.dtype, self.device)

    @property
    def dense_flops(self) -> int:
        """4 N^2 C a batch element: Q K^T and P V over all pairs."""
        width = self.shape.heads * self.shape.head_dim
        return 4 * self.batch * self.shape.layout.length**2 * width

    @property
    def title(self) -> str:
        return f"{self.shape.name}, {self.mask}, {type_name(self.dtype)}"

    @property
    def description(self) -> str:
        shape, work = self.shape, self.plan().flop_fraction
        return (
            f"{shape.description}; {shape.heads} heads x {shape.head_dim}, batch {self.batch}; "
            f"{work:.1%} of full attention's work"
        )

    def record(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "shape": shape.name,
            "layers": list(shape.layers),
            "grid": [shape.frames, shape.height, shape.width],
            "text_tokens": shape.text,
            "tokens": shape.layout.length,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "batch": self.batch,
            "mask": self.mask,
            "dtype": type_name(self.dtype),
            "work": self.plan().flop_fraction,
        }


def random_qkv(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as a LayerNorm leaves them, normal values: [B, H, N, D] each.

    Heads are last in memory, as a projection's output is. (Zeros would run faster: they draw less
    power.) Drawn on the CPU, so that every device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = case.shape
    size = (case.batch, shape.layout.length, shape.heads, shape.head_dim)

    def draw(norm: bool) -> Tensor:
        x = torch.randn(size, generator=generator)
        x = F.layer_norm(x, size[-1:]) if norm else x
        return x.to(device=case.device, dtype=case.dtype).transpose(1, 2)

    return draw(True), draw(True), draw(False)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def product(
    shapes: Iterable[Shape],
    masks: Iterable[str],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    batch: int,
) -> list[Case]:
    """All combinations; shape outermost.

    Raises:
        ValueError: no such mask.
    """
    masks, dtypes = tuple(masks), tuple(dtypes)
    cases = []
    for shape in shapes:
        for mask in masks:
            make_mask(mask, shape.layout)
            cases.extend(Case(shape, mask, dtype, device, batch) for dtype in dtypes)
    return cases


def _layer_names(count: int) -> tuple[str, ...]:
    few = {1: LAYERS[3:], 2: LAYERS[2:], 3: (LAYERS[0], *LAYERS[2:])}
    if count in few:
        return few[count]
    return (*LAYERS[:3], *(f"layer{index}" for index in range(4, count)), LAYERS[3])


def _bias(query: Segment, key: Segment) -> float:
    if query.layer != key.layer:
        return -0.5
    return 0.5 if key.kind == "text" and query.kind == "video" else 0.0
