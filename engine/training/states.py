"""A run's states on the disk: written whole or not at all, the last few kept, read to resume."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import LayerLoomError

State = dict[str, Any]
READ_ERRORS = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
)


class StateFiles:
    """``state.pt``, the newest, and ``state-<step>.pt``, those before it.

    Args:
        folder: the run's.
        keep: how many states stay, the newest included.
        main: whether this process writes; all of them read.
    """

    def __init__(self, folder: Path, keep: int = 1, main: bool = True):
        self.folder, self.keep, self.main = folder, keep, main
        self.newest = folder / "state.pt"
        self.newest_step: int | None = None

    def exists(self) -> bool:
        return self.newest.exists()

    def save(self, state: State) -> None:
        """Write a state of ``state["step"]``; the one before is kept under its step's name.

        Raises:
            LayerLoomError: the disk is full or the folder cannot be written; what was there stays.
        """
        if not self.main:
            return
        partial = self.newest.with_suffix(".partial")
        with _kept_on_failure(self.newest, lambda: partial.unlink(missing_ok=True)):
            torch.save(state, partial)
            again = self.newest_step in (None, state["step"])
            if self.keep > 1 and not again and self.newest.exists():
                earlier = self.folder / f"state-{self.newest_step:08d}.pt"
                earlier.unlink(missing_ok=True)
                # A second name, so that there is a state.pt at every moment.
                _second_name(self.newest, earlier)
            os.replace(partial, self.newest)
            self.newest_step = state["step"]
            for old in self._earlier()[self.keep - 1 :]:
                old.unlink(missing_ok=True)

    def _earlier(self) -> list[Path]:
        found = self.folder.glob("state-*.pt")
        return sorted((path for path in found if _step_of(path) is not None), reverse=True)

    @contextmanager
    def opened(self, template: State) -> Iterator[State]:
        """The newest state; what goes wrong while it is taken over is a damaged or strange file.

        ``template`` is a state of this run, for states that are read into place.
        """
        with _readable(self.newest):
            state = torch.load(self.newest, weights_only=True, map_location="cpu")
            self.newest_step = int(state["step"])
            yield state


class StateShards:
    """``state-<step>/`` folders, a file a process, for weights that are split among processes.

    All processes call ``save`` and ``opened`` together.
    """

    def __init__(
        self, folder: Path, keep: int = 1, main: bool = True, wait: Callable[[], None] = bool
    ):
        self.folder, self.keep, self.main, self.wait = folder, keep, main, wait

    @property
    def newest(self) -> Path:
        return self._all()[0] if self._all() else self.folder / "state-00000000"

    def _all(self) -> list[Path]:
        found = (path for path in self.folder.glob("state-*") if path.is_dir())
        return sorted((path for path in found if _step_of(path) is not None), reverse=True)

    def exists(self) -> bool:
        return bool(self._all())

    def save(self, state: State) -> None:
        """As ``StateFiles.save``; every process writes its part."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint import FileSystemWriter
        from torch.distributed.checkpoint.api import CheckpointException

        final = self.folder / f"state-{state['step']:08d}"
        partial = final.with_suffix(".partial")
        self.wait()
        if final.exists():
            return
        with _kept_on_failure(final, lambda: shutil.rmtree(partial, ignore_errors=True)):
            if self.main:
                shutil.rmtree(partial, ignore_errors=True)
            self.wait()
            try:
                checkpoint.save(state, storage_writer=FileSystemWriter(partial, overwrite=True))
            except CheckpointException as error:  # a BaseException, raised on all processes
                raise OSError(next(iter(error.failures.values()))[0]) from error
            if self.main:
                os.replace(partial, final)
                for old in self._all()[self.keep :]:
                    shutil.rmtree(old, ignore_errors=True)
        self.wait()

    @contextmanager
    def opened(self, template: State) -> Iterator[State]:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.api import CheckpointException

        with _readable(self.newest):
            try:
                checkpoint.load(template, checkpoint_id=self.newest)
            except CheckpointException as error:
                raise OSError(str(error)) from error
            yield template


def _step_of(path: Path) -> int | None:
    found = re.fullmatch(r"state-(\d{8,})(\.pt)?", path.name)
    return int(found[1]) if found else None


def _second_name(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


@contextmanager
def _kept_on_failure(path: Path, clean: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        clean()
        raise LayerLoomError(
            f"Could not write {path} ({error}); the last whole checkpoint is kept, "
            "free some space and resume."
        ) from error
    except BaseException:
        clean()
        raise


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise LayerLoomError(
            f"{path} is damaged or of a run with another network or optimizer; "
            "resume with the recipe it was started with, or name another folder=... ."
        ) from error
