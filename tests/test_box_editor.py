"""The box editor: its boxes are Python's, and it does what hands and keys mean."""

import functools
import http.server
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerloom.engine.conditioning.box_paths import box_shares, pixel_boxes
from layerloom.engine.conditioning.boxes import EASES, BoxPaths, Key, Track, parse_boxes
from layerloom.engine.errors import LayerLoomError

TESTS = Path(__file__).parent
WEB = TESTS.parent / "web"
WIDTH, HEIGHT, FRAMES = 160, 120, 9
PAGE = """<!doctype html><body style="margin:0;background:#111"><div id="box"
 style="width:460px;height:520px"></div><script type="module">
import { BoxEditor } from "./box_editor.mjs";
window.texts = [];
const editor = new BoxEditor({ onChange: (text) => texts.push(text) });
document.getElementById("box").append(editor.element);
editor.setClip({ frames: %d, width: %d, height: %d });
window.editor = editor;
window.show = () => editor.showPicture("./picture.png");
window.ready = true;
</script>"""
# A pixel of the screen, as a share of the picture.
NEAR = 0.01


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


# --- the model, in Node -------------------------------------------------------------------------


def test_the_editors_decisions():
    in_node("--test", TESTS / "box_editor.test.mjs")


# --- the editor, in a browser -------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """Address of a page that holds an editor and nothing else."""
    folder = tmp_path_factory.mktemp("boxes")
    for script in WEB.glob("*.mjs"):
        shutil.copy(script, folder)
    (folder / "index.html").write_text(PAGE % (FRAMES, WIDTH, HEIGHT))
    pixels = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    pixels[30:90, 40:100] = (90, 120, 90)
    Image.fromarray(pixels).save(folder / "picture.png")
    # A clip of nine frames, each of its own grey.
    greys = np.repeat(np.repeat(np.arange(9).reshape(3, 3) * 20 + 40, 30, 0), 40, 1)
    Image.fromarray(greys.astype(np.uint8)).save(folder / "sheet.png")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map}
        extensions_map[".mjs"] = "text/javascript"

        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


@pytest.fixture
def editor(request, served, chromium) -> Iterator:
    """A page whose editor shows a picture."""
    context = chromium.new_context(viewport={"width": 480, "height": 540}, has_touch=True)
    tab = context.new_page()
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(served)
    tab.wait_for_function("window.ready")
    tab.evaluate("show()")
    tab.wait_for_function("editor.model.stage.width > 1")
    yield tab
    pictures = os.environ.get("LAYERLOOM_SCREENSHOTS")
    if pictures:
        tab.screenshot(path=Path(pictures) / f"{request.node.name}.png")
    context.close()
    assert problems == []


# A subject more makes the timeline taller with the next frame, and the stage smaller with that.
SETTLED = """new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>
 done(editor.model.rect))))"""


def spot(page, x: float, y: float) -> tuple[float, float]:
    """Where a share of the picture is on the screen, as soon as nothing moves there."""
    rect = page.evaluate(SETTLED)
    box = page.locator(".layerloom-box-stage").bounding_box()
    return box["x"] + rect["x"] + x * rect["width"], box["y"] + rect["y"] + y * rect["height"]


