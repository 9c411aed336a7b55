"""The click editor in ComfyUI's graph, in a real browser (marker ``browser``)."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from test_browser import PATIENCE, graph, open_page, page  # noqa: F401
from tiny_segmenter import write_segmenter

pytest.importorskip("segment_anything")
pytestmark = pytest.mark.browser

MODEL = "tiny_clicks.pth"
SHOWN = "scene.png"
# A graph that is not on the screen keeps its editors.
STAGE = ".layerloom-click-stage:visible"
WIDTH, HEIGHT = 160, 120
# A graph made by hand: picture and segmenter into Click Mask, its mask shown.
MAKE = """([picture, model]) => {
  const graph = app.rootGraph ?? app.graph;
  graph.clear();
  const add = (type, x, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 100];
    graph.add(node);
    for (const [name, value] of Object.entries(values)) {
      const widget = node.widgets.find((one) => one.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
    return node;
  };
  const image = add("LoadImage", 20, { image: picture });
  const segmenter = add("LayerLoomLoadSegmenter", 20, { checkpoint: model });
  segmenter.pos[1] = 560;
  const mask = add("LayerLoomClickMask", 340);
  const shown = add("MaskPreview", 800);
  segmenter.connect(0, mask, mask.inputs.findIndex((input) => input.name === "segmenter"));
  image.connect(0, mask, mask.inputs.findIndex((input) => input.name === "image"));
  mask.connect(0, shown, 0);
  app.canvas.ds.reset();
  app.canvas.setDirty(true, true);
}"""
FIND = """() => {
  const graphs = [app.rootGraph ?? app.graph];
  graphs.push(...(graphs[0].subgraphs?.values() ?? []));
  return graphs.flatMap((graph) => graph.nodes ?? graph._nodes)
    .filter((node) => node.type === "LayerLoomClickMask");
}"""
VALUE = f"() => ({FIND})().map((n) => n.widgets.find((w) => w.name === 'clicks').value)"


@pytest.fixture(scope="module")
def files(comfy) -> None:
    """A picture and a tiny segmenter, there before the page reads its lists of files."""
    sams = comfy.base / "models" / "sams"
    sams.mkdir(parents=True, exist_ok=True)
    write_segmenter(sams / MODEL)
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    pixels[30:80, 30:90] = (220, 60, 40)
    Image.fromarray(pixels).save(comfy.base / "input" / SHOWN)


@pytest.fixture
def editor(files, page):  # noqa: F811
    """The page with a graph that has a click editor in it."""
    page.evaluate(MAKE, [SHOWN, MODEL])
    ready(page)
    return page


def ready(page) -> None:  # noqa: F811
    """Wait until the editor shows its picture and lies still."""
    stage = page.locator(STAGE).first
    stage.wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.layerloom-click-stage')]"
        ".filter((one) => one.offsetParent)"
        ".every((one) => one.querySelector('.layerloom-click-hint').hidden)"
    )
    before = None
    while before != (before := stage.bounding_box()):
        page.wait_for_timeout(100)


def spot(page, x: float, y: float) -> tuple[float, float]:  # noqa: F811
    """Where a share of the picture is on the screen."""
    box = page.locator(STAGE).first.bounding_box()
    scale = min(box["width"] / WIDTH, box["height"] / HEIGHT)
    left = box["x"] + (box["width"] - WIDTH * scale) / 2
    top = box["y"] + (box["height"] - HEIGHT * scale) / 2
    return left + x * WIDTH * scale, top + y * HEIGHT * scale


def clicks(page) -> dict:  # noqa: F811
    text = page.evaluate(VALUE)[0]
    return json.loads(text) if text else {"points": [], "boxes": []}


def masked(page) -> None:  # noqa: F811
    """Wait for the mask's own words."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.layerloom-click-status')]"
        ".some((one) => one.offsetParent && one.textContent.includes('% of the picture'))"
    )


def drag(page, start, end) -> None:  # noqa: F811
    page.mouse.move(*spot(page, *start))
    page.mouse.down()
    page.mouse.move(*spot(page, *end), steps=4)
    page.mouse.up()


