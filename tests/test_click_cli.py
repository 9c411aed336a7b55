"""`layerloom click`: what it writes, what it says, and what it refuses."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import assert_one_sentence, run, tree
from tiny_clicker import write_clicker

from layerloom.engine.click_job import read_region
from layerloom.engine.errors import LayerLoomError

PROMPT = ["--prompt", "moving left"]


@pytest.fixture(scope="module")
def clicker(tmp_path_factory):
    return write_clicker(tmp_path_factory.mktemp("click") / "tiny.safetensors")


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    for name, size in (("mask", (32, 48)), ("small", (8, 8))):
        grey = np.zeros(size, np.uint8)
        grey[4:20, 4:20] = 255
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / "empty.png")
    return tmp_path


@pytest.fixture
def segmenter(monkeypatch):
    """Stands in for the network: a square around the first point, whatever the picture."""
    seen = types.SimpleNamespace(opened=[], embedded=0, asked=[])

    class Fake:
        @classmethod
        def open(cls, path=None, device=None):
            seen.opened.append((path, device))
            return cls()

        def embed(self, picture):
            seen.embedded += 1
            return types.SimpleNamespace(size=picture.shape[:2])

        def masks(self, embedding, clicks):
            seen.asked.append(clicks)
            x, y = clicks.pixels(embedding.size)[0][0].astype(int)
            mask = torch.zeros(embedding.size, dtype=torch.bool)
            mask[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5] = True
            return types.SimpleNamespace(mask=lambda candidate: mask)

    module = types.ModuleType("layerloom.engine.conditioning.segmenter")
    module.Segmenter = Fake
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def click(files, clicker, *options):
    out = ["--out", files / "out", "--checkpoint", clicker, "--device", "cpu"]
    return run("click", files / "in.png", *out, *options)


def test_files_of_a_run(files, clicker, segmenter, capsys):
    options = ["--point", "20,16", "--point", "40,5,0", *PROMPT, "--strength", 3, "--arrays"]
    more = ["--region", "mask.png@jumps@2", "--width", 48, "--height", 32, "--steps", 2]
    more[1] = f"{files / 'mask.png'}@jumps@2"
    assert click(files, clicker, *options, *more) == 0
    out = files / "out"
    names = ["frames.png", "mask.png", "run.json", "video.npz", "video.webm"]
    assert sorted(tree(out)) == names
    with np.load(out / "video.npz") as arrays:
        assert arrays["video"].shape == (4, 32, 48, 3)
        masks = arrays["masks"]
    assert masks.shape == (2, 32, 48) and masks[0, 12:21, 16:25].all() and masks[0].sum() == 81
    with Image.open(out / "mask.png") as shown:
        assert np.array_equal(np.asarray(shown) > 127, masks.any(0))
    record = json.loads((out / "run.json").read_text())
    assert [r["phrase"] for r in record["regions"]] == ["moving left", "jumps"]
    assert record["regions"][0]["points"] == [[20, 16, 1], [40, 5, 0]]
    assert record["settings"]["regions"][1] == {"phrase": "jumps", "strength": 2}
    captured = capsys.readouterr()
    assert "4 frames of 48x32" in captured.out and "trained on 32x32" in captured.err


def test_a_picture_is_embedded_once_for_all_clicks(files, clicker, segmenter):
    options = ["--point", "20,16", *PROMPT, "--region", "40,8;2,2,0@jumps", "--steps", 1, "-q"]
    assert click(files, clicker, *options, "--dilate", 2, "--hold-background") == 0
    assert segmenter.embedded == 1 and len(segmenter.opened) == 1
    assert [len(clicks.points) for clicks in segmenter.asked] == [1, 2]
    record = json.loads((files / "out" / "run.json").read_text())
    assert record["dilate"] == 2 and any("composite" in note for note in record["notes"])


def test_a_mask_needs_no_segmenter(files, clicker, segmenter):
    options = ["--mask", files / "mask.png", *PROMPT, "--steps", 1, "--quiet"]
    assert click(files, clicker, *options, "--caption", "a red circle moving left") == 0
    assert not segmenter.opened
    assert json.loads((files / "out" / "run.json").read_text())["caption"].startswith("a red")


BAD = {
    "nowhere": (PROMPT, ["--point X,Y"]),
    "no phrase": (["--point", "3,3"], ["--prompt is empty"]),
    "twice": (["--mask", "{mask}", "--point", "3,3", *PROMPT], ["--mask and --point"]),
    "point": (["--point", "3", *PROMPT], ["'3'", "X,Y"]),
    "point outside": (["--point", "48,3", *PROMPT], ["48,3", "outside"]),
    "not a number": (["--point", "nan,3", *PROMPT], ["nan,3"]),
    "only unwanted": (["--point", "3,3,0", *PROMPT], ["select nothing"]),
    "box": (["--box", "1,2,3", *PROMPT], ["1,2,3"]),
    "no area": (["--box", "1,2,1,9", *PROMPT], ["no area"]),
    "missing mask": (["--mask", "no.png", *PROMPT], ["--mask no.png"]),
    "small mask": (["--mask", "{small}", *PROMPT], ["8x8", "48x32"]),
    "empty mask": (["--mask", "{empty}", *PROMPT], ["is empty"]),
    "region": (["--region", "3,3"], ["--region", "WHERE@PHRASE"]),
    "region mask": (["--region", "no.png@jumps"], ["no.png", "does not exist"]),
    "strength": (["--point", "3,3", *PROMPT, "--strength", "nan"], ["--strength is nan"]),
    "choose": (["--point", "3,3", *PROMPT, "--choose", "3"], ["--choose is 3"]),
    "dilate": (["--point", "3,3", *PROMPT, "--dilate", "9999"], ["dilation is 9999"]),
    "frames": (["--point", "3,3", *PROMPT, "--frames", "99"], ["99 frames"]),
    "seed": (["--point", "3,3", *PROMPT, "--seed", "-1"], ["--seed is -1"]),
    "segmenter": (["--point", "3,3", *PROMPT, "--segmenter", "no.pth"], ["--segmenter no.pth"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(files, clicker, segmenter, capsys, case):
    options, words = BAD[case]
    paths = {name: files / f"{name}.png" for name in ("mask", "small", "empty")}
    before = tree(files)
    given = [option.format(**paths) for option in options]
    assert click(files, clicker, "--steps", 1, "-q", *given) == 2
    assert_one_sentence(capsys.readouterr().err, *words)
    assert tree(files) == before


def test_without_a_starter_it_says_how_to_make_it(files, capsys, monkeypatch):
    monkeypatch.setattr("layerloom.engine.click.STARTER", files / "click.safetensors")
    options = ["--mask", files / "mask.png", *PROMPT, "--out", files / "out", "-q"]
    assert run("click", files / "in.png", *options) == 2
    assert_one_sentence(capsys.readouterr().err, "layerloom train starter/click.toml")
    assert not (files / "out").exists()


def test_regions_are_read(tmp_path):
    whole = read_region("40,60;80,20,0@ moves left @6")
    assert whole.points == ((40, 60, 1), (80, 20, 0)) and whole.strength == 6
    assert whole.phrase == "moves left" and whole.mask is None
    (tmp_path / "m.png").touch()
    assert read_region(f"{tmp_path / 'm.png'}@jumps").mask == tmp_path / "m.png"
    for text in ("", "@jumps", "3,3@", "3,3@jumps@high", "3,3@a@1@2"):
        with pytest.raises(LayerLoomError, match="WHERE@PHRASE@STRENGTH"):
            read_region(text)
