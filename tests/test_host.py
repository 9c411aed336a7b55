"""The nodes inside a real ComfyUI on the CPU (marker ``host``)."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import REPOSITORY

pytestmark = pytest.mark.host

API = sorted((REPOSITORY / "workflows" / "api").glob("*.json"))
NODES = {
    "LayerLoomLoadCheckpoint",
    "LayerLoomLayerPrompts",
    "LayerLoomLayeredLatent",
    "LayerLoomConditionLayers",
    "LayerLoomLayeredGuider",
    "LayerLoomDecodeLayers",
    "LayerLoomCompositeLayers",
    "LayerLoomSaveLayers",
    "LayerLoomLayerAttention",
    "LayerLoomLoraToggles",
    "LayerLoomLoadLora",
    "LayerLoomTrainLora",
    "LayerLoomLoadAnimator",
    "LayerLoomAnimateImage",
    "LayerLoomDualStreamGuider",
    "LayerLoomImageStreamGate",
    "LayerLoomLoadSegmenter",
    "LayerLoomClickMask",
    "LayerLoomLoadRegionAnimator",
    "LayerLoomClickAnimate",
    "LayerLoomHoldBackground",
    "LayerLoomBoxTrajectory",
    "LayerLoomBoxesFromMask",
    "LayerLoomLoadSubjectModel",
    "LayerLoomSubjectTrajectory",
}
STARTER = "starter/layered.safetensors"


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def generate(prefix: str, steps: int = 20, seed: int = 7, file_format: str = "png") -> dict:
    """The smallest workflow that makes layers with the starter."""
    return {
        "load": node("LayerLoomLoadCheckpoint", checkpoint=STARTER),
        "prompts": node(
            "LayerLoomLayerPrompts",
            clip=["load", 1],
            foreground="a red circle moving right",
            background="green stripes",
            blended="",
        ),
        "latent": node(
            "LayerLoomLayeredLatent", model=["load", 0], width=0, height=0, frames=0, batch_size=1
        ),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["prompts", 0],
            negative=["prompts", 1],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=2.5,
            sampler_name="ddim",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node(
            "LayerLoomDecodeLayers", samples=["sample", 0], vae=["load", 2], layers="auto"
        ),
        "save": node(
            "LayerLoomSaveLayers",
            foreground=["decode", 0],
            alpha=["decode", 1],
            background=["decode", 2],
            blended=["decode", 3],
            filename_prefix=prefix,
            format=file_format,
            fps=8.0,
        ),
    }


def errors(entry: dict) -> list[str]:
    """What a prompt's history says went wrong."""
    messages = entry["status"]["messages"]
    return [data["exception_message"] for kind, data in messages if kind == "execution_error"]


def saved_frames(comfy, prefix: str, layer: str) -> np.ndarray:
    """Frames of one layer that SaveLayers wrote as a PNG sequence."""
    from layerloom.engine.media import read_clip

    folder = (comfy.output / prefix).parent
    name = Path(prefix).name
    found = sorted(path for path in folder.glob(f"{name}*{layer}*") if path.is_dir())
    assert found, list(folder.iterdir())
    return read_clip(found[-1])


def test_all_nodes_register_with_help_on_every_socket(comfy):
    info = comfy.get("/object_info")
    assert {name for name in info if name.startswith("LayerLoom")} == NODES
    for name in NODES:
        entry = info[name]
        assert entry["category"].startswith("LayerLoom/")
        assert entry["description"]
        for group in entry["input"].values():
            for socket, (_, *options) in group.items():
                if isinstance(options[0] if options else None, dict):
                    assert options[0].get("tooltip"), (name, socket)
        assert len(entry["output_tooltips"]) == len(entry["output"]), name
        assert all(entry["output_tooltips"]), name
        help_page = comfy.bytes(f"/extensions/layerloom/docs/{name}.md").decode()
        assert len(help_page) > 200


