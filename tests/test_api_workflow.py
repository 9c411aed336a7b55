"""Workflow files, NODE.INPUT, and the host's answers and messages in words."""

import json

import pytest

from layerloom.engine.api_workflow import (
    ResultFile,
    Tracker,
    failure,
    find_input,
    local_names,
    read_workflow,
    refusal,
    result_files,
    set_input,
)
from layerloom.engine.errors import LayerLoomError

WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "In"}},
    "2": {"class_type": "TextNode", "inputs": {"text": "a cat", "size": 4}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "steps": 20, "image": ["1", 0], "text": ["2", 0]},
        "_meta": {"title": "Sampler v1.5"},
    },
    "4": {"class_type": "SaveLayers", "inputs": {"images": ["3", 0], "prefix": "x"}},
    "5": {"class_type": "SaveLayers", "inputs": {"images": ["3", 0], "mode.fps": 8}},
}


# --- the workflow file ----------------------------------------------------------------------

BAD_FILES = {
    "broken": ('{"1": ', ["broken.json", "not valid JSON", "Export (API)"]),
    "binary": (b"\xff\xfe\x00", ["binary.json", "not valid JSON"]),
    "deep": ("[" * 100_000, ["deep.json", "not valid JSON"]),
    "editor": ('{"nodes": [], "links": [], "version": 0.4}', ["as the editor saves it", "Export"]),
    "list": ("[1]", ["no workflow in API format", "Export (API)"]),
    "empty": ("{}", ["no workflow in API format"]),
    "other": ('{"a": 1}', ["no workflow in API format"]),
    "classless": ('{"1": {"class_type": "A", "inputs": {}}, "2": {}}', ["Node 2", "class_type"]),
    "inputless": ('{"1": {"class_type": "A"}}', ["Node 1", "no inputs"]),
    "dangling": (
        '{"1": {"class_type": "A", "inputs": {"x": ["9", 0]}}}',
        ["node 1 (A)", "input x", "node 9"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    content, words = BAD_FILES[case]
    path = tmp_path / f"{case}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LayerLoomError) as caught:
        read_workflow(path)
    told = str(caught.value)
    assert told.endswith(".") and ". " not in told and "\n" not in told
    for word in words:
        assert word in told


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "windows.json"
    path.write_text(json.dumps(WORKFLOW), encoding="utf-8-sig")
    assert read_workflow(path) == WORKFLOW


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("3.seed", ("3", "seed")),
        ("KSampler.seed", ("3", "seed")),
        ("Sampler v1.5.seed", ("3", "seed")),
        ("In.image", ("1", "image")),
        ("5.mode.fps", ("5", "mode.fps")),
        ("SaveLayers.mode.fps", None),
    ],
)
def test_naming_an_input(target, found):
    if found is None:
        with pytest.raises(LayerLoomError, match="node 4 .*node 5 .*give the id"):
            find_input(WORKFLOW, target, "--set")
    else:
        assert find_input(WORKFLOW, target, "--set") == found


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("3.seed=5", 5),
        ("3.seed=18446744073709551615", 18446744073709551615),
        ("3.seed=-1.5e2", -150.0),
        ("3.seed=true", True),
        ("3.seed=a=b", "a=b"),
        ("3.seed=NaN", "NaN"),
        ("3.seed=", ""),
        ('3.seed={"a": 1}', {"a": 1}),
        # The host reads a bare list as a link, and takes the list out of this.
        ('3.seed=["2", 0]', {"__value__": ["2", 0]}),
        ("2.text=5", "5"),
        ("2.text=null", "null"),
        ('2.text="5"', "5"),
        ("2.text=a red circle, moving", "a red circle, moving"),
    ],
)
def test_setting_an_input(setting, value):
    nodes = json.loads(json.dumps(WORKFLOW))
    set_input(nodes, setting)
    node_id, slot = setting.partition("=")[0].split(".")
    assert nodes[node_id]["inputs"][slot] == value
    assert type(nodes[node_id]["inputs"][slot]) is type(value)


# --- the host's words -----------------------------------------------------------------------


def invalid(kind: str, message: str, details: str, **info: object) -> dict:
    """One of the host's node errors, as its execution.py makes them."""
    return {"type": kind, "message": message, "details": details, "extra_info": info}


