"""DynamiCrafter inside a real ComfyUI on the CPU (marker ``host``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfy_server import REPOSITORY

from layerloom.engine.checkpoints.golden import load_case

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def official(tmp_path_factory, golden_dir) -> Path:
    """A folder with whole tiny checkpoints in the official layout."""
    folder = tmp_path_factory.mktemp("official")
    for name in ("dc_ckpt_tiny_512like", "dc_ckpt_tiny_256like"):
        state = load_case(golden_dir, name).weights("")
        torch.save({"state_dict": state}, folder / f"{name}.ckpt")
    return folder


# --- the model and the guider, where their numbers can be read ------------------------------------


@pytest.fixture(scope="module")
def measured(official, golden_dir) -> dict:
    """What host_animate.py measures in a ComfyUI of its own."""
    script = Path(__file__).with_name("host_animate.py")
    process = subprocess.run(
        [sys.executable, str(script), str(REPOSITORY), str(golden_dir), str(official)],
        cwd=os.environ["COMFYUI_DIR"],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = {}
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line.removeprefix("RESULT "))
    return found


def test_the_golden_numbers_come_out_of_the_hosts_model(measured):
    found = measured["golden"]
    # Released group sizes, several frame counts: float32 against the official float32.
    assert sum("c32" in name for name in found) == 3
    assert all(error < 1e-4 for name, error in found.items() if "c32" in name), found
    assert all(error < 1e-5 for name, error in found.items() if "tokens" in name), found
    # Whole files are so narrow that rounding drowns all else; in float64 the two are one.
    assert all(error < 1e-9 for name, error in found.items() if "as the engine" in name), found


def test_euler_is_the_published_sampler_with_dynamic_rescale_and_windows(measured):
    runs = {k: v for k, v in measured["sampling"].items() if isinstance(v, dict)}
    assert len(runs) == 8
    for name, run in runs.items():
        # The host ends at clean frames, the published sampler at its first timestep.
        assert run["as it ends here"] >= 55, (name, run)
        # Taken to the same end they are one; 256 starts from noise that is not scaled by
        # sqrt(1 - a) = 0.997 at its first timestep.
        assert run["as published"] >= (60 if name.startswith("256") else 85), (name, run)
    assert measured["sampling"]["two clips are one twice"] == 0


def test_forwards_that_scales_make_superfluous_are_left_out(measured):
    assert measured["branches"] == {
        "(1.0, 1.0)": 1,
        "(7.5, 7.5)": 2,
        "(7.5, 1.0)": 2,
        "(7.5, 2.0)": 3,
    }


def test_a_closed_gate_leaves_the_image_stream_out(measured):
    found = measured["gates"]
    assert found["tokens matter"] > 0.1 and found["closed changes"] > 0.1
    assert found["tokens behind a closed gate"] == 0
    assert found["factors"] == [0.5, 2.0, *[0.5] * 4, *[0.25] * 3, *[0.5] * 7]
    assert not found["original"]


def test_the_hosts_lora_loader_finds_the_weights(measured):
    found = measured["adapters"]
    for name in ("kohya", "host", "projector"):
        patched, change = found[name]
        assert patched == 1 and change > 0.01, (name, found)
    assert found["back"] == 0


def test_stored_types_stay_and_are_cast_layer_by_layer(measured):
    found = measured["types"]
    assert found["float16"]["kinds"] == ["float16"]
    assert found["bfloat16"]["kinds"] == ["bfloat16"]
    # Norms and biases are kept in more bits.
    assert found["float8_e4m3fn"]["kinds"] == ["float16", "float8_e4m3fn"]
    assert all(entry["error"] == 0 for entry in found.values()), found


def test_long_clips_ask_for_a_windows_memory_and_the_cores_windows_work_too(measured):
    assert measured["long"]["long over short"] == 1
    assert measured["host windows"] == {"finite": True, "frames": 24}
