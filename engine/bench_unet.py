"""`layerloom bench unet`: the video UNet against diffusers' UNet on the same weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.bench.cases import type_name
from ..kernels.bench.probes import Clock
from ..kernels.bench.protocol import Candidate, Prepared, Protocol, Row, Step, measure, numbered
from .bench_block import THEIRS, random_state
from .models.video_unet import VideoUNet

OURS = "layerloom"
# ModelScope's: widths as multiples of the first, text of 77 tokens.
MULTIPLES = (1, 2, 4, 4)
HEAD_DIM, CONTEXT_DIM, TEXT = 64, 1024, 77
LATENT = 4


@dataclass(frozen=True)
class UNetCase:
    """One row of a table: ModelScope's UNet at a width, a clip of latents, a type of numbers.

    width: channels of the first resolution, a multiple of 64. clip: frames, height, width.
    """

    width: int
    clip: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    batch: int = 1

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.width * multiple for multiple in MULTIPLES)

    @property
    def title(self) -> str:
        frames, height, width = self.clip
        return f"{self.width} channels, {frames}x{height}x{width}, {type_name(self.dtype)}"

    @property
    def description(self) -> str:
        millions = sum(p.numel() for p in on_meta(self.channels).parameters()) / 1e6
        return (
            f"ModelScope's UNet with {millions:.0f} M parameters; {self.clip[0]} frames of "
            f"{8 * self.clip[2]}x{8 * self.clip[1]} pixels, batch {self.batch}"
        )

    def record(self) -> dict[str, Any]:
        return {
            "channels": list(self.channels),
            "clip": list(self.clip),
            "batch": self.batch,
            "dtype": type_name(self.dtype),
        }


def unet_case(
    width: int, clip: str, dtype: torch.dtype, device: torch.device, batch: int
) -> UNetCase:
    """The case that ``width`` and ``clip`` ("FRAMESxHEIGHTxWIDTH") name.

    Raises:
        ValueError: no such width or clip.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", clip)
    if not found or min(map(int, found.groups())) < 1:
        raise ValueError(f"the clip {clip!r} is not FRAMESxHEIGHTxWIDTH, such as 16x20x32")
    if width < HEAD_DIM or width % HEAD_DIM:
        raise ValueError(f"the width {width} is not a multiple of {HEAD_DIM}")
    frames, height, across = map(int, found.groups())
    return UNetCase(width, (frames, height, across), dtype, device, batch)


def candidate_names(named: Sequence[str] | None = None) -> list[str]:
    """`layerloom` and `diffusers`.

    Raises:
        ValueError: another name.
    """
    for name in named or ():
        if name not in (OURS, THEIRS):
            raise ValueError(f"the candidate {name!r} is not known; there are {OURS}, {THEIRS}")
    return list(named or (OURS, THEIRS))


def on_meta(channels: Sequence[int]) -> VideoUNet:
    """Our network without memory."""
    with torch.device("meta"):
        network = VideoUNet(
            block_channels=tuple(channels), head_dim=HEAD_DIM, context_dim=CONTEXT_DIM
        )
    return network.eval().requires_grad_(False)


def dense_flops(case: UNetCase) -> int:
    """Operations of one call, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [x.to("meta") for x in _inputs(case, 0)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(case.channels)(*inputs)
    return counter.get_total_flops()


def run_case(
    case: UNetCase,
    names: Sequence[str],
    baselines: Sequence[str],
    clock: Clock,
    protocol: Protocol,
    cases_left: int,
    step: Step,
) -> list[Row]:
    """Measure the candidates called `names` on one case; errors are against float64."""
    generator = torch.Generator().manual_seed(protocol.seed)
    exact = random_state(on_meta(case.channels), generator)
    inputs = _inputs(case, protocol.seed)
    place = {"device": case.device, "dtype": case.dtype}
    state = {name: x.to(**place) for name, x in exact.items()}
    given = [x.to(case.device, case.dtype if x.is_floating_point() else None) for x in inputs]
    expected: list[Tensor] = []

    def error(computes: str, result: Tensor) -> float:
        if not expected:
            network = _ours(case, {k: x.double() for k, x in state.items()})
            expected.append(network(*(x.double() if x.is_floating_point() else x for x in given)))
        return ((result.double() - expected[0]).abs().max() / expected[0].abs().max()).item()

    flops = dense_flops(case)
    makers = {OURS: _our_candidate, THEIRS: _their_candidate}
    candidates = [
        makers[name](case, state, given, shown, flops)
        for name, shown in zip(names, numbered(names), strict=True)
    ]
    return measure(
        candidates, baselines, flops, case.device, clock, protocol, cases_left, error, step
    )


def _inputs(case: UNetCase, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents [B, C, T, H, W], timesteps [B], text [B, 77, D]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.batch, LATENT, *case.clip, generator=generator)
    text = torch.randn(case.batch, TEXT, CONTEXT_DIM, generator=generator)
    return x, torch.full((case.batch,), 500), text


def _ours(case: UNetCase, state: dict[str, Tensor]) -> VideoUNet:
    network = on_meta(case.channels)
    network.load_state_dict(state, assign=True)
    return network


def _our_candidate(
    case: UNetCase, state: dict[str, Tensor], given: list[Tensor], shown: str, flops: int
) -> Candidate:
    def prepare() -> Prepared:
        network = _ours(case, state)
        return Prepared(lambda: network(*given))

    return Candidate(shown, prepare, flops)


def _their_candidate(
    case: UNetCase, state: dict[str, Tensor], given: list[Tensor], shown: str, flops: int
) -> Candidate:
    reason = ""
    try:
        from diffusers import UNet3DConditionModel
    except ImportError:
        reason = "diffusers is not installed (pip install 'layerloom[standalone]')"

    def prepare() -> Prepared:
        with torch.device("meta"):
            network: Any = UNet3DConditionModel(
                block_out_channels=case.channels,
                attention_head_dim=HEAD_DIM,
                cross_attention_dim=CONTEXT_DIM,
            )
        network.load_state_dict(state, assign=True)
        network = network.eval().requires_grad_(False)
        return Prepared(lambda: network(*given).sample)

    return Candidate(shown, prepare, flops, reason=reason)
