"""Samples made of a video and a mask: what lay behind it comes back, or is said to be a guess."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerloom.engine.cli import main
from layerloom.engine.media import read_clip, write_webm
from layerloom.engine.training.data.from_video import split_video
from layerloom.engine.training.sprite_world import render, scene_at


def scene(index: int, frames: int) -> dict[str, np.ndarray]:
    """A sprite-world clip of 96x96: uint8 layers [F, H, W, 3], alpha [F, H, W]."""
    batch = render([scene_at(11, index)], frames, (96, 96))
    layers = {
        name: (getattr(batch, name)[0] * 255).round().byte().movedim(1, -1).numpy()
        for name in ("foreground", "alpha", "background", "blended")
    }
    return {**layers, "alpha": layers["alpha"][..., 0]}


def save(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(path)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def db(error: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(float(np.square(error).mean()), 1e-3)))


def moving_scenes(count: int) -> list[int]:
    return [i for i in range(40) if scene_at(11, i).speed == "fast"][:count]


def test_what_was_seen_behind_the_mask_comes_back():
    for index in moving_scenes(6):
        layers = scene(index, 16)
        split = split_video(layers["blended"], layers["alpha"])
        hidden = layers["alpha"] > 3  # less is the noise of lossy mattes
        edge = (layers["alpha"] > 64) & hidden.any(0)
        never = np.ones((96, 96), bool)
        # The mask is grown by a pixel: what some frame shows farther from it is exact.
        for frame in hidden:
            padded = np.pad(frame, 1)
            near = [padded[y : y + 96, x : x + 96] for y in range(3) for x in range(3)]
            never &= np.any(near, axis=0)
        assert split.unseen == pytest.approx(never.mean())
        error = split.background.astype(float) - layers["background"]
        assert np.abs(error)[:, ~never].max() <= 1
        # Colours at soft edges, where the video's own are a mix, are the sprite's own again.
        colour = np.abs(split.foreground.astype(float) - layers["foreground"])[edge]
        assert colour.mean() < 2.5
        assert split.psnr > 45


def test_what_was_never_seen_is_spread_in():
    # A gradient, a square that never moves: the fill is smooth, within a few levels.
    ramp = np.broadcast_to(np.linspace(40, 200, 64)[None, :, None], (64, 64, 3))
    background = np.repeat(ramp.round().astype(np.uint8)[None], 4, axis=0)
    alpha = np.zeros((4, 64, 64), np.uint8)
    alpha[:, 24:40, 24:40] = 255
    video = np.where(alpha[..., None] > 0, np.uint8(255), background)
    split = split_video(video, alpha)
    assert split.unseen == pytest.approx(18 * 18 / 64**2)  # the square and a pixel around it
    assert db(split.background.astype(float) - background) > 35
    assert "never seen" in split.notes()[0] and "7.9%" in split.notes()[0]
    assert (split.foreground[:, 26:38, 26:38] == 255).all()


def test_a_restless_background_is_noted():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    alpha = np.zeros((6, 32, 32), np.uint8)
    alpha[:, 8:16, 8:16] = 255
    notes = split_video(video, alpha).notes()
    assert len(notes) == 4 and "a camera and a scene that stand still" in notes[-1]


@pytest.fixture
def shot(tmp_path) -> tuple[Path, Path]:
    """A video and its mask as a person has them."""
    layers = scene(moving_scenes(1)[0], 16)
    write_webm(tmp_path / "shot.webm", layers["blended"], 8)
    write_webm(tmp_path / "mask.webm", layers["alpha"], 8)
    return tmp_path / "shot.webm", tmp_path / "mask.webm"


TEXTS = ("--foreground", "a shape", "--background", "a wall")


def test_from_video_makes_a_sample_that_passes_the_check(shot, tmp_path, capsys):
    video, mask = shot
    out = tmp_path / "mine"
    assert run("data", "from-video", video, "--mask", mask, "--out", out, *TEXTS) == 0
    told = capsys.readouterr()
    assert told.out == f"Wrote {out}/clips/shot: 16 frames of 96x96.\n"
    assert "The background is an approximation:" in told.err and "dB" in told.err
    assert run("data", "check", out, "--frames", 16, "--width", 96, "--height", 96, "-q") == 0

    layers = scene(moving_scenes(1)[0], 16)
    background = read_clip(out / "clips/shot/background.webm").frames
    # Lossy in and lossy out: well above what a trace of the sprite (15 dB) would leave.
    assert db(background.astype(float) - layers["background"]) > 28
    foreground = read_clip(out / "clips/shot/foreground.webm")
    assert np.abs(foreground.alpha.astype(int) - layers["alpha"]).mean() < 1

    # A second sample adds a line.
    with (out / "captions.jsonl").open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.truncate()  # the last line without its end, as editors leave it
    arguments = ("data", "from-video", video, "--mask", mask, "--out", out, "-q")
    assert run(*arguments, "--name", "two", *TEXTS, "--blended", "both") == 0
    lines = (out / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == ["clips/shot", "clips/two"]
    assert json.loads(lines[1])["blended"] == "both"
    assert run(*arguments, *TEXTS) == 2
    assert "clips/shot exists; choose another --name" in capsys.readouterr().err
    assert run(*arguments, "--name", "three") == 0
    assert not list(out.glob(".layerloom*")) and len(lines) == 2


def test_from_a_picture(tmp_path, capsys):
    layers = scene(0, 1)
    save(tmp_path / "one.png", layers["blended"][0])
    save(tmp_path / "mask.png", layers["alpha"][0])
    out = tmp_path / "mine"
    video, mask = tmp_path / "one.png", tmp_path / "mask.png"
    assert run("data", "from-video", video, "--mask", mask, "--out", out, *TEXTS) == 0
    assert f"Wrote {out}/images/one: 96x96." in capsys.readouterr().out
    assert run("data", "check", out, "--width", 96, "--height", 96, "-q") == 0
    # The picture itself where the mask is not.
    background = read_clip(out / "images/one/background.png", min_frames=1).frames[0]
    outside = np.pad(layers["alpha"][0] > 0, 1)
    near = np.any([outside[y : y + 96, x : x + 96] for y in range(3) for x in range(3)], axis=0)
    assert (background == layers["blended"][0])[~near].all()


def test_one_mask_for_all_frames(shot, tmp_path):
    mask = np.zeros((96, 96), np.uint8)
    mask[30:60, 30:60] = 255
    save(tmp_path / "mask.png", mask)
    out = tmp_path / "mine"
    arguments = ("data", "from-video", shot[0], "--mask", tmp_path / "mask.png", "--out", out)
    assert run(*arguments, "--frames", 5, "-q", *TEXTS) == 0
    assert len(read_clip(out / "clips/shot/background.webm").frames) == 5


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"--mask": "small.png"}, "small.png is 32x32 and the video 96x96"),
        ({"--mask": "short.webm"}, "short.webm has 4 frames and the video 16"),
        ({"--mask": "black.png"}, "The mask is black everywhere"),
        ({"--mask": "white.png"}, "The mask covers the whole picture"),
        ({"--mask": "nowhere.png"}, "nowhere.png does not exist"),
        ({"--frames": "0"}, "--frames is 0"),
        ({"--name": "a/b"}, "--name 'a/b' is no name"),
        ({"--foreground": "x"}, "--background is missing"),
        ({"--blended": "x"}, "--blended needs --foreground"),
        ({"--foreground": " ", "--background": "x"}, "--foreground is empty"),
    ],
)
def test_from_video_says_what_is_wrong(shot, tmp_path, capsys, changes, expected):
    for name, value in (("black", 0), ("white", 255)):
        save(tmp_path / f"{name}.png", np.full((96, 96), value, np.uint8))
    save(tmp_path / "small.png", np.zeros((32, 32), np.uint8))
    write_webm(tmp_path / "short.webm", np.zeros((4, 96, 96), np.uint8), 8)
    options = {"--mask": "mask.webm", "--out": str(tmp_path / "mine"), **changes}
    options["--mask"] = str(tmp_path / options["--mask"])
    flat = [text for pair in options.items() for text in pair]
    assert run("data", "from-video", shot[0], *flat, "-q") == 2
    error = capsys.readouterr().err
    assert expected in error and error.strip().endswith(".") and len(error.splitlines()) == 1
    assert not (tmp_path / "mine").exists()


def test_from_video_on_a_full_disk(shot, tmp_path, capsys, monkeypatch):
    out = tmp_path / "mine"
    arguments = ("data", "from-video", shot[0], "--mask", shot[1], "--out", out, "-q", *TEXTS)
    write = Path.write_bytes

    def full(path, content):
        if path.name == "blended.webm":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run(*arguments) == 2
    assert "no room left" in capsys.readouterr().err
    assert not out.exists()
