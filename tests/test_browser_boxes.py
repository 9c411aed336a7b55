"""The box editor in ComfyUI's graph, in a real browser (marker ``browser``)."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from test_browser import PATIENCE, graph, open_page, page  # noqa: F401

from layerloom.engine.conditioning.box_paths import box_masks, pixel_boxes
from layerloom.engine.conditioning.boxes import parse_boxes

pytestmark = pytest.mark.browser

SHOWN = "box_scene.png"
WIDTH, HEIGHT, FRAMES = 160, 120, 9
# A graph that is not on the screen keeps its editors.
STAGE = ".layerloom-box-stage:visible"
TIME = ".layerloom-box-time canvas:visible"
# A graph made by hand: a picture into Box Trajectory, its masks saved.
MAKE = """([picture, frames]) => {
  const graph = app.rootGraph ?? app.graph;
  graph.clear();
  const add = (type, x, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 60];
    graph.add(node);
    for (const [name, value] of Object.entries(values)) {
      const widget = node.widgets.find((one) => one.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
    return node;
  };
  const image = add("LoadImage", 20, { image: picture });
  const boxes = add("LayerLoomBoxTrajectory", 340, { frames });
  const masks = add("MaskToImage", 860);
  const shown = add("SaveImage", 1100, { filename_prefix: "boxes/drawn" });
  image.connect(0, boxes, boxes.inputs.findIndex((input) => input.name === "image"));
  boxes.connect(1, masks, 0);
  masks.connect(0, shown, 0);
  app.canvas.ds.reset();
  app.canvas.setDirty(true, true);
}"""
FIND = """() => {
  const graphs = [app.rootGraph ?? app.graph];
  graphs.push(...(graphs[0].subgraphs?.values() ?? []));
  return graphs.flatMap((graph) => graph.nodes ?? graph._nodes)
    .filter((node) => node.type === "LayerLoomBoxTrajectory");
}"""
VALUE = f"() => ({FIND})().map((n) => n.widgets.find((w) => w.name === 'boxes').value)"
STATUS = """(text) => [...document.querySelectorAll('.layerloom-box-status')]
  .some((one) => one.offsetParent && one.textContent.includes(text))"""


@pytest.fixture(scope="module")
def files(comfy) -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    pixels[30:80, 30:90] = (220, 60, 40)
    Image.fromarray(pixels).save(comfy.base / "input" / SHOWN)


@pytest.fixture
def editor(files, page):  # noqa: F811
    """The page with a graph that has a box editor in it."""
    page.evaluate(MAKE, [SHOWN, FRAMES])
    ready(page)
    return page


def ready(page) -> None:  # noqa: F811
    """Wait until the editor knows its clip and picture, and lies still."""
    stage = page.locator(STAGE).first
    stage.wait_for()
    page.wait_for_function(
        """(last) => [...document.querySelectorAll('.layerloom-box-count')]
          .some((one) => one.offsetParent && one.textContent.endsWith(`/ ${last}`))""",
        arg=FRAMES - 1,
    )
    page.wait_for_load_state("networkidle")
    before = None
    while before != (before := stage.bounding_box()):
        page.wait_for_timeout(150)


def spot(page, x: float, y: float) -> tuple[float, float]:  # noqa: F811
    """Where a share of the picture is on the screen; room is left around it."""
    box = page.locator(STAGE).first.bounding_box()
    scale = 0.84 * min(box["width"] / WIDTH, box["height"] / HEIGHT)
    left = box["x"] + (box["width"] - WIDTH * scale) / 2
    top = box["y"] + (box["height"] - HEIGHT * scale) / 2
    return left + x * WIDTH * scale, top + y * HEIGHT * scale


def drag(page, start, end) -> None:  # noqa: F811
    page.mouse.move(*spot(page, *start))
    page.mouse.down()
    page.mouse.move(*spot(page, *end), steps=4)
    page.mouse.up()


def seek(page, frame: int) -> None:  # noqa: F811
    box = page.locator(TIME).first.bounding_box()
    # The margins are pixels of a graph that may be zoomed.
    own = page.locator(TIME).first.evaluate("(canvas) => canvas.clientWidth")
    scale = box["width"] / own
    x = 12 * scale + (box["width"] - 24 * scale) * frame / (FRAMES - 1)
    page.mouse.click(box["x"] + x, box["y"] + 8 * scale)


def tracks(page, index: int = 0) -> list[dict]:  # noqa: F811
    text = page.evaluate(VALUE)[index]
    return json.loads(text)["tracks"] if text else []


def draw_a_path(page) -> None:  # noqa: F811
    drag(page, (0.1, 0.2), (0.35, 0.5))
    seek(page, FRAMES - 1)
    drag(page, (0.2, 0.3), (0.7, 0.6))


def prompt(page) -> dict:  # noqa: F811
    """What would be sent for the node."""
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = [one for one in sent.values() if one["class_type"] == "LayerLoomBoxTrajectory"]
    return node["inputs"]


def test_draw_key_ease_play_and_undo(editor):
    nodes = len(graph(editor)["nodes"])
    place = editor.evaluate(f"() => [...({FIND})()[0].pos]")
    draw_a_path(editor)
    (track,) = tracks(editor)
    assert [key["frame"] for key in track["keyframes"]] == [0, FRAMES - 1]
    first, last = ([key[side] for side in "xywh"] for key in track["keyframes"])
    assert first == pytest.approx([0.1, 0.2, 0.25, 0.3], abs=0.02)
    assert last == pytest.approx([0.6, 0.5, 0.25, 0.3], abs=0.02)
    seek(editor, 0)
    editor.locator(".layerloom-box-fields select:visible").first.select_option("ease_in_out")
    assert tracks(editor)[0]["keyframes"][0]["ease"] == "ease_in_out"
    count = editor.locator(".layerloom-box-count:visible").first
    editor.get_by_role("button", name="Play or pause").first.click()
    editor.wait_for_function(
        """() => [...document.querySelectorAll('.layerloom-box-count')]
          .some((one) => one.offsetParent && parseInt(one.textContent) >= 4)"""
    )
    editor.get_by_role("button", name="Play or pause").first.click()
    stood = count.inner_text()
    editor.wait_for_timeout(300)
    assert count.inner_text() == stood
    editor.locator(".layerloom-box-keys").first.focus()
    for _ in range(2):
        editor.keyboard.press("Control+z")
    editor.wait_for_timeout(300)
    assert len(tracks(editor)[0]["keyframes"]) == 1
    # The graph's own undo took no part in it, nor did its Delete, and the node lies where it lay.
    editor.keyboard.press("Home")
    editor.keyboard.press("Delete")
    editor.wait_for_timeout(300)
    assert tracks(editor) == []
    assert len(graph(editor)["nodes"]) == nodes
    assert editor.evaluate(f"() => [...({FIND})()[0].pos]") == place


def test_boxes_survive_saving_and_a_reload(editor, comfy):
    draw_a_path(editor)
    before, saved = editor.evaluate(VALUE), graph(editor)
    open_page(editor, comfy.url)
    editor.evaluate("(saved) => app.loadGraphData(saved)", saved)
    editor.wait_for_function(f"() => ({FIND})().length === 1")
    ready(editor)
    assert editor.evaluate(VALUE) == before
    label = editor.locator(".layerloom-box-stage canvas").first.get_attribute("aria-label")
    assert label.startswith("Picture with 1 subjects with 2 key frames")
    (node,) = [n for n in saved["nodes"] if n["type"] == "LayerLoomBoxTrajectory"]
    assert node["widgets_values"] == [FRAMES, 0, 0, 0, before[0]]
    sent = prompt(editor)
    assert set(sent) == {"frames", "width", "height", "subject", "boxes", "image"}
    assert sent["boxes"] == before[0]


def test_another_length_and_size_keep_the_path_and_the_run_makes_its_masks(editor, comfy):
    draw_a_path(editor)
    before = editor.evaluate(VALUE)
    editor.evaluate(
        f"""() => {{
          const node = ({FIND})()[0];
          for (const [name, value] of Object.entries({{ frames: 5, width: 80, height: 40 }})) {{
            const widget = node.widgets.find((one) => one.name === name);
            widget.value = value;
            widget.callback?.(value);
          }}
        }}"""
    )
    # Any change of the graph is told to the editor.
    editor.mouse.click(1500, 950)
    editor.wait_for_function(STATUS, arg="of 80 x 40")
    assert editor.evaluate(VALUE) == before
    editor.evaluate("() => app.queuePrompt(0, 1)")
    editor.wait_for_function(
        "() => Object.values(app.nodeOutputs).some((one) => one.images?.length === 5)",
        timeout=PATIENCE,
    )
    outputs = editor.evaluate("() => Object.values(app.nodeOutputs)")
    files = next(one["images"] for one in outputs if len(one.get("images", [])) == 5)
    masks = []
    for file in files:
        with Image.open(io.BytesIO(comfy.file(file))) as image:
            masks.append(np.asarray(image.convert("L")) > 127)
    paths = parse_boxes(before[0], 5)
    expected = box_masks(pixel_boxes(paths.tracks[0], 5, (40, 80)), (40, 80))
    assert (np.stack(masks) == expected).all()


def test_after_a_run_a_clips_frames_are_scrubbed(editor, comfy):
    second = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    Image.fromarray(second).save(comfy.base / "input" / "box_second.png")
    editor.evaluate(
        f"""() => {{
          const boxes = ({FIND})()[0];
          const {{ graph }} = boxes;
          const first = (graph.nodes ?? graph._nodes).find((node) => node.type === "LoadImage");
          const [other, clip] = ["LoadImage", "ImageBatch"].map((type, at) => {{
            const node = LiteGraph.createNode(type);
            node.pos = [20, 500 + 400 * at];
            graph.add(node);
            return node;
          }});
          other.widgets.find((one) => one.name === "image").value = "box_second.png";
          first.connect(0, clip, 0);
          other.connect(0, clip, 1);
          clip.connect(0, boxes, boxes.inputs.findIndex((input) => input.name === "image"));
        }}"""
    )
    drag(editor, (0.1, 0.2), (0.35, 0.5))
    editor.evaluate("() => app.queuePrompt(0, 1)")
    # A place of the picture where nothing is drawn.
    seen = f"""() => {{
      const canvas = [...document.querySelectorAll(".layerloom-box-stage canvas")]
        .find((one) => one.offsetParent);
      const scale = 0.84 * Math.min(canvas.width / {WIDTH}, canvas.height / {HEIGHT});
      const x = canvas.width / 2 + 0.4 * {WIDTH} * scale;
      const y = canvas.height / 2 + 0.4 * {HEIGHT} * scale;
      return canvas.getContext("2d").getImageData(Math.round(x), Math.round(y), 1, 1).data[0];
    }}"""
    near = f"(grey) => Math.abs(({seen})() - grey) < 4"
    editor.wait_for_function(near, arg=90, timeout=PATIENCE)
    seek(editor, FRAMES - 1)
    editor.wait_for_function(near, arg=200, timeout=PATIENCE)
    editor.keyboard.press("Home")
    editor.wait_for_function(near, arg=90)


def test_copies_have_editors_of_their_own_and_share_copied_paths(editor):
    draw_a_path(editor)
    editor.keyboard.press("Control+c")
    editor.evaluate(
        f"""() => {{
          const node = ({FIND})()[0];
          const {{ graph }} = node;
          const other = LiteGraph.createNode("LayerLoomBoxTrajectory");
          other.pos = [node.pos[0], node.pos[1] + 900];
          graph.add(other);
          node.pos = [node.pos[0], node.pos[1] - 1200];
          other.pos = [340, 60];
          other.widgets.find((one) => one.name === "frames").value = {FRAMES};
          app.canvas.setDirty(true, true);
        }}"""
    )
    editor.wait_for_function(f"() => ({FIND})().length === 2")
    editor.wait_for_timeout(500)
    editor.evaluate(
        """() => {
          const all = [...document.querySelectorAll('.layerloom-box-keys')];
          all.at(-1).focus({ preventScroll: true });
        }"""
    )
    editor.keyboard.press("Control+v")
    editor.wait_for_function(f"() => ({VALUE})().every((text) => text !== '')")
    first, second = (tracks(editor, index)[0]["keyframes"] for index in (0, 1))
    assert second[0]["x"] == pytest.approx(first[0]["x"] + 0.05, abs=1e-4)
    editor.keyboard.press("Shift+Delete")
    assert sorted(map(bool, editor.evaluate(VALUE))) == [False, True]
