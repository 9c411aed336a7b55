"""Train Adapter inside a real ComfyUI on the CPU (marker ``host``)."""

import asyncio
import json
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest
import torch
from adapter_files import starter_with_adapters
from PIL import Image
from test_host import errors, generate, node
from test_host_lora import distance, engine, make, same, toggles

from layerloom.engine.checkpoints.load import open_checkpoint
from layerloom.engine.checkpoints.lora import inspect_file, read_lora
from layerloom.engine.layered import STARTER

pytestmark = pytest.mark.host
LISTED = "LayerLoomLoadLora"


@pytest.fixture(scope="module")
def loras(comfy) -> Path:
    starter_with_adapters(comfy.base / "models" / "checkpoints" / "both.safetensors")
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    comfy.get("/object_info/LayerLoomLoadCheckpoint")
    return folder


def training(name: str, frames: int = 8, **inputs) -> dict:
    """A workflow that trains on a generated foreground over plain orange."""
    prompt = generate("unused/clip", steps=2)
    del prompt["save"]
    prompt["orange"] = node("EmptyImage", width=96, height=96, batch_size=frames, color=0xFF8018)
    prompt["train"] = node(
        "LayerLoomTrainLora",
        model=["load", 0],
        vae=["load", 2],
        positive=["prompts", 0],
        foreground=["decode", 0],
        alpha=["decode", 1],
        background=["orange", 0],
        **{
            "name": name,
            "kind": "plain",
            "rank": 4,
            "lora_alpha": 4.0,
            "steps": 8,
            "learning_rate": 3e-3,
            "batch_size": 2,
            "seed": 3,
            "continue_from": "[None]",
            "strength": 1.0,
            "blocks": "all",
            "video_share": 0.1,
            "text_dropout": 0.1,
            "accumulate": 1,
            "save_every": 4,
            "width": 0,
            "height": 0,
            "frames": 0,
            **inputs,
        },
    )
    return prompt


def with_file(file: str, strength: float = 1.0) -> dict:
    return {
        "adapter": node(LISTED, adapter=file, strength=strength),
        "toggle": toggles(["load", 0], **{"adapters.adapter_0": ["adapter", 0]}),
    }


def test_an_adapter_is_trained_saved_and_in_the_model_at_once(comfy, loras, monkeypatch, tmp_path):
    before = len(comfy.log())
    # Sampling, saving and training are one graph, as users run it.
    prompt = training("folder/orange")
    nodes = {"train": prompt["train"], "orange": prompt["orange"]}
    trainee = {"tp": prompt["prompts"], "tl": prompt["latent"], "ts": prompt["sample"]}
    trainee["ts"]["inputs"].update(positive=["tp", 0], negative=["tp", 1], latent_image=["tl", 0])
    trainee["td"] = node("LayerLoomDecodeLayers", samples=["ts", 0], vae=["load", 2], layers="auto")
    nodes["train"]["inputs"].update(
        foreground=["td", 0], alpha=["td", 1], positive=["tp", 0], strength=0.75
    )
    checkpoint = "starter/layered.safetensors"
    made = make(comfy, "trained", ["train", 0], checkpoint=checkpoint, **nodes, **trainee)
    log = comfy.log()[before:]
    assert "1 moving samples of 8 frames, 96x96." in log
    said = re.search(
        r"Saved as models/loras/folder/orange.safetensors. .*: ([\d.e-]+) before, "
        r"([\d.e-]+) after",
        log,
    )
    assert said and float(said[2]) < float(said[1]), log
    assert "Traceback" not in log and "Warning" not in log
    file = loras / "folder" / "orange.safetensors"
    notes = inspect_file(file)
    assert (notes.name, notes.rank, notes.alpha) == ("orange", 4, 4.0)
    assert notes.notes["steps"] == 8 and notes.notes["trained_on"] == "layered.safetensors"
    assert not list(loras.rglob("*.partial"))

    # The same frames from the file through Load Adapter, and not those of the bare model.
    loaded = make(
        comfy, "loaded", ["toggle", 0], checkpoint, **with_file("folder/orange.safetensors", 0.75)
    )
    plain = make(comfy, "untrained", checkpoint=checkpoint)
    assert same(made, loaded) and distance(made, plain) > 1
    # ... from the core's own loader, and from the engine.
    core = node(
        "LoraLoaderModelOnly",
        model=["load", 0],
        strength_model=0.75,
        lora_name="folder/orange.safetensors",
    )
    assert same(made, make(comfy, "core", ["core", 0], checkpoint, core=core))
    ours = engine(monkeypatch, STARTER, {}, [(read_lora(file), 0.75)])
    assert distance(made, ours) < min(6.5, distance(made, plain) / 4)
    # ... and the command takes it.
    command = [sys.executable, "-m", "layerloom.engine.cli", "layered", "--steps", "2"]
    command += ["--foreground", "a red circle", "--background", "plain blue", "--lora", str(file)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "made")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_node_shows_its_losses_while_it_runs(comfy, loras):
    """Progress, pictures on the way, and the last one as an output of the node."""
    prompt = training("shown", steps=6)
    prompt["plot"] = node("PreviewImage", images=["train", 3])
    prompt["file"] = node("PreviewAny", source=["train", 2])
    steps, pictures, entry = asyncio.run(watch(comfy, prompt, "train"))
    # One sample is encoded, six steps are done.
    assert steps[-1] == (7, 7) and len(steps) >= 4
    assert pictures and all(picture.size == (512, 320) for picture in pictures)
    (shown,) = entry["outputs"]["train"]["images"]
    picture = Image.open(BytesIO(comfy.file(shown)))
    assert picture.size == (512, 320) and shown["type"] == "temp"
    (same_plot,) = entry["outputs"]["plot"]["images"]
    assert Image.open(BytesIO(comfy.file(same_plot))).tobytes() == picture.tobytes()
    assert entry["outputs"]["file"]["text"] == ["shown.safetensors"]


