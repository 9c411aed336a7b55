"""Inputs that all nodes have which begin a clip."""

from __future__ import annotations

from comfy_api.latest import io


def size_inputs(default: str) -> list[io.Int.Input]:
    """Width and height; ``default`` says what 0 stands for."""
    return [
        io.Int.Input(side, default=0, min=0, max=8192, step=8, tooltip=f"Pixels; 0 {default}.")
        for side in ("width", "height")
    ]


def batch_input() -> io.Int.Input:
    """How many clips."""
    return io.Int.Input(
        "batch_size",
        default=1,
        min=1,
        max=64,
        advanced=True,
        tooltip="Clips made at once, from different noise, one after the other.",
    )
