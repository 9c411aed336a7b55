"""`layerloom bench block`: one block of the layered transformer against diffusers' block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import list_backends, use_backend
from ..kernels.bench.attention import exact_attention, sample_rows
from ..kernels.bench.cases import Case
from ..kernels.bench.probes import Clock
from ..kernels.bench.protocol import Candidate, Prepared, Protocol, Row, Step, measure, numbered
from .models.layered_transformer import TEXT_ROW, VIDEO_ROW, Block

OURS, THEIRS = "layerloom", "diffusers"
TIME_DIM = 512


def candidate_names(named: Sequence[str] | None = None) -> list[str]:
    """`layerloom` (with the policy's attention), `layerloom:BACKEND` and `diffusers`.

    Raises:
        ValueError: another name.
    """
    known = [OURS, *(f"{OURS}:{info.name}" for info in list_backends()), THEIRS]
    for name in named or ():
        if name not in known:
            raise ValueError(f"the candidate {name!r} is not known; there are {', '.join(known)}")
    return list(named or (OURS, THEIRS))


def dense_flops(case: Case) -> int:
    """Attention over all pairs, and 24 N C^2 for q, k, v, output and MLP (modulation left out)."""
    width = case.shape.heads * case.shape.head_dim
    return case.dense_flops + 24 * case.batch * case.shape.layout.length * width**2


def run_case(
    case: Case,
    names: Sequence[str],
    baselines: Sequence[str],
    clock: Clock,
    protocol: Protocol,
    cases_left: int,
    step: Step,
) -> list[Row]:
    """Measure the candidates called `names` on one case.

    diffusers' block knows no masks: it computes full attention whatever the case's mask.
    """
    setting = BlockSetting(case, protocol.seed)
    candidates = [
        _theirs(setting, shown) if name == THEIRS else _ours(setting, name, shown)
        for name, shown in zip(names, numbered(names), strict=True)
    ]
    return measure(
        candidates,
        baselines,
        dense_flops(case),
        case.device,
        clock,
        protocol,
        cases_left,
        setting.error,
        step,
    )


class BlockSetting:
    """A block with random weights, its inputs, and its exact output on sampled tokens."""

    def __init__(self, case: Case, seed: int):
        self.case, self.layout = case, case.shape.layout
        heads, head_dim = case.shape.heads, case.shape.head_dim
        width = heads * head_dim
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            block = Block(heads, head_dim, TIME_DIM)
        state = random_state(block, generator)
        place = {"device": case.device, "dtype": case.dtype}
        self.state = {name: x.to(**place) for name, x in state.items()}
        self.block = block.eval().requires_grad_(False)
        self.block.load_state_dict(self.state, assign=True)
        self.hidden = torch.randn(case.batch, self.layout.length, width, generator=generator).to(
            **place
        )
        self.time = torch.randn(case.batch, TIME_DIM, generator=generator).to(**place)
        self.runs = self.layout.runs(lambda s: TEXT_ROW if s.kind == "text" else VIDEO_ROW)
        self.text = sum(s.length for s in self.layout.segments if s.kind == "text")
        self.rows = sample_rows(case, seed)
        self._expected: dict[str, Tensor] = {}

    def error(self, computes: str, result: Tensor | tuple[Tensor, Tensor]) -> float:
        """Largest error on the sampled tokens, relative to the largest expected value."""
        if computes not in self._expected:
            self._expected[computes] = exact_block(
                self.state,
                self.hidden,
                self.time,
                self.text,
                self.case.shape.heads,
                self.rows,
                self._bias() if computes == "masked" else None,
            )
        expected = self._expected[computes]
        if isinstance(result, tuple):
            video, text = result
            found = torch.cat([text, video], dim=1)[:, self.rows]
        else:
            found = result[:, self.rows]
        return ((found.double() - expected).abs().max() / expected.abs().max()).item()

    def _bias(self) -> Tensor:
        return self.case.plan().to_dense_mask(self.case.device, torch.float64, self.rows)


def random_state(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights with open gates, float32: unit gain, norms around 1, moderate biases."""
    state = {}
    for name, parameter in module.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
        spread = spread * 0.25 if ".linear." in name else spread
        centre = 1.0 if "norm" in name and parameter.ndim == 1 and name.endswith("weight") else 0.0
        centre = 0.0 if ".linear." in name else centre
        state[name] = torch.randn(parameter.shape, generator=generator) * spread + centre
    return state


def exact_block(
    state: dict[str, Tensor],
    hidden: Tensor,
    time: Tensor,
    text: int,
    heads: int,
    rows: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The block in float64 on some tokens, written from CogVideoX's definition.

    AdaLN-zero with text and video modulated apart, q/k LayerNorm, joint attention, MLP with a
    tanh GELU, gated residuals (arXiv 2408.06072, section 2.2).

    Args:
        state: parameters by diffusers' names.
        hidden: [B, N, C], text first.
        time: [B, T], before its SiLU.
        text: tokens of text.
        rows: [R], the tokens whose result is wanted.
        bias: [R, N] additive mask, or None.

    Returns:
        [B, R, C] float64.
    """
    wide = {name: x.double() for name, x in state.items()}
    hidden, time = hidden.double(), F.silu(time.double())

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, wide[f"{name}.weight"], wide[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], wide[f"{name}.weight"], wide[f"{name}.bias"], eps)

    def modulated(name: str, x: Tensor, is_text: Tensor) -> tuple[Tensor, Tensor]:
        parts = linear(f"{name}.linear", time)[:, None].chunk(6, dim=-1)
        shift, scale, gate = (
            torch.where(is_text[:, None], words, video)
            for video, words in zip(parts[:3], parts[3:], strict=True)
        )
        return norm(f"{name}.norm", x, 1e-5) * (1 + scale) + shift, gate

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    everywhere = torch.arange(hidden.shape[1], device=hidden.device) < text
    x, gate = modulated("norm1", hidden, everywhere)
    q = norm("attn1.norm_q", split_heads(linear("attn1.to_q", x[:, rows])), 1e-6)
    k = norm("attn1.norm_k", split_heads(linear("attn1.to_k", x)), 1e-6)
    v = split_heads(linear("attn1.to_v", x))
    attended = exact_attention(q, k, v, bias).transpose(1, 2).flatten(2)
    hidden = hidden[:, rows] + gate[:, rows] * linear("attn1.to_out.0", attended)
    x, gate = modulated("norm2", hidden, everywhere[rows])
    inner = F.gelu(linear("ff.net.0.proj", x), approximate="tanh")
    return hidden + gate * linear("ff.net.2", inner)


def _ours(setting: BlockSetting, name: str, shown: str) -> Candidate:
    case = setting.case
    backend = name.partition(":")[2] or None

    def call() -> Tensor:
        # In a network the plan and the SiLU are made once for all blocks.
        time, plan = F.silu(setting.time), case.plan()
        with use_backend(backend):
            return setting.block(setting.hidden, time, setting.runs, plan)

    reasons = {info.name: info.reason for info in list_backends()}
    linear = dense_flops(case) - case.dense_flops
    return Candidate(
        shown,
        lambda: Prepared(call),
        linear + case.batch * case.plan().flops,
        reason=reasons.get(backend, ""),
        needs=_needs(setting, backend),
    )


def _theirs(setting: BlockSetting, shown: str) -> Candidate:
    case, reason = setting.case, ""
    try:
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    except ImportError:
        reason = "diffusers is not installed (pip install 'layerloom[standalone]')"

    def prepare() -> Prepared:
        heads, head_dim = case.shape.heads, case.shape.head_dim
        with torch.device("meta"):
            block: Any = CogVideoXBlock(
                heads * head_dim, heads, head_dim, TIME_DIM, attention_bias=True
            )
        block.load_state_dict(setting.state, assign=True)
        block = block.eval().requires_grad_(False)
        text = setting.hidden[:, : setting.text].contiguous()
        video = setting.hidden[:, setting.text :].contiguous()
        return Prepared(lambda: block(video, text, setting.time))

    return Candidate(
        shown,
        prepare,
        dense_flops(case),
        computes="full",
        reason=reason,
        needs=_needs(setting, None),
    )


def _needs(setting: BlockSetting, backend: str | None) -> int:
    """Bytes of a call: the MLP's inside is four times as wide and there is its GELU."""
    case, size = setting.case, setting.hidden.numel() * setting.hidden.element_size()
    needs = 10 * size
    if backend == "reference":
        needs += 4 * 4 * 1024 * case.shape.layout.length * case.shape.heads * case.batch
    return needs
