"""Choose the attention backend: the first that can take a call, or the one a user named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .backends import Backend, Constraints, Request, dispatch, reference

_BACKENDS: tuple[Backend, ...] = (dispatch.BACKEND, reference.BACKEND)
_chosen: ContextVar[str | None] = ContextVar("layerloom_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """No backend can take a call; the message lists every backend's reason."""


@dataclass(frozen=True)
class BackendInfo:
    """A backend as shown to people: `reason` says why it is out, empty if it is not."""

    name: str
    available: bool
    reason: str
    constraints: Constraints


def list_backends() -> list[BackendInfo]:
    """Every backend in order of preference."""
    return [
        BackendInfo(backend.name, reason is None, reason or "", backend.constraints)
        for backend in _BACKENDS
        for reason in (backend.probe(),)
    ]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use only the backend called `name` inside the block; None goes back to the choice.

    Holds for the current thread or task. A function under torch.compile does not see it: there
    the first backend that fits is traced.

    Raises:
        ValueError: there is no such backend.
    """
    names = [backend.name for backend in _BACKENDS]
    if name is not None and name not in names:
        raise ValueError(f"no backend {name!r}; there are {', '.join(names)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def select_backend(request: Request) -> Backend:
    """The first backend, of those a user allows, that can take `request`.

    Raises:
        BackendUnavailableError: none can.
    """
    # A compiler cannot trace a context variable.
    chosen = None if torch.compiler.is_compiling() else _chosen.get()
    reasons = []
    for backend in _BACKENDS:
        if chosen is not None and backend.name != chosen:
            reasons.append(f"{backend.name}: not asked for, use_backend names {chosen}")
            continue
        reason = backend.probe() or backend.constraints.refusal(request)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise BackendUnavailableError("no attention backend fits: " + "; ".join(reasons))
