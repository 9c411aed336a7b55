"""Compile Triton kernels for NVIDIA GPUs that are not there, and read what became of them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pytest

CAPABILITIES = (80, 86, 89, 90, 120)
# HMMA: Ampere, Ada and consumer Blackwell; HGMMA: Hopper; UTC*MMA: data-centre Blackwell.
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|OMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Compiled:
    """A kernel after ptxas.

    Args:
        registers: a thread.
        spills: bytes of local memory a thread (stack included); 0 when nothing spilled.
        shared_bytes: shared memory a block.
        ptx, sass: the code; `sass` is what the GPU runs.
        has_tensor_cores: whether `sass` holds a matrix instruction.
    """

    registers: int
    spills: int
    shared_bytes: int
    ptx: str
    sass: str
    has_tensor_cores: bool


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: Collection[str] = (),
) -> Compiled:
    """Compile a `triton.jit` function without a GPU or a driver; skips where Triton is absent.

    Args:
        fn: the decorated function, not decorated under TRITON_INTERPRET=1.
        signature: argument name to type, such as ``"*bf16"``, ``"i32"`` or ``"fp32"``.
        constants: values of the `tl.constexpr` arguments; an argument named here is left out of
            `signature`. A pointer that is None at run time is a constant None.
        capability: 10 times the compute capability: 80, 86, 89, 90, 120.
        divisible: arguments (pointers, strides) that are multiples of 16; without it loads are
            neither vectorised nor asynchronous.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(fn.arg_names)
    given = {*signature, *constants}
    if given != set(names) or set(signature) & set(constants):
        raise ValueError(f"the kernel takes {names}; got {sorted(signature)}, {sorted(constants)}")
    types = {name: signature.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn, types, values, attributes)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        # Fused multiply-adds: the default up to Triton 3.9, which warns if it is not said.
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    usage = _usage(kernel.asm["cubin"])
    sass = kernel.asm["sass"]
    return Compiled(
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        ptx=kernel.asm["ptx"],
        sass=sass,
        has_tensor_cores=TENSOR_CORE.search(sass) is not None,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on of the one kernel in a cubin."""
    from triton import knobs

    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with open(handle, "wb") as file:
            file.write(cubin)
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    finally:
        os.remove(path)
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
