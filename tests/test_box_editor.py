"""The box editor: its boxes are Python's, and it does what hands and keys mean."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from layerloom.engine.conditioning.box_paths import box_shares, pixel_boxes
from layerloom.engine.conditioning.boxes import EASES, BoxPaths, Key, Track, parse_boxes
from layerloom.engine.errors import LayerLoomError

TESTS = Path(__file__).parent


def in_node(*arguments: object, given: str = "") -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    result = subprocess.run(
        [node, *map(str, arguments)], input=given, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def random_wish(draw: random.Random) -> dict:
    """Paths with key frames anywhere, to be shown in a clip of some length and size."""
    own = draw.randint(1, 60)
    tracks = []
    for number in range(draw.randint(0, 3)):
        frames = sorted(draw.sample(range(own), draw.randint(1, min(own, 8))))
        keys = []
        for frame in frames:
            w, h = draw.uniform(0.002, 1.5), draw.uniform(0.002, 1.5)
            x, y = draw.uniform(-w, 1), draw.uniform(-h, 1)
            if draw.random() < 0.3:
                x, y, w, h = (round(value * 8) / 8 for value in (x, y, w + 0.1, h + 0.1))
                x, y = min(x, 0.875), min(y, 0.875)
                x, y, w, h = max(x, 0), max(y, 0), w or 0.125, h or 0.125
            keys.append(Key(frame, x, y, w, h, draw.choice(EASES)))
        draw.shuffle(keys)
        tracks.append(Track(f"subject {number}", tuple(keys)))
    frames = own if draw.random() < 0.6 else draw.randint(1, 80)
    size = (draw.randint(1, 1100), draw.randint(1, 2000))
    return {"text": BoxPaths(own, tuple(tracks)).to_json(), "frames": frames, "size": size}


def test_the_editors_boxes_are_pythons_to_the_last_bit():
    draw = random.Random(8)
    wishes = [random_wish(draw) for _ in range(600)]
    answers = json.loads(in_node(TESTS / "box_numbers.mjs", given=json.dumps(wishes)))
    boxes = 0
    for wish, answer in zip(wishes, answers, strict=True):
        paths = parse_boxes(wish["text"], wish["frames"])
        assert answer is not None and len(answer) == len(paths.tracks), wish
        for track, shown in zip(paths.tracks, answer, strict=True):
            assert shown["shares"] == box_shares(track, paths.frames).tolist(), wish
            assert shown["pixels"] == pixel_boxes(track, paths.frames, wish["size"]).tolist(), wish
            boxes += paths.frames
    assert boxes > 10_000


def test_the_editor_reads_what_python_reads_and_nothing_else():
    key = {"frame": 0, "x": 0.1, "y": 0.1, "w": 0.2, "h": 0.2}
    texts = ["", "{", "3", "[]", "null", '{"version": 2}', '{"frames": 0}', '{"frames": 2}']
    for changes in (
        {},
        {"frame": 4},
        {"frame": -1},
        {"frame": 0.5},
        {"x": 1},
        {"x": -0.2},
        {"x": "0"},
        {"x": None},
        {"w": 0},
        {"w": -1},
        {"w": 4.5},
        {"w": 3.5},
        {"ease": "hold"},
        {"ease": "bounce"},
        {"ease": "toString"},
        {"z": 1},
    ):
        tracks = [{"id": "a", "keyframes": [{**key, **changes}]}]
        texts.append(json.dumps({"version": 1, "frames": 4, "tracks": tracks}))
    for tracks in (
        [{"id": "", "keyframes": [key]}],
        [{"id": 3, "keyframes": [key]}],
        [{"id": "a", "keyframes": []}],
        [{"id": "a", "keyframes": [key, key]}],
        [{"id": "a", "keyframes": [key]}] * 2,
        [{"id": str(number), "keyframes": [key]} for number in range(17)],
        [{"id": "a", "keyframes": [{**key, "frame": f % 4} for f in range(1000)]}],
        ["a"],
        [None],
        "a",
    ):
        texts.append(json.dumps({"frames": 4, "tracks": tracks}))
    wishes = [{"text": text, "frames": 4, "size": [8, 8]} for text in texts]
    answers = json.loads(in_node(TESTS / "box_numbers.mjs", given=json.dumps(wishes)))
    for text, answer in zip(texts, answers, strict=True):
        try:
            parse_boxes(text, 4)
            read = True
        except LayerLoomError:
            read = False
        assert (answer is not None) == read, text
