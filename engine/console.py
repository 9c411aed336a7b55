"""What the commands share: options, a progress bar on stderr, lines for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .errors import LayerLoomError

CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="Checkpoint file; default: the starter.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, ...; default: the best there is.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def require(path: Path, what: str) -> None:
    """Raise LayerLoomError for a path that is not there."""
    if not path.exists():
        raise LayerLoomError(f"The {what} {path} does not exist; check the path.")


def say(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


@contextmanager
def progress_bar(title: str, quiet: bool, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr with steps and time left; yields `advance(done, total, title=...)`."""
    if quiet:
        yield lambda done, total, title=title: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int, title: str = title) -> None:
            bar.update(task, completed=done, total=total, description=title)

        yield advance
