"""DynamiCrafter inside a real ComfyUI on the CPU (marker ``host``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import REPOSITORY
from PIL import Image
from test_host import errors, generate, node, refused, resident
from tiny_animator import SIDE, write_animator

from layerloom.engine.checkpoints.golden import load_case

pytestmark = pytest.mark.host
TEMPLATES = sorted((REPOSITORY / "workflows" / "api").glob("animate_*.json"))


@pytest.fixture(scope="module")
def official(tmp_path_factory, golden_dir) -> Path:
    """A folder with whole tiny checkpoints in the official layout."""
    folder = tmp_path_factory.mktemp("official")
    for name in ("dc_ckpt_tiny_512like", "dc_ckpt_tiny_256like"):
        state = load_case(golden_dir, name).weights("")
        torch.save({"state_dict": state}, folder / f"{name}.ckpt")
    write_animator(folder / "tiny.safetensors")
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


def test_pictures_become_conditions_as_the_modes_say(measured):
    found = measured["inputs"]
    assert found["animate"]["latent"] == [16, 4, 8, 8]
    assert found["animate"]["filled"] == list(range(16))
    assert found["long"]["latent"][0] == 40 and found["long"]["windows"] == 8
    between, loop = found["interpolate"], found["loop"]
    # Zeros between the ends; windows would tear them apart.
    assert between["filled"] == [0, 8] and between["first"] > 0.01
    assert loop["filled"] == [0, 15] and loop["first"] == 0 and loop["kept"] == 15
    assert all(found[name]["windows"] is None for name in ("animate", "interpolate", "loop"))
    # Two clips at once, their given frames held by the host's own mask.
    assert loop["latent"][0] == 32 and loop["samples"] > 0.1
    assert [i for i, kept in enumerate(loop["mask"]) if kept] == [0, 15, 16, 31]
    for name in ("animate", "long", "interpolate", "loop"):
        assert found[name]["picture in"] == [False, True]
        assert found[name]["motion"] == 24


def test_what_is_done_to_pictures_is_said(measured):
    found = measured["inputs"]
    between = " ".join(found["interpolate"]["notes"])
    assert "Only the first of 2 pictures is the start image." in between
    assert "The end image of 40x80 is resized to 64x64, and 50% of its height" in between
    assert "Motion 24 is the fps: 15 to 30, smaller moves more." in between
    assert "trained on 16 frames at once; 9 may look worse" in between
    assert "keep 15 (output frames)" in " ".join(found["loop"]["notes"])


def test_what_does_not_fit_is_one_sentence(measured):
    expected = {
        "cropped": "shows the start image's middle alone; set crop to none",
        "vae": "The VAE made latents of shape (16, 2, 2) and tiny.safetensors takes (4, 8, 8)",
        "vision": "The image encoder makes tokens 7 wide and tiny.safetensors reads 20",
        "text": "The prompts are 768 numbers wide and tiny.safetensors reads 16",
        "loop": "A loop ends on its first image, so it takes no end image",
        "short": "1 frames are too few to go from one image to the next",
        "overlap": "Windows of 16 frames cannot overlap by 16",
        "motion": "The motion is -1",
    }
    assert measured["inputs"]["wrong"].keys() == expected.keys()
    for name, text in measured["inputs"]["wrong"].items():
        assert text.startswith("LayerLoomError: ") and expected[name] in text, text


def test_a_whole_pictures_tokens_and_the_starters_parts_are_taken_as_they_are(measured):
    found = measured["inputs"]
    assert found["whole output"] == found["other output"] == 0
    # The engine's own codec makes the same of frames and latents.
    assert max(found["vae"]) <= 1e-6
    for size, first, middle in found["preview"]:
        assert size == [12, 8] and first and not middle


# --- the nodes in a graph -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animator(comfy) -> str:
    """A tiny whole file in the server's models, and pictures among its inputs."""
    folder = comfy.base / "models" / "checkpoints"
    write_animator(folder / "animator.safetensors")
    rng = np.random.default_rng(0)
    for name, size in (("start", (SIDE, SIDE)), ("end", (48, 80))):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.BICUBIC)
        picture.save(comfy.base / "input" / f"{name}.png")
    comfy.get("/object_info/LayerLoomLoadAnimator")
    return "animator.safetensors"


def animate(prefix: str, steps: int = 3, seed: int = 7, cfg: float = 2.0, **inputs) -> dict:
    """The smallest workflow that animates a picture; ``inputs`` go to Animate Image."""
    usual = {
        "loop": False,
        "frames": 0,
        "motion": 0.0,
        "width": 0,
        "height": 0,
        "overlap": 0,
        "exact_frames": False,
        "batch_size": 1,
    }
    return {
        "load": node("LayerLoomLoadAnimator", checkpoint="animator.safetensors", variant="auto"),
        "start": node("LoadImage", image="start.png"),
        "end": node("LoadImage", image="end.png"),
        "text": node("CLIPTextEncode", clip=["load", 1], text="a red circle moving left"),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "animate": node(
            "LayerLoomAnimateImage",
            **{
                "model": ["load", 0],
                "positive": ["text", 0],
                "negative": ["empty", 0],
                "clip_vision": ["load", 2],
                "vae": ["load", 3],
                "start_image": ["start", 0],
                **usual,
                **inputs,
            },
        ),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["animate", 0],
            negative=["animate", 1],
            latent_image=["animate", 3],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 3]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
    }


