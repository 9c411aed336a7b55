"""Workflows, blueprint, help and translations agree with the nodes; needs no ComfyUI."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
LANGUAGES = ("en", "zh")
WIDGETS = {"Combo", "String", "Int", "Float", "Boolean"}
# The host puts a widget of its own behind these; it is saved, but not sent.
SEEDS = {"seed", "noise_seed"}
# Words that a workflow's notes must have, by the loader it uses: where weights go. A graph
# with several is about the first of these; the others' have templates of their own.
WEIGHTS = {
    "LayerLoomLoadSubjectModel": ("checkpoints", "diffusion_models", "text_encoders", "vae"),
    "LayerLoomLoadAnimator": ("checkpoints", "diffusion_models", "text_encoders", "clip_vision"),
    "LayerLoomLoadRegionAnimator": ("checkpoints", "diffusion_models", "text_encoders", "vae"),
    "LayerLoomLoadSegmenter": ("sams", "sam_vit_b_01ec64.pth"),
    "LayerLoomLoadCheckpoint": ("checkpoints", "diffusion_models", "text_encoders", "cogvideox"),
}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
FAMILIES = ("layered", "animate", "segmenter", "click", "trajectory")
STARTERS = {f"starter/{name}.safetensors" for name in FAMILIES}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class Declared:
    """A node as its source declares it: (name, is a widget, optional, tooltip) an input."""

    display_name: str
    description: str
    inputs: list[tuple[str, bool, bool, str]] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def order(self) -> list[str]:
        """Names as the host orders them: required ones first."""
        required = [name for name, _, optional, _ in self.inputs if not optional]
        return required + [name for name, _, optional, _ in self.inputs if optional]

    @property
    def widgets(self) -> list[str]:
        return [name for name in self.order if name in {i[0] for i in self.inputs if i[1]}]


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {word.arg: word.value for word in call.keywords if word.arg}


def _text(node: ast.expr | None, given: dict[str, ast.expr] | None = None) -> str:
    """A text as it stands, or as it was given to the helper function that ``node`` is in."""
    if isinstance(node, ast.Name):
        node = (given or {}).get(node.id)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _inputs(node: ast.expr, helpers: dict[str, ast.FunctionDef], given=None):
    """The io.<Type>.Input calls below an expression, helper functions followed."""
    if isinstance(node, ast.List):
        for element in node.elts:
            yield from _inputs(element, helpers, given)
    elif isinstance(node, ast.Starred):
        yield from _inputs(node.value, helpers, given)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        helper = helpers[node.func.id]
        names = [argument.arg for argument in helper.args.args]
        for inner in ast.walk(helper):
            if isinstance(inner, ast.Return):
                yield from _inputs(inner.value, helpers, dict(zip(names, node.args, strict=False)))
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Input":
        words = _keywords(node)
        optional = isinstance(words.get("optional"), ast.Constant) and words["optional"].value
        name = _text(node.args[0] if node.args else words.get("id"), given)
        tooltip = _text(words.get("tooltip"), given)
        yield name, node.func.value.attr in WIDGETS, bool(optional), tooltip


def declared_nodes() -> dict[str, Declared]:
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "nodes").glob("*.py"))
    ]
    everything = [node for tree in trees for node in ast.walk(tree)]
    helpers = {node.name: node for node in everything if isinstance(node, ast.FunctionDef)}
    found = {}
    for node in everything:
        words = _keywords(node) if isinstance(node, ast.Call) else {}
        if not _text(words.get("node_id")):
            continue
        declared = Declared(_text(words.get("display_name")), _text(words.get("description")))
        if "inputs" in words:
            declared.inputs = list(_inputs(words["inputs"], helpers))
        for output in getattr(words.get("outputs"), "elts", []):
            name = _text(output.args[0]) or _text(_keywords(output).get("id"))
            declared.outputs.append((name, _text(_keywords(output).get("tooltip"))))
        found[_text(words["node_id"])] = declared
    return found


NODES = declared_nodes()


def graphs(path: Path) -> list[dict]:
    """The graphs of a file, links as lists: the workflow itself and its subgraphs."""
    data = read(path)
    found = [data]
    for graph in data.get("definitions", {}).get("subgraphs", []):
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        graph["links"] = [[link[key] for key in keys] for link in graph["links"]]
        found.append(graph)
    return found


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def widget_values(node: dict) -> dict[str, object]:
    """Values of a saved node's widgets by input name; asserts that they line up."""
    values, named_values = list(node["widgets_values"]), {}
    for slot in node["inputs"]:
        if "widget" not in slot:
            continue
        named_values[slot["name"]] = values.pop(0)
        if slot["name"] in SEEDS:
            assert values.pop(0) in CONTROLS
    assert not values, node["type"]
    return named_values


def test_there_are_workflows_a_blueprint_and_nodes():
    assert len(WORKFLOWS) >= 6 and BLUEPRINTS and NODES


