"""Data a person brings: every fault gets its sentence, samples come out as they went in."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from layerloom.engine.cli import main
from layerloom.engine.conditioning.layers import RGBA, LayerSequence, composite
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.export import encode_prores
from layerloom.engine.media import encode_webm, read_clip
from layerloom.engine.training.data import probes as probing
from layerloom.engine.training.data import sprites
from layerloom.engine.training.data.buckets import bucket_sizes, cover_box, nearest_bucket
from layerloom.engine.training.data.captions import worded
from layerloom.engine.training.data.check import check_folder
from layerloom.engine.training.data.dataset import LayeredFolder
from layerloom.engine.training.data.plan import FolderClips, stretches
from layerloom.engine.training.data.probes import Probe, ProbeStore
from layerloom.engine.training.data.source import DataParts, open_data
from layerloom.engine.training.sprite_world import render, scene_at

SIZE = (64, 96)
FRAMES = 8
CHECK = ("--frames", FRAMES, "--width", SIZE[1], "--height", SIZE[0], "--quiet")


def scene(index: int, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """A sprite-world clip: uint8 layers [F, H, W, 3], alpha [F, H, W]."""
    batch = render([scene_at(11, index)], frames, size)
    layers = {
        name: (getattr(batch, name)[0] * 255).round().byte().movedim(1, -1).numpy()
        for name in ("foreground", "alpha", "background", "blended")
    }
    return {**layers, "alpha": layers["alpha"][..., 0]}


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def rgba(layers: dict[str, np.ndarray], index: int) -> np.ndarray:
    return np.dstack([layers["foreground"][index], layers["alpha"][index]])


def write_captions(folder: Path, *lines: dict | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "captions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def words(sample: str, **changes) -> dict:
    return {"sample": sample, "foreground": "a shape", "background": "a wall", **changes}


CAPTIONS = (
    words("clips/webm", blended="a shape over a wall", foreground=["a shape", "one shape"]),
    words("prores"),
    words("clips/apart"),
    words("images/one"),
    {"sample": "mattes/cat.png", "foreground": "a cat"},
    {"sample": "bird", "foreground": "a bird"},
    {"sample": "backgrounds/wall", "background": "a brick wall"},
)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """One sample of every form the folder may hold."""
    folder = tmp_path_factory.mktemp("data") / "mine"
    webm = folder / "clips" / "webm"
    webm.mkdir(parents=True)
    layers = scene(0, 2 * FRAMES + 3)
    (webm / "foreground.webm").write_bytes(
        encode_webm(layers["foreground"], 8, layers["alpha"], lossless=True)
    )
    (webm / "background.webm").write_bytes(encode_webm(layers["background"], 8, lossless=True))
    (webm / "blended.webm").write_bytes(encode_webm(layers["blended"], 8, lossless=True))
    (webm / "run.json").write_text("{}")  # `layerloom layered` leaves one

    prores = folder / "clips" / "prores"
    prores.mkdir()
    layers = scene(1)
    (prores / "foreground.mov").write_bytes(encode_prores(layers["foreground"], 8, layers["alpha"]))
    save(prores / "background.png", layers["background"][0])

    apart = folder / "clips" / "apart"
    layers = scene(2)
    for index in range(FRAMES):
        # Black where nothing is, as keyers write it.
        shown = layers["foreground"][index] * (layers["alpha"][index] > 0)[..., None]
        save(apart / "shot_foreground" / f"{index}.png", shown)
        save(apart / "shot_alpha" / f"{index}.png", layers["alpha"][index])
        save(apart / "shot_background" / f"{index}.png", layers["background"][index])

    layers = scene(3)
    save(folder / "images" / "one" / "foreground.png", rgba(layers, 0))
    save(folder / "images" / "one" / "background.png", layers["background"][0])
    save(folder / "mattes" / "cat.png", rgba(layers, 4))
    for index in range(FRAMES):
        save(folder / "mattes" / "bird" / f"{index}.png", rgba(scene(4), index))
    tall = scene(5, 1, (96, 64))
    save(folder / "backgrounds" / "wall.png", tall["background"][0])
    write_captions(folder, *CAPTIONS)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "mine"))


def settings(folder: Path, **changes) -> FolderClips:
    values = {"path": str(folder), "frames": FRAMES, "width": SIZE[1], "height": SIZE[0]}
    return FolderClips(**{**values, **changes})


def problems(folder: Path, **changes) -> list[str]:
    report = check_folder(folder, settings(folder, **changes), 8)
    return [str(problem) for problem in report.layout.problems]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


# --- the check ------------------------------------------------------------------------------


def test_a_good_folder_is_clean(made, capsys):
    assert run("data", "check", made, *CHECK, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["counts"] == {
        "clips": 3, "images": 1, "mattes": 2, "backgrounds": 1, "copies": 8
    }  # fmt: skip
    # Two pieces of the long clip, one of each other, one image; the copies in the wall's shape.
    assert {(b["width"], b["height"]): b["samples"] for b in found["buckets"]} == {
        (96, 64): 5,
        (64, 96): 8,
    }
    # 8 latent frames of 16 channels and 12x8 positions in bfloat16.
    assert found["cache_bytes"]["latents"] == 13 * 8 * 16 * 96 * 2
    assert run("data", "check", made, *CHECK) == 0
    out = capsys.readouterr().out
    assert "3 clips" in out and "96x64 5" in out and out.endswith("No problems found.\n")
    assert not (made / ".layerloom").exists()


def replace_webm(path: Path, **layers) -> None:
    path.write_bytes(encode_webm(layers["frames"], 8, layers.get("alpha"), lossless=True))


def opaque(folder: Path, level: int) -> None:
    for index in range(FRAMES):
        save(folder / f"clips/apart/shot_alpha/{index}.png", np.full(SIZE, level, np.uint8))


FAULTS = {
    "no foreground": (
        lambda f: (f / "clips/webm/foreground.webm").unlink(),
        "clips/webm: has no foreground; add foreground.webm",
    ),
    "no background": (
        lambda f: (f / "images/one/background.png").unlink(),
        "images/one: has no background; add background.png",
    ),
    "two backgrounds": (
        lambda f: save(f / "clips/webm/background.png", scene(0)["background"][0]),
        "clips/webm: has background.png and background.webm for the background; keep one",
    ),
    "not a clip": (
        lambda f: (f / "images/one/background.png").rename(f / "images/one/background.psd"),
        "images/one/background.psd: is no video, picture or folder of pictures",
    ),
    "a loose file": (
        lambda f: save(f / "clips/loose.png", scene(0)["background"][0]),
        "clips/loose.png: is a file; put each sample of clips/ into a folder",
    ),
    "text for a video": (
        lambda f: (f / "clips/webm/foreground.webm").write_text("no video"),
        "clips/webm/foreground.webm: is not a video that can be opened",
    ),
    "a cut video": (
        lambda f: (f / "clips/webm/background.webm").write_bytes(
            (f / "clips/webm/background.webm").read_bytes()[:400]
        ),
        "clips/webm/background.webm: is ",
    ),
    "an empty folder of frames": (
        lambda f: [p.unlink() for p in (f / "mattes/bird").iterdir()],
        "mattes/bird: has no pictures in it",
    ),
    "other length": (
        lambda f: replace_webm(
            f / "clips/webm/blended.webm", frames=scene(0, 2 * FRAMES + 1)["blended"]
        ),
        "clips/webm/blended.webm: has 17 frames and the foreground 19; give layers of one length",
    ),
    "other size": (
        lambda f: save(f / "clips/prores/background.png", scene(1, 1, (32, 48))["background"][0]),
        "clips/prores/background.png: is 48x32 and the foreground 96x64; make all layers",
    ),
    "no alpha": (
        lambda f: replace_webm(f / "clips/webm/foreground.webm", frames=scene(0, 19)["foreground"]),
        "clips/webm/foreground.webm: has no alpha; give it as WebM VP9 with alpha",
    ),
    "alpha all 0": (lambda f: opaque(f, 0), "clips/apart/shot_alpha: is transparent everywhere"),
    "alpha all 255": (lambda f: opaque(f, 255), "clips/apart/shot_alpha: is opaque everywhere"),
    "too few frames": (
        lambda f: [p.unlink() for p in (f / "mattes/bird").glob("[2-9].png")],
        "mattes/bird: has 2 frames, too few for 8; give at least 6",
    ),
    "a still clip": (
        lambda f: shutil.copytree(f / "images/one", f / "clips/one"),
        "clips/one/foreground.png: is a single picture; put still samples into images/",
    ),
    "a moving image": (
        lambda f: shutil.copytree(f / "clips/prores", f / "images/prores"),
        "images/prores/foreground.mov: has 8 frames; put samples that move into clips/",
    ),
    "mattes alone": (
        lambda f: shutil.rmtree(f / "backgrounds"),
        "mattes/: is of no use without backgrounds/",
    ),
    "an empty kind": (
        lambda f: shutil.rmtree(f / "images/one"),
        "images/: is empty; put samples in it",
    ),
    "no captions": (
        lambda f: (f / "captions.jsonl").unlink(),
        "captions.jsonl: is missing; write one line",
    ),
    "one caption missing": (
        lambda f: write_captions(f, *CAPTIONS[1:]),
        'clips/webm: has no caption; add a line with "foreground" and "background"',
    ),
    "not JSON": (
        lambda f: write_captions(f, *CAPTIONS, "", '{"sample": "x",'),
        "captions.jsonl, line 9: is not JSON (Expecting",
    ),
    "not an object": (
        lambda f: write_captions(f, *CAPTIONS, "[1]"),
        "captions.jsonl, line 8: is not an object",
    ),
    "an unknown key": (
        lambda f: write_captions(f, words("clips/webm", forground="x"), *CAPTIONS[1:]),
        "captions.jsonl, line 1: has the unknown key 'forground'; known are sample, foreground",
    ),
    "an empty text": (
        lambda f: write_captions(f, words("clips/webm", blended=" "), *CAPTIONS[1:]),
        "captions.jsonl, line 1: its 'blended' is no text",
    ),
    "a missing text": (
        lambda f: write_captions(f, {"sample": "clips/webm", "foreground": "x"}, *CAPTIONS[1:]),
        'captions.jsonl, line 1: the caption of clips/webm has no "background"',
    ),
    "no sample named": (
        lambda f: write_captions(f, *CAPTIONS, {"foreground": "x"}),
        'captions.jsonl, line 8: names no sample; add "sample"',
    ),
    "a stranger": (
        lambda f: write_captions(f, *CAPTIONS, words("clips/nobody")),
        "captions.jsonl, line 8: there is no sample clips/nobody",
    ),
    "twice": (
        lambda f: write_captions(f, *CAPTIONS, words("webm")),
        "captions.jsonl, line 8: clips/webm has a caption in line 1 already",
    ),
    "two of one name": (
        lambda f: (
            shutil.copytree(f / "images/one", f / "images/webm"),
            write_captions(f, words("webm"), *CAPTIONS[1:], words("images/webm")),
        ),
        "captions.jsonl, line 1: webm may be clips/webm or images/webm; write the whole name",
    ),
    "other text encoding": (
        lambda f: (f / "captions.jsonl").write_bytes('{"sample": "T\u00fcr"}'.encode("latin-1")),
        "captions.jsonl, line 1: is not UTF-8 text",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_sentence(folder, fault):
    spoil, expected = FAULTS[fault]
    assert problems(folder) == []
    spoil(folder)
    found = problems(folder)
    assert any(text.startswith(expected) for text in found), found
    # One fault, one line: nothing else is blamed for it, but for captions that no longer fit.
    others = [text for text in found if not text.startswith(expected)]
    assert all("caption" in text for text in others), others
    assert all(". " not in text and "\n" not in text for text in found)


def test_the_check_exits_with_1_and_says_all_at_once(folder, capsys):
    FAULTS["no alpha"][0](folder)
    FAULTS["not JSON"][0](folder)
    assert run("data", "check", folder, *CHECK) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 problems found."
    assert any(line.startswith("clips/webm/foreground.webm: has no alpha;") for line in out)
    assert any(line.startswith("captions.jsonl, line 9: is not JSON") for line in out)
    assert run("data", "check", folder, *CHECK, "--json") == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    assert {(p["file"], p["line"]) for p in found} == {
        ("clips/webm/foreground.webm", None),
        ("captions.jsonl", 9),
    }


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nowhere"], "nowhere is not a folder"),
        ([".", "--frames", "6"], "--frames is 6; it must be a multiple of 4"),
        ([".", "--frames", "0"], "--frames is 0"),
        ([".", "--width", "8"], "--width is 8; at least 16"),
        ([".", "--fps", "-1"], "--fps is -1"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_of_the_check(arguments, expected, capsys):
    assert run("data", "check", *arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    assert run("data", "check", tmp_path) == 1
    assert "holds none of clips/, images/, or mattes/ with backgrounds/" in capsys.readouterr().out


def test_an_interrupted_check_leaves_nothing(made, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "read_clip", interrupted)
    before = sorted(made.rglob("*"))
    assert run("data", "check", made, *CHECK) == 130
    assert capsys.readouterr().err == "layerloom: interrupted\n"
    assert sorted(made.rglob("*")) == before


def test_small_samples_are_noted(made):
    report = check_folder(made, settings(made, width=192, height=128), 8)
    assert not report.layout.problems
    assert "clips/prores is 96x64 and is enlarged 2 times" in report.notes


def test_what_was_seen_is_kept_until_a_file_changes(folder, tmp_path, monkeypatch):
    seen = []
    probe = probing.probe
    monkeypatch.setattr(probing, "probe", lambda path, what: seen.append(path) or probe(path, what))
    file = tmp_path / "clips.json"
    first = check_folder(folder, settings(folder), 8, ProbeStore(folder, file))
    count = len(seen)
    assert count == 13 and not list(tmp_path.glob("*.partial"))
    again = check_folder(folder, settings(folder), 8, ProbeStore(folder, file))
    assert len(seen) == count and again.probes == first.probes
    save(folder / "backgrounds/wall.png", scene(6, 1, SIZE)["background"][0])
    changed = check_folder(folder, settings(folder), 8, ProbeStore(folder, file))
    assert seen[count:] == [folder / "backgrounds/wall.png"]
    assert changed.probes["backgrounds/wall.png"]["background"].size == "96x64"
    file.write_text('{"cut off')
    check_folder(folder, settings(folder), 8, ProbeStore(folder, file))
    assert len(seen) == 2 * count + 1


# --- what is drawn --------------------------------------------------------------------------


def probe_of(frames: int, fps: float = 8) -> Probe:
    return Probe(frames, 64, 96, fps, None, (0, 255), (0, 0, 96, 64))


def test_pieces_of_clips():
    assert stretches(probe_of(1), 4, 0, 4) == [[0] * 4]
    assert stretches(probe_of(9), 4, 0, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stretches(probe_of(9), 4, 0, 1) == [[0, 1, 2, 3]]
    # Down to three quarters the last frame is held.
    assert stretches(probe_of(3), 4, 0, 4) == [[0, 1, 2, 2]]
    assert stretches(probe_of(2), 4, 0, 4) == []
    # 30 frames a second taken down to 8: the frames nearest before 0, 1/8, 2/8 ... s.
    assert stretches(probe_of(31, 30), 8, 8, 4) == [[0, 3, 7, 11, 15, 18, 22, 26]]
    assert stretches(probe_of(9, 8), 8, 12, 4) == [list(range(8))]


def test_buckets_keep_the_area_and_divide():
    sizes = bucket_sizes((480, 720), 16)
    assert sizes[0] == (480, 720) and (720, 480) in sizes
    for height, width in sizes:
        assert height % 16 == 0 and width % 16 == 0
        assert 0.9 * 480 * 720 < height * width <= 480 * 720
    assert bucket_sizes((100, 100), 16, shapes=False) == ((96, 96),)
    assert nearest_bucket((1920, 1080), sizes) == (784, 432)
    assert nearest_bucket((1000, 1500), sizes) == (480, 720)
    assert cover_box((100, 100), (50, 100)) == (0, 25, 100, 75)


def test_shares_and_stills_weigh_the_draws(made):
    def totals(**changes) -> dict[tuple[str, bool], float]:
        entries = LayeredFolder(settings(made, **changes), multiple=8).entries
        assert sum(e.weight for e in entries) == pytest.approx(1)
        found: dict[tuple[str, bool], float] = {}
        for entry in entries:
            key = entry.kind, entry.stands_still
            found[key] = found.get(key, 0) + entry.weight
        return {key: round(weight, 4) for key, weight in found.items()}

    # Four pieces of clips, one image, four copies of each matte, of which one does not move.
    assert totals() == {
        ("clips", False): round(4 / 13, 4),
        ("images", True): round(1 / 13, 4),
        ("mattes", False): round(4 / 13, 4),
        ("mattes", True): round(4 / 13, 4),
    }
    assert totals(shares={"images": 3, "clips": 1}) == {
        ("clips", False): 0.25,
        ("images", True): 0.75,
    }
    assert totals(still=0.25, shares={"clips": 1}) == {
        ("clips", False): 0.75,
        ("clips", True): 0.25,
    }
    assert totals(still=1, shares={"mattes": 1}) == {("mattes", True): 1}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"frames": 6}, "6 frames do not divide by 4; use 8"),
        ({"still": 1.5}, "data.still is 1.5; give a share from 0 to 1"),
        ({"copies": 0}, "data.copies is 0; it must be at least 1"),
        ({"fps": -1.0}, "data.fps is -1.0"),
        ({"buckets": 1}, "data.buckets is 1; write true or false"),
        ({"shares": {"video": 1}}, "names 'video'; it takes clips, images, mattes"),
        ({"shares": {"clips": -1}}, "give numbers from 0 up"),
        ({"shares": {"clips": 0}}, "give numbers from 0 up"),
        ({"shares": 3}, "data.shares"),
    ],
)
def test_settings_that_cannot_be(made, changes, expected):
    with pytest.raises(LayerLoomError, match=expected):
        settings(made, **changes)


def test_a_share_of_what_is_not_there(folder):
    for kind in ("mattes", "backgrounds", "images"):
        shutil.rmtree(folder / kind)
    write_captions(folder, *CAPTIONS[:3])
    with pytest.raises(LayerLoomError, match="the folder has only clips"):
        LayeredFolder(settings(folder, shares={"images": 1}), multiple=8)


# --- samples --------------------------------------------------------------------------------


def entry_of(data: LayeredFolder, name: str, **wanted) -> int:
    for index, entry in enumerate(data.entries):
        if entry.name == name and all(getattr(entry, k) == v for k, v in wanted.items()):
            return index
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name, index, start", [("clips/webm", 0, 8), ("clips/prores", 1, 0), ("clips/apart", 2, 0)]
)
def test_a_clip_comes_out_as_it_went_in(made, name, index, start):
    data = LayeredFolder(settings(made), multiple=8)
    sample = data[entry_of(data, name, piece=start // FRAMES)]
    layers = scene(index, 19 if index == 0 else FRAMES)
    assert sample["still"] is False
    for layer in RGBA:
        truth = torch.from_numpy(layers[layer][start : start + FRAMES]).float() / 255
        truth = truth[:, None] if layer == "alpha" else truth.movedim(-1, 1)
        assert sample[layer].shape == truth.shape
        if layer == "foreground":
            # Colour under nothing is nobody's.
            truth, found = truth * sample["alpha"], sample[layer] * sample["alpha"]
        else:
            found = sample[layer]
        # 4:2:0 colours at edges and 8 bits; a wrong frame or layer is 10 times as far off.
        assert (found - truth).abs().mean() < 0.012, layer
    if name != "clips/webm":  # which brings its own blended clip
        scene_again = composite(sample["foreground"], sample["alpha"], sample["background"])
        assert (scene_again - sample["blended"]).abs().max() < 0.003


def test_nothing_unseen_bleeds_in_when_layers_are_scaled(made):
    data = LayeredFolder(settings(made, width=48, height=32), multiple=8)
    sample = data[entry_of(data, "clips/apart")]  # black where nothing is
    colour = torch.from_numpy(scene(2)["foreground"][0, 0, 0]).float() / 255
    edge = (sample["alpha"] > 0.3) & (sample["alpha"] < 0.9)
    assert edge.sum() > 20
    away = (sample["foreground"] - colour[None, :, None, None]).abs().amax(1, keepdim=True)
    # The sprite's own soft edge was saved with its colour, so half-seen pixels have it too.
    assert away[edge].max() < 0.03


def test_images_stand_still_and_stills_repeat_one_frame(made):
    data = LayeredFolder(settings(made, still=0.5), multiple=8)
    image = data[entry_of(data, "images/one")]
    moving, still = (
        data[index]
        for index, entry in enumerate(data.entries)
        if entry.name == "clips/webm" and entry.piece == 1
    )
    assert image["still"] and still["still"] and not moving["still"]
    frame = next(
        e.still
        for e in data.entries
        if e.name == "clips/webm" and e.piece == 1 and e.still is not None
    )
    for layer in RGBA:
        for sample in (image, still):
            assert torch.equal(sample[layer], sample[layer][:1].expand_as(sample[layer]))
        assert torch.equal(still[layer][0], moving[layer][frame])
    assert (moving["alpha"][0] - moving["alpha"][-1]).abs().max() > 0.5


def test_copies_follow_the_seed_and_nothing_else(made):
    def placements(seed: int):
        return [e.placement for e in LayeredFolder(settings(made, seed=seed), multiple=8).entries]

    assert placements(3) == placements(3) != placements(4)
    data = LayeredFolder(settings(made, seed=3), multiple=8)
    index = entry_of(data, "mattes/cat.png")
    entry, sample = data.entries[index], data[index]
    assert entry.bucket == (96, 64)  # the background's shape
    assert sample["prompts"] == ("a cat", "a brick wall", "a cat over a brick wall")
    wall = torch.from_numpy(read_clip(made / "backgrounds/wall.png", min_frames=1).frames)
    assert (sample["background"][0] * 255 - wall[0].movedim(-1, 0)).abs().max() < 1
    # The matte's box has its place and size, without the empty border it was saved with.
    shown = sample["alpha"][0, 0] > 0.02
    rows, columns = torch.nonzero(shown.any(1)), torch.nonzero(shown.any(0))
    middle = (float(columns.float().mean()) + 0.5) / 64, (float(rows.float().mean()) + 0.5) / 96
    assert middle == pytest.approx((entry.placement.x, entry.placement.y), abs=0.03)
    largest = max(len(rows) / 96, len(columns) / 64)
    assert largest == pytest.approx(entry.placement.scale, abs=0.05)
    assert (sample["foreground"][0][:, shown] > 0).any()


def test_wordings():
    texts = {"foreground": ("a", "b"), "background": ("c",)}
    assert worded(texts) == ("a", "c", "a over c")
    assert {worded(texts, seed) for seed in range(20)} == {
        ("a", "c", "a over c"),
        ("b", "c", "b over c"),
    }
    assert worded({**texts, "blended": ("d",)}, 5)[2] == "d"


# --- the source -----------------------------------------------------------------------------


class PoolCodec:
    """An autoencoder that averages; counts what it encodes."""

    spatial_factor, temporal_factor = 8, 4

    def __init__(self, bias: float = 0.0):
        self.model = nn.Linear(1, 1)
        nn.init.constant_(self.model.weight, bias)
        nn.init.zeros_(self.model.bias)
        self.encoded = 0

    def encode(self, clip, generator):
        self.encoded += len(clip)
        pooled = nn.functional.avg_pool3d(clip.transpose(1, 2), (4, 8, 8)).transpose(1, 2)
        noise = torch.randn(pooled.shape, generator=generator)
        return pooled + self.model.weight.detach().squeeze() + 0.01 * noise


class LetterFeatures:
    """A text encoder that tells prompts apart by their letters."""

    tokens = 4

    def __init__(self):
        self.model, self.asked = nn.Linear(1, 1), []
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)

    def encode(self, prompts):
        self.asked += prompts
        codes = [[float(ord(c)) for c in prompt.ljust(12)[:12]] for prompt in prompts]
        return torch.tensor(codes).reshape(len(prompts), self.tokens, 3)


def parts(tmp_path: Path, codec=None, text=None) -> DataParts:
    cache = tmp_path / "run"
    cache.mkdir(exist_ok=True)
    return DataParts(codec or PoolCodec(), LayerSequence(frames=FRAMES), SIZE, 8, cache, text)


def opened(folder: Path, tmp_path: Path, codec=None, text=None, **table):
    return open_data({"kind": "folder", "path": str(folder), **table}, parts(tmp_path, codec, text))


def at(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def test_a_folder_gives_the_same_batches_whatever_came_before(folder, tmp_path):
    source = opened(folder, tmp_path, still=0.5)
    ticks = []
    source.encode(lambda *numbers: ticks.append(numbers))
    assert ticks == [(n + 1, len(source)) for n in range(len(source))]
    batches = [source.batch(at(step), 4) for step in range(8)]
    shapes = set()
    for latents, text, still in batches:
        height, width = latents.shape[-2:]
        assert latents.shape == (4, 8, 3, height, width) and latents.dtype == torch.bfloat16
        assert len(text) == 4 and all(len(prompts) == 3 for prompts in text)
        # A batch stands still or moves as a whole, so that one adapter strength suits it.
        assert len(set(still.tolist())) == 1
        shapes.add((height * 8, width * 8, bool(still[0])))
    assert {shape[:2] for shape in shapes} == set(source.sizes) == {(64, 96), (96, 64)}
    assert {shape[2] for shape in shapes} == {True, False}

    # Another run that starts in the middle, and steps asked for out of order.
    again = opened(folder, tmp_path, still=0.5)
    for step in (5, 6, 2, 7, 7):
        generator = at(step)
        latents, text, still = again.batch(generator, 4)
        assert torch.equal(latents, batches[step].latents) and text == batches[step].text
        # What the step draws next does not depend on reading ahead either.
        plain = at(step)
        again.draw(plain, 4)
        assert torch.equal(generator.get_state(), plain.get_state())
    later = at(3)
    torch.rand(2, generator=later)
    other = again.batch(later, 4)  # not the first draw of its step
    assert other.latents.shape[1:3] == (8, 3)


def test_processes_share_a_batch_and_the_encoding(folder, tmp_path):
    source = opened(folder, tmp_path)
    codec = source.parts.codec
    source.encode(rank=0, world=2)
    assert 0 < codec.encoded < len(source)
    source.encode(rank=1, world=2)
    assert codec.encoded == len(source)
    for step in range(4):
        whole = source.batch(at(step), 4)
        halves = [source.batch(at(step), 2, rank, 2) for rank in range(2)]
        assert torch.equal(whole.latents, torch.cat([half.latents for half in halves]))
        assert whole.text == halves[0].text + halves[1].text


def test_latents_are_of_the_joined_layers(folder, tmp_path):
    source = opened(folder, tmp_path)
    source.encode()
    data = source.dataset
    index = entry_of(data, "clips/webm", piece=0)
    latents = source.load([source.draw(at(0), 1)[0]._replace(index=index)]).latents[0].float()
    layers = source.sequence.split_latents(latents[None])
    sample = data[index]
    for layer in RGBA:
        clip = sample[layer] * 2 - 1
        if layer == "foreground":  # premultiplied around mid-grey
            clip = clip * sample["alpha"]
        clip = clip.expand(-1, 3, -1, -1).transpose(0, 1)
        truth = nn.functional.avg_pool3d(clip[None], (4, 8, 8))[0].transpose(0, 1)
        # bfloat16, and the codec's noise of 0.01.
        assert (layers[layer][0] - truth).abs().max() < 0.06


def test_texts_are_encoded_once_with_their_index(folder, tmp_path):
    text = LetterFeatures()
    source = opened(folder, tmp_path, text=text)
    source.encode()
    assert sorted(text.asked) == sorted(set(text.asked))
    assert {"0, a shape", "0, one shape", "1, a wall", "2, a cat over a brick wall"} <= set(
        text.asked
    )
    count = len(text.asked)
    index = entry_of(source.dataset, "clips/webm")
    seen = set()
    for wording in range(8):
        (pick,) = source.draw(at(0), 1)
        features = source.load([pick._replace(index=index, wording=wording)]).text
        assert features.shape == (1, 3, 4, 3) and features.dtype == torch.bfloat16
        letters = ["".join(chr(int(c)) for c in row.flatten()) for row in features[0].float()]
        seen.add(letters[0])
        assert letters[1:] == ["1, a wall   ", "2, a shape o"]
    assert seen == {"0, a shape  ", "0, one shape"}
    assert len(text.asked) == count
    opened(folder, tmp_path, text=text).encode()
    assert len(text.asked) == count


def test_only_what_changed_is_encoded_again(folder, tmp_path):
    def encoded(codec=None, **table) -> int:
        source = opened(folder, tmp_path, codec, **table)
        source.encode()
        assert source.batch(at(0), 2).latents.shape[0] == 2
        return source.parts.codec.encoded

    total = encoded()
    assert total == 13 and encoded() == 0
    # Copied or touched: the same bytes at another time.
    for path in (folder / "clips").rglob("*.*"):
        os.utime(path, (1, 1))
    assert encoded() == 0
    # Another image at the same place.
    save(folder / "images/one/background.png", scene(7)["background"][0])
    assert encoded() == 1
    # A changed wall is under all copies.
    save(folder / "backgrounds/wall.png", scene(7, 1, (96, 64))["background"][0])
    assert encoded() == 8
    (damaged, *_) = (folder / ".layerloom").glob("latents-*/clips-webm-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert encoded() == 1
    # Other weights, size or length: kept apart, so that going back costs nothing.
    assert encoded(PoolCodec(0.5)) == total
    assert encoded(width=64, height=64) == total
    assert encoded(frames=4) > 0
    assert encoded() == 0
    assert encoded(seed=1) == 8


def test_encoding_goes_on_where_it_was_stopped(folder, tmp_path):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    source = opened(folder, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        source.encode(stop)
    with pytest.raises(LayerLoomError, match="missing or damaged; resume, and it is made again"):
        for step in range(20):
            source.batch(at(step), 4)
    again = opened(folder, tmp_path)
    again.encode()
    assert again.parts.codec.encoded == len(again) - 5


def test_a_full_disk_while_encoding(folder, tmp_path, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        if str(target).endswith(".safetensors"):
            written.append(target)
            if len(written) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    source = opened(folder, tmp_path)
    with pytest.raises(LayerLoomError, match=r"The disk is full while writing .*make room"):
        source.encode()
    kept = [path for path in (folder / ".layerloom").rglob("*") if path.is_file()]
    assert not [path for path in kept if "partial" in path.name]
    assert len([path for path in kept if path.suffix == ".safetensors"]) == 3
    monkeypatch.setattr(os, "replace", replace)
    again = opened(folder, tmp_path)
    again.encode()
    assert again.parts.codec.encoded == len(again) - 3


def test_too_small_a_disk_is_said_before_work_starts(folder, tmp_path, monkeypatch):
    source = opened(folder, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    with pytest.raises(LayerLoomError, match=r"need about .* GB .* name another folder with data"):
        source.encode()
    assert source.parts.codec.encoded == 0


def test_numbers_that_are_none(folder, tmp_path):
    codec = PoolCodec(float("nan"))
    with pytest.raises(LayerLoomError, match="no finite numbers for clips/apart"):
        opened(folder, tmp_path, codec).encode()


def test_training_refuses_a_folder_with_problems(folder, tmp_path):
    FAULTS["no alpha"][0](folder)
    with pytest.raises(LayerLoomError) as caught:
        opened(folder, tmp_path)
    text = str(caught.value)
    assert "has a problem, the first is clips/webm/foreground.webm: has no alpha" in text
    assert f"layerloom data check {folder}" in text and ". " not in text


@pytest.mark.parametrize(
    "table, expected",
    [
        ({"kind": "video"}, "data.kind is 'video'; it must be one of sprites, folder"),
        ({"kind": "folder"}, "incomplete.*path"),
        ({"kind": "folder", "path": "nowhere"}, "data.path nowhere is not a folder"),
        ({"kind": "folder", "path": ".", "frame": 3}, "key 'frame' is unknown"),
        ({"kind": "folder", "path": 3}, "path is 3; it must be of type str"),
        ({"scenes": 0}, "scenes is 0; at least 1"),
        ({"still": 2.0}, "still is 2.0; give a share"),
        ({"size": 30}, "size is 30; it must be a multiple"),
    ],
)
def test_tables_that_cannot_be(tmp_path, table, expected):
    with pytest.raises(LayerLoomError, match=expected):
        open_data(table, parts(tmp_path))


def test_a_cache_that_cannot_be_made(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LayerLoomError, match=r"cannot be made .*name another folder"):
        opened(made, tmp_path, cache=str(tmp_path / "file" / "cache"))
    source = opened(made, tmp_path, cache=str(tmp_path / "elsewhere"))
    source.encode()
    assert list((tmp_path / "elsewhere").glob("latents-*/*.safetensors"))
    assert not (made / ".layerloom").exists()
    assert any("elsewhere" in line for line in source.describe())


# --- sprite world ---------------------------------------------------------------------------


def sprite_source(tmp_path: Path, codec=None, text=None, **table):
    values = {"kind": "sprites", "frames": FRAMES, "size": 32, "seed": 3, "scenes": 6}
    return open_data({**values, **table}, parts(tmp_path, codec, text))


def test_sprites_move_or_stand_still(tmp_path):
    source = sprite_source(tmp_path, still=0.5)
    with pytest.raises(RuntimeError):
        source.batch(at(0), 2)
    ticks = []
    source.encode(lambda *numbers: ticks.append(numbers))
    assert ticks[-1] == (6, 6) and len(source) == 6
    seen = set()
    for step in range(12):
        latents, text, still = source.batch(at(step), 3)
        assert latents.shape == (3, 8, 3, 4, 4) and latents.dtype == torch.bfloat16
        assert len(set(still.tolist())) == 1 and len(text) == 3
        seen.add(bool(still[0]))
        first, second = source.sequence.split_latents(latents.float())["alpha"].unbind(1)
        # The codec's noise of 0.01 apart, two halves of a still clip agree.
        assert ((first - second).abs().max() < 0.1) == bool(still[0])
        halves = [source.batch(at(step), 3, rank, 2) for rank in range(2)]
        whole = source.batch(at(step), 6)
        assert torch.equal(whole.latents, torch.cat([half.latents for half in halves]))
        assert whole.text == halves[0].text + halves[1].text
    assert seen == {True, False}


def test_sprites_are_encoded_once(tmp_path, monkeypatch):
    codec = PoolCodec()
    sprite_source(tmp_path, codec, still=0.5).encode()
    assert codec.encoded == 6
    sprite_source(tmp_path, codec, still=0.5).encode()
    sprite_source(tmp_path, codec, still=0.5).encode(rank=1, world=2)
    assert codec.encoded == 6
    sprite_source(tmp_path, codec, still=0.5, seed=4).encode()
    assert codec.encoded == 12
    (tmp_path / "run" / "latents.safetensors").write_text("damaged")
    sprite_source(tmp_path, codec, still=0.5, seed=4).encode()
    assert codec.encoded == 15


def test_sprites_with_a_frozen_text_encoder(tmp_path):
    source = sprite_source(tmp_path, text=LetterFeatures(), still=1.0)
    source.encode()
    latents, text, still = source.batch(at(0), 2)
    assert text.shape == (2, 3, 4, 3) and still.all()
    assert [chr(int(text[0, i, 0, 0])) for i in range(3)] == ["0", "1", "2"]


def test_one_frame_of_a_scene(tmp_path):
    batch = render([scene_at(3, i) for i in range(4)], FRAMES, (32, 32))
    held = sprites.still_frames(batch, 3, range(4))
    again = sprites.still_frames(batch, 3, range(4))
    chosen = set()
    for row in range(4):
        matches = [
            frame
            for frame in range(FRAMES)
            if torch.equal(held.blended[row, 0], batch.blended[row, frame])
        ]
        assert matches
        chosen.add(matches[0])
        assert torch.equal(held.alpha[row], held.alpha[row, :1].expand_as(held.alpha[row]))
    assert len(chosen) > 1 and torch.equal(held.blended, again.blended)


def test_the_check_loads_no_torch(made):
    """Checking should start at once, and on machines that do not train."""
    code = (
        "import sys; from layerloom.engine.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "data", "check", str(made), *map(str, CHECK)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("No problems found.\nFalse\n"), done.stderr