def frames(comfy, prompt: dict) -> np.ndarray:
    """Frames [T, H, W, 3] of a prompt that saves pictures."""
    entry = comfy.run(prompt)
    assert not errors(entry), errors(entry)
    files = entry["outputs"]["save"]["images"]
    folder = comfy.output
    return np.stack(
        [np.asarray(Image.open(folder / f["subfolder"] / f["filename"])) for f in files]
    )


def decibels(made: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(made.astype(float) - wanted.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def test_ksampler_makes_what_the_engine_makes(comfy, animator, monkeypatch):
    from layerloom.engine import animate as engine
    from layerloom.engine.animate_request import AnimateRequest

    made = frames(comfy, animate("animated/same", steps=20))
    noise = torch.randn([16, 4, 8, 8], generator=torch.manual_seed(7))
    monkeypatch.setattr(engine, "draw_each", lambda *_: noise.transpose(0, 1)[None])
    pipeline = engine.AnimatePipeline.open(
        comfy.base / "models" / "checkpoints" / animator, device="cpu"
    )
    image = np.asarray(Image.open(comfy.base / "input" / "start.png").convert("RGB"))
    request = AnimateRequest(
        image, "a red circle moving left", text_scale=2.0, rescale=0.0, eta=0.0, steps=20
    )
    wanted = pipeline.run(request).frames
    other = pipeline.run(request.__class__(**{**vars(request), "motion": 15.0})).frames
    # The host ends at clean frames, the release at its first timestep (ahead of 3 % noise).
    assert decibels(made, wanted) >= 40
    assert decibels(made, wanted) > decibels(made, other) + 3


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_templates_run_with_any_animator(comfy, animator, path):
    prompt = json.loads(path.read_text())
    for entry in prompt.values():
        if entry["class_type"] == "LayerLoomLoadAnimator":
            entry["inputs"]["checkpoint"] = animator
        if "steps" in entry["inputs"]:
            entry["inputs"]["steps"] = 2
    before = len(comfy.log())
    entry = comfy.run(prompt)
    assert not errors(entry), errors(entry)
    saved = [out for out in entry["outputs"].values() if "layerloom_layers" in out]
    assert saved and "Traceback" not in comfy.log()[before:]


def guided(prompt: dict, sampler: str = "euler", **scales) -> dict:
    """The same sampled by the guider behind a gate."""
    values = {"text_scale": 3.0, "image_scale": 1.5, "rescale": 0.5, **scales}
    prompt["gate"] = node(
        "LayerLoomImageStreamGate", model=["load", 0], strength=0.5, layers="middle", layer_list=""
    )
    prompt["guider"] = node(
        "LayerLoomDualStreamGuider",
        model=["gate", 0],
        positive=["animate", 0],
        image_only=["animate", 2],
        negative=["animate", 1],
        **values,
    )
    prompt["noise"] = node("RandomNoise", noise_seed=7)
    prompt["sampler"] = node("KSamplerSelect", sampler_name=sampler)
    prompt["sigmas"] = node(
        "BasicScheduler", model=["gate", 0], scheduler="simple", steps=3, denoise=1.0
    )
    prompt["sample"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=["sigmas", 0],
        latent_image=["animate", 3],
    )
    return prompt


def test_the_guider_samples_and_equal_scales_are_plain_guidance(comfy, animator):
    equal = {"text_scale": 2.0, "image_scale": 2.0, "rescale": 0.0}
    prompt = guided(animate("animated/equal"), **equal)
    prompt["gate"]["inputs"]["strength"] = 1.0
    plain = frames(comfy, animate("animated/plain"))
    assert np.abs(frames(comfy, prompt).astype(int) - plain).max() <= 1
    made = frames(comfy, guided(animate("animated/guided")))
    assert made.shape == (16, SIDE, SIDE, 3)
    assert np.abs(made.astype(int) - plain).max() > 1


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "uni_pc", "heun"])
def test_other_samplers_of_the_host_work(comfy, animator, sampler):
    made = frames(comfy, guided(animate(f"animated/{sampler}"), sampler))
    # A picture, not the black of broken numbers.
    assert made.std() > 5


