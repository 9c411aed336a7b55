"""The click editor does what hands and keys mean, in Node and in a browser."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).parent
WEB = TESTS.parent / "web"
WIDTH, HEIGHT = 160, 120
# segment() answers with the left half of the picture, and counts what it was asked.
PAGE = """<!doctype html><body style="margin:0;background:#111"><div id="box"
 style="width:420px;height:400px"></div><script type="module">
import { ClickEditor } from "./click_editor.mjs";
window.texts = []; window.asked = []; window.running = 0; window.most = 0; window.failing = "";
const editor = new ClickEditor({
  onChange: (text) => texts.push(text),
  async segment(clicks) {
    asked.push(clicks);
    most = Math.max(most, ++running);
    await new Promise((resolve) => setTimeout(resolve, 60));
    running--;
    if (failing) throw new Error(failing);
    return { mask: "./mask.png", share: 0.5, score: 0.97 };
  },
});
document.getElementById("box").append(editor.element);
window.editor = editor;
window.show = () => editor.showPicture("./picture.png");
window.color = (x, y) => {
  const { canvas } = editor;
  return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
};
window.ready = true;
</script>"""


def test_the_editors_decisions():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    for name in ("click_editor.test.mjs", "upstream.test.mjs"):
        result = subprocess.run([node, "--test", TESTS / name], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """Address of a page that holds an editor and nothing else."""
    folder = tmp_path_factory.mktemp("clicks")
    for script in WEB.glob("*.mjs"):
        shutil.copy(script, folder)
    (folder / "index.html").write_text(PAGE)
    pixels = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    pixels[30:90, 40:100] = (200, 40, 40)
    Image.fromarray(pixels).save(folder / "picture.png")
    mask = np.full((HEIGHT, WIDTH, 2), 255, np.uint8)
    mask[:, WIDTH // 2 :, 1] = 0
    Image.fromarray(mask, "LA").save(folder / "mask.png")

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
def page(request, served, chromium) -> Iterator:
    context = chromium.new_context(viewport={"width": 440, "height": 420}, has_touch=True)
    tab = context.new_page()
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(served)
    tab.wait_for_function("window.ready")
    yield tab
    pictures = os.environ.get("LAYERLOOM_SCREENSHOTS")
    if pictures:
        tab.screenshot(path=Path(pictures) / f"{request.node.name}.png")
    context.close()
    assert problems == []


@pytest.fixture
def editor(page):
    """The page with its picture shown."""
    page.evaluate("show()")
    page.wait_for_function("editor.model.picture !== null")
    return page


def spot(page, x: float, y: float) -> tuple[float, float]:
    """Where a share of the picture is on the screen."""
    box = page.locator(".layerloom-click-stage").bounding_box()
    rect = page.evaluate("editor.model.rect")
    left, top = box["x"] + rect["x"], box["y"] + rect["y"]
    return left + x * rect["width"], top + y * rect["height"]


def click(page, x: float, y: float, button: str = "left") -> None:
    page.mouse.click(*spot(page, x, y), button=button)


def drag(page, start: tuple[float, float], end: tuple[float, float], **options) -> None:
    page.mouse.move(*spot(page, *start))
    page.mouse.down(**options)
    page.mouse.move(*spot(page, *end), steps=5)
    page.mouse.up(**options)


def clicks(page) -> dict:
    """What the widget was told last."""
    text = page.evaluate("texts.at(-1) ?? ''")
    return json.loads(text) if text else {"points": [], "boxes": []}


def points(page) -> list[tuple[float, float, int]]:
    return [(p["x"], p["y"], p["label"]) for p in clicks(page)["points"]]


# A pixel of the screen, as a share of the picture.
NEAR = 0.01


def test_clicks_become_the_contract(editor):
    click(editor, 0.3, 0.4)
    click(editor, 0.9, 0.1, button="right")
    editor.keyboard.down("Alt")
    click(editor, 0.9, 0.9)
    editor.keyboard.up("Alt")
    drag(editor, (0.3, 0.4), (0.5, 0.6))
    editor.keyboard.down("Control")
    drag(editor, (0.2, 0.2), (0.7, 0.8))
    editor.keyboard.up("Control")
    assert clicks(editor)["version"] == 1
    for found, wanted in zip(
        points(editor), [(0.5, 0.6, 1), (0.9, 0.1, 0), (0.9, 0.9, 0)], strict=True
    ):
        assert found == pytest.approx(wanted, abs=NEAR)
    assert clicks(editor)["boxes"][0] == pytest.approx([0.2, 0.2, 0.7, 0.8], abs=NEAR)
    assert editor.locator("canvas").get_attribute("aria-label") == (
        "Picture with 1 positive and 2 negative points and 1 boxes"
    )


def test_the_mask_follows_and_one_request_runs_at_a_time(editor):
    drag(editor, (0.2, 0.2), (0.8, 0.8))
    editor.wait_for_function("editor.status.textContent.startsWith('50.0 %')")
    editor.wait_for_function("!editor.feed.busy")
    assert editor.evaluate("most") == 1
    # The last answer is for the last place.
    last = editor.evaluate("asked.at(-1).points[0]")
    assert (last["x"], last["y"]) == pytest.approx((0.8, 0.8), abs=NEAR)
    assert editor.evaluate("texts.length") == 1
    inside, outside = (editor.evaluate(at_place(x, 0.1)) for x in (0.2, 0.95))
    assert outside == [200, 200, 200]
    assert inside[2] > inside[0] + 40  # blue over grey
    editor.get_by_role("button", name="Clear all").click()
    editor.wait_for_function(f"{at_place(0.2, 0.1)}.every((value) => value === 200)")


def at_place(x: float, y: float) -> str:
    """JavaScript for the colour of the canvas at a share of the picture."""
    return (
        "(() => { const r = editor.model.rect; const k = window.devicePixelRatio; return color("
        f"Math.round((r.x + {x} * r.width) * k), Math.round((r.y + {y} * r.height) * k)); }})()"
    )


def test_undo_redo_and_delete(editor):
    click(editor, 0.3, 0.4)
    click(editor, 0.6, 0.4)
    editor.keyboard.press("Delete")
    assert len(points(editor)) == 1
    editor.keyboard.press("Control+z")
    assert len(points(editor)) == 2
    editor.keyboard.press("Control+z")
    editor.keyboard.press("Control+z")
    assert editor.evaluate("texts.at(-1)") == ""
    editor.get_by_role("button", name="Redo (Ctrl + Y)").click()
    assert len(points(editor)) == 1
    assert editor.get_by_role("button", name="Delete the selected").is_disabled()


def test_the_keyboard_alone_is_enough(editor):
    editor.locator(".layerloom-click-keys").focus()
    editor.keyboard.press("Enter")
    editor.keyboard.press("ArrowRight")
    editor.keyboard.press("Shift+ArrowUp")
    assert points(editor) == [(round(0.5 + 1 / WIDTH, 5), round(0.5 - 10 / HEIGHT, 5), 1)]
    editor.keyboard.press("x")
    assert points(editor)[0][2] == 0
    editor.keyboard.press("+")
    assert editor.evaluate("editor.model.view.zoom") > 1
    editor.keyboard.press("0")
    editor.keyboard.press("Backspace")
    assert points(editor) == []


def test_nothing_pressed_in_it_reaches_the_page_around(editor):
    editor.evaluate(
        "window.heard = []; for (const type of ['keydown', 'pointerdown', 'contextmenu', 'wheel'])"
        " document.body.addEventListener(type, (event) => heard.push(event.type));"
    )
    click(editor, 0.5, 0.5, button="right")
    editor.keyboard.press("Delete")
    editor.keyboard.press("r")
    editor.mouse.wheel(0, -100)
    editor.wait_for_function("editor.model.view.zoom > 1")
    assert editor.evaluate("heard") == []
    editor.evaluate("document.activeElement.blur()")
    zoom = editor.evaluate("editor.model.view.zoom")
    editor.mouse.wheel(0, -100)
    editor.wait_for_function("heard.length === 1")
    assert editor.evaluate("editor.model.view.zoom") == zoom


def test_a_zoomed_picture_is_clicked_where_it_is_seen(editor):
    click(editor, 0.5, 0.5)
    editor.mouse.move(*spot(editor, 0.25, 0.25))
    for _ in range(6):
        editor.mouse.wheel(0, -100)
    editor.wait_for_function("editor.model.view.zoom > 3")
    before = editor.evaluate("editor.model.view.x")
    drag(editor, (0.3, 0.3), (0.2, 0.3), button="middle")
    assert editor.evaluate("editor.model.view.x") > before
    click(editor, 0.3, 0.35)
    assert points(editor)[1] == pytest.approx((0.3, 0.35, 1), abs=NEAR)
    editor.get_by_role("button", name="Show the whole picture (0)").click()
    assert editor.evaluate("editor.model.view.zoom") == 1


def test_a_scaled_editor_is_clicked_where_it_is_seen(editor):
    editor.evaluate(
        "Object.assign(document.getElementById('box').style,"
        " { transform: 'scale(0.6)', transformOrigin: '0 0' })"
    )
    box = editor.locator(".layerloom-click-stage").bounding_box()
    rect = editor.evaluate("editor.model.rect")
    at = {
        side: rect[side] + 0.25 * rect[length] for side, length in (("x", "width"), ("y", "height"))
    }
    editor.mouse.click(box["x"] + 0.6 * at["x"], box["y"] + 0.6 * at["y"])
    assert points(editor)[0] == pytest.approx((0.25, 0.25, 1), abs=2 * NEAR)


def test_fingers_tap_stay_and_pinch(editor):
    editor.touchscreen.tap(*spot(editor, 0.3, 0.3))
    assert points(editor)[0] == pytest.approx((0.3, 0.3, 1), abs=NEAR)
    session = editor.context.new_cdp_session(editor)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", spot(editor, 0.7, 0.7))
    editor.wait_for_timeout(700)
    touch("touchEnd")
    editor.wait_for_function("texts.length === 2")
    assert points(editor)[1] == pytest.approx((0.7, 0.7, 0), abs=NEAR)
    left, right = spot(editor, 0.45, 0.5), spot(editor, 0.55, 0.5)
    touch("touchStart", left)
    touch("touchStart", left, right)
    for step in range(1, 5):
        touch("touchMove", (left[0] - 12 * step, left[1]), (right[0] + 12 * step, right[1]))
    touch("touchEnd")
    editor.wait_for_function("editor.model.view.zoom > 1.5")
    assert len(points(editor)) == 2


def test_clicks_from_a_workflow_are_shown_and_not_written_back(editor):
    editor.evaluate('editor.setText(\'[{"x": 79.5, "y": 59.5}]\')')
    assert editor.evaluate("editor.model.clicks.points[0].x") == 0.5
    editor.evaluate("editor.setText('no clicks')")
    status = editor.locator(".layerloom-click-status")
    assert "not in a form" in status.inner_text()
    assert editor.evaluate("texts.length") == 0
    editor.get_by_role("button", name="Clear all").click()
    assert editor.evaluate("texts") == [""]
    assert status.inner_text() == "Click what is wanted."


def test_what_the_host_refuses_is_said(editor):
    editor.evaluate("failing = 'The picture has 9000x9000 pixels.'; null")
    click(editor, 0.3, 0.4)
    editor.wait_for_function("editor.status.dataset.bad === 'true'")
    assert editor.locator(".layerloom-click-status").inner_text() == (
        "The picture has 9000x9000 pixels."
    )


def test_without_a_picture_it_says_what_to_do(page):
    assert "Connect a picture" in page.locator(".layerloom-click-hint").inner_text()
    page.mouse.click(200, 150)
    page.keyboard.press("Enter")
    assert page.evaluate("texts.length") == 0
    page.evaluate("editor.showPicture('./gone.png')")
    page.wait_for_function("editor.hint.textContent.includes('no longer there')")


def test_nothing_runs_while_nothing_happens_or_when_it_is_gone(editor):
    click(editor, 0.3, 0.4)
    editor.wait_for_function("!editor.feed.busy && editor.status.textContent.includes('%')")
    editor.wait_for_timeout(100)
    editor.evaluate(
        "window.requests = 0; const real = requestAnimationFrame.bind(window);"
        "window.requestAnimationFrame = (f) => { window.requests++; return real(f); }; null"
    )
    editor.wait_for_timeout(200)
    assert editor.evaluate("requests") == 0
    # Many moves of the hand, at most one drawing a frame.
    editor.evaluate("for (let i = 0; i < 50; i++) editor.model.nudge(1, 0); null")
    editor.keyboard.press("ArrowLeft")
    editor.keyboard.press("ArrowLeft")
    assert editor.evaluate("requests") <= 4
    editor.evaluate("editor.destroy()")
    editor.wait_for_timeout(200)
    before = editor.evaluate("[asked.length, texts.length]")
    editor.mouse.click(200, 150)
    editor.wait_for_timeout(200)
    assert editor.evaluate("[asked.length, texts.length]") == before
    assert editor.locator(".layerloom-clicks").count() == 0
