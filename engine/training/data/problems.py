"""What is wrong in which file of a person's folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault: the file (relative to the folder), what to change, and the line where it is one.

    ``text`` goes on after the file's name: "has 12 frames ...".
    """

    file: str
    text: str
    line: int | None = None

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{where}: {self.text}"
