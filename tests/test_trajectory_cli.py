"""`layerloom trajectory`: what it writes, which options belong to whom, and what it refuses."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import assert_one_sentence, run, tree
from tiny_director import write_director

from layerloom.engine.conditioning.boxes import BoxPaths, Key, Track
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.subject_pictures import SubjectReader
from layerloom.engine.trajectory_job import SubjectOption, group_options

BOX = ["--box", "0:0,8,16,16:ease_out", "--box", "3:16,8,16,16"]
PROMPT = ["--prompt", "a sprite moving"]


@pytest.fixture(scope="module")
def director(tmp_path_factory):
    return write_director(tmp_path_factory.mktemp("trajectory") / "tiny.safetensors")


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for name, size in (("mask", (20, 24)), ("small", (8, 8))):
        grey = np.zeros(size, np.uint8)
        grey[2:6, 4:8] = 255
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(tmp_path / "empty.png")
    paths = BoxPaths(6, (Track("a", (Key(0, 0.0, 0.0, 0.5, 0.5),)),))
    (tmp_path / "boxes.json").write_text(paths.to_json())
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def trajectory(files, director, *options):
    out = ["--out", files / "out", "--checkpoint", director, "--device", "cpu"]
    return run("trajectory", files / "one.png", *out, *options)


def test_files_of_a_run(files, director, capsys):
    options = ["--mask", files / "mask.png", *BOX, "--subject", files / "two.png"]
    more = ["--box", "1:16,16,16,16", *PROMPT, "--steps", 2, "--arrays"]
    assert trajectory(files, director, *options, *more) == 0
    out = files / "out"
    names = ["frames.png", "run.json", "subjects.png", "video.npz", "video.webm"]
    assert sorted(tree(out)) == names
    with np.load(out / "video.npz") as arrays:
        assert arrays["video"].shape == (4, 32, 32, 3)
        boxes = arrays["boxes"]
    assert boxes.shape == (2, 4, 4)
    assert boxes[0, 0].tolist() == [0, 8, 16, 24] and boxes[0, 3].tolist() == [16, 8, 32, 24]
    assert boxes[0, 1, 0] > 16 / 3 and (boxes[1] == [16, 16, 32, 32]).all()
    record = json.loads((out / "run.json").read_text())
    assert record["subjects"][0]["mask"].endswith("mask.png")
    assert record["subjects"][1]["mask"] is None
    assert record["settings"]["subjects"] == 2
    captured = capsys.readouterr()
    assert "4 frames of 32x32" in captured.out and "Subject 2 has no mask" in captured.err


def test_boxes_of_a_file_give_the_length(files, director):
    options = ["--boxes", files / "boxes.json", *PROMPT, "--steps", 1, "--quiet"]
    assert trajectory(files, director, *options) == 0
    record = json.loads((files / "out" / "run.json").read_text())
    assert record["frames"] == 6 and record["subjects"][0]["boxes"][5] == [0, 0, 16, 16]


def test_options_belong_to_the_subject_before_them(tmp_path):
    given = [("box", "a"), ("subject", "two"), ("mask", "m"), ("box", "b"), ("point", "3,4")]
    first, second = group_options(tmp_path / "one", given)
    assert first == SubjectOption(tmp_path / "one", None, (), ("a",))
    assert (str(second.image), str(second.mask)) == ("two", "m")
    assert second.boxes == ("b",) and second.points == ("3,4",)
    with pytest.raises(LayerLoomError, match="two masks"):
        group_options(tmp_path / "one", [("mask", "a"), ("mask", "b")])


def test_a_clicked_subject_is_segmented_once_opened(files, monkeypatch):
    opened = []

    class Fake:
        @classmethod
        def open(cls, path, device):
            opened.append(path)
            return cls()

        def embed(self, picture):
            return picture.shape[:2]

        def masks(self, size, clicks):
            mask = torch.zeros(size, dtype=torch.bool)
            x, y = clicks.pixels(size)[0][0].astype(int)
            mask[y, x] = True
            return types.SimpleNamespace(mask=lambda candidate: mask)

    module = types.ModuleType("layerloom.engine.conditioning.segmenter")
    module.Segmenter = Fake
    monkeypatch.setitem(sys.modules, module.__name__, module)
    reader = SubjectReader(None, None, [])
    for name in ("one.png", "two.png"):
        subject = reader.read(files / name, None, ("4,5",))
        assert subject.mask[5, 4] == 1 and subject.mask.sum() == 1
    assert opened == [None]


def test_transparency_cuts_out(files):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[1:3, 1:3, 3] = 255
    pixels[0, 0, 3] = 128
    Image.fromarray(pixels).save(files / "clear.png")
    subject = SubjectReader(None, None, []).read(files / "clear.png", None, ())
    assert subject.mask.sum() == 5
    assert subject.image[1, 1].tolist() == [200, 0, 0] and subject.image[3, 3].min() == 255
    # Half of it over white, not over black.
    assert subject.image[0, 0].tolist() == [227, 127, 127]


BAD = {
    "nowhere": (PROMPT, ["--box FRAME:X,Y,W,H"]),
    "no prompt": (["--prompt", " ", *BOX], ["--prompt is empty"]),
    "second goes nowhere": (["--subject", "{two}", *PROMPT, "--boxes", "{boxes}"], ["subjects"]),
    "second has no box": ([*BOX, "--subject", "{two}", *PROMPT], ["two.png", "--box"]),
    "missing subject": ([*BOX, "--subject", "no.png", *PROMPT], ["no.png"]),
    "twice": ([*BOX, "--boxes", "{boxes}", *PROMPT], ["--boxes and --box"]),
    "mask and point": (
        [*BOX, "--mask", "{mask}", "--point", "1,1", *PROMPT],
        ["--mask and --point"],
    ),
    "malformed": (["--box", "0:1,2,3", *PROMPT], ["0:1,2,3"]),
    "not a number": (["--box", "0:nan,0,4,4", *PROMPT], ["nan"]),
    "no area": (["--box", "0:1,1,0,4", *PROMPT], ["area"]),
    "outside": (["--box", "0:64,0,8,8", *PROMPT], ["outside"]),
    "late": (["--box", "9:0,0,8,8", *PROMPT], ["0 to 3"]),
    "twice at a frame": (["--box", "1:0,0,8,8", "--box", "1:0,0,9,9", *PROMPT], ["frame 1"]),
    "broken file": (["--boxes", "{broken}", *PROMPT], ["JSON"]),
    "missing file": (["--boxes", "no.json", *PROMPT], ["--boxes no.json"]),
    "small mask": ([*BOX, "--mask", "{small}", *PROMPT], ["8x8", "24x20"]),
    "empty mask": ([*BOX, "--mask", "{empty}", *PROMPT], ["is empty"]),
    "weight": ([*BOX, "--reference-weight", "2", *PROMPT], ["--reference-weight"]),
    "frames": ([*BOX, "--frames", "0", *PROMPT], ["--frames"]),
    "guidance": ([*BOX, "--guidance", "nan", *PROMPT], ["--guidance"]),
    "guidance drops": ([*BOX, "--guidance-drops", "box", *PROMPT], ["'box'", "text, all"]),
}


@pytest.mark.parametrize("options, words", BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_one_sentence(files, director, capsys, options, words):
    names = {p.stem: p for p in files.iterdir()}
    given = [option.format(**names) for option in options]
    assert trajectory(files, director, *given, "--quiet") == 2
    message = capsys.readouterr().err
    assert_one_sentence(message)
    assert all(word in message for word in words)
    assert not (files / "out").exists()
