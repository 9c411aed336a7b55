"""Run the tests of `tests/interpreted/` with Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECONDS = 540


def run_interpreted(*names: str) -> None:
    """Run files of `tests/interpreted/` with TRITON_INTERPRET=1, and fail with their output.

    Triton reads the variable when a kernel is decorated, so it needs a fresh process. Skips
    where Triton is absent or its interpreter does not work with the installed numpy.

    Args:
        names: file names in `tests/interpreted/`, for instance ``"test_elementwise.py"``.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("Triton before 3.7 cannot interpret loops with numpy 2.4; update Triton")
    paths = [str(TESTS / "interpreted" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    try:
        done = subprocess.run(
            command,
            cwd=TESTS.parent,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        pytest.fail(f"{', '.join(names)} took more than {SECONDS} s:\n{output}", pytrace=False)
    if done.returncode:
        pytest.fail(f"{', '.join(names)} in the interpreter:\n{done.stdout}", pytrace=False)


def _version(package: str) -> tuple[int, int]:
    major, minor, *_ = metadata.version(package).split(".")
    return int(major), int(minor)
