"""Box nodes inside a real ComfyUI (marker ``host``)."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from layerloom.engine.conditioning.box_paths import box_masks, pixel_boxes
from layerloom.engine.conditioning.box_sources import between, from_masks
from layerloom.engine.conditioning.boxes import parse_boxes

pytestmark = pytest.mark.host

SHOWN = "boxed.png"
WIDTH, HEIGHT, FRAMES = 160, 96, 5
PATHS = between((0.1, 0.1, 0.25, 0.5), (0.6, 0.4, 0.25, 0.5), 9, "ease_in_out")
SECOND = between((0.5, 0, 0.2, 0.2), (0, 0.5, 0.2, 0.2), 9)


@pytest.fixture(scope="module")
def host(comfy):
    """The running ComfyUI with a picture in its input folder."""
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    Image.fromarray(pixels).save(comfy.base / "input" / SHOWN)
    return comfy


def graph(boxes: str = PATHS.to_json(), picture: bool = True, **changes) -> dict:
    node = {"frames": FRAMES, "width": 0, "height": 0, "subject": 0, "boxes": boxes}
    if picture:
        node["image"] = ["image", 0]
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": SHOWN}},
        "boxes": {"class_type": "LayerLoomBoxTrajectory", "inputs": {**node, **changes}},
        "masks": {"class_type": "MaskToImage", "inputs": {"mask": ["boxes", 1]}},
        "save": save(["masks", 0], "boxes/mask"),
        "preview": save(["boxes", 2], "boxes/preview"),
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["boxes", 3]}},
    }


def save(images: list, prefix: str) -> dict:
    inputs = {"images": images, "filename_prefix": prefix}
    return {"class_type": "SaveImage", "inputs": inputs}


def pictures(host, entry: dict, node: str) -> np.ndarray:
    """Saved frames, uint8 [F, H, W, 3]."""
    frames = []
    for file in entry["outputs"][node]["images"]:
        with Image.open(io.BytesIO(host.file(file))) as image:
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def text_of(entry: dict) -> str:
    return entry["outputs"]["text"]["text"][0]


def test_boxes_and_masks_are_the_engines(host):
    entry = host.run(graph())
    assert entry["status"]["status_str"] == "success", host.log()[-2000:]
    boxes = pixel_boxes(PATHS.retimed(FRAMES).tracks[0], FRAMES, (HEIGHT, WIDTH))
    expected = box_masks(boxes, (HEIGHT, WIDTH))
    assert ((pictures(host, entry, "save")[..., 0] > 127) == expected).all()
    preview = pictures(host, entry, "preview")
    for frame, (x0, y0, x1, y1) in enumerate(boxes):
        assert tuple(preview[frame, y0, x0]) == tuple(preview[frame, y1 - 1, x1 - 1])
        assert tuple(preview[frame, y0, x0]) == (255, 178, 36)
    assert parse_boxes(text_of(entry)) == PATHS.retimed(FRAMES)
    (shown,) = entry["outputs"]["boxes"]["layerloom_picture"]
    assert shown["type"] == "temp"


def test_a_clips_frames_come_to_the_editor_on_one_sheet(host):
    prompt = graph()
    prompt["clip"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["image", 0]}}
    prompt["clip"]["inputs"]["amount"] = 7
    prompt["boxes"]["inputs"]["image"] = ["clip", 0]
    shown = host.run(prompt)["outputs"]["boxes"]
    (clip,) = shown["layerloom_clip"]
    assert [clip[name] for name in ("columns", "rows", "count", "frames")] == [3, 2, 5, 5]
    with Image.open(io.BytesIO(host.file(clip))) as sheet:
        assert sheet.size == (3 * WIDTH, 2 * HEIGHT)
        pixels = np.asarray(sheet)
    assert abs(pixels[HEIGHT + 5, 5].astype(int) - 90).max() <= 2
    # Five frames are on it; the sixth place is empty.
    assert pixels[HEIGHT + 5, 2 * WIDTH + 5].max() <= 2
    assert "layerloom_clip" not in host.run(graph())["outputs"]["boxes"]


def test_another_size_and_one_subject_of_two(host):
    both = PATHS.joined(SECOND)
    entry = host.run(graph(both.to_json(), picture=False, width=64, height=32, subject=2))
    paths = SECOND.retimed(FRAMES)
    expected = box_masks(pixel_boxes(paths.tracks[0], FRAMES, (32, 64)), (32, 64))
    assert ((pictures(host, entry, "save")[..., 0] > 127) == expected).all()
    plain = host.run(graph(picture=False))
    assert pictures(host, plain, "save").shape == (FRAMES, 256, 448, 3)


def test_a_masks_path_is_connected_behind_the_drawn_one(host):
    prompt = graph()
    prompt["again"] = {
        "class_type": "LayerLoomBoxesFromMask",
        "inputs": {"mask": ["boxes", 1], "frames": 0, "smooth": 0, "tolerance": 0.0},
    }
    second = dict(prompt["boxes"]["inputs"], boxes=SECOND.to_json(), path=["again", 0])
    prompt["second"] = {"class_type": "LayerLoomBoxTrajectory", "inputs": second}
    prompt["text"]["inputs"]["source"] = ["second", 3]
    entry = host.run(prompt)
    found = parse_boxes(text_of(entry))
    assert [track.id for track in found.tracks] == ["a", "a 2"]
    boxes = pixel_boxes(PATHS.retimed(FRAMES).tracks[0], FRAMES, (HEIGHT, WIDTH))
    assert (pixel_boxes(found.tracks[1], FRAMES, (HEIGHT, WIDTH)) == boxes).all()
    expected = from_masks(box_masks(boxes, (HEIGHT, WIDTH)))
    (given,) = entry["outputs"]["second"]["layerloom_path"]
    assert parse_boxes(given).tracks == expected.tracks
    # As BOUNDING_BOX it says the same.
    second["path"] = ["again", 1]
    assert parse_boxes(text_of(host.run(prompt))) == found


def test_the_hosts_own_boxes_are_taken_and_its_node_draws_ours(host):
    prompt = graph(boxes="")
    prompt["box"] = {
        "class_type": "PrimitiveBoundingBox",
        "inputs": {"x": 16, "y": 8, "width": 32, "height": 24},
    }
    prompt["boxes"]["inputs"]["path"] = ["box", 0]
    prompt["drawn"] = {
        "class_type": "DrawBBoxes",
        "inputs": {"bboxes": ["boxes", 0], "image": ["boxes", 2]},
    }
    prompt["save"] = save(["drawn", 0], "boxes/drawn")
    entry = host.run(prompt)
    assert entry["status"]["status_str"] == "success", host.log()[-2000:]
    (track,) = parse_boxes(text_of(entry)).tracks
    assert pixel_boxes(track, 1, (HEIGHT, WIDTH)).tolist() == [[16, 8, 48, 32]]
    assert pictures(host, entry, "save").shape == (FRAMES, HEIGHT, WIDTH, 3)


def stops(host, prompt: dict) -> str:
    """What a run that cannot be done says: refused, or a sentence in the log."""
    before = len(host.log())
    status, answer = host.post("/prompt", {"prompt": prompt, "client_id": "tests"})
    if status != 200:
        return json.dumps(answer)
    entry = host.wait(answer["prompt_id"])
    assert "save" not in entry["outputs"]
    return json.dumps(entry["status"]["messages"]) + host.log()[before:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"boxes": ""}, "no boxes"),
        ({"boxes": "{"}, "not JSON"),
        ({"boxes": '{"frames": 2, "tracks": [{"id": "a", "keyframes": [1]}]}'}, "key frame"),
        ({"subject": 2}, "no subject 2"),
    ],
)
def test_what_is_wrong_is_said(host, changes, words):
    said = stops(host, graph(**changes))
    assert words in said and "Traceback" not in said
