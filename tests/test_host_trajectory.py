"""Subjects along boxes inside a real ComfyUI, against the engine (marker ``host``)."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import REPOSITORY
from PIL import Image
from test_host import resident
from test_host_click_animate import windowed
from tiny_director import SETTINGS, SIDE, write_director

from layerloom.engine import trajectory
from layerloom.engine.conditioning.box_sources import between
from layerloom.engine.sampling.guidance import DROPS
from layerloom.engine.trajectory_request import Subject, TrajectoryRequest

pytestmark = pytest.mark.host

MODEL = "tiny_mover.safetensors"
# As the starter is: v, a schedule that ends in pure noise, placed subjects, guidance over the base.
PURE = "tiny_pure_noise.safetensors"
STEPS, GUIDANCE, SEED = 4, 2.0, 7
PROMPT = "a sprite moving over blue stripes"
PICTURE = 24
TEMPLATES = sorted((REPOSITORY / "workflows" / "api").glob("subject_*.json"))
# Two paths that overlap in the middle of the clip.
PATHS = between((0, 0.1, 0.5, 0.5), (0.5, 0.4, 0.5, 0.5), SETTINGS.frames).joined(
    between((0.5, 0.1, 0.5, 0.6), (0, 0.4, 0.5, 0.5), SETTINGS.frames)
)


@pytest.fixture(scope="module")
def host(comfy):
    """The running ComfyUI with a tiny model, two subjects' pictures and their masks."""
    folder = comfy.base / "models" / "checkpoints"
    write_director(folder / MODEL)
    starters = {"placed_reference": True, "guidance_drops": "all"}
    pure = replace(SETTINGS, prediction="v", zero_terminal_snr=True, **starters)
    write_director(folder / PURE, settings=pure)
    for number, (picture, mask) in enumerate(subjects()):
        Image.fromarray(picture).save(comfy.base / "input" / f"subject{number}.png")
        Image.fromarray(mask).save(comfy.base / "input" / f"outline{number}.png")
    Image.fromarray(np.zeros((PICTURE, PICTURE), np.uint8)).save(comfy.base / "input/nothing.png")
    return comfy


def subjects() -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for y, x, colour in ((4, 4, (220, 40, 40)), (9, 7, (40, 60, 220))):
        picture = np.full((PICTURE, PICTURE, 3), 60, np.uint8)
        mask = np.zeros((PICTURE, PICTURE), np.uint8)
        picture[y : y + 12, x : x + 10], mask[y : y + 12, x : x + 10] = colour, 255
        found.append((picture, mask))
    return found


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(count: int = 1, boxes: str | None = None, masked: bool = True, **changes) -> dict:
    """Loader, Box Trajectory, a Subject Trajectory node for each subject, KSampler, frames."""
    made = {
        "load": node("LayerLoomLoadSubjectModel", checkpoint=MODEL, base="[None]"),
        "boxes": node(
            "LayerLoomBoxTrajectory",
            frames=SETTINGS.frames,
            width=SIDE,
            height=SIDE,
            subject=0,
            boxes=PATHS.to_json() if boxes is None else boxes,
        ),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=""),
    }
    last = None
    for number in range(count):
        made[f"image{number}"] = node("LoadImage", image=f"subject{number}.png")
        made[f"mask{number}"] = node("LoadImageMask", image=f"outline{number}.png", channel="red")
        given = {
            "model": ["load", 0],
            "clip": ["load", 1],
            "vae": ["load", 2],
            "image": [f"image{number}", 0],
            "boxes": ["boxes", 3],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "subject": number + 1,
            "reference_weight": 0.75,
            "frames": 0,
            "width": 0,
            "height": 0,
            "batch_size": 1,
        }
        if masked:
            given["mask"] = [f"mask{number}", 0]
        if last:
            given["other_subjects"] = [last, 0]
        last = f"subject{number}"
        made[last] = node("LayerLoomSubjectTrajectory", **{**given, **changes})
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
    made["save"] = node("SaveImage", images=["decode", 0], filename_prefix="clips/subjects")
    return made


