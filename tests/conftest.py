"""Shared fixtures: golden files and key manifests, a small published file, a real ComfyUI."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, comfy_server

# Run by tests/triton_interpreter.py in a process of its own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
DATA = Path(__file__).parent / "data"
# Full width -> tiny width, for files with the published names and position tables.
TINY = {1920: 16, 5760: 48, 7680: 64, 23040: 192, 3840: 32, 512: 8, 4096: 12, 256: 6, 64: 8, 8: 3}


# A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why."""
    folder = os.environ.get("COMFYUI_DIR")
    comfy = None
    if not folder or not (Path(folder) / "main.py").is_file():
        comfy = "needs a ComfyUI checkout; name its folder in COMFYUI_DIR"
    elif importlib.util.find_spec("aiohttp") is None:
        comfy = "needs ComfyUI's requirements in this environment"
    browser = comfy
    if importlib.util.find_spec("playwright") is None:
        browser = "needs Playwright's Python client (pip install playwright)"
    for item in items:
        if item.get_closest_marker("browser") and browser:
            item.add_marker(pytest.mark.skip(reason=browser))
        elif item.get_closest_marker("host") and comfy:
            item.add_marker(pytest.mark.skip(reason=comfy))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory) -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack, shared by the tests of a session."""
    with comfy_server(tmp_path_factory.mktemp("comfyui") / "base") as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A Chromium driven by Playwright.

    A module's, not the session's: Playwright's event loop fills the thread while it lives, and
    other tests run event loops of their own.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("needs Chromium; install it or name its binary in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield browser
        browser.close()
