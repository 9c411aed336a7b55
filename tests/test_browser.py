"""The pack in a real browser: templates, viewer and graph life (marker ``browser``)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

TEMPLATE = "layered_generate"
STARTERS = Path(__file__).resolve().parents[1] / "starter"
# A graph on a slow, shared machine; nothing here measures time.
PATIENCE = 60_000
SAVE = "LayerLoomSaveLayers"
# The save node, also inside a subgraph.
FIND_SAVE = """() => {
  const graphs = [app.rootGraph ?? app.graph];
  graphs.push(...(graphs[0].subgraphs?.values() ?? []));
  const nodes = graphs.flatMap((graph) => graph.nodes ?? graph._nodes);
  return nodes.filter((node) => node.type === "LayerLoomSaveLayers");
}"""


@pytest.fixture(params=["classic", "nodes2"])
def page(request, comfy, chromium, tmp_path) -> Iterator:
    """ComfyUI's page with an empty graph, in the classic canvas or in Nodes 2.0."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": request.param == "nodes2",
        "Comfy.Workflow.ShowMissingNodesWarning": False,
    }
    status, _ = comfy.post("/settings", settings)
    assert status == 200
    page = chromium.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    open_page(page, comfy.url)
    page.kind = request.param
    yield page
    pictures = os.environ.get("LAYERLOOM_SCREENSHOTS")
    if pictures:
        name = request.node.name.replace("[", "_").rstrip("]")
        page.screenshot(path=Path(pictures) / f"{name}.png")
    page.close()
    ours = [fault for fault in faults if "layerloom" in fault.lower()]
    assert not ours


def open_page(page, url: str) -> None:
    page.goto(url)
    page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.setting")
    page.wait_for_function("() => !document.querySelector('#comfy-loading, .p-blockui-mask')")


def open_template(page, name: str = TEMPLATE) -> None:
    """Through the list of templates, as a user does."""
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").wait_for()
    page.get_by_role("dialog").get_by_text("layerloom", exact=True).first.click()
    page.get_by_test_id(f"template-workflow-{name}").first.click()
    page.wait_for_function(f"() => ({FIND_SAVE})().length === 1")


def player(page):
    """The viewer's element, in whatever way the graph shows it."""
    return page.locator(".layerloom-player").first


def run(page) -> None:
    """Queue the graph and wait until the viewer has its layers."""
    page.evaluate("() => app.queuePrompt(0, 1)")
    shown(page, "frame 1 of 8")


def shown(page, text: str) -> None:
    """Wait until the viewer says that it shows something."""
    page.wait_for_function(
        """(text) => [...document.querySelectorAll(".layerloom-player canvas")]
          .some((canvas) => canvas.getAttribute("aria-label")?.includes(text))""",
        arg=text,
    )


