"""Regions animated inside a real ComfyUI, against the engine (marker ``host``)."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clicker import SETTINGS, SIDE, write_clicker
from tiny_segmenter import write_segmenter

from layerloom.engine import click
from layerloom.engine.click_request import ClickRequest, Region
from layerloom.engine.sampling.ddim import leading_table

pytestmark = pytest.mark.host

MODEL = "tiny_click.safetensors"
STEPS, GUIDANCE, SEED = 4, 2.0, 7


@pytest.fixture(scope="module")
def host(comfy):
    """The running ComfyUI with a tiny region animator, a picture and two masks."""
    write_clicker(comfy.base / "models" / "checkpoints" / MODEL)
    picture, masks = scene()
    Image.fromarray(picture).save(comfy.base / "input" / "still.png")
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(comfy.base / "input" / f"mask{number}.png")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(comfy.base / "input" / "none.png")
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(comfy.base / "input" / "small.png")
    return comfy


def scene() -> tuple[np.ndarray, list[np.ndarray]]:
    picture = np.full((SIDE, SIDE, 3), 60, np.uint8)
    masks = []
    for y, x, colour in ((4, 4, (220, 40, 40)), (18, 16, (40, 60, 220))):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        picture[y : y + 10, x : x + 10], mask[y : y + 10, x : x + 10] = colour, 255
        masks.append(mask)
    return picture, masks


REGIONS = [("moving right", 2.0, 0), ("jumps", 3.5, 1)]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(regions=REGIONS[:1], caption: str = "", **changes) -> dict:
    """Loader, a Click to Animate node for each region, KSampler, frames saved."""
    made = {
        "load": node("LayerLoomLoadRegionAnimator", checkpoint=MODEL, base="[None]"),
        "image": node("LoadImage", image="still.png"),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
    }
    last = None
    for number, (phrase, strength, mask) in enumerate(regions):
        name = mask if isinstance(mask, str) else f"mask{mask}.png"
        made[f"mask{number}"] = node("LoadImageMask", image=name, channel="red")
        made[f"phrase{number}"] = node("CLIPTextEncode", clip=["load", 1], text=phrase)
        given = {
            "model": ["load", 0],
            "vae": ["load", 2],
            "image": ["image", 0],
            "mask": [f"mask{number}", 0],
            "phrase": [f"phrase{number}", 0],
            "negative": ["negative", 0],
            "strength": strength,
            "frames": 0,
            "width": 0,
            "height": 0,
            "batch_size": 1,
        }
        if caption:
            made["caption"] = node("CLIPTextEncode", clip=["load", 1], text=caption)
            given["caption"] = ["caption", 0]
        if last:
            given["other_regions"] = [last, 0]
        last = f"animate{number}"
        made[last] = node("LayerLoomClickAnimate", **{**given, **changes})
    made["sample"] = node(
        "KSampler",
        model=["load", 0],
        positive=[last, 0],
        negative=[last, 1],
        latent_image=[last, 2],
        seed=SEED,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        denoise=1.0,
    )
    made["decode"] = node("VAEDecode", samples=["sample", 0], vae=["load", 2])
    made["save"] = node("SaveImage", images=["decode", 0], filename_prefix="clips/click")
    return made


def frames(host, prompt: dict) -> np.ndarray:
    entry = host.run(prompt)
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[-2000:]
    pictures = [
        Image.open(io.BytesIO(host.file(file))).convert("RGB")
        for file in entry["outputs"]["save"]["images"]
    ]
    return np.stack([np.asarray(picture) for picture in pictures])


def engine_frames(host, monkeypatch, regions, caption: str = "", **changes) -> np.ndarray:
    """The engine's clip from the host's noise."""
    pipeline = click.ClickPipeline.open(host.base / "models" / "checkpoints" / MODEL, device="cpu")
    table = leading_table(pipeline.schedule, STEPS)
    # The host begins with as much noise as the first timestep has, the released sampler with all.
    begin = float((1 - pipeline.schedule.alphas_cumprod[table.timesteps[0]]).sqrt())

    def noise(shape, generators, device):
        channels, count, height, width = shape
        drawn = torch.randn([count, channels, height, width], generator=torch.manual_seed(SEED))
        return begin * drawn.transpose(0, 1)[None]

    monkeypatch.setattr(click, "draw_each", noise)
    picture, masks = scene()
    wanted = [Region(masks[m].astype(np.float32) / 255, p, s) for p, s, m in regions]
    given = {"prompt": caption, "steps": STEPS, "guidance": GUIDANCE, **changes}
    request = ClickRequest(picture, wanted, **given)
    return pipeline.run(request).frames


def decibels(made: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(made.astype(float) - wanted.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("count", [1, 2], ids=["one region", "two regions"])
@pytest.mark.parametrize("caption", ["", "a red circle moving left"], ids=["phrase", "caption"])
def test_ksampler_makes_what_the_engine_makes(host, monkeypatch, count, caption):
    made = frames(host, graph(REGIONS[:count], caption))
    wanted = engine_frames(host, monkeypatch, REGIONS[:count], caption)
    assert made.shape == wanted.shape == (SETTINGS.frames, SIDE, SIDE, 3)
    # The host steps in sigma space in float32, the engine on the sphere.
    assert decibels(made, wanted) >= 40


def test_regions_phrases_and_strengths_matter(host):
    base = frames(host, graph())
    for other in (
        [("moving left", 2.0, 0)],
        [("moving right", 3.5, 0)],
        [("moving right", 2.0, 1)],
        REGIONS,
    ):
        assert decibels(frames(host, graph(other)), base) < 60


def test_other_samplers_and_several_clips_run(host):
    prompt = graph(REGIONS, batch_size=2)
    prompt["sample"]["inputs"].update(sampler_name="dpmpp_2m", scheduler="simple")
    assert len(frames(host, prompt)) == 2 * SETTINGS.frames


def windowed(prompt: dict, length: int) -> dict:
    """The same sampled through the host's context windows."""
    prompt["windows"] = node(
        "ContextWindowsManual",
        model=["load", 0],
        context_length=length,
        context_overlap=2,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        dim=0,
        freenoise=False,
        cond_retain_index_list="",
        split_conds_to_windows=False,
        latent_retain_index_list="",
        causal_window_fix=True,
    )
    prompt["sample"]["inputs"]["model"] = ["windows", 0]
    return prompt


