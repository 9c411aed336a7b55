"""Click nodes and the click editor's route inside a real ComfyUI (marker ``host``)."""

import base64
import io
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmenter import picture, write_segmenter

from layerloom.engine.conditioning.clicks import parse_clicks
from layerloom.engine.conditioning.masks import refine
from layerloom.engine.conditioning.segmenter import Segmenter

pytest.importorskip("segment_anything")
pytestmark = pytest.mark.host

ROUTE = "/layerloom/segment"
MODEL = "tiny_clicks.pth"
SHOWN = "clicked.png"
CLICKS = {"version": 1, "points": [{"x": 0.4, "y": 0.5, "label": 1}], "boxes": []}


@pytest.fixture(scope="module")
def host(comfy):
    """The running ComfyUI with a tiny segmenter in models/sams and a picture in input."""
    sams = comfy.base / "models" / "sams"
    sams.mkdir(parents=True, exist_ok=True)
    write_segmenter(sams / MODEL)
    Image.fromarray(picture(120, 160)).save(comfy.base / "input" / SHOWN)
    return comfy


def wish(**changes) -> dict:
    shown = {"filename": SHOWN, "subfolder": "", "type": "input"}
    return {"picture": shown, "segmenter": MODEL, "clicks": CLICKS, **changes}


def decoded(answer: dict) -> np.ndarray:
    """The mask 0..1 of an answer: its picture's transparency."""
    kind, text = answer["mask"].split(",", 1)
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGBA"), np.float32)[..., 3] / 255


def graph(clicks: object = CLICKS, **changes) -> dict:
    text = clicks if isinstance(clicks, str) else json.dumps(clicks)
    mask = {
        "segmenter": ["segmenter", 0],
        "image": ["image", 0],
        "clicks": text,
        "candidate": "best",
        "dilate": 0,
        "feather": 0.0,
    }
    return {
        "segmenter": {"class_type": "LayerLoomLoadSegmenter", "inputs": {"checkpoint": MODEL}},
        "image": {"class_type": "LoadImage", "inputs": {"image": SHOWN}},
        "mask": {"class_type": "LayerLoomClickMask", "inputs": {**mask, **changes}},
        "picture": {"class_type": "MaskToImage", "inputs": {"mask": ["mask", 0]}},
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["picture", 0], "filename_prefix": "clicks/mask"},
        },
    }


def expected(host, clicks: object = CLICKS, candidate: int | None = None, **refinement):
    segmenter = Segmenter.open(host.base / "models" / "sams" / MODEL, "cpu")
    with Image.open(host.base / "input" / SHOWN) as image:
        pixels = np.asarray(image.convert("RGB"))
    embedding = segmenter.embed(pixels)
    found = segmenter.masks(embedding, parse_clicks(clicks, embedding.size))
    return refine(found.mask(candidate), **refinement).numpy(), found


def test_the_route_answers_with_the_engines_mask(host):
    status, answer = host.post(ROUTE, wish())
    assert status == 200, answer
    mask, found = expected(host)
    assert np.abs(decoded(answer) - mask).max() <= 0.5 / 255
    assert (answer["width"], answer["height"]) == (160, 120)
    assert answer["candidate"] == found.best
    assert answer["scores"] == pytest.approx(found.scores.tolist(), abs=1e-6)
    assert answer["score"] == max(answer["scores"])
    assert answer["share"] == pytest.approx(float((mask >= 0.5).mean()))


def test_candidate_growth_and_feather_reach_the_mask(host):
    status, answer = host.post(ROUTE, wish(candidate="1", dilate=3, feather=6))
    assert status == 200, answer
    mask, _ = expected(host, candidate=1, dilation=3, feather=6.0)
    assert np.abs(decoded(answer) - mask).max() <= 0.51 / 255


def test_clicks_may_be_text_or_pixels(host):
    _, first = host.post(ROUTE, wish(clicks=json.dumps(CLICKS)))
    # The same place: pixels count from their middle.
    _, second = host.post(ROUTE, wish(clicks=[{"x": 63.5, "y": 59.5}]))
    assert first["mask"] == second["mask"]


def test_a_picture_is_looked_at_once_and_anew_when_it_changes(host):
    path = host.base / "input" / "changing.png"
    shown = {"filename": path.name, "subfolder": "", "type": "input"}
    Image.fromarray(picture(96, 96, seed=1)).save(path)
    _, first = host.post(ROUTE, wish(picture=shown))
    begun = time.perf_counter()
    _, again = host.post(ROUTE, wish(picture=shown))
    # The issue allows a second from click to mask; this network is tiny, the machine is shared.
    assert time.perf_counter() - begun < 1
    assert first == again
    Image.fromarray(picture(64, 96, seed=2)).save(path)
    _, changed = host.post(ROUTE, wish(picture=shown))
    assert changed["height"] == 64