NODE_ERRORS = {
    "below": (
        invalid(
            "value_smaller_than_min",
            "Value 0 smaller than min of 1",
            "steps",
            input_name="steps",
            input_config=["INT", {"min": 1}],
            received_value=0,
        ),
        "input steps: 0 is below the least, 1",
    ),
    "missing": (
        invalid("required_input_missing", "Required input is missing", "vae", input_name="vae"),
        "input vae: missing",
    ),
    "choice": (
        invalid(
            "value_not_in_list",
            "Value not in list",
            "mode: 'loud' not in ['a', 'b']",
            input_name="mode",
        ),
        "input mode: 'loud' is not one of ['a', 'b']",
    ),
    "long choice": (
        invalid(
            "value_not_in_list",
            "Value not in list",
            "ckpt: 'x' not in (list of length 25)",
            input_name="ckpt",
            input_config=None,
        ),
        "input ckpt: 'x' is not one of its 25 choices",
    ),
    "socket": (
        invalid(
            "return_type_mismatch",
            "Return type mismatch between linked nodes",
            "image, received_type(IMAGE) mismatch input_type(LATENT)",
            input_name="image",
            input_config=["LATENT", {}],
            received_type="IMAGE",
            linked_node=["1", 0],
        ),
        'input image: takes LATENT but node 1 "In" (LoadImage) gives IMAGE',
    ),
    "number": (
        invalid(
            "invalid_input_type",
            "Failed to convert an input value to a INT value",
            "seed, five, invalid literal for int() with base 10: 'five'",
            input_name="seed",
            input_config=["INT", {}],
            received_value="five",
        ),
        "input seed: 'five' is not a value of type INT",
    ),
    "own check": (
        invalid(
            "custom_validation_failed",
            "Custom validation failed for node",
            "image - Invalid image file: x.png",
            input_name="image",
        ),
        "input image: Invalid image file: x.png",
    ),
    "exception": (
        invalid("exception_during_validation", "Exception when validating node", "'x'"),
        "Exception when validating node ('x')",
    ),
}


@pytest.mark.parametrize("case", NODE_ERRORS)
def test_validation_errors_in_words(case):
    error, words = NODE_ERRORS[case]
    answer = {
        "error": invalid("prompt_outputs_failed_validation", "Prompt outputs failed", "all of it"),
        "node_errors": {"3": {"errors": [error], "class_type": "KSampler"}},
    }
    assert refusal(answer, WORKFLOW) == f'node 3 "Sampler v1.5" (KSampler), {words}'


def test_what_several_inputs_share_is_told_once():
    missing = [
        invalid("required_input_missing", "Required input is missing", name, input_name=name)
        for name in ("model", "vae")
    ]
    # The host repeats a node's own sentence for each input that its check looks at.
    own = [
        invalid("custom_validation_failed", "Failed", f"{name} - Give one.", input_name=name)
        for name in ("a", "b")
    ]
    answer = {"node_errors": {"4": {"errors": missing + own}}}
    told = "node 4 (SaveLayers), "
    assert refusal(answer, WORKFLOW) == f"{told}inputs model, vae: missing; {told}Give one"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            invalid("missing_node_type", "Node 'In' not found. Install.", "#1", node_id="1"),
            'node 1 "In" (LoadImage) is of a class the server does not have',
        ),
        (invalid("prompt_no_outputs", "Prompt has no outputs", ""), "no output node"),
        (invalid("new_kind", "Something", "odd\nindeed."), "Something: odd indeed"),
        ("plain text", "plain text"),
    ],
)
def test_errors_of_the_whole_prompt(error, words):
    assert words in refusal({"error": error, "node_errors": {}}, WORKFLOW)


def test_how_a_prompt_ended():
    def entry(status: str, *messages: list) -> dict:
        return {"status": {"status_str": status, "messages": list(messages)}}

    error = {"node_id": "3", "exception_message": "Not enough\nmemory.\n"}
    assert failure(entry("success", ["execution_success", {}]), WORKFLOW) is None
    assert failure({"outputs": {}}, WORKFLOW) is None
    assert failure(entry("error", ["execution_error", error]), WORKFLOW) == (
        'Node 3 "Sampler v1.5" (KSampler) failed on the server: Not enough memory.'
    )
    # A node that a subgraph or a loop made while running.
    error = {"node_id": "3:7", "exception_type": "ValueError", "exception_message": ""}
    assert failure(entry("error", ["execution_error", error]), WORKFLOW) == (
        "Node 3:7 failed on the server: ValueError."
    )
    assert "interrupted" in failure(entry("error", ["execution_interrupted", {}]), WORKFLOW)
    assert "no reason" in failure(entry("error"), WORKFLOW)


