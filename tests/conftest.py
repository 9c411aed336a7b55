"""Shared fixtures: where the golden files and key manifests of the papers' official code lie."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Golden cases made by the official code (copied from the project's reference)."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def manifest_dir() -> Path:
    """Key and shape lists of the published checkpoints."""
    return DATA / "manifests"
