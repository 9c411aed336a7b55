"""`layerloom segment`: what it writes, what it says and what it refuses."""

import numpy as np
import pytest
from PIL import Image
from test_cli import assert_one_sentence, run, tree
from tiny_segmenter import picture, write_segmenter

pytest.importorskip("segment_anything")


@pytest.fixture
def files(tmp_path):
    """A picture and a segmenter whose candidates cover some of it."""
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    return [
        "segment",
        tmp_path / "picture.png",
        "--checkpoint",
        write_segmenter(tmp_path / "s.pth"),
    ]


def grey(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_masks_are_written(tmp_path, files, capsys):
    out = tmp_path / "new" / "mask.png"
    points = ["--point", "20,30", "--point", "5,6,0", "--box", "10,5,60,40"]
    assert run(*files, *points, "--out", out, "--candidates") == 0
    assert sorted(tree(out.parent)) == ["mask-0.png", "mask-1.png", "mask-2.png", "mask.png"]
    said = capsys.readouterr().out
    assert "mask.png" in said and "scores" in said
    chosen = int(said.split("Candidate ")[1][0])
    mask = grey(out)
    assert mask.shape == (48, 70) and set(np.unique(mask)) == {0, 255}
    assert np.array_equal(mask, grey(tmp_path / "new" / f"mask-{chosen}.png"))
    share = float(said.split("), ")[1].split("%")[0])
    assert share == pytest.approx(100 * (mask > 0).mean(), abs=0.06)
    # Another candidate; the best one grown and softened.
    other, wide = (chosen + 1) % 3, tmp_path / "wide.png"
    assert run(*files, *points, "--choose", other, "--out", wide) == 0
    assert np.array_equal(grey(wide), grey(tmp_path / "new" / f"mask-{other}.png"))
    assert run(*files, *points, "--dilate", 1, "--feather", 2, "--out", wide) == 0
    assert len(np.unique(grey(wide))) > 2
    assert (grey(wide) >= 127).sum() > (mask > 0).sum()
    assert not (tmp_path / "wide-0.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--point", "--box"]),
        (["--point", "20"], ["'20'", "X,Y"]),
        (["--point", "70,10"], ["70,10", "69,47", "outside"]),
        (["--point", "nan,10"], ["'nan,10'"]),
        (["--point", "1,1,0"], ["select nothing"]),
        (["--box", "1,2,3"], ["'1,2,3'"]),
        (["--box", "1,2,1,9"], ["no area"]),
        (["--point", "1,1", "--choose", 3], ["--choose is 3"]),
        (["--point", "1,1", "--dilate", 999], ["999"]),
        (["--point", "1,1", "--feather", -1], ["-1"]),
        (["--point", "1,1", "--dilate", -48], ["Nothing is left", "-48"]),
        (["--point", "1,1", "--out", "mask.jpg"], ["mask.jpg", ".png"]),
        (["--point", "1,1", "--out", "picture.png"], ["picture.png", "itself"]),
        (["--point", "1,1", "--checkpoint", "no.pth"], ["no.pth", "does not exist"]),
        (["--point", "1,1", "--checkpoint", "picture.png"], ["picture.png"]),
        (["--point", "1,1", "--device", "toaster"], ["toaster"]),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path, files, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    out = [] if "--out" in options else ["--out", "mask.png"]
    assert run(*files, *out, *options) == 2
    assert_one_sentence(capsys.readouterr().err, *words)
    assert tree(tmp_path) == before


def test_a_missing_picture_is_said(tmp_path, files, capsys):
    assert run("segment", tmp_path / "no.png", "--point", "1,1", "--out", tmp_path / "m.png") == 2
    assert_one_sentence(capsys.readouterr().err, "no.png", "does not exist")
