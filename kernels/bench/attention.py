"""`layerloom bench attention`: our backends against torch's attention on layered sequences."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import segment_attention
from ..backends import Request
from ..registry import BackendInfo, list_backends, use_backend
from .cases import Case, random_qkv
from .probes import Clock
from .protocol import Candidate, Prepared, Protocol, Row, Step, measure, numbered

BASELINES = ("sdpa", "sdpa-cudnn", "sdpa-masked", "flex", "flash-attn")
SAMPLED_ROWS = 64
"""Query rows whose error is taken, a segment's first and last among them."""
_MASK_ALIGNMENT = 16
"""Elements; torch's memory-efficient kernel copies a mask whose rows are not so aligned."""


def candidate_names(device: torch.device, named: Sequence[str] | None = None) -> list[str]:
    """The candidates to measure; a name given twice is measured twice, as a control.

    Default on a CPU: every exact backend but the reference, `sdpa` and `sdpa-masked`. On CUDA
    also `auto` (the policy's choice), `sdpa-cudnn`, `flex`, and what is installed of the
    approximate backends and flash-attn.

    Raises:
        ValueError: a name that is neither a backend nor a baseline.
    """
    infos = list_backends()
    known = [*(info.name for info in infos), "auto", *BASELINES]
    if named is not None:
        for name in named:
            if name not in known:
                raise ValueError(f"the backend {name!r} is not known; there are {', '.join(known)}")
        return list(named)
    # The reference writes its scores to memory: an oracle, not a contender.
    names = [info.name for info in infos if not info.approximate and info.name != "reference"]
    if device.type != "cuda":
        return [*names, "sdpa", "sdpa-masked"]
    names += ["auto", *(info.name for info in infos if info.approximate and info.available)]
    baselines = [name for name in BASELINES if name != "flash-attn" or _flash_attention()]
    return [*names, *baselines]


def run_case(
    case: Case,
    names: Sequence[str],
    baselines: Sequence[str],
    clock: Clock,
    protocol: Protocol,
    cases_left: int,
    step: Step,
) -> list[Row]:
    """Measure the candidates called `names` on one case."""
    q, k, v = random_qkv(case, protocol.seed)
    inputs = Inputs(case, q, k, v)
    oracle = Oracle(inputs, protocol.seed)
    shown = zip(names, numbered(names), strict=True)
    candidates = [make_candidate(name, inputs, title) for name, title in shown]
    return measure(
        candidates,
        baselines,
        case.dense_flops,
        case.device,
        clock,
        protocol,
        cases_left,
        oracle.error,
        step,
    )


class Inputs:
    """q, k, v of a case, packed and as one tensor a segment."""

    def __init__(self, case: Case, q: Tensor, k: Tensor, v: Tensor):
        self.case, self.q, self.k, self.v = case, q, k, v
        self.plan = case.plan()
        self._parts: list[list[Tensor]] | None = None

    @property
    def parts(self) -> list[list[Tensor]]:
        """Of q, k and v: [B, L, H, D] a segment, in memory of its own."""
        if self._parts is None:
            spans = self.case.shape.layout.slices
            self._parts = [
                [x.transpose(1, 2)[:, span].contiguous() for span in spans]
                for x in (self.q, self.k, self.v)
            ]
        return self._parts

    @property
    def size(self) -> int:
        """Bytes of one of q, k, v."""
        return self.q.numel() * self.q.element_size()


class Oracle:
    """Exact attention in float64 on sampled query rows."""

    def __init__(self, inputs: Inputs, seed: int):
        self.inputs = inputs
        self.rows = sample_rows(inputs.case, seed)
        self._expected: dict[str, Tensor] = {}

    def error(self, computes: str, result: Tensor) -> float:
        """Largest error of [B, H, N, D] relative to the largest expected value."""
        if computes not in self._expected:
            self._expected[computes] = self._attend(computes == "masked")
        expected = self._expected[computes]
        worst = (result[:, :, self.rows].double() - expected).abs().max()
        return (worst / expected.abs().max()).item()

    def _attend(self, masked: bool) -> Tensor:
        q, k, v, plan = (getattr(self.inputs, name) for name in ("q", "k", "v", "plan"))
        bias = plan.to_dense_mask(q.device, torch.float64, self.rows) if masked else None
        return exact_attention(q[:, :, self.rows], k, v, bias)


