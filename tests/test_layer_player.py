"""The layer player shows exactly the frame and layers asked for, in Node and in a browser."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from layerloom.engine.sprite_sheets import sprite_sheets

TESTS = Path(__file__).parent
WEB = TESTS.parent / "web"
SIZE, FRAMES = 32, 6
PAGE = """<!doctype html><body style="margin:0;background:#111"><div id="box"
 style="width:420px;height:440px"></div><script type="module">
import { LayerPlayer, readLayers } from "./layer_player.mjs";
const entries = await (await fetch("./layers.json")).json();
const player = new LayerPlayer();
document.getElementById("box").append(player.element);
window.player = player;
window.show = () => player.load(readLayers(entries, (sheet) => sheet));
window.color = (left, top) => {
  const { canvas } = player;
  const x = Math.round(canvas.width * left), y = Math.round(canvas.height * top);
  return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
};
window.ready = true;
</script>"""


def layers() -> dict[str, np.ndarray]:
    """Frames of plain colours that say which layer and frame they are."""
    tone = (np.arange(FRAMES) * 40)[:, None, None] + np.zeros((FRAMES, SIZE, SIZE))
    left = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
    left[..., : SIZE // 2] = 255
    zero, full = np.zeros_like(tone), np.full_like(tone, 255)
    return {
        "foreground": np.stack([full, tone, zero], -1).astype(np.uint8),
        "alpha": left,
        "background": np.stack([zero, tone, full], -1).astype(np.uint8),
        "blended": np.stack([tone, tone, tone], -1).astype(np.uint8),
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory, chromium) -> Iterator:
    folder = tmp_path_factory.mktemp("player")
    for script in WEB.glob("layer_player*.mjs"):
        shutil.copy(script, folder)
    (folder / "index.html").write_text(PAGE)
    clips, entries = layers(), []
    for name, frames in clips.items():
        alpha = clips["alpha"] if name == "foreground" else None
        sheets = sprite_sheets(frames, alpha, max_sheet=2 * SIZE)
        entries.append(
            {
                "name": name,
                "fps": 20,
                "sheets": sheets.save(folder, name),
                **{key: getattr(sheets, key) for key in ("frames", "width", "height", "columns")},
                "per_sheet": sheets.per_sheet,
            }
        )
    (folder / "layers.json").write_text(json.dumps(entries))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map}
        extensions_map[".mjs"] = "text/javascript"

        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tab = chromium.new_page(viewport={"width": 440, "height": 460})
        tab.problems = []
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        tab.wait_for_function("window.ready")
        yield tab
        assert tab.problems == []
        tab.close()
    finally:
        server.shutdown()


@pytest.fixture
def player(page):
    page.reload()
    page.wait_for_function("window.ready")
    page.evaluate("show()")
    return page


def test_the_players_decisions():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    script = TESTS / "layer_player.test.mjs"
    result = subprocess.run([node, "--test", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# Left and right half of the picture; a stage wider than high has bars at its sides.
LEFT, RIGHT = (0.45, 0.5), (0.55, 0.5)


def at(page, place: tuple[float, float]) -> list[int]:
    return page.evaluate(f"color({place[0]}, {place[1]})")


def test_every_frame_is_shown_exactly(player):
    for frame in [0, 3, 5, 4, 1]:
        player.evaluate(f"player.seek({frame})")
        assert at(player, LEFT) == [255, 40 * frame, 0]
        assert at(player, RIGHT) == [0, 40 * frame, 255]
    assert player.locator(".layerloom-counter").inner_text() == "2 / 6"


def test_layers_are_switched_and_soloed(player):
    player.evaluate("player.seek(2)")
    player.get_by_role("button", name="Foreground", exact=True).click()
    assert at(player, LEFT) == [0, 80, 255]
    player.get_by_role("button", name="Blended alone (solo)").click()
    assert at(player, LEFT) == [80, 80, 80]
    player.get_by_role("button", name="Blended alone (solo)").click()
    assert at(player, LEFT) == [0, 80, 255]
    player.get_by_role("button", name="Alpha alone (solo)").click()
    assert (at(player, LEFT), at(player, RIGHT)) == ([255, 255, 255], [0, 0, 0])


def test_backdrops_show_through(player):
    player.get_by_role("button", name="Foreground alone (solo)").click()
    for name, colour in (("Black behind", [0, 0, 0]), ("White behind", [255, 255, 255])):
        player.get_by_role("button", name=name).click()
        assert at(player, RIGHT) == colour
    player.get_by_label("Any colour behind").fill("#ff8000")
    assert at(player, RIGHT) == [255, 128, 0]
    player.get_by_role("button", name="Checkerboard behind").click()
    pixels = "[...Array(40).keys()].map((i) => color(0.55 + i / 400, 0.5)[0])"
    assert set(player.evaluate(pixels)) == {0xCC, 0xF5}


def test_blended_stands_next_to_the_recomposed_scene(player):
    player.evaluate("player.seek(3)")
    player.get_by_role("button", name="Side by side").click()
    assert at(player, (0.2, 0.4)) == [120, 120, 120]
    assert at(player, (0.7, 0.4)) == [255, 120, 0]
    assert at(player, (0.8, 0.4)) == [0, 120, 255]
    label = player.locator("canvas").get_attribute("aria-label")
    assert label == "Blended next to Recomposed, frame 4 of 6"


def test_keys_work_where_the_player_has_the_focus(player):
    player.locator(".layerloom-player").focus()
    player.keyboard.press("ArrowRight")
    assert player.evaluate("player.frame") == 1
    player.keyboard.press("ArrowLeft")
    player.keyboard.press("ArrowLeft")
    assert player.evaluate("player.frame") == FRAMES - 1
    player.keyboard.press("Home")
    assert player.evaluate("player.frame") == 0
    player.keyboard.press("Space")
    assert player.evaluate("player.playing")
    player.wait_for_function("player.frame >= 2")
    player.keyboard.press("Space")
    assert not player.evaluate("player.playing")


def test_the_slider_scrubs(player):
    slider = player.get_by_role("slider", name="Frame")
    slider.fill("4")
    assert at(player, LEFT) == [255, 160, 0]
    assert slider.get_attribute("aria-valuetext") == "Frame 5 of 6"
    slider.press("ArrowRight")
    assert player.evaluate("player.frame") == 5


def test_nothing_runs_while_paused_hidden_or_gone(player):
    player.evaluate(
        "window.requests = 0; const real = requestAnimationFrame.bind(window);"
        "window.requestAnimationFrame = (f) => { window.requests++; return real(f); }; null"
    )

    def runs() -> bool:
        before = player.evaluate("requests")
        player.wait_for_timeout(200)
        return player.evaluate("requests") > before

    assert not runs()
    player.evaluate("player.play()")
    assert runs()
    player.evaluate("document.getElementById('box').style.display = 'none'")
    player.wait_for_timeout(200)
    assert not runs()
    player.evaluate("document.getElementById('box').style.display = ''")
    player.wait_for_timeout(200)
    assert runs()
    player.evaluate("player.destroy()")
    assert not runs()
    assert player.locator(".layerloom-player").count() == 0


def test_without_layers_it_says_what_to_do(page):
    page.reload()
    page.wait_for_function("window.ready")
    assert "Run the workflow" in page.locator(".layerloom-hint").inner_text()
    assert page.locator(".layerloom-counter").inner_text() == ""
    assert page.get_by_role("button", name="Play").is_disabled()
    page.evaluate(
        "player.load([{ name: 'blended', frames: 1, fps: 8, width: 8, height: 8, columns: 1,"
        " per_sheet: 1, urls: ['/gone.webp'] }])"
    )
    assert "run the workflow again" in page.locator(".layerloom-hint").inner_text()
