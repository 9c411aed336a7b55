"""Numbers of the subject network inside ComfyUI's own model and samplers (marker ``host``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import REPOSITORY
from test_dreamvideo_checkpoints import base, original_names
from tiny_director import NETWORK, SETTINGS, build

from layerloom.engine.checkpoints.dreamvideo import open_trajectory
from layerloom.engine.checkpoints.dreamvideo_save import network_states, save_trajectory
from layerloom.engine.checkpoints.save import save_tensors

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """What host_trajectory.py measures in a ComfyUI of its own."""
    folder = tmp_path_factory.mktemp("movers")
    save_tensors(folder / "base.safetensors", original_names(base().state_dict()), {})
    unet = open_trajectory(folder / "base.safetensors").info.unet
    network = build(unet=unet)
    network.unet.load_state_dict(base().state_dict())
    for name, whole in (("whole", True), ("added", False)):
        save_trajectory(
            folder / f"{name}.safetensors",
            network_states(network, whole),
            **{**NETWORK, "unet": unet},
            settings=SETTINGS,
        )
    script = Path(__file__).with_name("host_trajectory.py")
    process = subprocess.run(
        [sys.executable, str(script), str(REPOSITORY), str(folder)],
        cwd=os.environ["COMFYUI_DIR"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = {}
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line.removeprefix("RESULT "))
    return found


def test_subjects_and_boxes_are_computed_once_a_run(measured):
    found = measured["once"]
    assert found["subjects"] == found["boxes"] == 1
    # Both halves of guidance in one batch, a step at a time.
    assert found["clips"] == [2, 2, 2]
    assert found["kept"] == 0


def test_clips_of_a_batch_are_single_clips(measured):
    # Random weights make latents of tens; products of another batch round otherwise.
    assert measured["clips"]["two are one twice"] <= 1e-3


def test_what_was_added_stands_on_its_base_and_types_are_kept(measured):
    found = measured["files"]
    assert found["added"] == 0
    for name, kinds in (
        ("float16", ["torch.float16"]),
        ("bfloat16", ["torch.bfloat16"]),
        ("float8_e4m3fn", ["torch.float16", "torch.float8_e4m3fn"]),
    ):
        assert found[name]["kinds"] == kinds
        assert found[name]["error"] <= 1e-4
    # Eight bits of mantissa through some thirty layers.
    assert found["in half"] <= 0.1


def test_adapters_change_a_run_and_not_the_next_one(measured):
    assert measured["adapters"]["changed"] > 1e-3
    assert measured["adapters"]["back"] == 0


def test_the_hosts_windows_see_their_own_frames_boxes(measured):
    found = measured["windows"]
    assert found["finite"] and found["as if whole"] <= 1e-4
    assert found["cut"] > 1e-3
    assert found["last frames' boxes in the first"] <= 1e-4 < found["and in the last"]
    assert "set batch_size to 1" in found["two clips"]


def test_what_the_network_cannot_do_is_a_sentence(measured):
    found = measured["wrong"]
    assert "needs whole frames" in found["area"]
    assert "choose ModelScope's text-to-video weights as base" in found["added alone"]
    assert "a base that reads neither subjects nor boxes" in found["base alone"]
    assert "holds no text encoder; load OpenCLIP ViT-H/14's" in found["clip"]
    assert "holds no VAE; load Stable Diffusion's" in found["vae"]


def test_previews_show_a_frame(measured):
    assert measured["preview"] == [4, 4]