def test_messages_become_steps():
    shown, notes = [], []
    tracker = Tracker(WORKFLOW, "p", lambda *step: shown.append(step), notes.append)

    def say(kind: str, **data: object) -> bool:
        shown.clear()
        return tracker.take({"type": kind, "data": data})

    assert say("status", status={"exec_info": {"queue_remaining": 3}})
    assert shown == [(0, 5, "Waiting (3 in the queue)")]
    assert not say("executing", node="4", prompt_id="another") and shown == []
    assert not say("execution_start", prompt_id="p") and shown == [(0, 5, "Starting")]
    assert not say("execution_cached", nodes=["1", "2"], prompt_id="p")
    assert not say("executing", node="3", display_node="3", prompt_id="p")
    assert shown == [(2, 5, "Sampler v1.5")]
    assert not say("progress", value=7, max=20, node="3", prompt_id="p")
    assert shown == [(7, 20, "Sampler v1.5")]
    states = {"1": {"state": "finished"}, "3": {"state": "running", "value": 8, "max": 20}}
    assert not say("progress_state", nodes=states, prompt_id="p")
    assert shown == [(8, 20, "Sampler v1.5")]
    states = {"3": {"state": "running", "value": 0, "max": 1}}
    assert not say("progress_state", nodes=states, prompt_id="p") and shown == []
    assert not say("executing", node="3.0.1", display_node="4", prompt_id="p")
    assert shown == [(3, 5, "SaveLayers")]
    blocked = {"exception_type": "ExecutionBlocked", "exception_message": "Execution Blocked: no"}
    assert say("execution_error", node_id="4", prompt_id="p", **blocked)
    assert notes == ["Node 4 (SaveLayers) failed on the server: Execution Blocked: no."]
    assert say("execution_success", prompt_id="p")
    assert say("executing", node=None, prompt_id="p")
    for odd in (None, [], "status", {"type": "status"}, {"type": "executing", "data": 3}):
        assert not tracker.take(odd)


def test_results_are_found_under_any_name():
    def item(name: str, **more: str) -> dict:
        return {"filename": name, "subfolder": "s", "type": "output", **more}

    outputs = {
        "4": {"images": [item("a.png"), item("a.png")], "animated": [True], "text": ["words"]},
        "5": {"gifs": [item("b.webm", format="video/webm")], "audio": [{"filename": "c.flac"}]},
        "6": {"odd": None, "number": 3},
    }
    assert result_files({"outputs": outputs}) == [
        ResultFile("a.png", "s", "output"),
        ResultFile("b.webm", "s", "output"),
        ResultFile("c.flac", "", "output"),
    ]
    assert result_files({}) == []


def test_names_stay_in_the_folder(tmp_path):
    (tmp_path / "taken").mkdir()
    names = ["../../up.png", "/etc/passwd", r"c:\x\a.png", ".hidden", "..", "A.PNG", 'b"<>|.png']
    files = [ResultFile(name, "", "output") for name in [*names, "a.png", "taken"]]
    assert local_names(files, tmp_path) == [
        "up.png",
        "passwd",
        "a.png",
        "hidden",
        "file",
        "A_2.PNG",  # some file systems take A.PNG for a.png
        "b____.png",
        "a_3.png",
        "taken_2",
    ]


def test_previews_are_results_where_nothing_was_saved():
    preview = {"filename": "p.png", "subfolder": "", "type": "temp"}
    saved = {"filename": "s.png", "subfolder": "", "type": "output"}
    only = {"outputs": {"1": {"images": [preview]}}}
    both = {"outputs": {"1": {"images": [preview]}, "2": {"video": [saved]}}}
    assert [file.filename for file in result_files(only)] == ["p.png"]
    assert [file.filename for file in result_files(both)] == ["s.png"]
