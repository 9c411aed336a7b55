"""Random layouts and masks, and attention written out in float64, for tests of the kernels."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from layerloom.kernels import Segment, SegmentMask, SequenceLayout, plan_attention

LAYERS = ("foreground", "alpha", "background", "blended")
# No deadline and no database of examples: timing on a shared machine says nothing about the code.
QUICK = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# Mostly short segments, for many of them; at times long ones, for tiles of kernels.
LENGTHS = st.integers(1, 40) | st.integers(1, 700)
GRIDS = ((1, 1, 1), (1, 5, 8), (2, 3, 4), (3, 3, 3), (5, 2, 4), (4, 9, 17), (3, 13, 18))


@st.composite
def layouts(draw, max_segments: int = 12, most_tokens: int = 1800) -> SequenceLayout:
    segments = []
    tokens = 0
    for index in range(draw(st.integers(1, max_segments))):
        grid = draw(st.none() | st.sampled_from(GRIDS))
        length = math.prod(grid) if grid else draw(LENGTHS)
        tokens += length
        if segments and tokens > most_tokens:
            break
        kind = "video" if grid else "text"
        segments.append(Segment(f"{kind}{index}", kind, length, grid=grid))
    return SequenceLayout(tuple(segments))


@st.composite
def cases(draw, most_tokens: int = 1800) -> tuple[SequenceLayout, SegmentMask | None]:
    layout = draw(layouts(most_tokens=most_tokens))
    size = len(layout.segments)
    if draw(st.integers(0, 9)) == 0:
        return layout, None
    visibility = draw(_square(size, st.booleans()))
    values = st.sampled_from([0.0, 0.0, 1.5, -2.0, 0.25, -math.inf])
    bias = draw(st.none() | _square(size, values))
    window = draw(st.none() | st.integers(0, 4))
    return layout, SegmentMask(visibility, bias, window)


def _square(size: int, values):
    row = st.lists(values, min_size=size, max_size=size)
    return st.lists(row, min_size=size, max_size=size)


def oracle_bias(layout: SequenceLayout, mask: SegmentMask | None) -> torch.Tensor:
    """[N, N] additive mask, token pair by token pair, from the definition alone."""
    tokens = []
    clip_frame = 0
    for index, segment in enumerate(layout.segments):
        for token in range(segment.length):
            frame = None
            if segment.kind == "video":
                frame = clip_frame + token // (segment.grid[1] * segment.grid[2])
            tokens.append((index, frame))
        if segment.kind == "video":
            clip_frame += segment.grid[0]

    def pair(query, key) -> float:
        if mask is None:
            return 0.0
        far = None not in (query[1], key[1], mask.frame_window) and (
            abs(query[1] - key[1]) > mask.frame_window
        )
        if far or not mask.visibility[query[0]][key[0]]:
            return -math.inf
        return mask.bias[query[0]][key[0]] if mask.bias else 0.0

    # Equal tokens have equal rows: compute one entry a pair of kinds of token, then spread.
    kinds = list(dict.fromkeys(tokens))
    table = torch.tensor([[pair(q, k) for k in kinds] for q in kinds], dtype=torch.float64)
    index = torch.tensor([kinds.index(token) for token in tokens])
    return table[index][:, index]


def oracle(q, k, v, bias, scale, dtype=torch.float64):
    """(out, lse) of the formula as written; NaN rows of an empty softmax become 0."""
    q, k, v, bias = q.to(dtype), k.to(dtype), v.to(dtype), torch.as_tensor(bias, dtype=dtype)
    scores = q @ k.transpose(-1, -2) * scale + bias
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def qkv(layout: SequenceLayout, heads: int = 2, head_dim: int = 8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(layout.length)
    shape = (3, 2, heads, layout.length, head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def make_plan(layout, mask, heads=2, head_dim=8, dtype=torch.float32):
    return plan_attention(layout, mask, heads, head_dim, dtype, "cpu")


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error relative to the largest expected number."""
    return ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def layerflow_rgba(grid: tuple[int, int, int], text: int) -> SequenceLayout:
    """LayerFlow's RGBA generation: three prompts, four layers."""
    prompts = [Segment(f"text:{n}", "text", text, n) for n in LAYERS if n != "alpha"]
    videos = [Segment(n, "video", math.prod(grid), n, grid) for n in LAYERS]
    return SequenceLayout((*prompts, *videos))
