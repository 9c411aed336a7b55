"""Loads the next step's batch while a step runs, without changing what any step gets."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class ReadAhead:
    """Calls ``compute(generator, *arguments)``, and does the next call early where it can guess.

    The guess: after a call with a fresh generator of seed s comes one with a fresh generator of
    seed s + 1 and the same arguments. A call that is none of that is computed as it comes; either
    way the result and the generator's state afterwards are those of ``compute``.
    """

    def __init__(self, compute: Callable[..., Any]):
        self._compute = compute
        self._pool = ThreadPoolExecutor(1, "layerloom-batch")
        self._guess: tuple[int, tuple, Future] | None = None

    def __call__(self, generator: torch.Generator, *arguments: Any) -> Any:
        seed = generator.initial_seed()
        if not torch.equal(generator.get_state(), _fresh(seed).get_state()):
            return self._compute(generator, *arguments)
        if self._guess is not None and self._guess[:2] == (seed, arguments):
            result, state = self._guess[2].result()
            generator.set_state(state)
        else:
            result = self._compute(generator, *arguments)
        later = self._pool.submit(self._ahead, seed + 1, arguments)
        self._guess = (seed + 1, arguments, later)
        return result

    def _ahead(self, seed: int, arguments: tuple) -> tuple[Any, torch.Tensor]:
        generator = _fresh(seed)
        return self._compute(generator, *arguments), generator.get_state()


def _fresh(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
