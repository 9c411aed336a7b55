"""`layerloom animate`: what it writes, what it says, what it refuses, and how it is interrupted."""

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from animate_files import whole_state, write_checkpoint, write_tokenizer
from PIL import Image
from test_cli import assert_one_sentence, run, tree

from layerloom.engine.errors import LayerLoomError
from layerloom.engine.media import read_clip, write_webm

PROMPT = ["--prompt", "a boat sails to the left"]


@pytest.fixture
def pictures(tmp_path) -> dict[str, Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    first = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(first).save(folder / "first.png")
    Image.fromarray(255 - first).save(folder / "second.png")
    Image.fromarray(rng.integers(0, 255, (48, 80, 3), dtype=np.uint8)).save(folder / "wide.jpg")
    hole = np.dstack([first, np.full((64, 64), 99, np.uint8)])
    Image.fromarray(hole).save(folder / "hole.png")
    frames = [Image.fromarray(first), Image.fromarray(255 - first)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    write_webm(folder / "clip.webm", np.stack([first] * 3), 8)
    (folder / "words.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    return {path.stem: path for path in folder.iterdir()}


class FakePipeline:
    """Stands in for the network; `requests` keeps what it was asked, `opened` with what."""

    requests: list
    opened: list

    @classmethod
    def open(cls, *paths, device=None, variant=None):
        cls.opened.append((*paths, device, variant))
        return cls()

    def prepare(self, request):
        request.validate()
        self.requests.append(request)
        return ["The end image was resized."] if request.end is not None else []

    def run(self, request, progress):
        for step in range(1, 4):
            progress("Denoising", step, 3)
        count = 15 if request.loop else 16
        for frame in range(1, count + 1):
            progress("Decoding", frame, count)
        rng = np.random.default_rng(request.seed)
        return types.SimpleNamespace(
            frames=rng.integers(0, 255, (count, 64, 96, 3), dtype=np.uint8),
            keys=((0, 0), (15, 1)) if request.end is not None else ((0, 0),),
            fps=request.fps or 8.0,
            settings={"steps": 3, "text_scale": 7.5},
            seconds_per_step=0.01,
        )


@pytest.fixture
def fake(monkeypatch) -> type[FakePipeline]:
    module = types.ModuleType("layerloom.engine.animate")
    module.AnimatePipeline = type("Pipeline", (FakePipeline,), {"requests": [], "opened": []})
    monkeypatch.setitem(sys.modules, "layerloom.engine.animate", module)
    return module.AnimatePipeline


# --- what is written ------------------------------------------------------------------------


def test_files_of_a_run(tmp_path, pictures, fake, capsys):
    out = tmp_path / "new" / "out"
    arguments = [*PROMPT, "--end", pictures["wide"], "--out", out, "--seed", 7, "--arrays"]
    assert run("animate", pictures["first"], *arguments) == 0
    assert sorted(tree(out)) == ["frames.png", "run.json", "video.npz", "video.webm"]
    with np.load(out / "video.npz") as arrays:
        assert list(arrays) == ["video"]
        video = arrays["video"]
    assert video.shape == (16, 64, 96, 3) and video.dtype == np.uint8
    clip = read_clip(out / "video.webm")
    assert clip.frames.shape == video.shape and clip.fps == 8
    assert abs(clip.frames.mean() - video.mean()) < 4
    with Image.open(out / "frames.png") as sheet:
        # Eight frames side by side.
        assert sheet.width > 8 * 96
    record = json.loads((out / "run.json").read_text())
    assert record["prompt"] == PROMPT[1] and record["seed"] == 7
    assert record["image"] == str(pictures["first"]) and record["end"] == str(pictures["wide"])
    assert record["settings"] == {"steps": 3, "text_scale": 7.5}
    assert record["frames"] == 16 and record["width"] == 96 and record["height"] == 64
    assert record["key_frames"] == [0, 15]
    assert record["notes"] == ["The end image was resized."]
    assert record["versions"]["layerloom"] and record["checkpoint"] == "starter"
    captured = capsys.readouterr()
    assert "video.webm" in captured.out and "16 frames of 96x64" in captured.out
    assert "The end image was resized." in captured.err


def test_quiet_says_only_what_was_written(tmp_path, pictures, fake, capsys):
    arguments = [*PROMPT, "--out", tmp_path / "out", "--quiet"]
    assert run("animate", pictures["first"], *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.startswith("Wrote frames.png")
    assert sorted(tree(tmp_path / "out")) == ["frames.png", "run.json", "video.webm"]


def test_options_become_the_request(tmp_path, pictures, fake):
    def ask(*options):
        arguments = [*PROMPT, "--out", tmp_path / "out", "--quiet", *options]
        assert run("animate", pictures["first"], *arguments) == 0
        return fake.requests[-1]

    plain = ask()
    assert plain.image.shape == (64, 64, 3) and plain.end is None and not plain.loop
    assert plain.gate == 1.0 and plain.text_scale is None and plain.frames is None
    assert fake.opened[-1] == (None, None, None, None, None, None)
    full = ask(
        *("--image-scale", 2, "--text-scale", 9, "--rescale", 0.5, "--motion", 12, "--gate", 0.8),
        *("--gate-layers", "middle", "--frames", 40, "--overlap", 4, "--width", 96),
        *("--height", 64, "--fps", 12, "--steps", 30, "--spacing", "uniform-released"),
        *("--eta", 0, "--exact-first-frame", "--negative", "blur", "--seed", 5),
        *("--variant", "512", "--device", "cpu"),
    )
    assert (full.image_scale, full.text_scale, full.rescale, full.motion) == (2, 9, 0.5, 12)
    assert (full.gate, full.gate_layers, full.frames, full.overlap) == (0.8, "middle", 40, 4)
    assert (full.width, full.height, full.fps, full.steps) == (96, 64, 12, 30)
    assert (full.spacing, full.eta, full.exact_first_frame) == ("uniform-released", 0, True)
    assert (full.negative, full.seed) == ("blur", 5)
    assert fake.opened[-1] == (None, None, None, None, "cpu", "512")
    assert ask("--loop").loop
    chain = ask("--via", pictures["second"], "--via", pictures["wide"], "--end", pictures["first"])
    assert [image.shape[:2] for image in chain.images] == [(64, 64), (64, 64), (48, 80), (64, 64)]
    assert ask("--via", pictures["second"], "--loop").loop


def test_what_a_picture_loses_is_said(tmp_path, pictures, fake, capsys):
    arguments = [*PROMPT, "--out", tmp_path / "out", "--end", pictures["moves"]]
    assert run("animate", pictures["hole"], *arguments) == 0
    said = capsys.readouterr().err
    assert "The image has transparent parts" in said
    assert "The end image is an animation; its first picture is taken." in said


def test_a_second_run_replaces_the_first(tmp_path, pictures, fake):
    (tmp_path / "mine.txt").write_text("stays")
    for seed in (0, 1):
        arguments = [*PROMPT, "--out", tmp_path, "--seed", seed, "--quiet"]
        assert run("animate", pictures["first"], *arguments) == 0
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1
    assert (tmp_path / "mine.txt").read_text() == "stays"
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


# --- what the user got wrong ----------------------------------------------------------------

BAD_OPTIONS = {
    "empty prompt": (["--prompt", " "], ["--prompt is empty"]),
    "end and loop": (["--end", "{second}", "--loop"], ["--end and --loop"]),
    "via alone": (["--via", "{second}"], ["--via", "--end", "--loop"]),
    "missing end": (["--end", "absent.png"], ["--end image absent.png", "does not exist"]),
    "missing via": (["--via", "absent.png", "--loop"], ["--via image absent.png"]),
    "words": (["--end", "{words}"], ["end image", "words.png", "not a picture"]),
    "empty": (["--end", "{empty}"], ["empty.png is empty"]),
    "a video": (["--end", "{clip}"], ["clip.webm", "not a picture"]),
    "no steps": (["--steps", "0"], ["--steps is 0", "1 to 1000"]),
    "steps in words": (["--steps", "many"], ["--steps", "integer"]),
    "no frames": (["--frames", "0"], ["--frames is 0"]),
    "too many frames": (["--frames", "1000000"], ["--frames is"]),
    "overlap": (["--overlap", "0"], ["--overlap is 0"]),
    "text scale": (["--text-scale", "-1"], ["--text-scale is -1"]),
    "image scale": (["--image-scale", "nan"], ["--image-scale is nan"]),
    "rescale": (["--rescale", "1.5"], ["--rescale is 1.5"]),
    "eta": (["--eta", "2"], ["--eta is 2"]),
    "motion": (["--motion", "0"], ["--motion is 0"]),
    "gate": (["--gate", "-1"], ["--gate is -1"]),
    "gate layers": (["--gate-layers", "some"], ["--gate-layers", "middle"]),
    "fps": (["--fps", "0"], ["--fps is 0"]),
    "seed": (["--seed", "-1"], ["--seed is -1"]),
    "width": (["--width", "0"], ["--width is 0"]),
    "spacing": (["--spacing", "leading"], ["--spacing", "trailing, uniform"]),
    "missing checkpoint": (["--checkpoint", "no.ckpt"], ["--checkpoint no.ckpt"]),
    "missing vae": (["--vae", "no_vae"], ["--vae no_vae"]),
    "missing text encoder": (["--text-encoder", "no_clip"], ["--text-encoder no_clip"]),
    "missing image encoder": (["--image-encoder", "no_clip"], ["--image-encoder no_clip"]),
    "unknown option": (["--colour", "red"], ["--colour", "layerloom animate --help"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(tmp_path, pictures, fake, capsys, case):
    options, words = BAD_OPTIONS[case]
    options = [option.format(**pictures) for option in options]
    before = tree(tmp_path)
    arguments = [*PROMPT, "--out", tmp_path / "out", *options]
    assert run("animate", pictures["first"], *arguments) == 2
    captured = capsys.readouterr()
    assert_one_sentence(captured.err, *words)
    assert captured.out == ""
    assert tree(tmp_path) == before
    assert not fake.requests


def test_bad_images(tmp_path, pictures, fake, capsys):
    for name, words in (
        (tmp_path / "absent.png", "does not exist"),
        (pictures["words"], "not a picture"),
        (pictures["empty"], "is empty"),
        (tmp_path / "pictures", "folder"),
    ):
        assert run("animate", name, *PROMPT, "--out", tmp_path / "out") == 2
        assert_one_sentence(capsys.readouterr().err, words)
    assert not fake.requests and not (tmp_path / "out").exists()
    assert run("animate", *PROMPT, "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys.readouterr().err, "IMAGE")
    assert run("animate", pictures["first"], "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys.readouterr().err, "--prompt")


def test_a_problem_found_by_the_pipeline_is_told(tmp_path, pictures, fake, capsys, monkeypatch):
    def refuse(self, request):
        raise LayerLoomError("Windows of 16 frames cannot overlap by 16; give 1 to 15 frames.")

    monkeypatch.setattr(fake, "prepare", refuse)
    arguments = [*PROMPT, "--out", tmp_path / "out", "--quiet"]
    assert run("animate", pictures["first"], *arguments) == 2
    assert_one_sentence(capsys.readouterr().err, "cannot overlap")
    assert not (tmp_path / "out").exists()


# --- the real thing -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, golden_dir, manifest_dir) -> list:
    """Options that name a whole tiny checkpoint and CLIP's tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    write_tokenizer(folder / "tokenizer")
    checkpoint = write_checkpoint(folder / "model.ckpt", whole_state(golden_dir, manifest_dir))
    return ["--checkpoint", checkpoint, "--text-encoder", folder / "tokenizer"]


def test_a_whole_run_on_a_tiny_official_checkpoint(tmp_path, pictures, whole, capsys):
    sizes = ["--width", 64, "--height", 64, "--steps", 2, "--device", "cpu"]
    arguments = [*PROMPT, *whole, *sizes, "--end", pictures["wide"], "--out", tmp_path / "out"]
    assert run("animate", pictures["first"], *arguments, "--arrays", "--exact-first-frame") == 0
    said = capsys.readouterr().err
    assert "The end image of 80x48 is resized to 64x64, and 40% of its width is cut off." in said
    assert "--variant" in said and "blended in as latents" in said
    with np.load(tmp_path / "out" / "video.npz") as arrays:
        assert arrays["video"].shape == (16, 64, 64, 3)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["mode"] == "interpolate" and record["key_frames"] == [0, 15]
    assert record["settings"]["steps"] == 2 and record["seconds_per_step"] > 0


def test_bad_checkpoints_are_a_sentence(tmp_path, pictures, whole, capsys):
    good = Path(whole[1])
    half = tmp_path / "half.ckpt"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "words.ckpt").write_text("not a checkpoint")
    for name in ("half.ckpt", "words.ckpt"):
        arguments = [*PROMPT, "--checkpoint", tmp_path / name, "--out", tmp_path / "out", "-q"]
        assert run("animate", pictures["first"], *arguments) == 2
        assert_one_sentence(capsys.readouterr().err, name)
    arguments = [*PROMPT, *whole, "--variant", "256", "--out", tmp_path / "out", "-q"]
    assert run("animate", pictures["first"], *arguments) == 2
    assert_one_sentence(capsys.readouterr().err, "not DynamiCrafter 256")
    assert not (tmp_path / "out").exists()


def test_interrupt_leaves_nothing(tmp_path, pictures, fake, capsys, monkeypatch):
    def interrupted(self, request, progress):
        progress("Denoising", 1, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "run", interrupted)
    before = tree(tmp_path)
    arguments = [*PROMPT, "--out", tmp_path / "deep" / "out"]
    assert run("animate", pictures["first"], *arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_ctrl_c_stops_a_real_run_within_a_step(tmp_path, pictures, whole):
    out = tmp_path / "out"
    sizes = ["--width", 64, "--height", 64, "--steps", 1000, "--device", "cpu"]
    arguments = ["animate", pictures["first"], *PROMPT, *whole, *sizes, "--out", out]
    command = [sys.executable, "-m", "layerloom.engine.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        # Notes are said when everything is loaded and the first step is about to start.
        first = process.stderr.readline()
        assert b"512" in first
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"interrupted" in rest and b"Traceback" not in rest
    assert not out.exists()