def test_checkpoint_list_starts_with_the_starter(comfy):
    options = comfy.get("/object_info/LayerLoomLoadCheckpoint")["LayerLoomLoadCheckpoint"]
    combo = options["input"]["required"]["checkpoint"]
    names = combo[0] if isinstance(combo[0], list) else combo[1]["options"]
    assert names[0] == STARTER


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_every_api_workflow_runs(comfy, path):
    prompt = json.loads(path.read_text())
    for loader in prompt.values():
        starter = loader["inputs"].get("checkpoint")
        if starter and not (REPOSITORY / starter).is_file():
            pytest.skip(f"{starter} is not there")
    # One of them trains.
    entry = comfy.wait(comfy.queue(prompt), seconds=900)
    assert not errors(entry)
    assert entry["status"]["status_str"] == "success"
    assert any("layerloom_layers" in output for output in entry["outputs"].values())


def test_ksampler_makes_what_the_engine_makes(comfy, monkeypatch):
    from layerloom.engine import layered

    comfy.run(generate("same/clip", steps=20, seed=7))
    noise = torch.randn([1, 16, 8, 12, 12], generator=torch.manual_seed(7))
    monkeypatch.setattr(layered, "draw_noise", lambda *_: noise.transpose(1, 2))
    request = layered.LayeredRequest(
        "generate",
        "a red circle moving right",
        "green stripes",
        steps=20,
        guidance=2.5,
        sampler="ddim",
    )
    engine = layered.LayeredPipeline.open(None, device="cpu").run(request)
    for layer in ("foreground", "alpha", "background", "blended"):
        clip = saved_frames(comfy, "same/clip", layer)
        frames = clip.frames[..., 0] if layer == "alpha" else clip.frames
        error = np.square(frames.astype(float) - getattr(engine, layer).astype(float)).mean()
        # The host samples in sigma space up to 4518 in float32, the engine on the sphere.
        assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 40, layer


def progress_of(comfy, prompt_id: str) -> list[dict]:
    return [job for job in comfy.get("/queue")["queue_running"] if job[1] == prompt_id]


def test_cancel_stops_within_a_step_and_the_next_prompt_runs(comfy):
    # Larger than usual: a step takes longer than a request.
    prompt = generate("cancelled/clip", steps=1000, seed=1)
    prompt["latent"]["inputs"].update(width=160, height=160)
    more, entry = comfy.cancel(prompt, steps=1000, after=3)
    # The step that runs when the request arrives, and one that ended while it was under way.
    assert more <= 2
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert not list(comfy.output.glob("cancelled/*"))
    entry = comfy.run(generate("after_cancel/clip", steps=4))
    assert entry["status"]["status_str"] == "success"


def refused(comfy, prompt: dict) -> str:
    """The host's validation answer to a prompt it does not take."""
    status, answer = comfy.post("/prompt", {"prompt": prompt, "client_id": "tests"})
    assert status == 400, answer
    return json.dumps(answer["node_errors"])


def test_what_users_get_wrong_is_a_sentence_and_no_traceback(comfy, tmp_path):
    before = len(comfy.log())
    prompt = generate("wrong/clip")
    prompt["sample"]["inputs"]["latent_image"] = ["prompts", 0]
    assert "LATENT" in refused(comfy, prompt)

    prompt = generate("wrong/clip")
    prompt["prompts"]["inputs"]["foreground"] = "  "
    assert "The foreground prompt is empty" in refused(comfy, prompt)

    conditioned = {
        **generate("wrong/clip"),
        "image": node("EmptyImage", width=96, height=96, batch_size=3, color=255),
        "condition": node(
            "LayerLoomConditionLayers",
            model=["load", 0],
            vae=["load", 2],
            positive=["prompts", 0],
            negative=["prompts", 1],
            task="background",
            clip=["image", 0],
            width=0,
            height=0,
            frames=16,
            batch_size=1,
        ),
    }
    sample = conditioned["sample"]["inputs"]
    sample["positive"], sample["negative"] = ["condition", 0], ["condition", 1]
    sample["latent_image"] = ["condition", 2]
    missing = json.loads(json.dumps(conditioned))
    del missing["condition"]["inputs"]["clip"]
    assert "clip" in refused(comfy, missing)

    entry = comfy.run(conditioned)
    assert not list(comfy.output.glob("wrong/*"))
    assert entry["status"]["status_str"]
    assert "3 frames, but 16 a layer are needed" in comfy.log()[before:]

    other = comfy.base / "models" / "checkpoints" / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}, other)
    comfy.get("/object_info/LayerLoomLoadCheckpoint")
    prompt = generate("wrong/clip")
    prompt["load"]["inputs"]["checkpoint"] = "other.safetensors"
    assert "is not a checkpoint LayerLoom knows" in refused(comfy, prompt)
    other.unlink()
    assert "Traceback" not in comfy.log()[before:]


