"""The element-wise Triton kernels: interpreted on CPU, and compiled for GPUs that are not there."""

from __future__ import annotations

import threading

import pytest
import torch
from triton_interpreter import run_interpreted
from triton_offline import CAPABILITIES, Compiled, compile_kernel

from layerloom.kernels import adaln_modulate, gated_residual, qk_norm
from layerloom.kernels.backends.triton import fused


def test_kernels_in_the_interpreter():
    run_interpreted("test_elementwise.py")


def test_a_kernel_that_fails_is_logged_once_and_plain_torch_goes_on(monkeypatch, caplog):
    pytest.importorskip("triton")
    # Memory of a CPU is what Triton refuses for certain.
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    x, gate, runs = torch.randn(2, 5, 48), torch.randn(2, 1, 48), ((0, 5, 0),)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(gated_residual(x, x.clone(), gate, runs), x + gate * x)
            for thread in threading.enumerate():
                if thread.name == "layerloom-compile":
                    thread.join(120)
    assert len([record for record in caplog.records if "Triton" in record.message]) == 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "dtype, head_dim", [("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp32", 128)]
)
def test_qk_layer_norm_compiles(dtype, head_dim, capability):
    pytest.importorskip("triton")
    from layerloom.kernels.backends.triton import elementwise

    block = elementwise.head_block(head_dim)
    check(offline(elementwise.qk_layer_norm_kernel, dtype, block, capability))


class NoDevice:
    """As much of a GPU's driver as Triton asks before it compiles."""

    def get_current_device(self):
        return 99  # Triton remembers kernels by device: none of a real one's

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)


def test_what_is_compiled_beforehand_is_what_calls_take(monkeypatch):
    triton = pytest.importorskip("triton")
    variants = []

    def see(**call):
        """Note the variant; True keeps Triton from compiling and launching it."""
        variants.append((call["fn"].name, call["key"]))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", see)
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    monkeypatch.setattr(fused, "ready", lambda key, compile: compile() or True)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    for batch, heads, tokens in ((1, 1, 1), (1, 2, 16), (2, 3, 17), (16, 30, 48)):
        runs = ((0, 1, 1), (1, tokens, 0))
        q = torch.zeros(batch, tokens, heads * 64).unflatten(-1, (heads, 64)).transpose(1, 2)
        qk_norm(q, q[:, :, :1], *torch.zeros(4, 64), eps=1e-6)
        x = torch.zeros(batch, tokens, 1920)
        shift, scale, gate = torch.zeros(batch, 2, 3, 1920).unbind(2)
        adaln_modulate(x, None, shift[0, 0], shift, scale, runs)
        gated_residual(x, x.clone(), gate, runs)
    # Once before and once for the call; one variant for all shapes.
    assert len(variants) == 2 * 3 * 4
    assert len(set(variants)) == 3


def test_kernels_without_parameters_compile():
    pytest.importorskip("triton")
    from layerloom.kernels.backends.triton import elementwise

    absent = {"weight": None, "bias": None}
    block = {**elementwise.token_block(1920), **absent}
    check(offline(elementwise.adaln_modulate_kernel, "bf16", block, 80))
    absent = {"weight_q": None, "bias_q": None, "weight_k": None, "bias_k": None}
    block = {**elementwise.head_block(64), **absent}
    check(offline(elementwise.qk_layer_norm_kernel, "bf16", block, 80))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, channels", [("bf16", 1920), ("fp32", 1920), ("bf16", 8192)])
def test_kernels_over_tokens_compile(dtype, channels, capability):
    pytest.importorskip("triton")
    from layerloom.kernels.backends.triton import elementwise

    block = elementwise.token_block(channels)
    for kernel in (elementwise.adaln_modulate_kernel, elementwise.gated_residual_kernel):
        check(offline(kernel, dtype, block, capability))


def offline(kernel, dtype: str, block: dict, capability: int) -> Compiled:
    """Compile as a call on aligned tensors does."""
    constants = {name: value for name, value in block.items() if name in kernel.arg_names}
    types = {"eps": "fp32", "tiles": "*i32"}
    counts = {"heads", "tokens_q", "tokens_k", "programs_q"}
    signature = {
        name: "i32"
        if name.startswith("stride_") or name in counts
        else types.get(name, f"*{dtype}")
        for name in kernel.arg_names
        if name not in constants
    }
    aligned = signature.keys() - counts - {"eps"}
    return compile_kernel(
        kernel, signature, constants, capability, block["num_warps"], divisible=aligned
    )


def check(compiled: Compiled) -> None:
    assert compiled.spills == 0
    assert compiled.shared_bytes <= 99 * 1024
    # These kernels wait for memory: they need loads of 16 bytes and room for many threads.
    assert "ld.global.v4.b32" in compiled.ptx
    assert compiled.registers <= 128
