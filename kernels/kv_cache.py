"""Keep keys and values of segments that do not depend on noisy ones from one step to the next."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .plan import AttentionPlan

log = logging.getLogger("layerloom.kernels")


@dataclass
class _Row:
    """What is kept for one batch row: [2, H, N_static, D] a block, and what it was made of."""

    inputs: tuple[Tensor, ...]
    states: dict[Hashable, Tensor] = field(default_factory=dict)
    complete: set[Hashable] = field(default_factory=set)
    made: int = -1
    used: int = -1


class SegmentKVCache:
    """Keys and values of a plan's static segments, block by block and batch row by batch row.

    `begin` says before every pass over the blocks which plan they shall run: the full one, which
    computes all tokens and keeps the static ones' keys and values, or `without_static`, which
    computes the others alone. It is exact as long as a block makes the same states of the same
    inputs; where they also depend on the time step (AdaLN) it is an approximation, which
    `refresh_every` bounds. Inference only. One cache serves one network on one device.

    Rows are told apart by their inputs, not by their place: both branches of guidance may come in
    one batch or one after the other, and rows with the same inputs share what is kept.

    Args:
        max_bytes: most that it holds, the shared workspace included. Where a plan needs more,
            nothing is kept and everything is computed as without a cache.
        refresh_every: compute the static segments anew after so many steps; None is never.

    Raises:
        ValueError: a bound below 0 or a refresh below 1.
    """

    def __init__(self, max_bytes: int, refresh_every: int | None = None):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        if refresh_every is not None and refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1 or None, got {refresh_every}")
        self.max_bytes, self.refresh_every = max_bytes, refresh_every
        self._said: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self._plans: tuple[AttentionPlan, AttentionPlan] | None = None
        self._blocks = 0
        self._runs: tuple[tuple[tuple[int, int], ...], ...] = ((), ())
        self._rows: list[_Row] = []
        self._batch: list[_Row] = []
        self._workspace: Tensor | None = None
        self._step, self._time = -1, None
        self._declined = False

    @property
    def held_bytes(self) -> int:
        """Bytes of keys, values and workspace that are held now."""
        held = [state for row in self._rows for state in row.states.values()]
        held += [] if self._workspace is None else [self._workspace]
        return sum(x.numel() * x.element_size() for x in held)

    def begin(
        self, plan: AttentionPlan, blocks: int, inputs: Sequence[Tensor], time: Tensor | None = None
    ) -> AttentionPlan:
        """The plan that the coming pass over the blocks shall run.

        Args:
            plan: of all tokens.
            blocks: how many calls with keys of their own a pass makes.
            inputs: [B, ...] each: all that the static segments are made of.
            time: [B] the time step, one number; passes with the same one are one step. Without it
                every pass is a step.

        Returns:
            `plan`, or `plan.without_static()`: q, k and v then hold the rows of `take_queries`.
        """
        if self._plans is None or self._plans[0] != plan or self._blocks != blocks:
            self.reset()
            self._plans, self._blocks = (plan, plan.without_static()), blocks
            self._runs = (plan.static_runs, plan.dynamic_runs)
        now = None if time is None else float(time.flatten()[0])
        if now is None or now != self._time:
            self._step, self._time = self._step + 1, now
        if self._declined or not self._admit(inputs):
            return plan
        if all(self._is_fresh(row) for row in self._batch):
            return self._plans[1]
        for row in self._batch:
            # Also where a pass was interrupted half-way: it counts for nothing.
            row.complete.clear()
            row.made = self._step
        return plan

    def keys_values(
        self, k: Tensor, v: Tensor, plan: AttentionPlan, key: Hashable
    ) -> tuple[Tensor, Tensor]:
        """All tokens' keys and values for one call, [B, H, N, D] each.

        With a plan of all tokens these are `k` and `v`, and the static ones' are kept under `key`
        if `begin` said so. With a plan `without_static`, `k` and `v` are the others' and the rest
        is filled in, into memory that the next call reuses.

        Raises:
            ValueError: a plan that `begin` did not return, a key that was not kept, or another
                batch or element type than that of the pass.
        """
        if self._plans is None or plan not in self._plans:
            raise ValueError("the plan of this call is not the one that kv_cache.begin returned")
        if self._declined:
            return k, v
        if len(k) != len(self._batch) or len(v) != len(self._batch):
            raise ValueError(
                f"kv_cache.begin got a batch of {len(self._batch)}, this call has {len(k)}"
            )
        if (k.dtype, v.dtype) != (plan.dtype, plan.dtype):
            raise ValueError(f"the plan is for {plan.dtype}, the call has {k.dtype} and {v.dtype}")
        if plan.dropped:
            return self._assemble(k, v, key)
        self._keep(k, v, key)
        return k, v

    def _admit(self, inputs: Sequence[Tensor]) -> bool:
        """Find or make the batch's rows; False, and nothing kept any more, if they do not fit."""
        plan = self._plans[0]
        if not plan.static_segments:
            return self._decline(
                "no clean segment sees clean segments and text alone (the mask clean_sees_clean "
                "makes it so)"
            )
        batch = len(inputs[0])
        self._batch = []
        for index in range(batch):
            own = [x[index] for x in inputs]
            row = next((row for row in self._rows if _same(row.inputs, own)), None)
            if row is None:
                row = _Row(tuple(_copy(x) for x in own))
                self._rows.append(row)
            row.used = self._step
            self._batch.append(row)
        # Rows of the last step may be the other branch of guidance; older ones are of other runs.
        for oldest in (self._step - 1, self._step):
            self._rows = [row for row in self._rows if row.used >= oldest]
            needed = cache_bytes(plan, self._blocks, len(self._rows), batch)
            if needed <= self.max_bytes:
                return True
        tokens = sum(stop - start for start, stop in self._runs[0])
        return self._decline(
            f"keys and values of {tokens:,} given tokens in {self._blocks} blocks, "
            f"{len(self._rows)} times, take {_size(needed)} with their workspace of {batch}, more "
            f"than the {_size(self.max_bytes)} allowed"
        )

    def _decline(self, reason: str) -> bool:
        self._rows, self._batch, self._workspace, self._declined = [], [], None, True
        if reason not in self._said:
            self._said.add(reason)
            log.warning("Nothing is kept between steps: %s.", reason)
        return False

    def _is_fresh(self, row: _Row) -> bool:
        if len(row.complete) < self._blocks:
            return False
        return self.refresh_every is None or self._step - row.made < self.refresh_every

    def _keep(self, k: Tensor, v: Tensor, key: Hashable) -> None:
        tokens = sum(stop - start for start, stop in self._runs[0])
        for index, row in enumerate(self._batch):
            if key in row.complete:
                continue  # the same row, earlier in the batch
            if key not in row.states:
                if len(row.states) == self._blocks:
                    raise ValueError(
                        f"kv_cache.begin was told of {self._blocks} blocks; {key!r} is one more"
                    )
                row.states[key] = _empty((2, k.shape[1], tokens, k.shape[3]), k)
            for source, state in ((k, row.states[key][0]), (v, row.states[key][1])):
                position = 0
                for start, stop in self._runs[0]:
                    part = slice(position, position + stop - start)
                    state[:, part] = source[index, :, start:stop]
                    position = part.stop
            row.complete.add(key)

    def _assemble(self, k: Tensor, v: Tensor, key: Hashable) -> tuple[Tensor, Tensor]:
        if any(key not in row.complete for row in self._batch):
            raise ValueError(
                f"no keys and values are kept for {key!r}; call with the plan of all tokens first"
            )
        shape = (2, len(k), k.shape[1], self._plans[0].layout.length, k.shape[3])
        if self._workspace is None or self._workspace.shape != shape:
            self._workspace = None
            self._workspace = _empty(shape, k)
        space, (static, dynamic) = self._workspace, self._runs
        for index, row in enumerate(self._batch):
            position = 0
            for start, stop in static:
                part = slice(position, position + stop - start)
                space[:, index, :, start:stop] = row.states[key][:, :, part]
                position = part.stop
        position = 0
        for start, stop in dynamic:
            part = slice(position, position + stop - start)
            space[0, :, :, start:stop] = k[:, :, part]
            space[1, :, :, start:stop] = v[:, :, part]
            position = part.stop
        return space[0], space[1]


def cache_bytes(plan: AttentionPlan, blocks: int, rows: int, batch: int) -> int:
    """Bytes of a cache: `rows` of static keys and values a block, a `batch` of workspace."""
    static = sum(stop - start for start, stop in plan.static_runs)
    token = 2 * plan.heads * plan.head_dim * plan.dtype.itemsize
    return token * (blocks * rows * static + batch * plan.layout.length)


def _same(kept: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    return len(kept) == len(inputs) and all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
        for a, b in zip(kept, inputs, strict=True)
    )


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    # What is made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def _copy(x: Tensor) -> Tensor:
    return _empty(x.shape, x).copy_(x)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