def test_transparent_and_turned_pictures_are_seen_as_load_image_sees_them(host):
    rgba = np.concatenate([picture(120, 160), picture(120, 160, seed=3)[..., :1]], axis=2)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgba).save(host.base / "input" / "odd.png", exif=turned)
    shown = {"filename": "odd.png", "subfolder": "", "type": "input"}
    status, answer = host.post(ROUTE, wish(picture=shown))
    assert (status, answer["height"], answer["width"]) == (200, 160, 120)
    prompt = graph()
    prompt["image"]["inputs"]["image"] = "odd.png"
    assert np.abs(decoded(answer) - saved(host, host.run(prompt))).max() <= 1.01 / 255


def test_a_large_picture_gets_a_small_mask(host):
    pixels = np.kron(picture(30, 40), np.ones((50, 50, 1), np.uint8))
    Image.fromarray(pixels).save(host.base / "input" / "large.png")
    shown = {"filename": "large.png", "subfolder": "", "type": "input"}
    status, answer = host.post(ROUTE, wish(picture=shown))
    assert status == 200, answer
    assert (answer["width"], answer["height"]) == (2000, 1500)
    assert decoded(answer).shape == (768, 1024)


def outside(comfy) -> dict[str, dict]:
    """Requests for files that are not in the host's folders."""
    (comfy.base / "secret.png").write_bytes((comfy.base / "input" / SHOWN).read_bytes())
    link = comfy.base / "input" / "link.png"
    if not link.is_symlink():
        os.symlink(comfy.base / "secret.png", link)
    places = {
        "up": {"filename": "../secret.png"},
        "up in the subfolder": {"filename": "secret.png", "subfolder": ".."},
        "absolute": {"filename": str(comfy.base / "secret.png")},
        "absolute subfolder": {"filename": "secret.png", "subfolder": str(comfy.base)},
        "a neighbour that begins alike": {"filename": "../input2/a.png"},
        "a link": {"filename": "link.png"},
        "a zero byte": {"filename": "a\0b.png"},
        "the folder itself": {"filename": "."},
        "another kind": {"filename": SHOWN, "type": "models"},
        "no name": {"filename": ""},
        "a number": {"filename": 7},
    }
    return {name: {"subfolder": "", "type": "input", **place} for name, place in places.items()}


def test_the_route_refuses_pictures_outside_the_hosts_folders(host):
    for name, place in outside(host).items():
        status, answer = host.post(ROUTE, wish(picture=place))
        assert status == 400, name
        assert_sentence(answer["error"])
        assert str(host.base) not in answer["error"].replace(str(place["filename"]), ""), name


def assert_sentence(text: str) -> None:
    assert text.endswith(".") and "Traceback" not in text and "\n" not in text
    # What is wrong; what to do.
    assert len(text) > 30


