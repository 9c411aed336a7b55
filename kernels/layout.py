"""Describe a packed sequence of text and video segments, and who may see whom in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

KINDS = ("text", "video")


@dataclass(frozen=True)
class Segment:
    """A contiguous stretch of tokens that belong together.

    Args:
        name: unique in its layout, for instance ``"text:foreground"``.
        kind: ``"text"`` or ``"video"``.
        length: tokens.
        layer: the layer it shows or describes; ``None`` for a prompt shared by all layers.
        grid: tokens as (frames, height, width) of a video segment, frame-major.
        clean: True for a given (not noisy) layer.
    """

    name: str
    kind: str
    length: int
    layer: str | None = None
    grid: tuple[int, int, int] | None = None
    clean: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"segment {self.name!r} has kind {self.kind!r}; expected one of {KINDS}"
            )
        if self.length < 0:
            raise ValueError(f"segment {self.name!r} has a negative length ({self.length})")
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
            if len(self.grid) != 3 or math.prod(self.grid) != self.length:
                raise ValueError(
                    f"segment {self.name!r} has {self.length} tokens, "
                    f"which its grid {self.grid} (frames, height, width) does not hold"
                )


@dataclass(frozen=True)
class SequenceLayout:
    """The segments of one packed sequence, in order."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        names = [segment.name for segment in self.segments]
        if len(set(names)) != len(names):
            raise ValueError(f"segment names must be unique, got {names}")

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Start of every segment, then the total: S + 1 numbers."""
        return (0, *accumulate(segment.length for segment in self.segments))

    @property
    def length(self) -> int:
        """Tokens in the whole sequence."""
        return self.cu_seqlens[-1]

    @property
    def slices(self) -> tuple[slice, ...]:
        """One slice of the token axis a segment."""
        bounds = self.cu_seqlens
        return tuple(slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True))

    def slice(self, name: str) -> slice:
        """The slice of the segment called `name`.

        Raises:
            KeyError: no segment has that name.
        """
        for segment, span in zip(self.segments, self.slices, strict=True):
            if segment.name == name:
                return span
        raise KeyError(f"no segment {name!r}; there are {[s.name for s in self.segments]}")

    def segment_ids(self, device: torch.device | str | None = None) -> Tensor:
        """[N] int64, the segment index of every token."""
        ids = torch.empty(self.length, dtype=torch.long, device=device)
        for index, span in enumerate(self.slices):
            ids[span] = index
        return ids

    def frame_ids(self, device: torch.device | str | None = None) -> Tensor:
        """[N] int64, the frame of every video token along the concatenated clip; -1 for text.

        Raises:
            ValueError: a video segment has no grid.
        """
        ids = torch.full((self.length,), -1, dtype=torch.long, device=device)
        first = 0
        for segment, span in zip(self.segments, self.slices, strict=True):
            if segment.kind != "video":
                continue
            frames, height, width = require_grid(segment)
            frame = torch.arange(first, first + frames, device=device)
            ids[span] = frame.repeat_interleave(height * width)
            first += frames
        return ids

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Join one [B, L_i, C] tensor a segment, in order, into [B, N, C].

        Raises:
            ValueError: wrong number of parts or a wrong length.
        """
        if len(parts) != len(self.segments):
            raise ValueError(f"expected {len(self.segments)} parts, got {len(parts)}")
        for segment, part in zip(self.segments, parts, strict=True):
            if part.shape[1] != segment.length:
                raise ValueError(
                    f"segment {segment.name!r} takes {segment.length} tokens, got {part.shape[1]}"
                )
        if needs_graph(*parts):
            return torch.cat(tuple(parts), dim=1)
        batch, _, channels = parts[0].shape
        packed = parts[0].new_empty(batch, self.length, channels)
        for span, part in zip(self.slices, parts, strict=True):
            packed[:, span] = part
        return packed

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, C] to one [B, L_i, C] view a segment.

        Raises:
            ValueError: `x` does not have the layout's length.
        """
        if x.shape[1] != self.length:
            raise ValueError(f"the layout holds {self.length} tokens, got {x.shape[1]}")
        return x.split([segment.length for segment in self.segments], dim=1)

    def runs(self, key: Callable[[Segment], int]) -> tuple[tuple[int, int, int], ...]:
        """Stretches (start, stop, row) of neighbouring segments for which `key` gives one row."""
        runs: list[tuple[int, int, int]] = []
        for segment, span in zip(self.segments, self.slices, strict=True):
            if segment.length == 0:
                continue
            row = key(segment)
            if runs and runs[-1][2] == row:
                runs[-1] = (runs[-1][0], span.stop, row)
            else:
                runs.append((span.start, span.stop, row))
        return tuple(runs)


@dataclass(frozen=True)
class SegmentMask:
    """Who sees whom, segment by segment.

    Args:
        visibility: [S, S] booleans, query segment in the row, key segment in the column; any
            nested sequence or tensor.
        bias: [S, S] floats added to the scaled scores, or None; -inf hides the pair.
        frame_window: the largest distance in frames, along the concatenated clip, at which one
            video token sees another; None for no limit. Text is not limited by it.

    Raises:
        ValueError: tables that are not square or not of one size, a bias that is NaN or +inf, or
            a negative window.
    """

    visibility: tuple[tuple[bool, ...], ...]
    bias: tuple[tuple[float, ...], ...] | None = None
    frame_window: int | None = None

    def __post_init__(self) -> None:
        visibility = _table(self.visibility, bool)
        size = len(visibility)
        if any(len(row) != size for row in visibility):
            raise ValueError("visibility must be a square table, one row and column a segment")
        object.__setattr__(self, "visibility", visibility)
        if self.bias is not None:
            bias = _table(self.bias, float)
            if len(bias) != size or any(len(row) != size for row in bias):
                raise ValueError(f"bias must be {size} x {size}, as visibility is")
            if any(math.isnan(value) or value == math.inf for row in bias for value in row):
                raise ValueError("bias must be finite or -inf")
            object.__setattr__(self, "bias", bias)
        if self.frame_window is not None and self.frame_window < 0:
            raise ValueError(f"frame_window must not be negative, got {self.frame_window}")

    def pair(self, query: int, key: int) -> float | None:
        """The bias between two segments, or None where the key segment is invisible."""
        if not self.visibility[query][key]:
            return None
        bias = 0.0 if self.bias is None else self.bias[query][key]
        return None if bias == -math.inf else bias


def full(layout: SequenceLayout) -> SegmentMask:
    """Every token sees every token, as the published weights were trained."""
    return _mask(layout, lambda query, key: True)


def prompt_isolated(layout: SequenceLayout) -> SegmentMask:
    """All video sees all video, but a layer does not see the other layers' prompts.

    A prompt sees itself and the layer it describes. A layer without a prompt of its own (alpha)
    goes with the foreground's; a prompt without a layer is seen by all.
    """

    def sees(query: Segment, key: Segment) -> bool:
        if query.kind == key.kind == "video":
            return True
        if query.kind == key.kind == "text":
            return key.layer in (None, query.layer)
        text, video = (query, key) if query.kind == "text" else (key, query)
        return text.layer is None or text.layer == _prompt_layer(layout, video)

    return _mask(layout, sees)


def layer_isolated(layout: SequenceLayout) -> SegmentMask:
    """A layer and its prompt see each other and nothing else.

    Alpha, if it has no prompt, also sees the foreground's; a prompt without a layer is seen by
    all and sees only itself.
    """

    def sees(query: Segment, key: Segment) -> bool:
        if key.kind == "text" and query.kind == "video":
            return key.layer is None or key.layer == _prompt_layer(layout, query)
        return _is_shared(key) or _layer(query) == _layer(key)

    return _mask(layout, sees)


def blended_sees_all(layout: SequenceLayout) -> SegmentMask:
    """Foreground and alpha see each other, background itself, the blended layer everything.

    A prompt counts as its layer. On LayerFlow's four layers about 56 % of the work is left. It
    changes the function that the published weights were trained for: a user's choice.
    """

    def sees(query: Segment, key: Segment) -> bool:
        if _is_shared(key) or _layer(query) in ("blended", _layer(key)):
            return True
        return {_layer(query), _layer(key)} == {"foreground", "alpha"}

    return _mask(layout, sees)


def clean_sees_clean(layout: SequenceLayout, mask: SegmentMask | None = None) -> SegmentMask:
    """Clean (given) layers see only clean ones and prompts; all else as in `mask`, or full.

    Prompts are given, too, and also see only what is given. The states of both then depend on no
    noisy segment, so that a `SegmentKVCache` can keep them. Where nothing is clean the mask stays
    as it is.
    """
    mask = full(layout) if mask is None else mask
    segments = layout.segments
    if not any(segment.clean for segment in segments):
        return mask
    given = [segment.clean or segment.kind == "text" for segment in segments]
    visibility = [
        [sees and (key or not query) for key, sees in zip(given, row, strict=True)]
        for query, row in zip(given, mask.visibility, strict=True)
    ]
    return replace(mask, visibility=visibility)


def require_grid(segment: Segment) -> tuple[int, int, int]:
    """The grid of a video segment, or a ValueError that says why it is needed."""
    if segment.grid is None:
        raise ValueError(
            f"a frame window needs the grid (frames, height, width) of segment {segment.name!r}"
        )
    return segment.grid


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether an operation must stay functional: autograd records it, or a compiler traces it."""
    if torch.compiler.is_compiling():
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _mask(layout: SequenceLayout, sees: Callable[[Segment, Segment], bool]) -> SegmentMask:
    segments = layout.segments
    return SegmentMask(tuple(tuple(sees(query, key) for key in segments) for query in segments))


def _is_shared(segment: Segment) -> bool:
    return segment.kind == "text" and segment.layer is None


def _layer(segment: Segment) -> str | None:
    """The layer a segment counts as; an unlabelled video segment is a layer of its own."""
    return segment.layer if segment.layer or segment.kind == "text" else segment.name


def _prompt_layer(layout: SequenceLayout, video: Segment) -> str | None:
    """The layer whose prompt describes `video`."""
    layer = _layer(video)
    described = {segment.layer for segment in layout.segments if segment.kind == "text"}
    return "foreground" if layer == "alpha" and "alpha" not in described else layer


def _table(rows: object, cast: type) -> tuple[tuple, ...]:
    if isinstance(rows, Tensor):
        rows = rows.tolist()
    return tuple(tuple(cast(value) for value in row) for row in rows)