def colours(page) -> int:
    """How many different colours the viewer's canvas holds."""
    return page.evaluate(
        """() => {
          const canvas = [...document.querySelectorAll(".layerloom-player canvas")].at(-1);
          const { width, height } = canvas;
          const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )


def graph(page) -> dict:
    return page.evaluate("() => (app.rootGraph ?? app.graph).serialize()")


def press(page, name: str) -> None:
    """Press a button of the viewer by its text or label."""
    player(page).get_by_role("button", name=name, exact=True).first.click()


def test_template_runs_and_the_viewer_plays(page):
    open_template(page)
    run(page)
    assert colours(page) > 50
    press(page, "Play")
    shown(page, "frame 4 of 8")
    press(page, "Pause")
    player(page).get_by_role("slider").fill("6")
    shown(page, "frame 7 of 8")
    press(page, "Alpha")
    shown(page, "Alpha")
    press(page, "Side by side")
    shown(page, "Recomposed")
    press(page, "Black behind")
    assert colours(page) > 50


def test_workflow_survives_saving_and_loading(page, comfy):
    open_template(page)
    before = graph(page)
    open_page(page, comfy.url)
    page.evaluate("(saved) => app.loadGraphData(saved)", before)
    page.wait_for_function(f"() => ({FIND_SAVE})().length === 1")
    after = graph(page)

    def kept(data: dict) -> list:
        nodes = [(n["type"], json.dumps(n.get("widgets_values"))) for n in data["nodes"]]
        return sorted(nodes)

    assert kept(after) == kept(before)
    assert len(after["links"]) == len(before["links"])
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    inputs = [node["inputs"] for node in prompt.values() if node["class_type"] == SAVE]
    assert [set(values) for values in inputs] == [
        {"foreground", "alpha", "background", "blended", "filename_prefix", "format", "fps"}
    ]
    player(page).wait_for(state="attached")


def test_copies_have_viewers_of_their_own(page):
    open_template(page)
    page.evaluate(
        f"""() => {{
          const node = ({FIND_SAVE})()[0];
          app.canvas.selectItems([node]);
          app.canvas.copyToClipboard([node]);
          app.canvas.pasteFromClipboard({{ position: [node.pos[0], node.pos[1] + 600] }});
        }}"""
    )
    page.wait_for_function(f"() => ({FIND_SAVE})().length === 2")
    elements = page.evaluate(
        f"""() => ({FIND_SAVE})().map(
          (node) => node.widgets.find((widget) => widget.name === "layerloom_viewer").element
        ).reduce((all, element) => all.add(element), new Set()).size"""
    )
    assert elements == 2


def test_it_lives_inside_a_subgraph(page):
    open_template(page)
    page.evaluate(
        f"""() => {{
          const save = ({FIND_SAVE})()[0];
          const graph = save.graph;
          const decode = graph.nodes.find((node) => node.type === "LayerLoomDecodeLayers");
          const {{ subgraph, node }} = graph.convertToSubgraph(new Set([decode, save]));
          app.canvas.openSubgraph(subgraph, node);
        }}"""
    )
    run(page)
    assert colours(page) > 50


TEMPLATES = ("animate_guider", "animate_loop", "click_regions", "subject_two")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_open_and_make_their_prompts(page, name):
    open_template(page, name)
    twin = Path(__file__).resolve().parents[1] / "workflows" / "api" / f"{name}.json"
    expected = json.loads(twin.read_text(encoding="utf-8"))
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert {key: node["class_type"] for key, node in prompt.items()} == {
        key: node["class_type"] for key, node in expected.items()
    }
    for key, node in expected.items():
        # The save node brings a widget for its viewer's state.
        made = {k: v for k, v in prompt[key]["inputs"].items() if k in node["inputs"]}
        assert made == node["inputs"], (key, node["class_type"])


@pytest.mark.parametrize("name", ["animate_image", "click_animate"])
def test_templates_of_clips_run_and_the_viewer_plays(page, name):
    family = name.split("_")[0]
    if not (STARTERS / f"{family}.safetensors").exists():
        pytest.skip(f"starter/{family}.safetensors is not trained yet")
    open_template(page, name)
    page.evaluate("() => app.queuePrompt(0, 1)")
    shown(page, "frame 1 of 16")
    assert colours(page) > 50
    first = middle(page)
    player(page).get_by_role("slider").fill("15")
    shown(page, "frame 16 of 16")
    last = middle(page)
    if name == "click_animate":
        # The red square was clicked and is told to move to the right; the blue one stays.
        assert last["red"] > first["red"] + 0.1
        assert abs(last["blue"] - first["blue"]) < 0.03
    else:
        # The red circle is told to move to the left.
        assert last["red"] < first["red"] - 0.1


def middle(page) -> dict[str, float]:
    """Where red and blue things are on the viewer's canvas: shares of its width."""
    return page.evaluate(
        """() => {
          const canvas = [...document.querySelectorAll(".layerloom-player canvas")].at(-1);
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          const sums = { red: [0, 0], blue: [0, 0] };
          for (let i = 0; i < data.length; i += 4) {
            const [r, g, b] = data.slice(i, i + 3);
            const name = r > 150 && g < 100 && b < 110 ? "red"
              : b > 180 && r < 110 && g < 160 ? "blue" : null;
            if (name) {
              sums[name][0] += (i / 4) % width;
              sums[name][1] += 1;
            }
          }
          return Object.fromEntries(
            Object.entries(sums).map(([name, [sum, count]]) => [name, sum / count / width]),
          );
        }"""
    )