MALFORMED = {
    "a list": [1, 2],
    "no picture": {"segmenter": MODEL, "clicks": CLICKS},
    "no clicks": wish(clicks=None),
    "clicks that are no JSON": wish(clicks="{"),
    "a point outside": wish(clicks={"points": [{"x": 1.2, "y": 0.5, "label": 1}]}),
    "no positive point": wish(clicks={"points": [{"x": 0.5, "y": 0.5, "label": 0}]}),
    "nothing": wish(clicks={"points": []}),
    "many points": wish(clicks={"points": [{"x": 0.5, "y": 0.5}] * 300}),
    "a candidate": wish(candidate="7"),
    "candidate of another kind": wish(candidate=["best"]),
    "growth": wish(dilate=100000),
    "growth in words": wish(dilate="much"),
    "feather": wish(feather=-1),
    "feather that is no number": wish(feather=float("nan")),
    "no such segmenter": wish(segmenter="none.pth"),
    "a segmenter outside": wish(segmenter="../checkpoints/x.pth"),
    "a starter outside": wish(segmenter="starter/../../../x.safetensors"),
    "no such picture": wish(picture={"filename": "gone.png"}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_the_route_says_what_is_wrong(host, name):
    status, answer = host.post(ROUTE, MALFORMED[name])
    assert status == 400, answer
    assert_sentence(answer["error"])


def test_the_route_refuses_what_is_too_large_or_no_picture(host):
    folder = host.base / "input"
    # Few bytes, many pixels.
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("1", (9000, 9000)).save(folder / "wide.png")
    (folder / "words.png").write_text("no picture")
    for name, said in (
        ("bomb.png", "scale it down"),
        ("wide.png", "9000x9000"),
        ("words.png", "not a picture"),
    ):
        status, answer = host.post(ROUTE, wish(picture={"filename": name}))
        assert (status, said in answer["error"]) == (400, True), answer
        assert_sentence(answer["error"])
    status, answer = host.post(ROUTE, wish(clicks="x" * 100_000))
    assert status == 413
    assert_sentence(answer["error"])


def test_the_route_refuses_bodies_that_are_no_json(host):
    import urllib.error
    import urllib.request

    for body in (b"{", b"", b"\xff\xfe", b"[" * 30_000):
        request = urllib.request.Request(f"{host.url}{ROUTE}", body)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        assert caught.value.code == 400
        assert_sentence(json.loads(caught.value.read())["error"])


def saved(host, entry: dict) -> np.ndarray:
    (file,) = entry["outputs"]["save"]["images"]
    with Image.open(io.BytesIO(host.file(file))) as image:
        return np.asarray(image.convert("L"), np.float32) / 255


def test_the_node_makes_the_mask_that_the_editor_shows(host):
    entry = host.run(graph(dilate=2, feather=3.0))
    assert entry["status"]["status_str"] == "success", entry["status"]
    mask = saved(host, entry)
    wanted, _ = expected(host, dilation=2, feather=3.0)
    assert np.abs(mask - wanted).max() <= 1.01 / 255
    _, answer = host.post(ROUTE, wish(dilate=2, feather=3.0))
    assert np.abs(decoded(answer) - mask).max() <= 1.01 / 255
    (shown,) = entry["outputs"]["mask"]["layerloom_picture"]
    status, again = host.post(ROUTE, wish(picture=shown, dilate=2, feather=3.0))
    assert (status, again["mask"]) == (200, answer["mask"])


def test_points_stay_on_the_object_when_the_picture_is_resized(host):
    resized = graph()
    resized["scaled"] = {
        "class_type": "ImageScale",
        "inputs": {
            "image": ["image", 0],
            "upscale_method": "nearest-exact",
            "width": 320,
            "height": 240,
            "crop": "disabled",
        },
    }
    resized["mask"]["inputs"]["image"] = ["scaled", 0]
    large = saved(host, host.run(resized))
    small = saved(host, host.run(graph()))
    assert large.shape == (240, 320)
    differing = np.abs(large[::2, ::2] - small) > 0.5
    # Random weights look at noise here: only the outline may move.
    assert differing.mean() < 0.1


def test_clicks_in_pixels_of_other_editors_run(host):
    mask = saved(host, host.run(graph([{"x": 63.5, "y": 59.5}])))
    wanted, _ = expected(host)
    assert np.abs(mask - wanted).max() <= 1.01 / 255


def refused(host, prompt: dict) -> str:
    """What the host says when it does not take a prompt."""
    status, answer = host.post("/prompt", {"prompt": prompt, "client_id": "tests"})
    assert status == 400, answer
    problems = [e for node in answer["node_errors"].values() for e in node["errors"]]
    return " ".join(f"{problem['message']} {problem['details']}" for problem in problems)


def test_wrong_clicks_are_refused_before_anything_runs(host):
    for clicks, said in (
        ("", "select nothing"),
        ("{", "not JSON"),
        ({"points": [{"x": 0.5, "y": 0.5, "label": 0}]}, "select nothing"),
        ({"points": [{"x": 3, "y": 0.5}]}, "outside the picture"),
    ):
        assert said in refused(host, graph(clicks)), clicks


def test_what_shows_only_in_the_run_is_a_sentence(host):
    before = len(host.log())
    entry = host.run(graph([{"x": 500, "y": 20}]))
    assert "save" not in entry["outputs"]
    assert "outside the picture of 160x120 pixels" in host.log()[before:]
    assert "Traceback" not in host.log()[before:]


def test_other_files_and_models_are_refused(host):
    (host.base / "models" / "sams" / "other.pth").write_bytes(b"")
    torch.save({"a": torch.zeros(3)}, host.base / "models" / "sams" / "odd.pth")
    for name, said in (("odd.pth", "not a segmenter"), ("other.pth", "other.pth")):
        prompt = graph()
        prompt["segmenter"]["inputs"]["checkpoint"] = name
        assert said in refused(host, prompt)


def test_segment_anything_is_listed_from_its_folder(host):
    info = host.get("/object_info/LayerLoomLoadSegmenter")["LayerLoomLoadSegmenter"]
    combo = info["input"]["required"]["checkpoint"]
    names = combo[0] if isinstance(combo[0], list) else combo[1]["options"]
    assert MODEL in names