@named(WORKFLOWS + BLUEPRINTS)
def test_links_agree_at_both_ends(path):
    for graph in graphs(path):
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        links = {link[0]: link for link in graph["links"]}
        assert len(links) == len(graph["links"])
        for link, origin, out, target, slot, kind in graph["links"]:
            if origin == -10:
                source = graph["inputs"][out]
                assert link in source["linkIds"]
            else:
                source = nodes[origin]["outputs"][out]
                assert link in source["links"]
            if target == -20:
                sink = graph["outputs"][slot]
                assert link in sink["linkIds"]
            else:
                sink = nodes[target]["inputs"][slot]
                assert sink["link"] == link
            assert source["type"] == kind and kind in sink["type"].split(",")
        for node in graph["nodes"]:
            for slot, entry in enumerate(node["inputs"]):
                if entry["link"] is not None:
                    assert links[entry["link"]][3:5] == [node["id"], slot]
            for slot, entry in enumerate(node["outputs"]):
                for link in entry["links"] or []:
                    assert links[link][1:3] == [node["id"], slot]
        if "last_node_id" in graph:
            assert graph["last_node_id"] >= max(nodes)
            assert graph["last_link_id"] >= max(links, default=0)


@named(WORKFLOWS + BLUEPRINTS)
def test_our_nodes_have_the_slots_and_widgets_they_declare(path):
    for graph in graphs(path):
        for node in graph["nodes"]:
            if not node["type"].startswith("LayerLoom"):
                continue
            declared = NODES[node["type"]]
            sockets = [name for name in declared.order if name not in declared.widgets]
            # A growing input is saved as a slot for each link and a free one.
            names = [slot["name"].partition(".")[0] for slot in node["inputs"]]
            assert list(dict.fromkeys(names)) == sockets + declared.widgets
            assert len({slot["name"] for slot in node["inputs"]}) == len(names)
            assert [slot["name"] for slot in node["outputs"]] == [o[0] for o in declared.outputs]
            required = {name for name, widget, optional, _ in declared.inputs if not optional}
            for slot in node["inputs"]:
                connected = slot["link"] is not None or "widget" in slot
                assert connected or slot["name"] not in required, (node["type"], slot["name"])
            widget_values(node)


@named(WORKFLOWS)
def test_the_api_twin_is_the_same_graph(path):
    workflow, twin = read(path), read(path.parent / "api" / path.name)
    links = {link[0]: link for link in workflow["links"]}
    expected = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        inputs = widget_values(node)
        for slot in node["inputs"]:
            if slot["link"] is not None:
                origin, out = links[slot["link"]][1:3]
                inputs[slot["name"]] = [str(origin), out]
        expected[str(node["id"])] = (node["type"], inputs)
    assert {key: (node["class_type"], node["inputs"]) for key, node in twin.items()} == expected