def test_given_layers_are_reused_in_the_hosts_sampler():
    """Branches of guidance in one batch and in two calls; nothing outlives its run."""
    script = Path(__file__).with_name("host_reuse.py")
    process = subprocess.run(
        [sys.executable, str(script), str(REPOSITORY)],
        cwd=os.environ["COMFYUI_DIR"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    line = next(line for line in process.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    (batch, tokens), *_ = result["full"]["calls"]
    assert batch == 2 and result["full"]["calls"] == [[2, tokens]] * 4
    fewer = min(call[1] for call in result["together, None"]["calls"])
    assert fewer < tokens
    steps = {"1": [tokens] * 4, "2": [tokens, fewer] * 2, "None": [tokens, fewer, fewer, fewer]}
    for refresh, expected in steps.items():
        together, apart = result[f"together, {refresh}"], result[f"apart, {refresh}"]
        assert together["calls"] == [[2, count] for count in expected]
        assert apart["calls"] == [[1, count] for count in expected for _ in "ab"]
        for run in (together, apart):
            # Computed at every step, it is what is computed without reuse, but for rounding.
            assert (run["to_isolated"] < 1e-4) == (refresh == "1")
            assert run["to_itself"] == 0
    assert result["too little"] == {"calls": [[2, tokens]] * 4, "to_isolated": 0}
    assert result["taken back"] == {"to_full": 0}
    asked, held = result["asked and held"]
    assert asked == held > 0
    assert result["left"] == [0, 0]
    assert "Nothing is kept between steps" in process.stderr + process.stdout


def test_reuse_is_a_switch_of_the_attention_node(comfy):
    def attend(**choice) -> dict:
        usual = {"model": ["load", 0], "backend": "host", "visibility": "full", "frame_window": 0}
        return node("LayerLoomLayerAttention", **{**usual, **choice})

    def run(prefix: str, **choice) -> np.ndarray:
        prompt = {
            **generate(prefix, steps=3),
            "attend": attend(**choice),
            "image": node("EmptyImage", width=96, height=96, batch_size=16, color=16750848),
            "condition": node(
                "LayerLoomConditionLayers",
                model=["load", 0],
                vae=["load", 2],
                positive=["prompts", 0],
                negative=["prompts", 1],
                task="background",
                clip=["image", 0],
                width=0,
                height=0,
                frames=0,
                batch_size=1,
            ),
        }
        sample = prompt["sample"]["inputs"]
        sample["model"], sample["latent_image"] = ["attend", 0], ["condition", 2]
        sample["positive"], sample["negative"] = ["condition", 0], ["condition", 1]
        assert not errors(comfy.run(prompt))
        return saved_frames(comfy, prefix, "blended").frames.astype(int)

    isolated = run("reuse/isolated", visibility="given_isolated")
    always = run("reuse/always", reuse_given=True, refresh_every=1)
    assert np.abs(always - isolated).max() <= 1
    kept = run("reuse/kept", reuse_given=True, refresh_every=0, reuse_memory=1.0)
    assert np.abs(kept - isolated).max() > 1
    before = len(comfy.log())
    nothing = {**generate("reuse/nothing", steps=2), "attend": attend(reuse_given=True)}
    nothing["sample"]["inputs"]["model"] = ["attend", 0]
    assert not errors(comfy.run(nothing))
    assert "nothing to reuse" in comfy.log()[before:]


def test_the_attention_node_runs_our_kernels_or_says_why_not(comfy):
    def run(backend: str) -> np.ndarray | None:
        prefix = f"attention/{backend}"
        prompt = generate(prefix, steps=2)
        prompt["attend"] = node(
            "LayerLoomLayerAttention",
            model=["load", 0],
            backend=backend,
            visibility="blended_sees_all",
            frame_window=0,
        )
        prompt["sample"]["inputs"]["model"] = ["attend", 0]
        comfy.run(prompt)
        if not list(comfy.output.glob(f"{prefix}*")):
            return None
        return saved_frames(comfy, prefix, "blended").frames.astype(int)

    hosts = run("host")
    for name in ("auto", "reference"):
        assert np.abs(run(name) - hosts).max() <= 1
    before = len(comfy.log())
    if run("triton") is None:
        assert "The attention backend triton cannot run here: " in comfy.log()[before:]
        assert "Traceback" not in comfy.log()[before:]


def resident(comfy) -> int:
    """Bytes that the server's process holds."""
    text = Path(f"/proc/{comfy.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024


def test_thirty_prompts_leave_memory_flat(comfy):
    if not Path(f"/proc/{comfy.process.pid}/status").exists():
        pytest.skip("reads the server's memory from /proc, which this system does not have")
    sizes = []
    for index in range(30):
        comfy.run(generate("many/clip", steps=4, seed=index))
        sizes.append(resident(comfy))
    # The first prompts fill caches of the host and of torch.
    assert sizes[-1] < sizes[9] * 1.03, [size >> 20 for size in sizes]


def test_latents_can_be_saved_loaded_and_batched_by_core_nodes(comfy):
    prompt = generate("latents/clip", steps=6)
    prompt["keep"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/kept")
    entry = comfy.run(prompt)
    assert not errors(entry)
    saved = sorted((comfy.output / "latents").glob("kept*.latent"))[-1]
    (comfy.base / "input" / "kept.latent").write_bytes(saved.read_bytes())
    prompt = generate("latents/again", steps=6)
    for name in ("sample", "latent", "prompts"):
        del prompt[name]
    prompt["read"] = node("LoadLatent", latent="kept.latent")
    prompt["twice"] = node("LatentBatch", samples1=["read", 0], samples2=["read", 0])
    prompt["decode"]["inputs"]["samples"] = ["twice", 0]
    entry = comfy.run(prompt)
    assert not errors(entry)
    first = saved_frames(comfy, "latents/clip", "background").frames
    again = saved_frames(comfy, "latents/again", "background").frames
    assert len(again) == 2 * len(first)
    assert np.abs(again[: len(first)].astype(int) - first).max() <= 1


def test_previews_show_the_blended_layer(comfy):
    import asyncio

    import aiohttp
    from PIL import Image

    async def last_preview() -> bytes:
        picture = b""
        url = comfy.url.replace("http", "ws") + "/ws?clientId=tests"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            comfy.queue(generate("preview/clip", steps=12, seed=3))
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    if message.data[:4] == b"\x00\x00\x00\x01":
                        picture = message.data[8:]
                elif json.loads(message.data)["type"] == "execution_success":
                    return picture
        raise AssertionError("the socket closed")

    picture = Image.open(io.BytesIO(asyncio.run(last_preview()))).convert("RGB")
    blended = saved_frames(comfy, "preview/clip", "blended").frames
    small = np.asarray(picture.resize((12, 12), Image.BOX), dtype=float)
    frame = np.asarray(Image.fromarray(blended[5]).resize((12, 12), Image.BOX), dtype=float)
    likeness = np.corrcoef(small.ravel(), frame.ravel())[0, 1]
    other = saved_frames(comfy, "preview/clip", "foreground").frames[5]
    other = np.asarray(Image.fromarray(other).resize((12, 12), Image.BOX), dtype=float)
    assert likeness > 0.8
    assert likeness > np.corrcoef(small.ravel(), other.ravel())[0, 1]


def test_start_up_imports_nothing_heavy(comfy):
    """The host measures each pack's import; the pack itself leaves torch's heavy friends alone."""
    assert re.search(r"seconds: .*layerloom", comfy.log())
    assert "LayerLoom's nodes could not be loaded" not in comfy.log()
