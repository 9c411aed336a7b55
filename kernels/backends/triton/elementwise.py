"""Triton kernels for the neighbours of attention: q/k LayerNorm, AdaLN and gates by segment.

All three are bound by memory: each reads and writes its tokens once and computes in float32.
Which row of parameters a token takes is read from a table on the device: a kernel is compiled for
a width, never for a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program holds at a time: 16 or 32 a thread.
BLOCK = 4096
# Tokens a program walks with one row of parameters: loading them adds an eighth to the reads.
TILE = 16
# Said, because Triton 3.9 warns where it is not and 3.10 leaves it off.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _standardize(x, live, size, eps):
    """(x - mean) / sqrt(variance + eps) of each row of ``size`` elements; 0 where not live."""
    mean = tl.sum(x, 1) / size
    centred = tl.where(live, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / size
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def _norm_heads(
    x,
    out,
    weight,
    bias,
    eps,
    program,
    heads,
    tokens,
    stride_b,
    stride_h,
    stride_n,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """LayerNorm of ROWS tokens of one head, into contiguous [B, H, N, D]."""
    # Heads run fastest: their parts of a token lie side by side in a projection's output.
    head = program % heads
    rest = program // heads
    blocks = tl.cdiv(tokens, ROWS)
    batch = rest // blocks
    token = (rest % blocks) * ROWS + tl.arange(0, ROWS)
    live = (token < tokens)[:, None]
    dims = tl.arange(0, HEAD)
    row = token.to(tl.int64)[:, None]
    at = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    values = tl.load(at + row * stride_n + dims[None, :], mask=live, other=0.0).to(tl.float32)
    values = _standardize(values, live, HEAD, eps)
    if weight is not None:
        values *= tl.load(weight + dims).to(tl.float32)[None, :]
    if bias is not None:
        values += tl.load(bias + dims).to(tl.float32)[None, :]
    to = out + (batch.to(tl.int64) * heads + head) * tokens * HEAD
    tl.store(to + row * HEAD + dims[None, :], values.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["heads", "tokens_q", "tokens_k", "programs_q"])
def qk_layer_norm_kernel(
    q,
    k,
    out_q,
    out_k,
    weight_q,
    bias_q,
    weight_k,
    bias_k,
    eps,
    heads,
    tokens_q,
    tokens_k,
    programs_q,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """LayerNorm of q and k over the head size; the first ``programs_q`` programs take q."""
    program = tl.program_id(0)
    if program < programs_q:
        _norm_heads(
            q, out_q, weight_q, bias_q, eps, program, heads, tokens_q,
            stride_qb, stride_qh, stride_qn, HEAD, ROWS,
        )  # fmt: skip
    else:
        _norm_heads(
            k, out_k, weight_k, bias_k, eps, program - programs_q, heads, tokens_k,
            stride_kb, stride_kh, stride_kn, HEAD, ROWS,
        )  # fmt: skip


@triton.jit
def adaln_modulate_kernel(
    x,
    out,
    weight,
    bias,
    shift,
    scale,
    tiles,
    eps,
    stride_xb,
    stride_xn,
    stride_ob,
    stride_on,
    stride_shift_b,
    stride_shift_r,
    stride_scale_b,
    stride_scale_r,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """LayerNorm(x) * (1 + scale_row) + shift_row for one tile of tokens of one sample.

    Grid (tiles, batch). LayerNorm's affine part is folded into the row: one multiply-add a value.
    """
    tile = tiles + 3 * tl.program_id(0)
    first = tl.load(tile)
    last = tl.load(tile + 1)
    index = tl.load(tile + 2).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PADDED)
    inside = dims < CHANNELS

    at = shift + batch * stride_shift_b + index * stride_shift_r
    offset = tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)
    at = scale + batch * stride_scale_b + index * stride_scale_r
    factor = 1.0 + tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset += tl.load(bias + dims, mask=inside, other=0.0).to(tl.float32) * factor
    if weight is not None:
        factor *= tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)

    x += batch * stride_xb
    out += batch * stride_ob
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        live = (token < last)[:, None] & inside[None, :]
        row = token.to(tl.int64)[:, None]
        values = tl.load(x + row * stride_xn + dims[None, :], mask=live, other=0.0)
        values = _standardize(values.to(tl.float32), live, CHANNELS, eps)
        values = values * factor[None, :] + offset[None, :]
        to = out + row * stride_on + dims[None, :]
        tl.store(to, values.to(out.dtype.element_ty), mask=live)


@triton.jit
def gated_residual_kernel(
    x,
    y,
    out,
    gate,
    tiles,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_ob,
    stride_on,
    stride_gb,
    stride_gr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """x + gate_row * y for one tile of tokens of one sample; ``out`` may be ``y``."""
    tile = tiles + 3 * tl.program_id(0)
    first = tl.load(tile)
    last = tl.load(tile + 1)
    index = tl.load(tile + 2).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, PADDED)
    inside = dims < CHANNELS
    at = gate + batch * stride_gb + index * stride_gr
    factor = tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)

    x += batch * stride_xb
    y += batch * stride_yb
    out += batch * stride_ob
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        live = (token < last)[:, None] & inside[None, :]
        row = token.to(tl.int64)[:, None]
        kept = tl.load(x + row * stride_xn + dims[None, :], mask=live, other=0.0)
        added = tl.load(y + row * stride_yn + dims[None, :], mask=live, other=0.0)
        values = kept.to(tl.float32) + factor[None, :] * added.to(tl.float32)
        to = out + row * stride_on + dims[None, :]
        tl.store(to, values.to(out.dtype.element_ty), mask=live)


def token_block(channels: int) -> dict:
    """Compile-time arguments and options of the kernels that walk tokens of ``channels`` values."""
    padded = triton.next_power_of_2(channels)
    return {
        "CHANNELS": channels,
        "PADDED": padded,
        "ROWS": min(TILE, max(1, BLOCK // padded)),
        "num_warps": 4 if padded <= BLOCK // 2 else 8,
        **OPTIONS,
    }


def head_block(head_dim: int) -> dict:
    """Compile-time arguments and options of the q/k LayerNorm."""
    return {"HEAD": head_dim, "ROWS": BLOCK // head_dim, "num_warps": 4, **OPTIONS}


def launch_qk_layer_norm(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of q [B, H, N, D] and k [B, H, M, D] over D: contiguous copies."""
    q, k = _last_contiguous(q), _last_contiguous(k)
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    block = head_block(q.shape[-1])
    counts = [x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], block["ROWS"]) for x in (q, k)]
    if sum(counts):
        with _device_of(q):
            qk_layer_norm_kernel[(sum(counts),)](
                *(q, k, out_q, out_k, weight_q, bias_q, weight_k, bias_k, eps),
                *(q.shape[1], q.shape[2], k.shape[2], counts[0]),
                *(*_strides(q), *_strides(k)),
                **block,
            )
    return out_q, out_k


