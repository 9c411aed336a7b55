"""Shared fixtures: where the golden files and key manifests lie, and a small published file."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"
# Full width -> tiny width, for files with the published names and position tables.
TINY = {1920: 16, 5760: 48, 7680: 64, 23040: 192, 3840: 32, 512: 8, 4096: 12, 256: 6, 64: 8, 8: 3}


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Golden cases made by the official code (copied from the project's reference)."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def manifest_dir() -> Path:
    """Key and shape lists of the published checkpoints."""
    return DATA / "manifests"


@pytest.fixture(scope="session")
def tiny_sat(manifest_dir) -> Callable[..., dict[str, torch.Tensor]]:
    """Random weights under a published file's names: narrow blocks, full position table."""

    def make(name: str = "layerflow_rgba_generate", layers: int = 2) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        shapes = json.loads(gzip.decompress((manifest_dir / f"{name}.json.gz").read_bytes()))
        state = {}
        for key, shape in shapes.items():
            block = re.search(r"(?:layers|modulations|layernorm_list)\.(\d+)\.", key)
            if block and int(block[1]) >= layers:
                continue
            shape = [TINY.get(n, n) for n in shape]
            if ".final_layer.linear." in key:
                shape[0] = 64  # 2x2 patches of 16 channels, not a head's width
            state[key] = torch.randn(shape) * 0.3
        return state

    return make
