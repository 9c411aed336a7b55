"""Puts a set of result files into a folder all together or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from .errors import LayerLoomError

# No room left, over quota, over the file size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StagedFolder:
    """Context manager: files are written to a hidden folder and moved into place at the end.

    folder: where the files belong; made if missing, with its parents.
    names: the file names to come; one of them being a folder already is an error at the start.
    advice: what messages say to do about a place that cannot be written to.

    Entering checks that files can be made there, so it comes before the work. Leaving by any
    exception, an interrupt too, puts everything back as it was: earlier files of the same name
    stay, and folders that were made are removed.
    Errors: LayerLoomError for no permission, a file in the way, and a full disk.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str] = (),
        advice: str = "choose another --out",
    ):
        self.folder = Path(folder)
        self.advice = advice
        self.names = tuple(names)
        self.files: list[Path] = []
        self._made: list[Path] = []
        self._stage: Path | None = None

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        if self._stage is None:
            raise RuntimeError("StagedFolder.path is for use inside the with block")
        return self._stage / name

    def __enter__(self) -> StagedFolder:
        try:
            self._make_folder()
            self._stage = Path(tempfile.mkdtemp(prefix=".layerloom-", dir=self.folder))
            # A folder may be made where no byte may be written (quota, full disk).
            self.path("probe").write_bytes(b"layerloom")
            self.path("probe").unlink()
            for name in self.names:
                if (self.folder / name).is_dir():
                    raise LayerLoomError(
                        f"{self.folder / name} is a folder, and a file of that name is to be"
                        f" written; move it away or {self.advice}."
                    )
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._move_into_place()
        except OSError as failure:
            error = failure
            raise self._explain(failure) from failure
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._remove(keep_folder=error is None)
        if isinstance(error, OSError) and self._concerns_writing(error):
            raise self._explain(error) from error

    def _make_folder(self) -> None:
        missing = []
        folder = self.folder
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir()
            self._made.append(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.folder))

    def _move_into_place(self) -> None:
        """Move every staged file; on failure put the earlier files back."""
        staged = sorted(entry.name for entry in self._stage.iterdir())
        earlier = self._stage / ".earlier"
        earlier.mkdir()
        moved: list[str] = []
        try:
            for name in staged:
                target = self.folder / name
                moved.append(name)
                if target.exists() or target.is_symlink():
                    os.replace(target, earlier / name)
                os.replace(self._stage / name, target)
        except BaseException:
            for name in moved:
                if (earlier / name).exists():
                    os.replace(earlier / name, self.folder / name)
                elif not (self._stage / name).exists():
                    (self.folder / name).unlink(missing_ok=True)
            raise
        self.files = [self.folder / name for name in staged]

    def _remove(self, keep_folder: bool = False) -> None:
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._stage = None
        if not keep_folder:
            for folder in reversed(self._made):
                try:
                    folder.rmdir()
                except OSError:
                    break  # something else was put there meanwhile: it is not ours to remove
            self._made.clear()

    def _concerns_writing(self, error: OSError) -> bool:
        inside = error.filename is not None and str(self.folder) in str(error.filename)
        return inside or error.errno in _FULL

    def _explain(self, error: OSError) -> LayerLoomError:
        if error.errno in _FULL:
            return LayerLoomError(
                f"The disk that {self.folder} is on has no room left for the results; free some"
                f" space or {self.advice}."
            )
        if isinstance(error, NotADirectoryError | FileExistsError):
            return LayerLoomError(
                f"{self.folder} cannot be a folder, because a file is in the way; {self.advice}."
            )
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return LayerLoomError(
                f"There is no permission to write in {self.folder}; {self.advice}."
            )
        reason = error.strerror or error
        return LayerLoomError(f"Nothing can be written in {self.folder} ({reason}); {self.advice}.")