async def watch(comfy, prompt: dict, owner: str, until: int | None = None):
    """Run a prompt over a socket; a node's progress and previews, and the history entry.

    until: cancel once the node is that far.
    """
    steps, pictures = [], []
    url = comfy.url.replace("http", "ws") + "/ws?clientId=tests"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, max_msg_size=0) as socket,
    ):
        prompt_id, running, cancelled = comfy.queue(prompt), None, False
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                # 1 is a picture, 3 a sentence on a node.
                if running == owner and message.data[:4] == b"\0\0\0\1":
                    pictures.append(Image.open(BytesIO(message.data[8:])))
                continue
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if kind == "executing":
                running = data["node"]
            if kind == "progress" and data["node"] == owner:
                steps.append((data["value"], data["max"]))
                if until and data["value"] >= until and not cancelled:
                    cancelled = True
                    async with session.post(f"{comfy.url}/interrupt") as answer:
                        assert answer.status == 200
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                return steps, pictures, comfy.wait(prompt_id)
    raise AssertionError("the socket closed")


def test_cancel_keeps_the_adapter_and_says_so(comfy, loras):
    before = len(comfy.log())
    prompt = training("stopped", steps=5000, save_every=5000)
    steps, _, entry = asyncio.run(watch(comfy, prompt, "train", until=4))
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert steps[-1][0] <= 7
    log = comfy.log()[before:]
    said = re.search(
        r"Stopped after (\d+) of 5000 steps; the adapter so far is kept as "
        r"models/loras/stopped.safetensors",
        log,
    )
    assert said and "Traceback" not in log, log
    file = loras / "stopped.safetensors"
    assert inspect_file(file).notes["steps"] == int(said[1]) >= 3
    # It is listed, it works, and nothing of the training is left in the model.
    checkpoint = "starter/layered.safetensors"
    with_it = make(
        comfy, "after_stop", ["toggle", 0], checkpoint, **with_file("stopped.safetensors")
    )
    plain = make(comfy, "after_stop_plain", checkpoint=checkpoint)
    assert distance(with_it, plain) > 0
    fresh = comfy.base / "models" / "checkpoints" / "fresh.safetensors"
    fresh.write_bytes(STARTER.read_bytes())
    comfy.get("/object_info/LayerLoomLoadCheckpoint")
    assert same(plain, make(comfy, "after_stop_fresh", checkpoint="fresh.safetensors"))


def test_the_same_seed_gives_the_same_adapter_under_a_new_name(comfy, loras):
    for _ in range(2):
        # Another strength, so that the host does not take the result of the run before.
        entry = comfy.run(
            training("again", steps=3, strength=len(list(loras.glob("again*"))) + 1.0)
        )
        assert not errors(entry)
    first, second = (read_lora(loras / f"{name}.safetensors") for name in ("again", "again-2"))
    for module in first.targets:
        for a, b in zip(first.weights[module], second.weights[module], strict=True):
            assert torch.equal(a, b)