def frames(host, prompt: dict) -> np.ndarray:
    entry = host.run(prompt)
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[-2000:]
    pictures = [
        Image.open(io.BytesIO(host.file(file))).convert("RGB")
        for file in entry["outputs"]["save"]["images"]
    ]
    return np.stack([np.asarray(picture) for picture in pictures])


def engine_frames(
    host, monkeypatch, count: int, masked: bool = True, model: str = MODEL, **changes
) -> np.ndarray:
    """The engine's clip from the host's noise, ended where the host ends."""
    path = host.base / "models" / "checkpoints" / model
    pipeline = trajectory.TrajectoryPipeline.open(path, device="cpu")
    usual = trajectory.ddim_table

    def ended_clean(*given, **options):
        table = usual(*given, **options)
        # The paper's sampler ends at the schedule's first step, the host's without noise.
        alphas, directions = table.alphas_prev.clone(), table.directions.clone()
        alphas[-1], directions[-1] = 1, 0
        return replace(table, alphas_prev=alphas, directions=directions)

    spacing = "trailing" if pipeline.settings.zero_terminal_snr else "uniform"
    first = usual(pipeline.schedule, STEPS, spacing, eta=0.0).timesteps[0]
    # The host begins with as much noise as the first timestep has, the released sampler with all.
    begin = float((1 - pipeline.schedule.alphas_cumprod[first]).sqrt())

    def noise(shape, generators, device):
        channels, length, height, width = shape
        drawn = torch.randn([length, channels, height, width], generator=torch.manual_seed(SEED))
        return begin * drawn.transpose(0, 1)[None]

    monkeypatch.setattr(trajectory, "ddim_table", ended_clean)
    monkeypatch.setattr(trajectory, "draw_each", noise)
    wanted = [
        Subject(picture, mask.astype(np.float32) / 255 if masked else None)
        for picture, mask in subjects()[:count]
    ]
    given = {"steps": STEPS, "guidance": GUIDANCE, **changes}
    paths = replace(PATHS, tracks=PATHS.tracks[:count])
    return pipeline.run(TrajectoryRequest(wanted, paths, PROMPT, **given)).frames


