"""Adapters inside a real ComfyUI on the CPU (marker ``host``): what switches do to the frames."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import random_lora, starter_with_adapters
from test_host import errors, generate, node, saved_frames

from layerloom.engine.checkpoints.lora import read_loras, save_lora

pytestmark = pytest.mark.host
LAYERS = ("foreground", "alpha", "background", "blended")
STEPS = 3


@pytest.fixture(scope="module")
def files(comfy) -> dict[str, Path]:
    """The starter with two adapters of its own, and further ones in models/loras."""
    carried = comfy.base / "models" / "checkpoints" / "toggled.safetensors"
    starter_with_adapters(carried)
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    extra = random_lora("extra", 2, 3.0, 0.02)
    save_lora(folder / "host.safetensors", extra, "host")
    save_lora(folder / "diffusers.safetensors", extra, "diffusers")
    wide = {module: (torch.zeros(2, 30), torch.zeros(30, 2)) for module in extra.targets}
    save_lora(folder / "wide.safetensors", replace(extra, weights=wide), "host")
    (folder / "damaged.safetensors").write_bytes((folder / "host.safetensors").read_bytes()[:-9])
    comfy.get("/object_info/LayerLoomLoadCheckpoint")
    return {"checkpoint": carried, "extra": folder / "host.safetensors"}


def make(comfy, prefix: str, model=None, checkpoint: str = "toggled.safetensors", **nodes):
    """Frames of a short run by layer; ``nodes`` and the model's source go into the workflow."""
    prompt = generate(f"{prefix}/clip", steps=STEPS, seed=5) | nodes
    prompt["load"]["inputs"]["checkpoint"] = checkpoint
    prompt["sample"]["inputs"]["model"] = model or ["load", 0]
    entry = comfy.run(prompt)
    assert not errors(entry), errors(entry)
    found = {}
    for layer in LAYERS:
        clip = saved_frames(comfy, f"{prefix}/clip", layer)
        found[layer] = clip.frames[..., 0] if layer == "alpha" else clip.frames
    return found


def toggles(model, motion=False, motion_strength=1.0, content=True, content_strength=1.0, **more):
    return node(
        "LayerLoomLoraToggles",
        model=model,
        motion=motion,
        motion_strength=motion_strength,
        content=content,
        content_strength=content_strength,
        **more,
    )


def engine(monkeypatch, file: Path, strengths: dict[str, float], loras=()) -> dict[str, np.ndarray]:
    """The same run on the engine, with the host's noise."""
    from layerloom.engine import layered

    noise = torch.randn([1, 16, 8, 12, 12], generator=torch.manual_seed(5))
    monkeypatch.setattr(layered, "draw_noise", lambda *_: noise.transpose(1, 2))
    request = layered.LayeredRequest(
        "generate",
        "a red circle moving right",
        "green stripes",
        steps=STEPS,
        guidance=2.5,
        sampler="ddim",
    )
    pipeline = layered.LayeredPipeline.open(file, device="cpu", adapters=strengths, loras=loras)
    result = pipeline.run(request)
    return {layer: getattr(result, layer) for layer in LAYERS}


def distance(first: dict, second: dict) -> float:
    """Largest mean squared difference of a layer's frames."""
    return max(
        float(np.square(first[layer].astype(float) - second[layer].astype(float)).mean())
        for layer in LAYERS
    )


def same(first: dict, second: dict) -> bool:
    return all(np.array_equal(first[layer], second[layer]) for layer in LAYERS)


def test_switches_do_what_the_engine_does(comfy, files, monkeypatch):
    cases = {
        "default": ({}, {"motion": 0.0, "content": 1.0}),
        "off": ({"content": False}, {"motion": 0.0, "content": 0.0}),
        "motion": ({"motion": True, "motion_strength": 0.75}, {"motion": 0.75, "content": 1.0}),
        "mixed": (
            {"motion": True, "motion_strength": -0.5, "content_strength": 0.4},
            {"motion": -0.5, "content": 0.4},
        ),
    }
    host, ours = {}, {}
    for name, (inputs, strengths) in cases.items():
        host[name] = make(
            comfy, f"toggle_{name}", ["toggle", 0], toggle=toggles(["load", 0], **inputs)
        )
        ours[name] = engine(monkeypatch, files["checkpoint"], strengths)
    # Without the node, the checkpoint's defaults.
    assert same(make(comfy, "toggle_none"), host["default"])
    for name in cases:
        others = [other for other in cases if other != name]
        nearest = min(distance(host[name], host[other]) for other in others)
        # 40 dB, as test_host compares the two samplers, and far nearer than any other setting.
        assert distance(host[name], ours[name]) < min(6.5, nearest / 20), name


