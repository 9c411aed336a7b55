"""Shows the host how far a node is, and stops the node when the user cancels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# Seconds between previews: a picture goes over the network for each.
PREVIEW_SECONDS = 1.0


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


class PreviewedSteps:
    """A progress bar of ``total`` steps that shows a picture on the node now and then."""

    def __init__(self, total: int):
        import comfy.utils

        self.total, self._shown = total, -PREVIEW_SECONDS
        self._bar = comfy.utils.ProgressBar(total)

    def at(self, step: int, picture: Callable[[], Any] | None = None) -> None:
        """So many steps are done; ``picture`` (a PIL image) is drawn where one is due.

        Raises the host's interrupt (a BaseException) after a cancel.
        """
        import comfy.model_management
        from comfy.cli_args import args

        comfy.model_management.throw_exception_if_processing_interrupted()
        preview, now = None, time.monotonic()
        if picture and (now - self._shown >= PREVIEW_SECONDS or step == self.total):
            preview, self._shown = ("JPEG", picture(), args.preview_size), now
        self._bar.update_absolute(step, self.total, preview)
