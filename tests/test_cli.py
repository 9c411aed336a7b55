"""The `layerloom` command: what it writes, and one sentence and nothing else for bad input."""

import errno
import json
import os
import pickle
import pty
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerloom.engine import layered_job
from layerloom.engine.checkpoints.save import save_checkpoint
from layerloom.engine.cli import main
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.media import read_clip, write_webm
from layerloom.engine.models.layered_transformer import LayeredTransformer

WORDS = ["--foreground", "a red circle moving right", "--background", "green stripes"]
TINY = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 8,
}


def run(*arguments: object) -> int:
    """Exit status of the command, in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "layerloom.engine.cli", *map(str, arguments)]
    return subprocess.Popen(command, **options)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_one_sentence(text: str, *words: str) -> None:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("layerloom: ")
    assert lines[0].endswith(".") and ". " not in lines[0]
    for word in words:
        assert word in lines[0]


@pytest.fixture
def clips(tmp_path) -> dict[str, Path]:
    """A clip, its matte, a clip of another length, and a clip with its own alpha."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    alpha = np.zeros((8, 64, 64), np.uint8)
    alpha[:, 16:48, 16:48] = 255
    write_webm(folder / "clip.webm", frames, 12)
    write_webm(folder / "matte.webm", alpha, 12)
    write_webm(folder / "short.webm", frames[:4], 12)
    write_webm(folder / "rgba.webm", frames, 12, alpha)
    write_webm(folder / "one.webm", frames[:1], 12)
    (folder / "words.mp4").write_text("not a video")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def tiny_checkpoint(tmp_path) -> Path:
    path = tmp_path / "tiny.safetensors"
    torch.manual_seed(0)
    network = LayeredTransformer(**TINY)
    module = "transformer_blocks.0.attn1.to_q"
    save_checkpoint(
        path,
        network.state_dict(),
        variant="tiny-for-tests",
        transformer=TINY,
        adapters={"motion": {module: (torch.zeros(3, 32), torch.zeros(32, 3))}},
    )
    return path


# --- a pipeline that needs no weights -------------------------------------------------------


@dataclass
class FakeRequest:
    task: str
    foreground: str
    background: str
    blended: str | None
    given: dict
    fps: float
    frames: int | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    guidance_mode: str | None
    sampler: str | None
    seed: int
    reuse: object

    def validate(self) -> None:
        pass


class FakePipeline:
    """Stands in for the network; `requests` keeps what it was asked."""

    requests: list[FakeRequest]

    @classmethod
    def open(cls, checkpoint, vae, text_encoder, device=None, adapters=None, loras=()):
        return cls()

    def prepare(self, request):
        self.requests.append(request)
        return ["The clip was resized."]

    def run(self, request, callback):
        for step in range(1, 4):
            callback(types.SimpleNamespace(step=step, total=3))
        rng = np.random.default_rng(request.seed)
        frames = rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
        alpha = np.zeros((8, 64, 64), np.uint8)
        alpha[:, 8:40, 8:40] = 255
        return types.SimpleNamespace(
            foreground=frames,
            alpha=alpha,
            background=255 - frames,
            blended=frames,
            recomposed=frames,
            fps=request.fps,
            settings={"steps": 3, "guidance": 2.5},
            seconds_per_step=0.01,
        )


@pytest.fixture
def fake(monkeypatch) -> type[FakePipeline]:
    module = types.ModuleType("layerloom.engine.layered")
    pipeline = type("Pipeline", (FakePipeline,), {"requests": []})
    module.LayeredPipeline, module.LayeredRequest = pipeline, FakeRequest
    monkeypatch.setitem(sys.modules, "layerloom.engine.layered", module)
    return pipeline


# --- start-up -------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from layerloom.engine.cli import main\n"
        "try: main(['layered', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'rich', 'av', 'numpy', 'PIL'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "loaded: []" in done.stdout
    for option in ("--given-foreground", "--decompose", "--arrays", "--text-encoder", "--seed"):
        assert option in done.stdout
    # Processor time, which other work on the machine does not stretch; measured: 0.15 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_version_and_bare_call(capsys):
    assert run("--version") == 0
    assert re.fullmatch(r"layerloom \d+\.\d+\S*\n", capsys.readouterr().out)
    assert run() == 0
    assert "layered" in capsys.readouterr().out


# --- what is written ------------------------------------------------------------------------