def test_no_api_twin_is_left_over():
    twins = {path.name for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert twins == {path.name for path in WORKFLOWS}


@named(WORKFLOWS + BLUEPRINTS)
def test_nodes_do_not_overlap(path):
    for graph in graphs(path):
        # A title bar of 30 stands above each node's position.
        boxes = [
            (n["type"], x, y - 30, x + w, y + h)
            for n in graph["nodes"]
            for (x, y), (w, h) in [(n["pos"], n["size"])]
        ]
        for index, (name, left, top, right, bottom) in enumerate(boxes):
            for other, left2, top2, right2, bottom2 in boxes[index + 1 :]:
                apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
                assert apart, (name, other)


@named(WORKFLOWS)
def test_a_workflow_runs_without_files_of_the_user(path):
    loaders = [node for node in read(path)["nodes"] if node["type"] in WEIGHTS]
    assert loaders
    for node in read(path)["nodes"]:
        assert not node["type"].startswith("Load"), "loads a file that a user may not have"
    for node in loaders:
        assert node["widgets_values"][0] in STARTERS


@named(WORKFLOWS)
def test_a_workflow_says_where_published_weights_go_and_saves_its_layers(path):
    nodes = read(path)["nodes"]
    notes = " ".join(n["widgets_values"][0] for n in nodes if n["type"] == "MarkdownNote")
    kinds = {node["type"] for node in nodes}
    for word in next(words for loader, words in WEIGHTS.items() if loader in kinds):
        assert word in notes
    assert "LayerLoomSaveLayers" in kinds


@named(WORKFLOWS)
def test_a_workflow_has_a_thumbnail(path):
    loaded = [n["widgets_values"][0] for n in read(path)["nodes"] if n["type"] in WEIGHTS]
    missing = [name for name in loaded if not (ROOT / name).is_file()]
    if missing:
        pytest.skip(f"{missing[0]} is not there yet, so there is no picture of what it makes")
    assert path.with_suffix(".jpg").is_file()


def test_every_node_is_in_a_workflow():
    used = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    assert set(NODES) <= used


@named(BLUEPRINTS)
def test_a_blueprint_is_one_node_that_shows_what_is_inside(path):
    data = read(path)
    (node,), (graph,) = data["nodes"], data["definitions"]["subgraphs"]
    assert node["type"] == graph["id"]
    # The host shows the file's name.
    assert graph["name"] == node["title"] == path.stem
    for outside, inside in ((node["inputs"], graph["inputs"]), (node["outputs"], graph["outputs"])):
        assert [(s["name"], s["type"]) for s in outside] == [(s["name"], s["type"]) for s in inside]
    assert [slot["name"] for slot in node["outputs"]] == [
        "foreground",
        "alpha",
        "background",
        "blended",
    ]
    inner = {str(n["id"]): {slot["name"] for slot in n["inputs"]} for n in graph["nodes"]}
    shown = [name for _, name in node["properties"]["proxyWidgets"]]
    assert {"foreground", "background", "seed", "steps"} <= set(shown)
    for owner, name in node["properties"]["proxyWidgets"]:
        assert name in inner[owner] | {"control_after_generate"}


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("node_id", sorted(NODES))
def test_every_node_has_help_with_a_picture_that_names_its_inputs(node_id):
    docs = ROOT / "web" / "docs"
    for page in (docs / f"{node_id}.md", docs / node_id / "zh.md"):
        text = page.read_text(encoding="utf-8")
        words = set(re.findall(r"`([^`]+)`", text))
        missing = {name for name, *_ in NODES[node_id].inputs + NODES[node_id].outputs} - words
        assert not missing, page
        # The host resolves pictures against docs/, also those of translations.
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert pictures, page
        for picture in pictures:
            assert (docs / picture).is_file(), f"{page.name} shows {picture}, which is missing"


def test_no_help_is_left_over():
    docs = ROOT / "web" / "docs"
    pages = {page.stem for page in docs.glob("*.md")} | {p.parent.name for p in docs.glob("*/*.md")}
    assert pages == set(NODES)


# --- translations ---------------------------------------------------------------------------------


def texts(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    else:
        yield value


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_cover_every_node_and_input(language):
    definitions = read(ROOT / "locales" / language / "nodeDefs.json")
    assert set(definitions) == set(NODES)
    for node_id, entry in definitions.items():
        declared = NODES[node_id]
        assert set(entry["inputs"]) == {name for name, *_ in declared.inputs}, node_id
        assert list(entry["outputs"]) == [str(i) for i in range(len(declared.outputs))], node_id
        assert entry["display_name"] and entry["description"]
        for slot in [*entry["inputs"].values(), *entry["outputs"].values()]:
            assert slot["name"] and slot["tooltip"], node_id


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["main.json", "nodeDefs.json"])
def test_translations_use_no_letters_that_the_frontend_reads_as_syntax(language, file):
    # vue-i18n: linked messages, placeholders, plurals.
    for text in texts(read(ROOT / "locales" / language / file)):
        assert text and not set(text) & set("@{}|"), text


def test_english_texts_are_those_of_the_nodes():
    definitions = read(ROOT / "locales" / "en" / "nodeDefs.json")
    for node_id, declared in NODES.items():
        entry = definitions[node_id]
        assert entry["display_name"] == declared.display_name
        assert entry["description"] == declared.description
        for name, _, _, tooltip in declared.inputs:
            # Only what the source writes as one literal can be compared.
            assert not tooltip or entry["inputs"][name]["tooltip"] == tooltip, (node_id, name)
        for slot, (name, tooltip) in enumerate(declared.outputs):
            shown = entry["outputs"][str(slot)]
            assert shown["name"] == name
            assert not tooltip or shown["tooltip"] == tooltip, (node_id, name)


def test_categories_are_translated():
    schemas = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "nodes").glob("*.py"))
    parts = {
        part for path in re.findall(r'"(LayerLoom/[^"]+)"', schemas) for part in path.split("/")
    }
    assert parts
    for language in LANGUAGES:
        main = read(ROOT / "locales" / language / "main.json")
        assert parts <= set(main["nodeCategories"])


# --- files ----------------------------------------------------------------------------------------


def test_python_sources_are_ascii():
    # Windows reads them in its own code page where no encoding is given.
    rooms = ("nodes", "engine", "kernels", "starter", "tests")
    files = [ROOT / "__init__.py", *(f for room in rooms for f in (ROOT / room).rglob("*.py"))]
    assert [f.name for f in files if not f.read_bytes().isascii()] == []


def test_the_hosts_folders_hold_what_it_expects():
    # The host imports every .js below web/ as an extension and lists every workflows/*.json.
    allowed = {"workflows": {".json", ".jpg"}, "subgraphs": {".json"}, "locales": {".json"}}
    for folder, suffixes in allowed.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= suffixes, folder
        assert all(re.fullmatch(r"[\w .-]+", path.name) for path in files)
