"""Shows the host how far a node is, and stops the node when the user cancels."""

from __future__ import annotations

from collections.abc import Callable


def steps(total: int) -> Callable[[], None]:
    """A function to call after each of `total` steps.

    It moves the node's progress bar, and raises the host's interrupt (a BaseException) after a
    cancel.
    """
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def step() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return step
