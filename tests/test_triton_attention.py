"""The Triton attention kernel: what it computes (interpreted), and what it becomes for a GPU."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from attention_cases import layerflow_rgba, make_plan
from triton_interpreter import run_interpreted
from triton_offline import CAPABILITIES, compile_kernel

from layerloom.kernels import SegmentMask, blended_sees_all, list_backends
from layerloom.kernels.backends import Request
from layerloom.kernels.policy import preference

SHARED_BYTES = 99 * 1024  # what a block may have on sm_86, 89 and 120
POINTERS = {"q", "k", "v", "out"}
STRIDES = [f"stride_{x}{axis}" for x in "qkvo" for axis in "bhn"]
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def test_it_agrees_with_the_dense_oracle():
    run_interpreted("test_attention.py")


def compiled(head_dim: int, dtype: torch.dtype, capability: int):
    pytest.importorskip("triton", reason="needs Triton")
    from layerloom.kernels.backends.triton.attention import (
        config_for,
        constants,
        segment_attention_kernel,
    )

    config = config_for(head_dim, divmod(capability, 10))
    values = constants(config, head_dim, upcast=False)
    warps, stages = values.pop("num_warps"), values.pop("num_stages")
    assert values.pop("enable_fp_fusion")
    signature = {name: f"*{TYPES[dtype]}" for name in POINTERS}
    signature |= {"lse": "*fp32", "tiles": "*i32", "runs": "*i32", "biases": "*fp32"}
    signature |= {"scale": "fp32", "heads": "i32", "rows": "i32"} | dict.fromkeys(STRIDES, "i32")
    divisible = [*POINTERS, "lse", "tiles", "runs", "biases", *STRIDES]
    return compile_kernel(
        segment_attention_kernel, signature, values, capability, warps, stages, divisible
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_it_compiles_for_every_gpu_without_spilling(head_dim, capability):
    kernel = compiled(head_dim, torch.bfloat16, capability)
    assert kernel.spills == 0 and kernel.shared_bytes <= SHARED_BYTES
    assert kernel.has_tensor_cores
    assert ("HGMMA" if capability == 90 else "HMMA") in kernel.sass
    # Keys and values arrive while the last ones are multiplied.
    assert "LDGSTS" in kernel.sass or "UTMALDG" in kernel.sass


def test_half_precision_compiles_like_bfloat16():
    kernel = compiled(64, torch.float16, 80)
    assert kernel.spills == 0 and kernel.shared_bytes <= SHARED_BYTES and kernel.has_tensor_cores


def request(dtype=torch.bfloat16, device="cuda", gradients=False) -> Request:
    return Request(torch.device(device), dtype, 64, gradients)


def test_the_policy_takes_the_kernel_where_it_saves_calls():
    layout = layerflow_rgba(grid=(4, 30, 45), text=226)
    visibility = blended_sees_all(layout).visibility
    size = len(layout.segments)
    bias = [[0.5 * (i == j) for j in range(size)] for i in range(size)]
    plans = {
        "full": make_plan(layout, None),
        "few large pieces": make_plan(layout, SegmentMask(visibility)),
        "bias": make_plan(layout, SegmentMask(visibility, bias)),
        "window": make_plan(layout, SegmentMask(visibility, frame_window=1)),
    }
    first = {name: preference(plan, request()).order[0] for name, plan in plans.items()}
    assert first == {
        "full": "dispatch",
        "few large pieces": "dispatch",
        "bias": "triton",
        "window": "triton",
    }
    for other in (request(torch.float32), request(device="cpu"), request(gradients=True)):
        assert preference(plans["bias"], other).order[0] == "dispatch"
    assert "merge" in preference(plans["bias"], request()).reason


def test_without_a_gpu_the_backend_says_why_it_is_out():
    info = {info.name: info for info in list_backends()}["triton"]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not info.available
    assert info.reason in ("there is no CUDA device", "Triton is not installed")


def test_a_variant_compiles_beside_the_work_and_a_failure_is_told_once(caplog):
    from layerloom.kernels.backends.triton.compile import failure, ready, wait

    started, go = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert go.wait(60)

    assert not ready("slow variant", slow)
    assert started.wait(60) and not ready("slow variant", slow)  # nobody waits for it
    go.set()
    for thread in threading.enumerate():
        if thread.name == "layerloom-compile":
            thread.join(60)
    assert ready("slow variant", slow)

    def broken() -> None:
        raise RuntimeError("no assembler\nmore lines")

    with caplog.at_level(logging.WARNING, logger="layerloom.kernels"):
        assert not ready("broken variant", broken)
        for thread in threading.enumerate():
            if thread.name == "layerloom-compile":
                thread.join(60)
        assert not ready("broken variant", broken)
    assert failure("broken variant") == "RuntimeError: no assembler"
    assert len(caplog.records) == 1 and "goes on without it" in caplog.text
    with pytest.raises(RuntimeError, match="no assembler"):
        wait("broken variant", broken)