def launch_adaln_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    runs: Sequence[int],
    eps: float,
) -> Tensor:
    """LayerNorm(x) * (1 + scale_row) + shift_row: a contiguous [B, N, C]."""
    x, shift, scale = (_last_contiguous(t) for t in (x, shift, scale))
    out = x.new_empty(x.shape)
    tiles = token_tiles(tuple(runs), x.device)
    if x.numel():
        with _device_of(x):
            adaln_modulate_kernel[(len(tiles), x.shape[0])](
                *(x, out, weight, bias, shift, scale, tiles, eps),
                *(stride for t in (x, out, shift, scale) for stride in _strides(t)),
                **token_block(x.shape[-1]),
            )
    return out


def launch_gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, runs: Sequence[int], out: Tensor
) -> None:
    """Write x + gate_row * y into ``out`` [B, N, C], which may be ``y``."""
    x, y, gate = (_last_contiguous(t) for t in (x, y, gate))
    tiles = token_tiles(tuple(runs), x.device)
    if x.numel():
        with _device_of(x):
            gated_residual_kernel[(len(tiles), x.shape[0])](
                *(x, y, out, gate, tiles),
                *(stride for t in (x, y, out, gate) for stride in _strides(t)),
                **token_block(x.shape[-1]),
            )


@lru_cache(maxsize=64)
def token_tiles(runs: tuple[int, ...], device: torch.device) -> Tensor:
    """[T, 3] int32 on ``device``: first token, end and row of tiles of at most TILE tokens.

    Args:
        runs: start, stop, row, start, stop, row and so on.
    """
    tiles = [
        (first, min(first + TILE, stop), row)
        for start, stop, row in zip(runs[::3], runs[1::3], runs[2::3], strict=True)
        for first in range(start, stop, TILE)
    ]
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3).to(device)


def _strides(x: Tensor) -> tuple[int, ...]:
    """All strides but the last; 0 where there is one element, whatever torch noted there."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device if x.is_cuda else -1)