def test_lists_are_clips_and_training_goes_on_from_a_file(comfy, loras):
    prompt = training("base", frames=1, steps=3)
    entry = comfy.run(prompt)
    assert not errors(entry), errors(entry)
    before = len(comfy.log())
    more = training("more", frames=1, steps=3, continue_from="base.safetensors", rank=64)
    # Eight frames apart from each other: clips of four.
    more["train"]["inputs"]["frames"] = 4
    for name in ("foreground", "alpha_image"):
        more[name] = node("RebatchImages", images=["decode", 0], batch_size=4)
    more["alpha_image"]["inputs"]["images"] = ["mask", 0]
    more["mask"] = node("MaskToImage", mask=["decode", 1])
    more["alpha"] = node("ImageToMask", image=["alpha_image", 0], channel="red")
    more["train"]["inputs"].update(foreground=["foreground", 0], alpha=["alpha", 0])
    entry = comfy.run(more)
    assert not errors(entry), errors(entry)
    log = comfy.log()[before:]
    assert "2 moving samples of 4 frames, 96x96. The checkpoint was trained on 8 frames" in log
    assert read_lora(loras / "more.safetensors").rank == 4


def test_still_clips_come_with_the_models_motion_adapter(comfy, loras):
    before = len(comfy.log())
    for kind, name in (("motion", "layered"), ("content", "layered"), ("content", "both")):
        prompt = training(f"{kind}_{name}", kind=kind, steps=2, video_share=0.5)
        if name == "both":
            prompt["load"]["inputs"]["checkpoint"] = "both.safetensors"
        entry = comfy.run(prompt)
        assert not errors(entry), errors(entry)
    log = comfy.log()[before:]
    assert "8 still samples of 8 frames, 96x96." in log
    assert log.count("1 moving and 8 still samples of 8 frames, 96x96.") == 2
    assert "both.safetensors has no motion adapter" not in log
    carried = open_checkpoint(STARTER).info.adapters
    assert ("layered.safetensors has no motion adapter" in log) == ("motion" not in carried)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../outside"}, "The adapter's name is '../outside'; give letters"),
        ({"name": "a.safetensors"}, "without .safetensors"),
        ({"name": ""}, "The adapter's name is ''"),
        ({"continue_from": "gone.safetensors"}, "gone.safetensors"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(comfy, loras, changes, message):
    prompt = training("refused")
    prompt["train"]["inputs"].update(changes)
    status, answer = comfy.post("/prompt", {"prompt": prompt, "client_id": "tests"})
    assert status == 400 and message in json.dumps(answer)


def test_wrong_layers_are_a_sentence_and_leave_no_file(comfy, loras):
    def changed(change) -> dict:
        prompt = training("wrong")
        change(prompt)
        return prompt

    def without_alpha(prompt):
        del prompt["train"]["inputs"]["alpha"]

    def too_short(prompt):
        prompt["train"]["inputs"]["frames"] = 12

    def other_length(prompt):
        prompt["orange"]["inputs"]["batch_size"] = 5

    def other_text(prompt):
        prompt["text"] = node("CLIPTextEncode", clip=["load", 1], text="a red circle")
        prompt["train"]["inputs"]["positive"] = ["text", 0]

    def uneven_lists(prompt):
        prompt["two"] = node("RebatchImages", images=["decode", 0], batch_size=4)
        prompt["three"] = node("RebatchImages", images=["orange", 0], batch_size=3)
        prompt["train"]["inputs"].update(foreground=["two", 0], background=["three", 0])

    cases = {
        uneven_lists: "foreground has 2 entries for 3 clips; connect one for all",
        without_alpha: "The foreground of the clip has no alpha; connect a MASK",
        too_short: "Clip 1 has 8 frames, but 12 a layer are needed",
        other_length: "differ in length (frames: foreground 8, background 5, alpha 8)",
        other_text: "does not come straight from Layer Prompts",
    }
    for change, message in cases.items():
        entry = comfy.run(changed(change))
        assert any(message in text for text in errors(entry)), (message, errors(entry))
    assert not list(loras.glob("wrong*"))


def test_every_type_that_weights_are_held_in_can_be_trained_on(loras):
    """In a process of its own, where the host can be told which type to take."""
    script = Path(__file__).with_name("host_training.py")
    carrying = loras.parent / "checkpoints" / "both.safetensors"
    command = [sys.executable, str(script), os.environ["COMFYUI_DIR"], str(carrying)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    own = found.pop()
    # The motion adapter stands beside the network, not in its weights; content is in them.
    assert own["beside"] == {"motion": 1.0} and own["apart"] < 1e-5, own
    assert [entry["type"] for entry in found] == ["float32", "bfloat16", "float16", "float8_e4m3fn"]
    for entry in found:
        assert entry["after"] < 0.8 * entry["before"], entry
        # Fewer bits, the same training: nearly the same direction in all of its weights.
        assert entry["cosine"] > 0.98, entry
