"""One attention kernel for packed segments: each tile of queries walks its own runs of keys.

Online softmax (Milakov and Gimelshein, arXiv:1805.02867) tiled as in FlashAttention-2 (Dao,
arXiv:2307.08691). Visibility, biases and frame windows are all runs of keys in an int32 table, so
the kernel never sees an N x N mask, and lengths are never specialised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: rows of queries and keys a tile, warps, and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By head size, for two-byte types: float32 would need registers that are not there. Chosen by
# offline compilation (no spills and at most 99 KB of shared memory on sm_80 to sm_120), never by a
# search in a user's first step.
CONFIGS = {
    32: Config(128, 64, 4, 3),
    64: Config(128, 64, 4, 3),
    128: Config(128, 64, 8, 2),
}
# Hopper's matrix instructions span two warp groups; with one, newer compilers spill.
CONFIGS_HOPPER = {**CONFIGS, 64: Config(128, 64, 8, 3)}
# The interpreter pays by iteration, not by element.
CONFIG_INTERPRETED = Config(128, 128, 4, 1)


def config_for(head_dim: int, capability: tuple[int, int] | None) -> Config:
    """The fixed configuration for a head size; without a GPU, the interpreter's."""
    if capability is None:
        return CONFIG_INTERPRETED
    return (CONFIGS_HOPPER if capability[0] == 9 else CONFIGS)[head_dim]


@triton.jit
def _visit(
    q,
    k,
    v,
    peak,
    total,
    acc,
    start,
    stop,
    bias,
    scale,
    stride_k,
    stride_v,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Fold keys ``start`` .. ``start + BLOCK_N`` (cut at ``stop`` if TAIL) into the softmax."""
    keys = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD)
    k_at = k + keys[None, :].to(tl.int64) * stride_k + dims[:, None]
    v_at = v + keys[:, None].to(tl.int64) * stride_v + dims[None, :]
    if TAIL:
        k_part = tl.load(k_at, mask=keys[None, :] < stop, other=0.0)
        v_part = tl.load(v_at, mask=keys[:, None] < stop, other=0.0)
    else:
        k_part = tl.load(k_at)
        v_part = tl.load(v_at)
    if UPCAST:
        k_part = k_part.to(tl.float32)
    scores = tl.dot(q, k_part, input_precision="ieee") * scale + bias
    if TAIL:
        # Finite, so that the difference of two hidden scores is no NaN.
        scores = tl.where(keys[None, :] < stop, scores, -1e30)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, 1)
    weights = weights.to(v_part.dtype)
    if UPCAST:
        weights = weights.to(tl.float32)
        v_part = v_part.to(tl.float32)
    acc = tl.dot(weights, v_part, acc * fade[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit(do_not_specialize=["heads", "rows"])
def segment_attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    tiles,
    runs,
    biases,
    scale,
    heads,
    rows,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out = softmax(q k^T scale + bias) v over the runs of a tile, and its log-sum-exp.

    Grid (tiles, batch * heads). ``scale`` already holds log2(e), because exponents are taken to
    base 2. Sums are kept in float32.
    """
    tile = tiles + 4 * tl.program_id(0)
    first = tl.load(tile)
    last = tl.load(tile + 1)
    first_run = tl.load(tile + 2)
    last_run = tl.load(tile + 3)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)

    row = first + tl.arange(0, BLOCK_M)
    live = row < last
    dims = tl.arange(0, HEAD)
    q_at = q + batch * stride_qb + head * stride_qh
    q_part = tl.load(
        q_at + row[:, None].to(tl.int64) * stride_qn + dims[None, :], mask=live[:, None], other=0.0
    )
    if UPCAST:
        q_part = q_part.to(tl.float32)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh

    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    for run in range(first_run, last_run):
        start = tl.load(runs + 2 * run)
        stop = tl.load(runs + 2 * run + 1)
        bias = tl.load(biases + run) * 1.4426950408889634
        whole = start + (stop - start) // BLOCK_N * BLOCK_N
        for at in range(start, whole, BLOCK_N):
            peak, total, acc = _visit(
                q_part, k, v, peak, total, acc, at, stop, bias, scale,
                stride_kn, stride_vn, HEAD, BLOCK_N, False, UPCAST,
            )  # fmt: skip
        if whole < stop:
            peak, total, acc = _visit(
                q_part, k, v, peak, total, acc, whole, stop, bias, scale,
                stride_kn, stride_vn, HEAD, BLOCK_N, True, UPCAST,
            )  # fmt: skip

    # A tile without runs has total 0: output 0 and log-sum-exp -inf.
    seen = total > 0.0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    out_at = out + batch * stride_ob + head * stride_oh
    tl.store(
        out_at + row[:, None].to(tl.int64) * stride_on + dims[None, :],
        acc.to(out.dtype.element_ty),
        mask=live[:, None],
    )
    natural = (peak + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453
    lse_at = lse + tl.program_id(1).to(tl.int64) * rows
    tl.store(lse_at + row, tl.where(seen, natural, float("-inf")), mask=live)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> tuple:
    """The kernel's run-time arguments in order."""
    return (
        *(q, k, v, out, lse),
        *table,
        scale * LOG2E,
        q.shape[1],
        q.shape[2],
        *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
    )


def constants(config: Config, head_dim: int, upcast: bool) -> dict:
    """The kernel's compile-time arguments."""
    return {
        "HEAD": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "UPCAST": upcast,
        "num_warps": config.warps,
        "num_stages": config.stages,
        # What Triton does anyway so far; newer versions want it said.
        "enable_fp_fusion": True,
    }