def prompt(page) -> dict:  # noqa: F811
    """What would be sent for the node."""
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = [one for one in sent.values() if one["class_type"] == "LayerLoomClickMask"]
    return node["inputs"]


def test_click_move_undo_and_the_mask_within_a_second(editor):
    nodes = len(graph(editor)["nodes"])
    editor.mouse.click(*spot(editor, 0.4, 0.45))
    masked(editor)
    # The network is open and the picture was looked at: from here on a click takes no time.
    editor.evaluate("() => { document.querySelector('.layerloom-click-status').textContent = ''; }")
    begun = time.perf_counter()
    editor.mouse.click(*spot(editor, 0.9, 0.9), button="right")
    masked(editor)
    assert time.perf_counter() - begun < 1
    first, second = clicks(editor)["points"]
    assert (first["x"], first["y"], first["label"]) == pytest.approx((0.4, 0.45, 1), abs=0.02)
    assert (second["x"], second["y"], second["label"]) == pytest.approx((0.9, 0.9, 0), abs=0.02)

    drag(editor, (0.4, 0.45), (0.5, 0.35))
    assert clicks(editor)["points"][0]["x"] == pytest.approx(0.5, abs=0.02)
    editor.keyboard.press("Control+z")
    editor.wait_for_timeout(300)
    assert clicks(editor)["points"][0]["x"] == pytest.approx(0.4, abs=0.02)
    # The graph's own undo took no part in it, nor did its Delete.
    editor.keyboard.press("Delete")
    editor.wait_for_timeout(300)
    assert len(graph(editor)["nodes"]) == nodes
    assert prompt(editor)["clicks"] == editor.evaluate(VALUE)[0]


def test_a_box_is_drawn_with_ctrl_and_the_node_stays_where_it_is(editor):
    place = editor.evaluate(f"() => [...({FIND})()[0].pos]")
    editor.keyboard.down("Control")
    drag(editor, (0.15, 0.2), (0.6, 0.7))
    editor.keyboard.up("Control")
    assert clicks(editor)["boxes"][0] == pytest.approx([0.15, 0.2, 0.6, 0.7], abs=0.02)
    masked(editor)
    assert editor.evaluate(f"() => [...({FIND})()[0].pos]") == place


def test_clicks_survive_saving_and_a_reload(editor, comfy):
    editor.mouse.click(*spot(editor, 0.4, 0.45))
    editor.mouse.click(*spot(editor, 0.8, 0.2), button="right")
    masked(editor)
    before, saved = clicks(editor), graph(editor)
    open_page(editor, comfy.url)
    editor.evaluate("(saved) => app.loadGraphData(saved)", saved)
    editor.wait_for_function(f"() => ({FIND})().length === 1")
    ready(editor)
    assert clicks(editor) == before
    masked(editor)
    label = editor.locator(".layerloom-click-stage canvas").first.get_attribute("aria-label")
    assert label == "Picture with 1 positive and 1 negative points and 0 boxes"
    # And in the same place of the saved values.
    (node,) = [n for n in saved["nodes"] if n["type"] == "LayerLoomClickMask"]
    assert node["widgets_values"][0] == json.dumps(before, separators=(",", ":"))
    assert set(prompt(editor)) == {
        "segmenter",
        "image",
        "clicks",
        "candidate",
        "dilate",
        "feather",
    }