def test_off_is_the_base_as_it_is_stored(comfy, files):
    off = make(comfy, "stored_off", ["toggle", 0], toggle=toggles(["load", 0], content=False))
    bare = files["checkpoint"].with_name("bare.safetensors")
    starter_with_adapters(bare, {})
    comfy.get("/object_info/LayerLoomLoadCheckpoint")
    assert same(make(comfy, "stored_bare", checkpoint="bare.safetensors"), off)


def test_weights_in_every_type_are_toggled_to_the_bit(files):
    """In a process of its own, where the host's patched weights can be read."""
    script = Path(__file__).with_name("host_weights.py")
    command = [sys.executable, str(script), os.environ["COMFYUI_DIR"], str(files["checkpoint"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    # Largest relative error: one rounding, which the host does at random up or down.
    bounds = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10, "float8_e4m3fn": 2**-3}
    assert [entry["type"] for entry in found] == list(bounds)
    for entry in found:
        for what in ("off is stored", "on changes", "twice is once", "default comes back"):
            assert entry[what], (entry, what)
        assert entry["error"] <= bounds[entry["type"]], entry
    # A second copy of the model, as the host makes one for another GPU.
    assert found[0]["copy"]


def test_toggling_twice_is_toggling_once_and_leaves_no_trace(comfy, files):
    on = {"motion": True, "motion_strength": 1.5}
    before = make(comfy, "twice_before")
    once = make(comfy, "twice_once", ["toggle", 0], toggle=toggles(["load", 0], **on))
    chained = {
        "first": toggles(["load", 0], content=False),
        "second": toggles(["first", 0], **on),
    }
    assert same(make(comfy, "twice_chained", ["second", 0], **chained), once)
    again = make(comfy, "twice_again", ["toggle", 0], toggle=toggles(["load", 0], **on))
    assert same(again, once) and not same(before, once)
    # One loaded model serves all: back to the defaults, nothing is left in the weights.
    assert same(make(comfy, "twice_after"), before)


def test_an_extra_adapter_is_what_the_hosts_own_loader_makes_of_the_file(comfy, files, monkeypatch):
    own = make(
        comfy,
        "extra_host",
        ["core", 0],
        core=node(
            "LoraLoaderModelOnly",
            model=["load", 0],
            lora_name="host.safetensors",
            strength_model=0.7,
        ),
    )
    found = {}
    for name in ("host", "diffusers"):
        adapter = node("LayerLoomLoadLora", adapter=f"{name}.safetensors", strength=0.7)
        found[name] = make(
            comfy,
            f"extra_{name}_ours",
            ["toggle", 0],
            adapter=adapter,
            toggle=toggles(["load", 0], **{"adapters.adapter_0": ["adapter", 0]}),
        )
    assert same(found["host"], own)
    adapter = node("LayerLoomLoadLora", adapter="host.safetensors", strength=0.7)
    loader = node(
        "LoraModelLoader", model=["load", 0], lora=["adapter", 0], strength_model=1.0, bypass=False
    )
    assert same(make(comfy, "extra_model", ["loader", 0], adapter=adapter, loader=loader), own)
    # There B carries the scale: another rounding.
    assert distance(found["diffusers"], own) < 0.01
    plain = make(comfy, "extra_none")
    assert distance(plain, own) > 1
    (extra,) = read_loras(files["extra"]).values()
    ours = engine(monkeypatch, files["checkpoint"], {}, [(extra, 0.7)])
    assert distance(own, ours) < min(6.5, distance(plain, own) / 20)


def test_extras_add_up_with_the_switches_and_other_nodes(comfy, files):
    """A LoRA of another node before the toggle stays; nothing chosen changes nothing."""
    core = node(
        "LoraLoaderModelOnly", model=["load", 0], lora_name="host.safetensors", strength_model=0.7
    )
    before = make(comfy, "sum_before", ["toggle", 0], core=core, toggle=toggles(["core", 0]))
    after = make(
        comfy,
        "sum_after",
        ["core", 0],
        toggle=toggles(["load", 0]),
        core=core | {"inputs": {**core["inputs"], "model": ["toggle", 0]}},
    )
    # The same sum in another order.
    assert distance(before, after) < 0.01
    nothing = node("LayerLoomLoadLora", adapter="[None]", strength=1.0)
    zero = node("LayerLoomLoadLora", adapter="host.safetensors", strength=0.0)
    made = make(
        comfy,
        "sum_nothing",
        ["toggle", 0],
        nothing=nothing,
        zero=zero,
        toggle=toggles(
            ["load", 0],
            **{"adapters.adapter_0": ["nothing", 0], "adapters.adapter_1": ["zero", 0]},
        ),
    )
    assert same(made, make(comfy, "sum_default"))


@pytest.mark.parametrize(
    ("adapter", "toggle", "message"),
    [
        ("wide", {}, "does not fit toggled.safetensors: transformer_blocks.0.attn1.to_q is"),
        ("damaged", {}, "damaged.safetensors is cut short or damaged"),
    ],
)
def test_adapters_that_cannot_be_used_are_sentences(comfy, files, adapter, toggle, message):
    before = len(comfy.log())
    prompt = generate("wrong_lora/clip", steps=2)
    prompt["load"]["inputs"]["checkpoint"] = "toggled.safetensors"
    prompt["adapter"] = node("LayerLoomLoadLora", adapter=f"{adapter}.safetensors", strength=1.0)
    prompt["toggle"] = toggles(["load", 0], **{"adapters.adapter_0": ["adapter", 0]}, **toggle)
    prompt["sample"]["inputs"]["model"] = ["toggle", 0]
    comfy.run(prompt)
    log = comfy.log()[before:]
    assert message in log and "Traceback" not in log
    assert not list(comfy.output.glob("wrong_lora/*"))


def test_a_checkpoint_without_adapters_says_so(comfy, files):
    starter_with_adapters(files["checkpoint"].with_name("bare.safetensors"), {})
    comfy.get("/object_info/LayerLoomLoadCheckpoint")
    before = len(comfy.log())
    prompt = generate("bare_motion/clip", steps=2)
    prompt["load"]["inputs"]["checkpoint"] = "bare.safetensors"
    prompt["toggle"] = toggles(["load", 0], motion=True)
    prompt["sample"]["inputs"]["model"] = ["toggle", 0]
    comfy.run(prompt)
    log = comfy.log()[before:]
    assert "bare.safetensors has no motion adapter (its adapters: none)" in log
    assert "Traceback" not in log and not list(comfy.output.glob("bare_motion/*"))
    before = len(comfy.log())
    made = make(
        comfy, "bare_content", ["t", 0], checkpoint="bare.safetensors", t=toggles(["load", 0])
    )
    assert same(made, make(comfy, "bare_plain", checkpoint="bare.safetensors"))
    assert "has no content adapter; that switch does nothing" in comfy.log()[before:]


def test_the_file_is_never_touched(comfy, files):
    before = {path: path.read_bytes() for path in files.values()}
    make(comfy, "file", ["t", 0], t=toggles(["load", 0], motion=True, content_strength=0.2))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_toggle_is_listed_with_a_growing_input(comfy):
    info = comfy.get("/object_info/LayerLoomLoraToggles")["LayerLoomLoraToggles"]
    kind, options = info["input"]["optional"]["adapters"]
    assert kind == "COMFY_AUTOGROW_V3" and options["tooltip"]
    (slot,) = options["template"]["input"]["required"].values()
    assert slot[0] == "LORA_MODEL", json.dumps(options)