def decibels(made: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(made.astype(float) - wanted.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("drops", DROPS)
@pytest.mark.parametrize("count", [1, 2], ids=["one subject", "two subjects"])
def test_ksampler_makes_what_the_engine_makes(host, monkeypatch, count, drops):
    made = frames(host, graph(count, guidance_drops=drops))
    wanted = engine_frames(host, monkeypatch, count, guidance_drops=drops)
    assert made.shape == wanted.shape == (SETTINGS.frames, SIDE, SIDE, 3)
    # The host steps in sigma space in float32, the engine on the sphere.
    assert decibels(made, wanted) >= 40


def test_what_guidance_drops_is_the_checkpoints_unless_said(host):
    trained = frames(host, graph())
    others = {drops: frames(host, graph(guidance_drops=drops)) for drops in DROPS}
    assert np.array_equal(others[SETTINGS.guidance_drops], trained)
    assert not np.array_equal(others["text"], others["all"])
    # Without cfg there is nothing to compare with.
    alone = [graph(guidance_drops=drops) for drops in DROPS]
    for prompt in alone:
        prompt["sample"]["inputs"]["cfg"] = 1.0
    assert np.array_equal(*(frames(host, prompt) for prompt in alone))


@pytest.mark.parametrize("drops", DROPS)
def test_context_windows_go_over_what_guidance_compares_with(host, drops):
    def prompt():
        return graph(frames=8, guidance_drops=drops)

    plain, made = frames(host, prompt()), frames(host, windowed(prompt(), 4))
    assert made.shape == plain.shape and decibels(made, plain) < 60
    assert np.array_equal(frames(host, windowed(prompt(), 8)), plain)


def test_a_schedule_that_ends_in_pure_noise_is_sampled_as_in_the_engine(host, monkeypatch):
    prompt = graph()
    prompt["load"]["inputs"]["checkpoint"] = PURE
    prompt["sample"]["inputs"]["scheduler"] = "simple"
    wanted = engine_frames(host, monkeypatch, 1, model=PURE)
    found = decibels(frames(host, prompt), wanted)
    assert found >= 50
    # The timesteps of the other schedules make another clip, so this can tell them apart.
    prompt["sample"]["inputs"]["scheduler"] = "ddim_uniform"
    assert decibels(frames(host, prompt), wanted) < found - 1, found


def test_settings_reach_the_network_as_in_the_engine(host, monkeypatch):
    prompt = graph(masked=False, reference_weight=0.25, frames=6, width=48, height=32)
    wanted = engine_frames(
        host, monkeypatch, 1, False, reference_weight=0.25, frames=6, width=48, height=32
    )
    assert wanted.shape == (6, 32, 48, 3)
    assert decibels(frames(host, prompt), wanted) >= 40
    for note in ("retimed to 6", "was trained on 32x32", "There is no mask"):
        assert note in host.log()
    # A word that the negative prompt says reaches the text and not the subject's own features.
    prompt = graph()
    prompt["negative"]["inputs"]["text"] = "blue"
    wanted = engine_frames(host, monkeypatch, 1, negative="blue")
    assert decibels(frames(host, prompt), wanted) >= 40


def test_boxes_of_the_hosts_kind_say_the_same(host):
    base = frames(host, graph())
    pixels = graph()
    pixels["subject0"]["inputs"]["boxes"] = ["boxes", 0]
    assert decibels(frames(host, pixels), base) >= 60


def test_a_transparent_picture_needs_no_mask(host):
    prompt = graph(masked=False)
    # The host's node takes what is transparent.
    prompt["outside"] = node("InvertMask", mask=["mask0", 0])
    prompt["cut"] = node("JoinImageWithAlpha", image=["image0", 0], alpha=["outside", 0])
    prompt["subject0"]["inputs"]["image"] = ["cut", 0]
    assert np.array_equal(frames(host, prompt), frames(host, graph()))


def test_subjects_boxes_and_weights_matter(host):
    base, both = frames(host, graph()), frames(host, graph(2))
    other = graph(subject=2)
    weight = graph(reference_weight=0.0)
    picture = graph()
    picture["image0"]["inputs"]["image"] = "subject1.png"
    picture["mask0"]["inputs"]["image"] = "outline1.png"
    for changed in (other, weight, picture):
        assert decibels(frames(host, changed), base) < 60
    assert decibels(both, base) < 60
    # Who is in front where boxes overlap is the order of the chain.
    swapped = graph(2)
    first, second = swapped["subject0"]["inputs"], swapped["subject1"]["inputs"]
    for name in ("image", "mask", "subject"):
        first[name], second[name] = second[name], first[name]
    assert decibels(frames(host, swapped), both) < 60


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "uni_pc", "heun"])
def test_other_samplers_and_several_clips_run(host, sampler):
    prompt = graph(2, batch_size=2)
    prompt["sample"]["inputs"].update(sampler_name=sampler, scheduler="karras")
    made = frames(host, prompt)
    assert len(made) == 2 * SETTINGS.frames
    # A picture, not the black of broken numbers.
    assert made.std() > 5


def test_cancel_stops_within_a_step_and_the_next_prompt_runs(host):
    # Larger than usual: a step takes longer than a request.
    prompt = graph(width=96, height=96)
    prompt["sample"]["inputs"].update(steps=1000, scheduler="simple")
    more, entry = host.cancel(prompt, steps=1000, after=2)
    assert more <= 2
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert len(frames(host, graph())) == SETTINGS.frames


def test_many_prompts_leave_memory_flat(host):
    if not Path(f"/proc/{host.process.pid}/status").exists():
        pytest.skip("reads the server's memory from /proc, which this system does not have")
    sizes = []
    for index in range(16):
        frames(host, graph(2, reference_weight=index / 16))
        sizes.append(resident(host))
    # The first prompts fill caches of the host and of torch.
    assert sizes[-1] < sizes[6] * 1.03, [size >> 20 for size in sizes]