def drag(page, *places: tuple[float, float], hold: str = "") -> None:
    if hold:
        page.keyboard.down(hold)
    page.mouse.move(*spot(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*spot(page, *place), steps=6)
    page.mouse.up()
    if hold:
        page.keyboard.up(hold)


def moment(page, frame: int, row: int = -1) -> tuple[float, float]:
    """Where a frame is on the timeline's ruler, or in a subject's row."""
    box = page.locator(".layerloom-box-time canvas").bounding_box()
    x = 12 + (box["width"] - 24) * frame / (FRAMES - 1)
    return box["x"] + x, box["y"] + (9 if row < 0 else 18 + 18 * row + 9)


def seek(page, frame: int) -> None:
    page.mouse.click(*moment(page, frame))


def tracks(page) -> list[dict]:
    """What the widget was told last."""
    text = page.evaluate("texts.at(-1) ?? ''")
    return json.loads(text)["tracks"] if text else []


def keys(page, index: int = 0) -> list[tuple]:
    return [(k["frame"], k["x"], k["y"], k["w"], k["h"]) for k in tracks(page)[index]["keyframes"]]


def press(page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def test_draw_go_on_and_move_make_a_path(editor):
    drag(editor, (0.13, 0.22), (0.38, 0.57))
    assert keys(editor) == [pytest.approx((0, 0.13, 0.22, 0.25, 0.35), abs=NEAR)]
    seek(editor, 8)
    drag(editor, (0.25, 0.4), (0.7, 0.45), hold="Alt")
    seek(editor, 4)
    assert editor.evaluate("editor.model.box.x") == pytest.approx(0.355, abs=NEAR)
    # A corner: the opposite one stays.
    corner = editor.evaluate("(({x, y, w, h}) => [x + w, y + h])(editor.model.box)")
    drag(editor, tuple(corner), (corner[0] + 0.11, corner[1] - 0.06), hold="Alt")
    first, middle, last = keys(editor)
    assert (first[0], middle[0], last[0]) == (0, 4, 8)
    assert middle == pytest.approx((4, 0.355, 0.245, 0.36, 0.29), abs=2 * NEAR)
    assert last == pytest.approx((8, 0.58, 0.27, 0.25, 0.35), abs=NEAR)
    text = editor.evaluate("texts.at(-1)")
    paths = parse_boxes(text, FRAMES)
    for frame in range(FRAMES):
        editor.evaluate(f"editor.model.seek({frame})")
        shown = editor.evaluate("editor.model.box")
        python = box_shares(paths.tracks[0], FRAMES)[frame]
        assert [shown[side] for side in "xywh"] == pytest.approx(python.tolist(), abs=2e-5)


def test_a_second_subject_a_copy_and_a_name(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    drag(editor, (0.6, 0.6), (0.9, 0.9))
    drag(editor, (0.15, 0.15), (0.28, 0.28), hold="Control")
    assert [track["id"] for track in tracks(editor)] == ["a", "b", "c"]
    editor.keyboard.press("Control+c")
    editor.keyboard.press("Control+v")
    assert [track["id"] for track in tracks(editor)] == ["a", "b", "c", "c 2"]
    assert keys(editor, 3)[0][1] == pytest.approx(keys(editor, 2)[0][1] + 0.05, abs=1e-4)
    name = editor.get_by_label("The subject's name")
    name.fill("dog")
    name.press("Enter")
    assert tracks(editor)[3]["id"] == "dog"
    # A click chooses: what is chosen is what the fields show.
    editor.mouse.click(*spot(editor, 0.75, 0.75))
    assert name.input_value() == "b"
    press(editor, "Remove the chosen subject")
    assert [track["id"] for track in tracks(editor)] == ["a", "c", "dog"]


def test_a_drawn_path_is_followed_from_this_frame_on(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    press(editor, "Draw the chosen subject's path")
    drag(editor, (0.2, 0.2), (0.8, 0.2), (0.8, 0.8))
    assert editor.evaluate("editor.model.tool") == "box"
    (first, *_, last) = keys(editor)
    assert first[0] == 0 and last[0] == 8
    assert last[1:3] == pytest.approx((0.7, 0.7), abs=0.02)
    editor.evaluate("editor.model.seek(4)")
    shown = editor.evaluate("editor.model.box")
    # Even in shares: half of 0.6 + 0.6.
    assert (shown["x"], shown["y"]) == pytest.approx((0.7, 0.1), abs=0.03)
    assert len(keys(editor)) <= 4
    editor.keyboard.press("Control+z")
    assert len(keys(editor)) == 1


def test_key_frames_move_in_time_and_go(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    seek(editor, 4)
    drag(editor, (0.2, 0.2), (0.6, 0.2))
    editor.mouse.move(*moment(editor, 4, 0))
    editor.mouse.down()
    editor.mouse.move(*moment(editor, 7, 0), steps=5)
    editor.mouse.up()
    assert [key[0] for key in keys(editor)] == [0, 7]
    assert editor.evaluate("editor.model.frame") == 7
    editor.keyboard.press("Delete")
    assert [key[0] for key in keys(editor)] == [0]
    editor.keyboard.press("k")
    assert [key[0] for key in keys(editor)] == [0, 7]
    editor.keyboard.press("[")
    assert editor.evaluate("editor.model.frame") == 0
    editor.keyboard.press("Delete")
    editor.keyboard.press("]")
    editor.keyboard.press("Delete")
    assert tracks(editor) == []
    for _ in range(2):
        editor.keyboard.press("Control+z")
    assert [key[0] for key in keys(editor)] == [0, 7]
    press(editor, "Redo")
    assert [key[0] for key in keys(editor)] == [7]


def test_eases_are_chosen_and_kept(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    seek(editor, 8)
    drag(editor, (0.2, 0.2), (0.7, 0.2))
    seek(editor, 4)
    even = editor.evaluate("editor.model.box.x")
    editor.get_by_label("How this key frame becomes the next").select_option("ease_in")
    assert tracks(editor)[0]["keyframes"][0]["ease"] == "ease_in"
    assert editor.evaluate("editor.model.box.x") < even - 0.05
    editor.locator(".layerloom-box-keys").focus()
    editor.keyboard.press("e")
    assert tracks(editor)[0]["keyframes"][0]["ease"] == "ease_out"


def test_numbers_are_pixels_of_the_clip(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    for title, value in (("Left", "40"), ("Top", "30"), ("Width", "32"), ("Height", "12")):
        field = editor.get_by_label(title)
        field.fill(value)
        field.press("Enter")
        field.blur()
    assert keys(editor) == [pytest.approx((0, 0.25, 0.25, 0.2, 0.1), abs=1e-5)]
    # The same place of a larger clip.
    editor.evaluate("editor.setClip({ frames: 9, width: 320, height: 240 })")
    assert editor.get_by_label("Left").input_value() == "80"
    assert "64 x 24 pixels of 320 x 240" in editor.locator(".layerloom-box-status").inner_text()


def test_the_keyboard_alone_is_enough(editor):
    editor.locator(".layerloom-box-keys").focus()
    for pressed in ("Enter", "End", "ArrowRight", "Shift+ArrowUp", "Alt+ArrowRight", ",", "."):
        editor.keyboard.press(pressed)
    assert keys(editor) == [
        pytest.approx((0, 0.375, 0.375, 0.25, 0.25)),
        pytest.approx((8, 0.375 + 1 / 160, 0.375 - 10 / 120, 0.25 + 1 / 160, 0.25), abs=2e-5),
    ]
    editor.keyboard.press("Shift+Delete")
    assert tracks(editor) == []


def test_it_snaps_to_the_picture_and_to_other_boxes(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    drag(editor, (0.2, 0.2), (0.115, 0.5))
    assert keys(editor)[0][1:3] == pytest.approx((0, 0.4), abs=1e-4)
    drag(editor, (0.6, 0.6), (0.8, 0.9))
    drag(editor, (0.7, 0.75), (0.7, 0.56))
    assert keys(editor, 1)[0][2] == pytest.approx(0.4, abs=1e-4)
    assert editor.evaluate("editor.model.lines") == {"x": [], "y": []}
    press(editor, "Line up")
    drag(editor, (0.7, 0.55), (0.7, 0.565))
    assert keys(editor, 1)[0][2] == pytest.approx(0.415, abs=0.008)


def test_it_plays_and_pauses_and_scrubs(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    editor.keyboard.press(" ")
    editor.wait_for_function("editor.model.frame >= 3")
    editor.keyboard.press(" ")
    frame = editor.evaluate("editor.model.frame")
    editor.wait_for_timeout(400)
    assert editor.evaluate("editor.model.frame") == frame
    editor.mouse.move(*moment(editor, 1))
    editor.mouse.down()
    editor.mouse.move(*moment(editor, 6), steps=5)
    assert editor.evaluate("editor.model.frame") == 6
    editor.mouse.up()
    label = editor.locator(".layerloom-box-stage canvas").get_attribute("aria-label")
    assert label == "Picture with 1 subjects with 1 key frames, frame 6"


def test_a_finger_draws_and_a_second_one_takes_it_back(editor):
    session = editor.context.new_cdp_session(editor)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        fingers = [
            dict(zip("xy", spot(editor, *place), strict=True), id=number)
            for number, place in enumerate(places)
        ]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", (0.2, 0.2))
    for step in range(1, 5):
        touch("touchMove", (0.2 + 0.1 * step, 0.2 + 0.1 * step))
    touch("touchEnd")
    assert keys(editor) == [pytest.approx((0, 0.2, 0.2, 0.4, 0.4), abs=2 * NEAR)]
    touch("touchStart", (0.4, 0.4))
    touch("touchMove", (0.5, 0.5))
    touch("touchStart", (0.5, 0.5), (0.7, 0.5))
    touch("touchEnd")
    assert editor.evaluate("texts.length") == 1
    assert editor.evaluate("editor.model.box.x") == pytest.approx(0.2, abs=2 * NEAR)


def test_a_closer_look_by_wheel_keys_and_fingers(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    editor.mouse.move(*spot(editor, 0.7, 0.6))
    editor.mouse.wheel(0, 100)
    assert editor.evaluate("[editor.model.frame, editor.model.view.zoom]") == [1, 1]
    before = spot(editor, 0.7, 0.6)
    editor.keyboard.down("Control")
    editor.mouse.wheel(0, -500)
    editor.keyboard.up("Control")
    assert editor.evaluate("editor.model.view.zoom") == pytest.approx(1.25**5)
    # A wheel turns at a whole pixel, which is three times as far from its share now.
    assert spot(editor, 0.7, 0.6) == pytest.approx(before, abs=2.1)
    # A box is drawn where it is seen.
    drag(editor, (0.62, 0.55), (0.72, 0.66))
    assert keys(editor, 1) == [pytest.approx((1, 0.62, 0.55, 0.1, 0.11), abs=NEAR / 2)]
    # With a second row on the timeline the stage is another.
    editor.wait_for_timeout(80)
    before = spot(editor, 0.7, 0.6)
    editor.mouse.move(*before)
    editor.mouse.down(button="middle")
    editor.mouse.move(before[0] - 30, before[1] - 20, steps=3)
    editor.mouse.up(button="middle")
    moved = spot(editor, 0.7, 0.6)
    assert moved == pytest.approx((before[0] - 30, before[1] - 20), abs=1)
    assert editor.evaluate("texts.length") == 2
    editor.keyboard.press("0")
    assert editor.evaluate("editor.model.view.zoom") == 1
    editor.keyboard.press("+")
    assert editor.evaluate("editor.model.view.zoom") == 1.25
    press(editor, "Show the whole picture")
    assert editor.evaluate("editor.model.view.zoom") == 1
    session = editor.context.new_cdp_session(editor)
    left, right = spot(editor, 0.4, 0.7), spot(editor, 0.6, 0.7)
    for step in range(6):
        fingers = [
            {"x": left[0] - 10 * step, "y": left[1], "id": 0},
            {"x": right[0] + 10 * step, "y": right[1], "id": 1},
        ]
        kind = "touchMove" if step else "touchStart"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    wide = right[0] - left[0]
    expected = (wide + 100) / wide
    assert editor.evaluate("editor.model.view.zoom") == pytest.approx(expected, rel=0.05)
    assert editor.evaluate("texts.length") == 2


def test_a_clips_frames_are_scrubbed(editor):
    sheet = {"address": "./sheet.png", "columns": 3, "rows": 3, "count": 9, "frames": 9}

    def seen() -> int:
        """The grey in a place of the picture where nothing is drawn."""
        editor.wait_for_timeout(80)
        return editor.evaluate(
            """() => {
              const canvas = document.querySelector(".layerloom-box-stage canvas");
              const { rect, stage } = editor.model;
              const scale = canvas.width / stage.width;
              const x = Math.round((rect.x + 0.9 * rect.width) * scale);
              const y = Math.round((rect.y + 0.9 * rect.height) * scale);
              return canvas.getContext("2d").getImageData(x, y, 1, 1).data[0];
            }"""
        )

    assert seen() == 200
    editor.evaluate("(sheet) => editor.showClip(sheet)", sheet)
    assert seen() == 200
    seek(editor, 5)
    assert seen() == pytest.approx(40 + 20 * 5, abs=2)
    editor.keyboard.press("End")
    assert seen() == pytest.approx(40 + 20 * 8, abs=2)
    editor.evaluate("() => editor.showClip(null)")
    assert seen() == 200
    editor.evaluate("() => editor.showClip({ address: './none.png' })")
    assert seen() == 200


def test_boxes_from_a_workflow_are_shown_and_not_written_back(editor):
    text = parse_boxes(
        {
            "frames": 5,
            "tracks": [
                {"id": "cat", "keyframes": [{"frame": 4, "x": 0.5, "y": 0, "w": 0.5, "h": 1}]}
            ],
        }
    ).to_json()
    editor.evaluate("(text) => editor.setText(text)", text)
    assert editor.evaluate("editor.model.track.keys[0].frame") == 8
    editor.evaluate("editor.setText('no boxes')")
    status = editor.locator(".layerloom-box-status")
    assert "not in a form" in status.inner_text()
    assert editor.evaluate("texts.length") == 0
    press(editor, "Clear all")
    assert editor.evaluate("texts") == [""]
    assert "not in a form" not in status.inner_text()


def test_a_connected_path_is_shown_and_taken_over(editor):
    given = {
        "frames": 9,
        "tracks": [{"id": "x", "keyframes": [{"frame": 0, "x": 0, "y": 0, "w": 0.5, "h": 0.5}]}],
    }
    take = editor.get_by_role("button", name="Take over")
    assert not take.is_visible()
    editor.evaluate("(given) => editor.setGiven(JSON.stringify(given))", given)
    assert "1 more from the connected path" in editor.locator(".layerloom-box-status").inner_text()
    take.click()
    assert tracks(editor)[0]["id"] == "x"


def test_nothing_pressed_in_it_reaches_the_page_around(editor):
    editor.evaluate(
        "window.heard = []; for (const type of ['keydown', 'pointerdown', 'contextmenu', 'wheel'])"
        " document.body.addEventListener(type, (event) => heard.push(event.type));"
    )
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    editor.keyboard.press("Delete")
    editor.mouse.wheel(0, 100)
    editor.wait_for_function("editor.model.frame === 1")
    name = editor.get_by_label("Left")
    name.press("1")
    assert editor.evaluate("heard") == []


def test_nothing_runs_while_nothing_happens_or_when_it_is_gone(editor):
    drag(editor, (0.1, 0.1), (0.3, 0.3))
    editor.wait_for_timeout(100)
    editor.evaluate(
        "window.requests = 0; const real = requestAnimationFrame.bind(window);"
        "window.requestAnimationFrame = (f) => { window.requests++; return real(f); }; null"
    )
    editor.wait_for_timeout(200)
    assert editor.evaluate("requests") == 0
    # Many moves of the hand, at most one drawing a frame.
    editor.evaluate("for (let i = 0; i < 50; i++) editor.model.nudge(1, 0), editor.fields; null")
    editor.keyboard.press("ArrowLeft")
    assert editor.evaluate("requests") <= 3
    editor.keyboard.press(" ")
    editor.evaluate("editor.destroy()")
    editor.wait_for_timeout(100)
    before = editor.evaluate("[requests, texts.length]")
    editor.mouse.click(200, 150)
    editor.wait_for_timeout(200)
    assert editor.evaluate("[requests, texts.length]") == before
    assert editor.locator(".layerloom-boxes").count() == 0
