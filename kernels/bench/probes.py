"""Time, memory and kernels of one call, on a CPU or a CUDA device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
# A sample of many short calls is steadier than one of a single call.
SHORTEST_SAMPLE = 2e-3
_FLUSHED = 2
"""Sizes of the L2 cache that are overwritten before a timed call on a GPU."""


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection inside the block: it would land in somebody's sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Clock:
    """Times calls on one device.

    CPU: wall time, the mean of several calls where one is shorter than ``SHORTEST_SAMPLE``; with
    `busy`, the processor time of the whole process instead, which other work on the machine hardly
    changes (threads that wait for each other still count, so use it with one thread).
    CUDA: `torch.cuda.Event` pairs around one call on an idle stream, so work on the host before
    and between the launches (planning, tables) counts as much as the kernels. The L2 cache is
    overwritten first, outside the timed span: all candidates start equally cold.
    """

    def __init__(self, device: torch.device, busy: bool = False):
        self.device = device
        self.now = time.process_time if busy else time.perf_counter
        self.scratch = None
        if device.type == "cuda":
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            size = _FLUSHED * (size or 64 * 2**20)
            self.scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def once(self, call: Call) -> tuple[float, Any]:
        """Seconds of one call by the host's clock, kernels finished, and its result."""
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        return time.perf_counter() - start, result

    def repeats(self, seconds: float) -> int:
        """Calls a sample, for calls that take `seconds` each."""
        if self.device.type == "cuda":
            return 1
        return min(1000, max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-6))))

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds a call, mean of `repeats`."""
        if self.scratch is None:
            start = self.now()
            for _ in range(repeats):
                call()
            return (self.now() - start) / repeats
        self.scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        stream.synchronize()
        begin.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warm_up(self) -> None:
        """Start thread pools, libraries and the device's context before the first candidate."""
        x = torch.randn(512, 512, device=self.device)
        for _ in range(3):
            x = x @ x * 1e-3
        self.wait()


@dataclass(frozen=True)
class Inside:
    """What one call does.

    Attributes:
        peak_bytes: most memory that tensors made by the call (its result included) held at a time.
        operators: attention operators of torch or of this package that ran.
        device_kernel: the GPU kernel that took longest; empty on a CPU.
    """

    peak_bytes: int | None
    operators: tuple[str, ...]
    device_kernel: str = ""


def look_inside(call: Call, device: torch.device) -> Inside:
    """Run `call` once more, watched.

    CUDA: the peak is `max_memory_allocated` above what was allocated before (inputs, masks and
    other candidates' state), from a call without the profiler; the profiler then watches another.

    CPU: exact. torch's allocator reports each allocation and release to the profiler; their sizes
    are summed in the order of their times and the largest sum is the peak. Buffers that MKL or
    oneDNN take from the system themselves are not tensors and not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        try:
            profile = _profile(call, device)
        except RuntimeError:
            # A container may keep a profiler from the card.
            return Inside(peak, ())
        return Inside(peak, _operators(profile), _longest_kernel(profile))
    profile = _profile(call, device)
    return Inside(_peak_of_events(profile), _operators(profile))


def _profile(call: Call, device: torch.device) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=device.type == "cpu") as found:
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # Released while watched, after all that the call itself releases.
        del result
    return found


def _peak_of_events(profile: Any) -> int | None:
    try:
        events = profile.profiler.kineto_results.events()
        changes = sorted(
            (
                (event.start_ns(), index, event.nbytes())
                for index, event in enumerate(events)
                if event.name() == "[memory]"
            )
        )
    except AttributeError:
        # The raw events are not part of the profiler's stable interface.
        return None
    held = peak = 0
    for _, _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


def _operators(profile: Any) -> tuple[str, ...]:
    names = dict.fromkeys(event.name for event in profile.events())
    kept = [name for name in names if _is_attention(name)]
    # The entry point says nothing once the kernel behind it is known.
    inner = [name for name in kept if name != "aten::scaled_dot_product_attention"]
    return tuple(inner or kept)


def _is_attention(name: str) -> bool:
    wanted = ("scaled_dot_product", "flex_attention", "layerloom::", "flash_attn", "sageattn")
    return any(part in name for part in wanted) and "(" not in name


def _longest_kernel(profile: Any) -> str:
    longest: dict[str, float] = {}
    for event in profile.events():
        if str(event.device_type).endswith("CUDA"):
            longest[event.name] = longest.get(event.name, 0.0) + event.time_range.elapsed_us()
    return max(longest, key=longest.get)[:120] if longest else ""