def said(host, prompt: dict) -> str:
    """What a run that made nothing put on its nodes and in the log, or why it was refused."""
    status, answer = host.post("/prompt", {"prompt": prompt, "client_id": "tests"})
    if status != 200:
        return json.dumps(answer)
    before = len(host.log())
    entry = host.wait(answer["prompt_id"])
    assert "save" not in entry["outputs"]
    # Box Trajectory is an output of its own: what does not reach it runs all the same.
    return json.dumps(answer["node_errors"]) + host.log()[before:]


def test_what_users_get_wrong_is_a_sentence(host):
    nothing, small, chained, elsewhere, plain = (graph() for _ in range(5))
    lengths = graph(2)
    lengths["subject0"]["inputs"]["frames"] = 6
    nothing["mask0"]["inputs"]["image"] = "nothing.png"
    small["mask0"] = node("SolidMask", value=1.0, width=16, height=16)
    chained["subject0"]["inputs"]["positive"] = ["chained", 0]
    chained["chained"] = node("LayerLoomSubjectTrajectory", **graph()["subject0"]["inputs"])
    elsewhere["sample"]["inputs"]["latent_image"] = ["empty", 0]
    elsewhere["empty"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    plain["sample"]["inputs"]["positive"] = ["positive", 0]
    for changed, sentence in (
        (nothing, "The mask is empty"),
        (small, "The mask is 16x16"),
        (graph(subject=3), "There are boxes for 2 subjects and this is subject 3"),
        (graph(boxes=""), "There are no boxes"),
        (graph(other_subjects=["positive", 0]), "other subjects holds none"),
        (lengths, "The other subjects are for 6 frames of 32x32"),
        (chained, "connect that node's positive to other_subjects"),
        (elsewhere, "take the latent from the same Subject Trajectory node"),
        (plain, "put a Subject Trajectory node between the prompts and the sampler"),
    ):
        told = said(host, changed)
        assert sentence in told, (sentence, told[-1500:])
        assert "Traceback" not in told or "LayerLoomError" in told


def test_other_models_are_told_apart(host):
    wrong = graph()
    wrong["load"]["inputs"]["checkpoint"] = "starter/layered.safetensors"
    told = said(host, wrong)
    assert "no checkpoint that moves subjects" in told and "Traceback" not in told
    layered = graph()
    layered["layers"] = node("LayerLoomLoadCheckpoint", checkpoint=MODEL)
    layered["decode"]["inputs"]["vae"] = ["layers", 2]
    assert "load it with Load Subject Model" in said(host, layered)
    other = graph()
    other["layered"] = node("LayerLoomLoadCheckpoint", checkpoint="starter/layered.safetensors")
    other["subject0"]["inputs"]["model"] = ["layered", 0]
    assert "which moves no subjects along boxes" in said(host, other)
    decoder = graph()
    decoder["layered"] = other["layered"]
    decoder["subject0"]["inputs"]["vae"] = ["layered", 2]
    assert "The VAE made latents of shape" in said(host, decoder)
    texts = graph()
    texts["layered"] = other["layered"]
    texts["negative"]["inputs"]["clip"] = ["layered", 1]
    assert "take the checkpoint's own CLIP" in said(host, texts)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_run_with_any_such_model(host, path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for entry in prompt.values():
        inputs = entry["inputs"]
        if entry["class_type"] == "LayerLoomLoadSubjectModel":
            inputs["checkpoint"] = MODEL
        elif entry["class_type"] == "CLIPTextEncode" and inputs["text"]:
            inputs["text"] = PROMPT
        elif entry["class_type"] == "KSampler":
            inputs["steps"] = 2
    entry = host.run(prompt)
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"])[-2000:]
    (shown,) = [out for out in entry["outputs"].values() if "layerloom_layers" in out]
    assert shown
