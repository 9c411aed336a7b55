"""Compile kernels beside the running work: nobody waits for a compiler in their first step."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable

log = logging.getLogger("layerloom.kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels in Python, without a GPU; it reads the variable at import too."""

_lock = threading.Lock()
# What became of a variant: None while it compiles, True, or the reason it failed.
_states: dict[Hashable, bool | str | None] = {}


def ready(key: Hashable, compile: Callable[[], None]) -> bool:
    """Whether the kernel variant ``key`` is compiled.

    The first question starts ``compile`` in a daemon thread and is answered with False; a
    failure is logged once and the answer stays False.
    """
    if INTERPRETED:
        return True
    with _lock:
        if key in _states:
            return _states[key] is True
        _states[key] = None
    threading.Thread(
        target=_run, args=(key, compile), name="layerloom-compile", daemon=True
    ).start()
    return False


def wait(key: Hashable, compile: Callable[[], None]) -> None:
    """Compile the variant now, for a caller who asked for this backend by name.

    Raises:
        RuntimeError: it does not compile, or did not when it was tried before.
    """
    if INTERPRETED:
        return
    with _lock:
        known = _states.get(key)
    if known is None:
        _run(key, compile)
    if _states[key] is not True:
        raise RuntimeError(f"the Triton kernel does not compile here: {_states[key]}")


def failure(key: Hashable) -> str | None:
    """Why a variant failed to compile, or None."""
    state = _states.get(key)
    return state if isinstance(state, str) else None


def _run(key: Hashable, compile: Callable[[], None]) -> None:
    try:
        compile()
        _states[key] = True
    except Exception as error:
        # Whatever a compiler, an assembler or a driver raises: other backends do the work.
        _states[key] = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning(
            "A Triton kernel does not compile here (%s); LayerLoom goes on without it.",
            _states[key],
        )
