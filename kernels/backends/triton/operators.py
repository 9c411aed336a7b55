"""The attention kernel as an operator of torch: traceable, with gradients through plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import QUERY_CHUNK
from .attention import Config, arguments, config_for, constants, segment_attention_kernel
from .compile import INTERPRETED
from .namespace import NAMESPACE


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output and the log-sum-exp.

    Heads come last in memory, as SDPA returns them: joining the heads afterwards is a view.
    """
    batch, heads, rows, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, rows, dtype=torch.float32)


def config_on(device: torch.device, head_dim: int) -> Config:
    """The kernel's configuration on a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return config_for(head_dim, capability)


def launch_example(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Compile the kernel by launching it once on a few tokens, on a stream of its own.

    Triton builds a launcher and loads the code with the first launch; both take time, and either
    may fail.
    """
    stream = torch.cuda.Stream(device)
    with torch.no_grad(), torch.cuda.stream(stream):
        x = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype)
        tiles = torch.tensor([[0, 16, 0, 1]], dtype=torch.int32, device=device)
        runs = torch.tensor([[0, 16]], dtype=torch.int32, device=device)
        biases = torch.zeros(1, device=device)
        segment_attention(x, x.clone(), x.clone(), tiles, runs, biases, 1.0)
    stream.synchronize()


@torch.library.custom_op(f"{NAMESPACE}::segment_attention", mutates_args=())
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, runs: Tensor, biases: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, M, D] and its log-sum-exp [B, H, M] over the runs of a `RunTable`.

    q: [B, H, M, D]; k, v: [B, H, N, D].
    """
    q, k, v = (_aligned(x) for x in (q, k, v))
    config = config_on(q.device, q.shape[-1])
    out, lse = empty_results(q, v)
    grid = (len(tiles), q.shape[0] * q.shape[1])
    if 0 in grid:
        return out, lse
    # The interpreter multiplies bfloat16 bit patterns as if they were numbers.
    upcast = INTERPRETED and q.dtype == torch.bfloat16
    with torch.cuda.device(q.device if q.is_cuda else -1):
        segment_attention_kernel[grid](
            *arguments(q, k, v, out, lse, (tiles, runs, biases), scale),
            **constants(config, q.shape[-1], upcast),
        )
    return out, lse


@segment_attention.register_fake
def _(q, k, v, tiles, runs, biases, scale):
    return empty_results(q, v)


@torch.library.custom_op(f"{NAMESPACE}::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    runs: Tensor,
    biases: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in plain torch, stretch by stretch over its visible keys.

    With P = exp(S - lse), dP = dO V^T and D = sum(dO * O) - dlse: dS = P (dP - D), as in
    FlashAttention-2 (arXiv:2307.08691, section 3.1).
    """
    gradients = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    spans, values = runs.tolist(), biases.tolist()
    offset = (grad_out.float() * out.float()).sum(-1) - grad_lse
    for first, last, first_run, last_run in _stretches(tiles.tolist()):
        for start in range(first, last, QUERY_CHUNK):
            rows = slice(start, min(start + QUERY_CHUNK, last))
            queries, wanted = q[:, :, rows].float() * scale, grad_out[:, :, rows].float()
            for run in range(first_run, last_run):
                keys = slice(*spans[run])
                part_k, part_v = k[:, :, keys].float(), v[:, :, keys].float()
                scores = queries @ part_k.transpose(-1, -2) + values[run]
                weights = (scores - lse[:, :, rows, None]).exp()
                slope = weights * (wanted @ part_v.transpose(-1, -2) - offset[:, :, rows, None])
                gradients[0][:, :, rows] += slope @ part_k * scale
                gradients[1][:, :, keys] += slope.transpose(-1, -2) @ queries
                gradients[2][:, :, keys] += weights.transpose(-1, -2) @ wanted
    pairs = zip(gradients, (q, k, v), strict=True)
    return tuple(torch.empty_like(x).copy_(gradient) for gradient, x in pairs)


@segment_attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, tiles, runs, biases, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_out, grad_lse):
    gradients = segment_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None, None)


segment_attention.register_autograd(_backward, setup_context=_setup)


def _aligned(x: Tensor) -> Tensor:
    """x as the one compiled variant reads it: last stride 1, the rest and its start aligned."""
    strides = x.stride()
    if strides[-1] == 1 and x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in strides[:-1]):
        return x
    return x.contiguous()


def _stretches(tiles: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """(first row, end, first run, end of runs): the tiles of one stretch of rows joined."""
    joined = {(last, first_run, last_run): [] for _, last, first_run, last_run in tiles}
    for first, *rest in tiles:
        joined[tuple(rest)].append(first)
    return [(min(firsts), *rest) for rest, firsts in joined.items()]