def test_files_of_a_run(tmp_path, fake, capsys):
    out = tmp_path / "new" / "out"
    assert run("layered", *WORDS, "--out", out, "--seed", 7, "--steps", 3, "--arrays") == 0
    layers = ["alpha.webm", "background.webm", "blended.webm", "foreground.webm"]
    assert sorted(tree(out)) == [*layers, "layers.npz", "layers.png", "run.json"]
    with np.load(out / "layers.npz") as arrays:
        assert sorted(arrays) == ["alpha", "background", "blended", "foreground"]
        assert all(arrays[name].dtype == np.uint8 for name in arrays)
        assert arrays["alpha"].shape == (8, 64, 64)
        matte, background = arrays["alpha"], arrays["background"]
    assert (np.abs(read_clip(out / "foreground.webm").alpha.astype(int) - matte) < 30).all()
    assert abs(read_clip(out / "background.webm").frames.mean() - background.mean()) < 3
    assert read_clip(out / "blended.webm").fps == 8
    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 7
    assert record["settings"] == {"steps": 3, "guidance": 2.5}
    assert record["seconds_per_step"] == 0.01
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["prompts"]["foreground"] == WORDS[1]
    assert record["notes"] == ["The clip was resized."]
    captured = capsys.readouterr()
    assert "foreground.webm" in captured.out and "8 frames of 64x64" in captured.out
    assert "The clip was resized." in captured.err


def test_a_second_run_replaces_the_first(tmp_path, fake):
    (tmp_path / "mine.txt").write_text("stays")
    for seed in (0, 1):
        assert run("layered", *WORDS, "--out", tmp_path, "--seed", seed, "--quiet") == 0
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1
    assert (tmp_path / "mine.txt").read_text() == "stays"
    assert not [name for name in tree(tmp_path) if name.startswith(".")]