def test_the_hosts_context_windows_see_a_piece_of_the_clip(host):
    plain = frames(host, graph(REGIONS, frames=8))
    made = frames(host, windowed(graph(REGIONS, frames=8), 4))
    assert made.shape == plain.shape and decibels(made, plain) < 60
    assert np.array_equal(frames(host, windowed(graph(REGIONS, frames=8), 8)), plain)


def test_a_picture_in_the_first_frame_alone_allows_no_context_windows(host):
    settings = replace(SETTINGS, picture="first")
    write_clicker(host.base / "models" / "checkpoints" / "tiny_first.safetensors", settings)
    prompt = windowed(graph(frames=8), 4)
    prompt["load"]["inputs"]["checkpoint"] = "tiny_first.safetensors"
    assert "sample without context windows" in said(host, prompt)


def said(host, prompt: dict) -> str:
    """What a run that made nothing put on its nodes and in the log."""
    before = len(host.log())
    entry = host.run(prompt)
    assert "save" not in entry["outputs"]
    return host.log()[before:]


def test_what_users_get_wrong_is_a_sentence(host):
    for changed, sentence in (
        (graph([("moving right", 2.0, "none.png")]), "The mask is empty"),
        (graph([("moving right", 2.0, "small.png")]), "The mask is 16x16"),
        (graph(frames=64), "has positions for"),
        (graph(other_regions=["phrase0", 0]), "other regions holds none"),
    ):
        told = said(host, changed)
        assert sentence in told and "Traceback" not in told
    prompt = graph()
    prompt["sample"]["inputs"]["positive"] = ["phrase0", 0]
    assert "put a Click to Animate node" in said(host, prompt)


def test_other_models_are_told_apart(host):
    wrong = graph()
    wrong["load"]["inputs"]["checkpoint"] = "starter/layered.safetensors"
    status, answer = host.post("/prompt", {"prompt": wrong, "client_id": "tests"})
    assert status == 400
    assert "Traceback" not in json.dumps(answer)
    other = graph()
    other["layered"] = node("LayerLoomLoadCheckpoint", checkpoint="starter/layered.safetensors")
    other["animate0"]["inputs"]["model"] = ["layered", 0]
    assert "which animates no regions" in said(host, other)


def test_a_segmenter_is_no_model_for_samplers(host):
    pytest.importorskip("segment_anything")
    sams = host.base / "models" / "sams"
    sams.mkdir(parents=True, exist_ok=True)
    write_segmenter(sams / "sampled.pth")
    prompt = graph()
    prompt["segmenter"] = node("LayerLoomLoadSegmenter", checkpoint="sampled.pth")
    prompt["sample"]["inputs"]["model"] = ["segmenter", 0]
    assert "connect it to Click Mask" in said(host, prompt)


def test_the_background_is_held_as_the_engine_holds_it(host, monkeypatch):
    prompt = graph()
    prompt["held"] = node(
        "LayerLoomHoldBackground",
        images=["decode", 0],
        image=["image", 0],
        mask=["mask0", 0],
        vae=["load", 2],
    )
    prompt["save"]["inputs"]["images"] = ["held", 0]
    made = frames(host, prompt)
    wanted = engine_frames(host, monkeypatch, REGIONS[:1], hold_background=True)
    assert decibels(made, wanted) >= 30
    picture, _ = scene()
    # Random weights move much, yet not all: what is still is the picture's own.
    same = (made == picture).all(axis=(0, -1))
    assert np.array_equal(same, (wanted == picture).all(axis=(0, -1)))
