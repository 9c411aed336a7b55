"""Whether the element-wise kernels can take a call now: each function gives None where they cannot.

A kernel is compiled for a device, types and a width, beside the running work; until it is ready,
and for whatever it does not take, the caller goes on in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from . import BACKEND
from .compile import ready

HEAD_DIMS = (32, 64, 128)
MAX_CHANNELS = 8192
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def qk_norm(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """LayerNorm of q and k in one launch, contiguous [B, H, N, D]."""
    parameters = (weight_q, bias_q, weight_k, bias_k)
    size = q.shape[-1]
    if (
        not _runs_on(q.device)
        or size not in HEAD_DIMS
        or q.ndim != 4
        or k.ndim != 4
        or q.shape[:2] != k.shape[:2]
        or k.shape[-1] != size
        or q.dtype != k.dtype
        or any(p is not None and p.shape != (size,) for p in parameters)
        or not _plain(q, k, *parameters)
    ):
        return None
    device, dtype, types = q.device, q.dtype, _types(parameters)

    def example() -> None:
        from .elementwise_operators import qk_layer_norm

        heads = torch.zeros(1, 1, 1, size, device=device, dtype=dtype)
        qk_layer_norm(heads, heads.clone(), *_examples(types, (size,), device), 1e-6)

    if not _ready(("qk_norm", device, dtype, size, types), device, example):
        return None
    from .elementwise_operators import qk_layer_norm

    return qk_layer_norm(q, k, *parameters, eps)


def adaln_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    runs: Sequence[tuple[int, int, int]],
    eps: float,
) -> Tensor | None:
    """LayerNorm(x) * (1 + scale_row) + shift_row in one pass over x [B, N, C]."""
    size = x.shape[-1]
    if (
        not _runs_on(x.device)
        or size > MAX_CHANNELS
        or not _rows_fit(x, shift, runs)
        or not _rows_fit(x, scale, runs)
        or any(p is not None and p.shape != (size,) for p in (weight, bias))
        or not _plain(x, weight, bias, shift, scale)
    ):
        return None
    device, dtype = x.device, x.dtype
    types, row_types = _types((weight, bias)), _types((shift, scale))

    def example() -> None:
        from .elementwise_operators import adaln_modulate

        tokens = torch.zeros(1, 1, size, device=device, dtype=dtype)
        parameters = _examples(types, (size,), device)
        rows = _examples(row_types, (1, 1, size), device)
        adaln_modulate(tokens, *parameters, *rows, [0, 1, 0], 1e-5)

    if not _ready(("adaln", device, dtype, size, types, row_types), device, example):
        return None
    from .elementwise_operators import adaln_modulate

    return adaln_modulate(x, weight, bias, shift, scale, _flat(runs), eps)


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, runs: Sequence[tuple[int, int, int]]
) -> Tensor | None:
    """x + gate_row * y, written into y [B, N, C]."""
    size = x.shape[-1]
    if (
        not _runs_on(x.device)
        or size > MAX_CHANNELS
        or x.shape != y.shape
        or x.dtype != y.dtype
        or not y.is_contiguous()
        or not _rows_fit(x, gate, runs)
        or not _plain(x, y, gate)
    ):
        return None
    device, dtype, gate_dtype = x.device, x.dtype, gate.dtype

    def example() -> None:
        from .elementwise_operators import gated_residual_

        tokens = torch.zeros(1, 1, size, device=device, dtype=dtype)
        gated_residual_(tokens, tokens.clone(), tokens.to(gate_dtype), [0, 1, 0])

    if not _ready(("gate", device, dtype, size, gate_dtype), device, example):
        return None
    from .elementwise_operators import gated_residual_

    gated_residual_(x, y, gate, _flat(runs))
    return y


def _ready(key: tuple, device: torch.device, example: Callable[[], None]) -> bool:
    def compile() -> None:
        # Not only compiled but launched once, on a stream of its own: Triton builds a launcher
        # and loads the code with the first launch, and both can fail or take a second.
        if device.type != "cuda":
            example()
            return
        stream = torch.cuda.Stream(device)
        with torch.no_grad(), torch.cuda.stream(stream):
            example()
        stream.synchronize()

    return ready(key, compile)


@cache
def _runs_on(device: torch.device) -> bool:
    limits = BACKEND.constraints
    if BACKEND.probe() is not None or device.type not in limits.devices:
        return False
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= limits.min_capability


def _plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all is memory of `x`'s device, of the kind that a kernel's one variant reads.

    Triton compiles anew for pointers and strides that are no multiples of 16, and for strides
    beyond 32 bits. Automatic casts would change the types that plain torch returns.
    """
    return not torch.is_autocast_enabled(x.device.type) and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device == x.device
        and tensor.dtype in DTYPES
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride % 16 == 0 and stride < 2**31)
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
        for tensor in (x, *others)
        if tensor is not None
    )


def _rows_fit(x: Tensor, rows: Tensor, runs: Sequence[tuple[int, int, int]]) -> bool:
    return (
        x.ndim == 3
        and rows.ndim == 3
        and rows.shape[0] in (1, x.shape[0])
        and rows.shape[2] == x.shape[2]
        and all(0 <= row < rows.shape[1] for _, _, row in runs)
    )


def _flat(runs: Sequence[tuple[int, int, int]]) -> list[int]:
    return list(chain.from_iterable(runs))


def _types(tensors: Sequence[Tensor | None]) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _examples(
    types: Sequence[torch.dtype | None], shape: tuple[int, ...], device: torch.device
) -> list[Tensor | None]:
    return [None if t is None else torch.zeros(shape, device=device, dtype=t) for t in types]