def test_quiet_says_only_what_was_written(tmp_path, fake, capsys):
    assert run("layered", *WORDS, "--out", tmp_path / "out", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("Wrote ")


def test_clips_become_tasks(tmp_path, clips, fake):
    def ask(*options):
        assert run("layered", *WORDS, "--out", tmp_path / "out", "--quiet", *options) == 0
        return fake.requests[-1]

    assert ask().task == "generate" and ask().given == {}
    request = ask("--given-background", clips["clip"])
    assert request.task == "background" and list(request.given) == ["background"]
    assert request.fps == 12
    request = ask("--decompose", clips["clip"])
    assert request.task == "decompose" and list(request.given) == ["blended"]
    request = ask("--given-foreground", clips["clip"], "--given-alpha", clips["matte"])
    assert request.task == "foreground" and list(request.given) == ["foreground", "alpha"]
    assert request.given["alpha"].shape == (8, 64, 64)
    matte = request.given["alpha"]
    # A clip with transparency brings its own matte.
    own = ask("--given-foreground", clips["rgba"]).given["alpha"]
    assert (np.abs(own.astype(int) - matte) < 30).all()
    assert list(ask("--given-foreground", clips["clip"]).given) == ["foreground"]


def test_reuse_is_asked_for_as_given(tmp_path, clips, fake):
    from layerloom.engine.reuse import MEMORY_GIB, REFRESH_EVERY, GivenReuse

    asked = {
        (): None,
        ("--reuse-given",): GivenReuse(refresh=REFRESH_EVERY, memory=MEMORY_GIB),
        ("--reuse-given", "--reuse-refresh", "0"): GivenReuse(refresh=None),
        ("--reuse-given", "--reuse-refresh", "4", "--reuse-memory", "2.5"): GivenReuse(
            refresh=4, memory=2.5
        ),
    }
    for options, reuse in asked.items():
        options = ["--decompose", clips["clip"], *options]
        assert run("layered", *WORDS, "--out", tmp_path / "out", *options) == 0
        assert fake.requests[-1].reuse == reuse


def test_long_clips_are_cut_and_said(tmp_path, clips, fake, monkeypatch, capsys):
    monkeypatch.setattr(layered_job, "_FRAMES_READ", 5)
    assert run("layered", *WORDS, "--out", tmp_path / "out", "--decompose", clips["clip"]) == 0
    assert len(fake.requests[-1].given["blended"]) == 5
    assert "Only the first 5 frames" in capsys.readouterr().err


# --- what the user got wrong ----------------------------------------------------------------

BAD_OPTIONS = {
    "empty foreground": (["--foreground", " "], ["--foreground is empty"]),
    "empty background": (["--background", ""], ["--background is empty"]),
    "empty blended": (["--blended", ""], ["--blended is empty"]),
    "two tasks": (
        ["--given-background", "{clip}", "--decompose", "{clip}"],
        ["--given-background and --decompose"],
    ),
    "alpha alone": (["--given-alpha", "{matte}"], ["--given-alpha", "--given-foreground"]),
    "no steps": (["--steps", "0"], ["--steps is 0", "from 1"]),
    "steps in words": (["--steps", "many"], ["--steps", "integer"]),
    "guidance": (["--guidance", "nan"], ["--guidance is nan"]),
    "seed": (["--seed", "-1"], ["--seed is -1"]),
    "no frames": (["--frames", "0"], ["--frames is 0"]),
    "odd width": (["--width", "63", "--height", "64"], ["--width is 63", "even"]),
    "odd height": (["--width", "64", "--height", "65"], ["--height is 65", "even"]),
    "sampler": (["--sampler", "euler"], ["--sampler", "euler", "ddim"]),
    "guidance mode": (["--guidance-mode", "loud"], ["--guidance-mode", "loud", "constant"]),
    "missing clip": (["--decompose", "missing.mp4"], ["missing.mp4", "does not exist"]),
    "not a video": (["--decompose", "{words}"], ["words.mp4", "not a video"]),
    "one frame": (["--given-background", "{one}"], ["one.webm", "only one frame"]),
    "lengths": (
        ["--given-foreground", "{clip}", "--given-alpha", "{short}"],
        ["4 frames", "8 frames"],
    ),
    "missing checkpoint": (["--checkpoint", "no.safetensors"], ["no.safetensors"]),
    "missing vae": (["--vae", "no_vae"], ["--vae", "no_vae"]),
    "missing text encoder": (["--text-encoder", "no_t5"], ["--text-encoder", "no_t5"]),
    "nothing to reuse": (["--reuse-given"], ["--reuse-given", "no layer is given"]),
    "refresh alone": (["--reuse-refresh", "5"], ["--reuse-refresh", "--reuse-given"]),
    "refresh": (
        ["--decompose", "{clip}", "--reuse-given", "--reuse-refresh", "-1"],
        ["--reuse-refresh is -1", "0 for never"],
    ),
    "reuse memory": (
        ["--decompose", "{clip}", "--reuse-given", "--reuse-memory", "0"],
        ["--reuse-memory is 0", "above 0"],
    ),
    "unknown option": (["--colour", "red"], ["--colour", "layerloom layered --help"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(tmp_path, clips, fake, capsys, case):
    options, words = BAD_OPTIONS[case]
    options = [option.format(**clips) for option in options]
    before = tree(tmp_path)
    assert run("layered", *WORDS, "--out", tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert_one_sentence(captured.err, *words)
    assert captured.out == ""
    assert tree(tmp_path) == before
    assert not fake.requests


def test_missing_required_options_and_unknown_commands(capsys):
    assert run("layered", "--background", "stripes", "--out", "x") == 2
    assert_one_sentence(capsys.readouterr().err, "--foreground")
    assert run("weave") == 2
    assert_one_sentence(capsys.readouterr().err, "weave")


def test_bad_input_from_a_shell_is_answered_at_once(tmp_path):
    """Nothing heavy is loaded for it: the real process, with its exit status."""
    command = start(
        "layered", *WORDS, "--out", tmp_path / "out", "--steps", 0, stderr=subprocess.PIPE
    )
    _, err = command.communicate(timeout=60)
    assert command.returncode == 2
    assert_one_sentence(err.decode(), "--steps is 0")
    assert not list(tmp_path.iterdir())


def test_out_is_a_file(tmp_path, fake, capsys):
    (tmp_path / "out").write_text("mine")
    assert run("layered", *WORDS, "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys.readouterr().err, "file is in the way")
    assert tree(tmp_path) == {"out": b"mine"}


def test_no_permission(fake, capsys):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        status = run("layered", *WORDS, "--out", folder / "out")
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert status == 2
    assert_one_sentence(capsys.readouterr().err, "no permission to write")
    assert not fake.requests
    folder.rmdir()


def test_disk_full_while_writing(tmp_path, fake, capsys):
    """A real write past a limit of the system, which behaves as a full disk does."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        status = run("layered", *WORDS, "--out", out, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert_one_sentence(capsys.readouterr().err, "no room left")
    assert tree(tmp_path) == {}


def test_disk_full_at_the_last_file(tmp_path, fake, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert run("layered", *WORDS, "--out", tmp_path / "out", "--quiet") == 2
    assert_one_sentence(capsys.readouterr().err, "no room left")
    assert tree(tmp_path) == {}


def test_interrupt_leaves_nothing(tmp_path, fake, capsys, monkeypatch):
    def interrupted(self, request, callback):
        callback(types.SimpleNamespace(step=1, total=3))
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "run", interrupted)
    assert run("layered", *WORDS, "--out", tmp_path / "deep" / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_a_problem_found_by_the_pipeline_is_told(tmp_path, fake, capsys, monkeypatch):
    def refuse(self, request):
        raise LayerLoomError("--width is 62, but this checkpoint needs multiples of 8; give 64.")

    monkeypatch.setattr(fake, "prepare", refuse)
    assert run("layered", *WORDS, "--out", tmp_path / "out", "--quiet") == 2
    assert_one_sentence(capsys.readouterr().err, "multiples of 8")
    assert tree(tmp_path) == {}


# --- checkpoints ----------------------------------------------------------------------------


class Evil:
    """A pickle of this makes a file called `pwned` when it is opened carelessly."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def bad_checkpoints(folder: Path, good: Path) -> dict[str, Path]:
    truncated = folder / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    unknown = folder / "unknown.safetensors"
    from safetensors.torch import save_file

    save_file({"some.weight": torch.zeros(3)}, unknown)
    bare, zipped = folder / "bare.pt", folder / "zipped.pt"
    bare.write_bytes(pickle.dumps({"module": Evil(folder / "pwned")}))
    torch.save({"module": Evil(folder / "pwned")}, zipped)
    words = folder / "words.ckpt"
    words.write_text("not a checkpoint")
    return {path.stem: path for path in (truncated, unknown, bare, zipped, words)}


@pytest.mark.parametrize("kind", ["truncated", "unknown", "bare", "zipped", "words"])
@pytest.mark.parametrize("command", ["info", "convert", "layered"])
def test_bad_checkpoints(tmp_path, tiny_checkpoint, capsys, command, kind):
    path = bad_checkpoints(tmp_path, tiny_checkpoint)[kind]
    before = tree(tmp_path)
    arguments = {
        "info": [path],
        "convert": [path, tmp_path / "out.safetensors", "--quiet"],
        "layered": [*WORDS, "--checkpoint", path, "--out", tmp_path / "out", "--quiet"],
    }
    assert run(command, *arguments[command]) == 2
    assert_one_sentence(capsys.readouterr().err, path.name)
    assert tree(tmp_path) == before


def test_info(tiny_checkpoint, capsys):
    assert run("info", tiny_checkpoint, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "layered" and found["variant"] == "tiny-for-tests"
    assert found["adapters"] == {"motion": 3}
    assert found["transformer"]["attention_head_dim"] == 16
    assert found["bytes"] == tiny_checkpoint.stat().st_size
    assert run("info", tiny_checkpoint) == 0
    shown = capsys.readouterr().out
    for word in ("layered", "tiny-for-tests", "motion", "float32"):
        assert word in shown
    assert run("info", tiny_checkpoint.with_name("missing.pt")) == 2
    assert_one_sentence(capsys.readouterr().err, "missing.pt")


def test_convert(tmp_path, tiny_checkpoint, capsys):
    target = tmp_path / "converted.safetensors"
    assert run("convert", tiny_checkpoint, target) == 0
    assert "converted.safetensors" in capsys.readouterr().out
    assert run("info", target, "--json") == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "tiny-for-tests"
    written = target.read_bytes()
    for arguments, word in (
        ([tiny_checkpoint, target], "--force"),
        ([tiny_checkpoint, tmp_path / "name.pt"], ".safetensors"),
        ([tiny_checkpoint, tiny_checkpoint, "--force"], "file to convert"),
        ([tiny_checkpoint, tmp_path / "missing" / "out.safetensors"], "missing"),
    ):
        assert run("convert", *arguments) == 2
        assert_one_sentence(capsys.readouterr().err, word)
    assert target.read_bytes() == written
    assert run("convert", tiny_checkpoint, target, "--force", "--quiet") == 0


def test_verify(tmp_path, golden_dir, capsys):
    folder = tmp_path / "golden"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        name = f"lf_schedule{suffix}"
        (folder / name).write_bytes((golden_dir / name).read_bytes())
    assert run("verify", folder) == 0
    passed = capsys.readouterr().out
    assert "max error" in passed and "tolerance" in passed and " 0 failed" in passed
    # A case whose expected numbers are off by more than its tolerance.
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "lf_schedule.safetensors")
    name = "out.sqrt_alphas_cumprod_1000"
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, folder / "lf_schedule.safetensors")
    assert run("verify", folder) == 1
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if "FAIL" in line and "sqrt_alphas" in line]
    assert " 1 failed" in shown
    for missing in (tmp_path / "nothing", tmp_path):
        assert run("verify", missing) == 2
        assert_one_sentence(capsys.readouterr().err, missing.name)


# --- training and scores --------------------------------------------------------------------


def test_train_passes_recipe_and_overrides(tmp_path, monkeypatch, capsys):
    from layerloom.engine.training import recipe as recipes

    calls = []

    def train(path, overrides, resume, progress, note, dry_run=False):
        calls.append((path, overrides, resume))
        note("How much memory")
        if dry_run:
            return None
        progress("encoding", 1, 2, {})
        progress("training", 2, 2, {"loss": 0.5})
        return tmp_path / "final.safetensors"

    monkeypatch.setattr(recipes, "train_from_recipe", train)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[training]\nsteps = 1\n")
    assert run("train", recipe, "training.steps=5", "name=a=b", "--resume") == 0
    assert calls == [(recipe, {"training.steps": "5", "name": "a=b"}, True)]
    shown = capsys.readouterr()
    assert "final.safetensors" in shown.out and "How much memory" in shown.err
    assert run("train", recipe, "--dry-run") == 0
    assert capsys.readouterr().out == "How much memory\n"
    assert run("train", "starter_autoencoder") == 0
    capsys.readouterr()
    assert calls[-1][0].name == "starter_autoencoder.toml" and calls[-1][0].is_file()
    assert run("train", "no_such_recipe") == 2
    assert_one_sentence(capsys.readouterr().err, "no_such_recipe", "starter_autoencoder")
    assert run("train", recipe, "steps") == 2
    assert_one_sentence(capsys.readouterr().err, "key=value")


def test_eval_prints_json(monkeypatch, capsys):
    from layerloom.engine.layered import LayeredPipeline
    from layerloom.engine.metrics import layered

    opened = types.SimpleNamespace(
        sequence=lambda: types.SimpleNamespace(frames=8), native_size=(48, 64)
    )
    asked = []
    monkeypatch.setattr(LayeredPipeline, "open", lambda *a, **k: asked.append((a, k)) or opened)

    def evaluate(pipeline, *, scenes, seed, frames, size, progress):
        assert pipeline is opened
        progress(scenes, scenes)
        return {"scenes": scenes, "seed": seed, "frames": frames, "size": size}

    monkeypatch.setattr(layered, "evaluate", evaluate)
    assert run("eval", "layered", "--scenes", 4, "--seed", 2, "--dtype", "bfloat16") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {"scenes": 4, "seed": 2, "frames": 8, "size": [48, 64]}
    assert asked == [((None,), {"device": None, "dtype": torch.bfloat16})]
    assert run("eval", "layered", "--dtype", "int8") == 2
    assert_one_sentence(capsys.readouterr().err, "--dtype is 'int8'")
    assert run("eval", "layered", "--scenes", 0) == 2
    assert_one_sentence(capsys.readouterr().err, "--scenes is 0")


def test_eval_reuse_prints_a_table_and_json(monkeypatch, capsys):
    from layerloom.engine.layered import LayeredPipeline
    from layerloom.engine.metrics import reuse
    from layerloom.engine.metrics.layered import scene_layers

    truth = scene_layers(reuse.held_out_scenes(3, 2), 8, (48, 64))
    asked = []

    class Opened:
        native_size, device = (48, 64), torch.device("cpu")

        def sequence(self):
            return types.SimpleNamespace(frames=8)

        def generate_batch(self, task, prompts, given, seed, reuse):
            asked.append((task, len(prompts), sorted(given), seed, reuse))
            return truth

    monkeypatch.setattr(LayeredPipeline, "open", lambda *a, **k: Opened())
    command = ["eval", "reuse", "--scenes", 3, "--seed", 2, "--refresh", 4, "--refresh", 0]
    assert run(*command, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    names = ["full attention", "isolated", "kept, every 4", "kept"]
    assert list(scores) == ["foreground", "background", "decompose"]
    for rows in scores.values():
        assert list(rows) == names and rows["full attention"]["speed"] == 1.0
        assert all(row["seconds"] > 0 for row in rows.values())
    # The true layers themselves: every label right, the blend exact.
    assert scores["decompose"]["kept"]["alpha_iou"] == 1.0
    assert scores["background"]["kept"]["shape"] == 1.0
    assert {(task, tuple(given)) for task, _, given, _, _ in asked} == {
        ("foreground", ("alpha", "foreground")),
        ("background", ("background",)),
        ("decompose", ("blended",)),
    }
    assert [choice and (choice.keep, choice.refresh) for *_, choice in asked[:4]] == [
        None,
        (False, None),
        (True, 4),
        (True, None),
    ]
    assert run(*command) == 0
    table = capsys.readouterr().out
    assert "| foreground | blended_db |" in table and "| kept, every 4 |" in table
    assert run("eval", "reuse", "--refresh", -1) == 2
    assert_one_sentence(capsys.readouterr().err, "--refresh is -1")


# --- with the starter -----------------------------------------------------------------------


def test_the_starter_makes_layers(tmp_path):
    out = tmp_path / "out"
    command = start("layered", *WORDS, "--out", out, "--arrays", "--steps", 4)
    assert command.wait(timeout=120) == 0
    with np.load(out / "layers.npz") as arrays:
        assert {arrays[name].shape[:3] for name in arrays} == {arrays["alpha"].shape}
        assert arrays["alpha"].max() > 128  # there is a sprite
    assert read_clip(out / "foreground.webm").alpha is not None


def test_the_starter_repeats_itself(tmp_path):
    made = []
    for name in ("a", "b"):
        assert run("layered", *WORDS, "--out", tmp_path / name, "--steps", 2, "--arrays") == 0
        with np.load(tmp_path / name / "layers.npz") as arrays:
            made.append({layer: arrays[layer] for layer in arrays})
    assert all((made[0][layer] == made[1][layer]).all() for layer in made[0])


def test_decomposing_a_clip_of_another_size(tmp_path, capsys):
    """A photograph-like clip, 4:3, longer than the starter's: resized, said, back at its size."""
    folder = tmp_path / "clip"
    folder.mkdir()
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    picture = np.asarray(base.resize((160, 120), Image.Resampling.BICUBIC))
    for index in range(12):
        Image.fromarray(np.roll(picture, 3 * index, axis=1)).save(folder / f"{index}.png")
    out = tmp_path / "out"
    options = ["--decompose", folder, "--steps", 4, "--arrays"]
    assert run("layered", *WORDS, "--out", out, *options) == 0
    assert re.search("resized|cropped", capsys.readouterr().err)
    with np.load(out / "layers.npz") as arrays:
        assert arrays["background"].shape[1:] == (120, 160, 3)
        assert arrays["alpha"].shape[1:] == (120, 160)
    assert json.loads((out / "run.json").read_text())["notes"]


def test_ctrl_c_stops_within_a_step(tmp_path):
    """The real command on a terminal; 1000 steps would take a minute."""
    terminal, end = pty.openpty()
    options = {"stderr": end, "stdout": end, "env": {**os.environ, "TERM": "xterm"}}
    command = start("layered", *WORDS, "--out", tmp_path / "out", "--steps", 1000, **options)
    os.close(end)

    def read() -> bytes:
        try:
            return os.read(terminal, 4096)
        except OSError:  # the command has closed its end
            return b""

    seen = read()
    while b"Denoising" not in seen and command.poll() is None:
        seen += read()
    assert b"Denoising" in seen, seen.decode()
    command.send_signal(signal.SIGINT)
    asked = time.monotonic()
    while read():
        pass
    assert command.wait(timeout=30) == 130
    # A step takes a tenth of a second; the rest is leaving Python.
    assert time.monotonic() - asked < 5
    assert tree(tmp_path) == {}
    os.close(terminal)