def test_points_stay_when_the_picture_is_resized_and_the_run_makes_the_mask(editor):
    editor.mouse.click(*spot(editor, 0.4, 0.45))
    masked(editor)
    before = clicks(editor)
    editor.evaluate(
        f"""() => {{
          const mask = ({FIND})()[0];
          const {{ graph }} = mask;
          const nodes = graph.nodes ?? graph._nodes;
          const image = nodes.find((node) => node.type === "LoadImage");
          const scale = LiteGraph.createNode("ImageScale");
          scale.pos = [20, 700];
          graph.add(scale);
          for (const [name, value] of Object.entries({{ width: 320, height: 240 }})) {{
            scale.widgets.find((widget) => widget.name === name).value = value;
          }}
          image.connect(0, scale, 0);
          scale.connect(0, mask, mask.inputs.findIndex((input) => input.name === "image"));
        }}"""
    )
    ready(editor)
    assert clicks(editor) == before
    editor.evaluate("() => app.queuePrompt(0, 1)")
    editor.wait_for_function(
        "() => Object.values(app.nodeOutputs).some((one) => one.layerloom_picture)",
        timeout=PATIENCE,
    )
    editor.wait_for_timeout(500)
    assert clicks(editor) == before
    masked(editor)
    outputs = editor.evaluate("() => Object.values(app.nodeOutputs)")
    (shown,) = next(one for one in outputs if "layerloom_picture" in one)["layerloom_picture"]
    assert shown["type"] == "temp"


def test_a_cropped_picture_shows_after_a_run(editor):
    editor.evaluate(
        f"""() => {{
          const mask = ({FIND})()[0];
          const {{ graph }} = mask;
          const nodes = graph.nodes ?? graph._nodes;
          const image = nodes.find((node) => node.type === "LoadImage");
          const crop = LiteGraph.createNode("ImageScale");
          crop.pos = [20, 700];
          graph.add(crop);
          const values = {{ width: {HEIGHT}, height: {HEIGHT}, crop: "center" }};
          for (const [name, value] of Object.entries(values)) {{
            crop.widgets.find((widget) => widget.name === name).value = value;
          }}
          image.connect(0, crop, 0);
          crop.connect(0, mask, mask.inputs.findIndex((input) => input.name === "image"));
          const clicks = mask.widgets.find((widget) => widget.name === "clicks");
          clicks.value = '{{"points": [{{"x": 0.4, "y": 0.5}}]}}';
          mask.onConfigure({{}});
        }}"""
    )
    hint = editor.locator(".layerloom-click-hint").first
    editor.mouse.click(1200, 800)
    editor.wait_for_function(
        "() => !document.querySelector('.layerloom-click-hint').hidden", timeout=PATIENCE
    )
    assert "after a run" in hint.inner_text()
    editor.evaluate("() => app.queuePrompt(0, 1)")
    editor.wait_for_function("() => document.querySelector('.layerloom-click-hint').hidden")
    masked(editor)


def test_copies_and_subgraphs_have_editors_of_their_own(editor):
    editor.mouse.click(*spot(editor, 0.4, 0.45))
    masked(editor)
    editor.evaluate(
        f"""() => {{
          const node = ({FIND})()[0];
          app.canvas.selectItems([node]);
          app.canvas.copyToClipboard([node]);
          app.canvas.pasteFromClipboard({{ position: [node.pos[0], node.pos[1] + 700] }});
        }}"""
    )
    editor.wait_for_function(f"() => ({FIND})().length === 2")
    first, second = editor.evaluate(VALUE)
    assert first == second != ""
    editor.mouse.click(*spot(editor, 0.6, 0.6))
    editor.wait_for_function(f"() => {{ const [a, b] = ({VALUE})(); return a !== b; }}")
    assert sorted(len(json.loads(text)["points"]) for text in editor.evaluate(VALUE)) == [1, 2]
    editor.evaluate(
        f"""() => {{
          const node = ({FIND})().find((one) => one.inputs.every((input) => input.widget ||
            input.link != null));
          const {{ subgraph, node: outer }} = node.graph.convertToSubgraph(new Set([node]));
          app.canvas.openSubgraph(subgraph, outer);
        }}"""
    )
    ready(editor)
    editor.wait_for_timeout(300)
    editor.mouse.click(*spot(editor, 0.2, 0.2))
    masked(editor)
    found = editor.evaluate(
        f"() => ({FIND})().filter((n) => n.graph !== (app.rootGraph ?? app.graph))"
        ".map((n) => n.widgets.find((w) => w.name === 'clicks').value)"
    )
    assert len(json.loads(found[0])["points"]) in (2, 3)