def test_modes_and_lengths(comfy, animator):
    assert len(frames(comfy, animate("animated/long", frames=23, overlap=4))) == 23
    assert len(frames(comfy, animate("animated/two", batch_size=2))) == 32
    between = frames(comfy, animate("animated/between", frames=6, end_image=["end", 0]))
    assert len(between) == 6
    loop = animate("animated/loop", frames=7, loop=True)
    loop["cut"] = node("ImageFromBatch", image=["decode", 0], batch_index=0, length=["animate", 4])
    loop["save"]["inputs"]["images"] = ["cut", 0]
    assert len(frames(comfy, loop)) == 7
    exact = animate("animated/exact", frames=6, end_image=["end", 0], exact_frames=True)
    kept = frames(comfy, exact)
    code = animate("animated/code", frames=6)
    for name in ("animate", "sample"):
        del code[name]
    code["encode"] = node("VAEEncode", pixels=["start", 0], vae=["load", 3])
    code["decode"]["inputs"]["samples"] = ["encode", 0]
    (own,) = frames(comfy, code)
    assert np.abs(kept[0].astype(int) - own).max() <= 1
    assert np.abs(between[0].astype(int) - own).max() > 1


def test_cancel_stops_within_a_step_and_the_next_prompt_runs(comfy, animator):
    prompt = animate("animated/cancelled", steps=1000, frames=48)
    more, entry = comfy.cancel(prompt, steps=1000, after=2)
    assert more <= 1
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert len(frames(comfy, animate("animated/after"))) == 16


def test_twenty_prompts_leave_memory_flat(comfy, animator):
    if not Path(f"/proc/{comfy.process.pid}/status").exists():
        pytest.skip("reads the server's memory from /proc, which this system does not have")
    sizes = []
    for index in range(20):
        frames(comfy, guided(animate(f"animated/many{index}", seed=index, motion=15.0 + index)))
        sizes.append(resident(comfy))
    # The first prompts fill caches of the host and of torch.
    assert sizes[-1] < sizes[6] * 1.03, [size >> 20 for size in sizes]


def test_what_users_get_wrong_is_a_sentence(comfy, animator):
    layered = node("LayerLoomLoadCheckpoint", checkpoint="starter/layered.safetensors")
    wrong = {
        "is LayeredModel, which animates no pictures": {"model": ["layered", 0]},
        "The VAE made latents of shape": {"vae": ["layered", 2]},
        "The prompts are 64 numbers wide": {"positive": ["other", 0]},
        "A loop ends on its first image": {"loop": True, "end_image": ["end", 0]},
        "shows the start image's middle alone": {
            "start_image": ["end", 0],
            "clip_vision_output": ["seen", 0],
        },
    }
    for sentence, inputs in wrong.items():
        before = len(comfy.log())
        prompt = animate("animated/wrong", **inputs) | {
            "layered": layered,
            "other": node("CLIPTextEncode", clip=["layered", 1], text="a star"),
            "seen": node(
                "CLIPVisionEncode", clip_vision=["load", 2], image=["end", 0], crop="center"
            ),
        }
        comfy.run(prompt)
        log = comfy.log()[before:]
        assert sentence in log and "Traceback" not in log, log[-2000:]
        assert not list(comfy.output.glob("animated/wrong*"))
    prompt = animate("animated/wrong", frames=-1)
    assert "frames" in refused(comfy, prompt)
    prompt = animate("animated/wrong")
    prompt["load"]["inputs"]["checkpoint"] = "starter/animate.safetensor"
    assert "starter/animate.safetensor" in refused(comfy, prompt)
    prompt = animate("animated/wrong")
    prompt["load"]["inputs"]["variant"] = "256"
    assert "says it is tiny, not 256" in refused(comfy, prompt)
    prompt = generate("animated/wrong")
    prompt["load"]["inputs"]["checkpoint"] = animator
    assert "load it with Load Animator" in refused(comfy, prompt)


def test_prompts_without_a_picture_or_with_another_latent_are_told_what_to_do(comfy, animator):
    prompt = animate("animated/bare")
    prompt["sample"]["inputs"]["positive"] = ["text", 0]
    assert "put an Animate Image node between the prompts" in " ".join(errors(comfy.run(prompt)))
    prompt = animate("animated/bare")
    prompt["latent"] = node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=9)
    prompt["sample"]["inputs"]["latent_image"] = ["latent", 0]
    assert "take the latent from the same Animate Image" in " ".join(errors(comfy.run(prompt)))


def test_parts_that_a_file_lacks_say_which_loader_to_use(comfy, animator, official):
    target = comfy.base / "models" / "checkpoints" / "bare.ckpt"
    target.write_bytes((official / "dc_ckpt_tiny_512like.ckpt").read_bytes())
    comfy.get("/object_info/LayerLoomLoadAnimator")
    prompt = animate("animated/parts")
    prompt["load"]["inputs"]["checkpoint"] = "bare.ckpt"
    before = len(comfy.log())
    entry = comfy.run(prompt)
    assert entry["status"]["status_str"]
    said = json.dumps(entry["status"]["messages"]) + comfy.log()[before:]
    assert "may be 512 or 512_interp, whose weights look alike" in said
    assert "Traceback" not in said
    assert not list(comfy.output.glob("animated/parts*"))