def sample_rows(case: Case, seed: int) -> Tensor:
    """``SAMPLED_ROWS`` query rows, sorted: a segment's first and last, the others at random."""
    layout = case.shape.layout
    ends = {row for span in layout.slices for row in (span.start, span.stop - 1)}
    wanted = min(max(SAMPLED_ROWS - len(ends), 0), layout.length)
    others = random.Random(seed).sample(range(layout.length), wanted)
    return torch.tensor(sorted(ends.union(others)), device=case.device)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T D^-0.5 + bias) v in float64, a head at a time to hold few scores.

    Args:
        q: [B, H, R, D]; k, v: [B, H, N, D]; bias: [R, N] or None.
    """
    out = torch.empty_like(q, dtype=torch.float64)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            one = (batch, head)
            scores = q[one].double() @ k[one].double().T * q.shape[-1] ** -0.5
            scores = scores if bias is None else scores + bias
            out[one] = scores.softmax(-1) @ v[one].double()
    return out


def make_candidate(name: str, inputs: Inputs, shown: str | None = None) -> Candidate:
    """The candidate called `name`, a backend of ours or a baseline, shown under another name."""
    makers: dict[str, Callable[[str, Inputs], Candidate]] = {
        "auto": partial(_ours, info=None),
        "sdpa": partial(_joined, context=nullcontext),
        "sdpa-cudnn": _cudnn,
        "sdpa-masked": _masked,
        "flex": _flex,
        "flash-attn": _flash,
    }
    for info in list_backends():
        makers[info.name] = partial(_ours, info=info)
    return makers[name](shown or name, inputs)


def _ours(shown: str, inputs: Inputs, info: BackendInfo | None) -> Candidate:
    """A backend of ours; the plan is made anew in every timed call.

    (In a run it is made once. Tables and kernels that backends keep for equal plans are kept.)
    """
    case, backend = inputs.case, info.name if info else None

    def call() -> Tensor:
        with use_backend(backend):
            return segment_attention(inputs.q, inputs.k, inputs.v, case.plan())

    needs, reason = 2 * inputs.size, ""
    if info is not None:
        request = Request(case.device, case.dtype, case.shape.head_dim)
        reason = info.reason or info.constraints.refusal(request) or ""
    if backend == "reference":
        scores = 1024 * case.shape.layout.length * case.shape.heads * case.batch * 4
        needs += 4 * scores
    return Candidate(
        shown,
        lambda: Prepared(call),
        case.batch * inputs.plan.flops,
        reason=reason,
        needs=needs,
    )


def _joined(
    shown: str,
    inputs: Inputs,
    context: Callable[[], AbstractContextManager] = nullcontext,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
    reason: str = "",
) -> Candidate:
    """The usual way: join the segments' q, k and v, then attention over everything."""

    # These are inputs, not work of the candidate.
    parts = [] if reason else inputs.parts

    def call() -> Tensor:
        with context():
            return attention(*(torch.cat(x, dim=1).transpose(1, 2) for x in parts))

    # The joined tensors and the result.
    needs = 4 * inputs.size
    flops = inputs.case.dense_flops
    ready = Prepared(call)
    return Candidate(shown, lambda: ready, flops, computes="full", reason=reason, needs=needs)


def _cudnn(shown: str, inputs: Inputs) -> Candidate:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    reason = "" if inputs.case.device.type == "cuda" else "cuDNN attention needs a CUDA device"
    context = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
    return _joined(shown, inputs, context=context, reason=reason)


def _masked(shown: str, inputs: Inputs) -> Candidate:
    """SDPA with a dense additive mask in q's type, made beforehand.

    Additive because torch turns a boolean one into this in every call; rows aligned so that its
    kernels need no copy of their own. The baseline at its best, but for the memory.
    """
    case, length = inputs.case, inputs.case.shape.layout.length
    aligned = -(-length // _MASK_ALIGNMENT) * _MASK_ALIGNMENT

    def prepare() -> Prepared:
        mask = torch.empty(length, aligned, dtype=case.dtype, device=case.device)[:, :length]
        for start in range(0, length, 1024):
            rows = slice(start, min(start + 1024, length))
            mask[rows] = inputs.plan.to_dense_mask(case.device, case.dtype, rows)

        def call() -> Tensor:
            return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=mask)

        return Prepared(call, (mask,))

    needs = length * aligned * inputs.q.element_size() + 2 * inputs.size
    return Candidate(shown, prepare, case.dense_flops, needs=needs)


def _flex(shown: str, inputs: Inputs) -> Candidate:
    """FlexAttention, compiled in its first call, with the plan's BlockMask and score_mod."""
    case, plan, block = inputs.case, inputs.plan, 128
    reason = ""
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        reason = "this torch has no FlexAttention"

    def prepare() -> Prepared:
        from torch.nn.attention.flex_attention import flex_attention

        # One compilation a case: an earlier case's would count against the limit of variants.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        mask, bias = plan.to_block_mask(block_size=block), plan.score_mod()
        blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        width = case.shape.heads * case.shape.head_dim
        held = tuple(x for x in mask.as_tuple() if isinstance(x, Tensor))

        def call() -> Tensor:
            return compiled(inputs.q, inputs.k, inputs.v, block_mask=mask, score_mod=bias)

        return Prepared(call, held, 4 * case.batch * blocks * block**2 * width)

    return Candidate(shown, prepare, reason=reason, needs=4 * inputs.size)


def _flash(shown: str, inputs: Inputs) -> Candidate:
    """The flash-attn package over everything: version 3 if there is one, else 2."""
    module = _flash_attention()
    reason = "" if module else "flash-attn is not installed (pip install flash-attn)"
    if module and inputs.case.device.type != "cuda":
        reason = "flash-attn needs a CUDA device"
    elif module and inputs.case.dtype not in (torch.float16, torch.bfloat16):
        reason = f"flash-attn takes float16 and bfloat16, not {inputs.case.dtype}"

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function: Any = importlib.import_module(module).flash_attn_func
        out = function(*(x.transpose(1, 2) for x in (q, k, v)))
        # Some releases of version 3 also return the log-sum-exp.
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return _joined(shown, inputs, attention=attention, reason=reason)


def _flash_attention() -> str | None:
    for module in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(module) is not None:
            return module
    return None
