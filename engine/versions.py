"""What a run was made with: the versions of interpreter, packages and machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any


def package_version(name: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def made_with(packages: Sequence[str]) -> dict[str, Any]:
    """``versions`` and ``platform`` of a run's record."""
    versions = {"python": platform.python_version()}
    versions |= {package: package_version(package) for package in packages}
    return {"versions": versions, "platform": platform.platform()}
