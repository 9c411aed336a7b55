"""Choose the attention backend: what the policy prefers, or the one a user named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .backends import Backend, Constraints, Request, dispatch, quantized, reference, triton
from .plan import AttentionPlan
from .policy import preference

log = logging.getLogger("layerloom.kernels")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_BACKENDS: tuple[Backend, ...] = (
    dispatch.BACKEND,
    triton.BACKEND,
    reference.BACKEND,
    quantized.SAGE,
    quantized.COMFY_KITCHEN,
)
# Backends that failed at work in this process, and why.
_broken: dict[str, str] = {}
_chosen: ContextVar[str | None] = ContextVar("layerloom_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """No backend can take a call; the message lists every backend's reason."""


@dataclass(frozen=True)
class BackendInfo:
    """A backend as shown to people: `reason` says why it is out, empty if it is not.

    An `approximate` one runs only where it is named.
    """

    name: str
    available: bool
    reason: str
    constraints: Constraints
    approximate: bool = False


def list_backends() -> list[BackendInfo]:
    """Every backend; `policy.preference` orders the exact ones for a plan."""
    return [
        BackendInfo(
            backend.name,
            reason is None,
            reason or "",
            backend.constraints,
            backend.approximate,
        )
        for backend in _BACKENDS
        for reason in (_broken.get(backend.name) or backend.probe(),)
    ]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use only the backend called `name` inside the block; None goes back to the choice.

    Holds for the current thread or task. A function under torch.compile does not see it: there
    the policy's first backend that fits is traced.

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


def named_backend() -> str | None:
    """The backend that `use_backend` insists on here; None under a compiler, which sees none."""
    return None if torch.compiler.is_compiling() else _chosen.get()


def select_backend(request: Request, plan: AttentionPlan, tensors: Tensors) -> Backend:
    """The backend for a call: the one a user named, else the first that the policy likes.

    A named backend is given the time to get ready (a kernel to compile); one that the policy
    likes is passed over until it is.

    Raises:
        BackendUnavailableError: none can take the call.
    """
    chosen = named_backend()
    backends = {backend.name: backend for backend in _BACKENDS}
    liked = (chosen,) if chosen else preference(plan, request).order
    exact = () if chosen else (b.name for b in _BACKENDS if not b.approximate)
    order = dict.fromkeys(name for name in (*liked, *exact) if name in backends)
    reasons = [f"{name}: not asked for" for name in backends if name not in order]
    for name in order:
        backend = backends[name]
        reason = _refusal(backend, request)
        if reason is None and backend.prepare is not None:
            try:
                reason = backend.prepare(*tensors, plan, must=chosen is not None)
            except RuntimeError as error:
                reason = str(error)
        if reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailableError("no attention backend fits: " + "; ".join(reasons))


def give_up(backend: Backend, error: Exception) -> bool:
    """Take a backend that failed at work out of the choice; False if a user insists on it."""
    if _chosen.get() == backend.name:
        return False
    _broken[backend.name] = f"failed with {type(error).__name__}: {error}".splitlines()[0]
    log.warning(
        "The attention backend %s %s; LayerLoom goes on without it.",
        backend.name,
        _broken[backend.name],
    )
    return True


def _refusal(backend: Backend, request: Request) -> str | None:
    if backend.name in _broken:
        return _broken[backend.name]
    return backend.probe() or backend.constraints.refusal(request)
