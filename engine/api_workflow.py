"""API-format workflows of ComfyUI: their inputs, and what the host says of them, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LayerLoomError

Workflow = dict[str, dict[str, Any]]
Progress = Callable[[int, int, str], None]
Note = Callable[[str], None]

# After these the queue or the history may have changed.
_TURNS = ("status", "execution_success", "execution_error", "execution_interrupted")
_EXPORT = "open the workflow in ComfyUI and choose Export (API) in its menu"
_NAMES_SHOWN = 8


# --- the workflow ---------------------------------------------------------------------------


def read_workflow(path: Path) -> Workflow:
    """The nodes of an API-format file by their ids; LayerLoomError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise LayerLoomError(f"The workflow {path} does not exist; check the path.") from None
    except OSError as error:
        reason = error.strerror or error
        raise LayerLoomError(f"The workflow {path} cannot be read ({reason}).") from error
    except (ValueError, RecursionError) as error:
        raise LayerLoomError(
            f"The workflow {path} is not valid JSON ({one_line(error)}); {_EXPORT}."
        ) from error
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise LayerLoomError(
            f"{path} holds a workflow as the editor saves it, not in API format; {_EXPORT}."
        )
    nodes = list(data.values()) if isinstance(data, dict) else []
    if not any(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise LayerLoomError(f"{path} holds no workflow in API format; {_EXPORT}.")
    for name, node in data.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise LayerLoomError(f"Node {name} of {path} has no class_type; {_EXPORT}.")
        if not isinstance(node.get("inputs"), dict):
            raise LayerLoomError(f"Node {name} of {path} has no inputs; {_EXPORT}.")
        for slot, value in node["inputs"].items():
            if _is_link(value) and value[0] not in data:
                raise LayerLoomError(
                    f"{node_name(data, name)} takes its input {slot} from node {value[0]}, which"
                    f" is not in {path}; {_EXPORT}."
                )
    return data


def node_name(workflow: Workflow, node_id: str) -> str:
    """A node for a person: 'node 3 "My sampler" (KSampler)'."""
    node = workflow.get(str(node_id))
    if node is None:
        return f"node {node_id}"
    kind, title = node["class_type"], _title(node)
    return (
        f'node {node_id} "{title}" ({kind})'
        if title not in (None, kind)
        else (f"node {node_id} ({kind})")
    )


def find_input(workflow: Workflow, target: str, option: str) -> tuple[str, str]:
    """Node id and input name that NODE.INPUT means.

    NODE is an id, or a title or a class that one node alone has; ids win over titles, titles
    over classes. Titles and inputs may have dots in them.
    Errors: LayerLoomError for an unknown or ambiguous node, an unknown input, a link.
    """
    splits = [(target[: dot.start()], target[dot.end() :]) for dot in re.finditer(r"\.", target)]
    found = [(nodes, slot) for node, slot in splits if (nodes := _matches(workflow, node))]
    if not found:
        names = listing(node_name(workflow, node_id) for node_id in workflow)
        wanted = f"no node {splits[0][0]!r}" if splits else f"no dot in {target!r}"
        raise LayerLoomError(f"{option} {target}: there is {wanted}; the workflow has {names}.")
    known = [
        (nodes, slot)
        for nodes, slot in found
        if any(slot in workflow[node_id]["inputs"] for node_id in nodes)
    ]
    nodes, slot = (known or found)[0]
    if len(nodes) > 1:
        raise LayerLoomError(
            f"{option} {target} fits {listing(node_name(workflow, name) for name in nodes)};"
            " give the id of the node."
        )
    node_id, inputs = nodes[0], workflow[nodes[0]]["inputs"]
    free = [name for name, value in inputs.items() if not _is_link(value)]
    if slot not in inputs:
        raise LayerLoomError(
            f"{option} {target}: {node_name(workflow, node_id)} has no input {slot!r}; it has"
            f" {listing(free) or 'none to set'}."
        )
    if slot not in free:
        source = node_name(workflow, inputs[slot][0])
        raise LayerLoomError(
            f"{option} {target}: that input of {node_name(workflow, node_id)} is linked to"
            f" {source} and has no value of its own; set an input of {source}."
        )
    return node_id, slot


def set_input(workflow: Workflow, setting: str, option: str = "--set") -> None:
    """Apply NODE.INPUT=VALUE; VALUE is JSON where it is JSON, else text.

    An input that holds text stays text: 5 is the word "5" there, and quotes are taken off.
    """
    target, equals, text = setting.partition("=")
    if not equals:
        raise LayerLoomError(f"{option} {setting} has no '='; write {option} NODE.INPUT=VALUE.")
    node_id, slot = find_input(workflow, target, option)
    inputs = workflow[node_id]["inputs"]
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = text
    if isinstance(inputs[slot], str) and not isinstance(value, str):
        value = text
    # A bare list would be read as a link.
    inputs[slot] = {"__value__": value} if isinstance(value, list) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _matches(workflow: Workflow, name: str) -> list[str]:
    if name in workflow:
        return [name]
    titled = [node_id for node_id, node in workflow.items() if _title(node) == name]
    return titled or [key for key, node in workflow.items() if node["class_type"] == name]


def _title(node: Mapping[str, Any]) -> str | None:
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
    )


def listing(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def one_line(text: object, longest: int = 600) -> str:
    line = " ".join(str(text).split()).rstrip(".")
    return line if len(line) <= longest else line[:longest] + "..."


# --- what the server says -------------------------------------------------------------------


def refusal(answer: Any, workflow: Workflow) -> str:
    """The host's validation errors in words, without a full stop; "" if there are none."""
    answer = answer if isinstance(answer, dict) else {}
    told = [
        f"{node_name(workflow, node_id)}, {text}"
        for node_id, found in (answer.get("node_errors") or {}).items()
        for text in _node_errors(found.get("errors", []), workflow)
    ]
    error = answer.get("error")
    if not told and error:
        told = [_whole_error(error, workflow) if isinstance(error, dict) else one_line(error)]
    return "; ".join(told)


def _node_errors(errors: Iterable[Mapping[str, Any]], workflow: Workflow) -> list[str]:
    """What is wrong with a node, the inputs that share a fault told together."""
    inputs: dict[str, list[str]] = {}
    whole = set()
    for error in errors:
        slot = (error.get("extra_info") or {}).get("input_name")
        reason = _input_error(error, slot, workflow)
        inputs.setdefault(reason, []).extend([slot] if slot else [])
        if error.get("type") == "custom_validation_failed":
            whole.add(reason)
    told = []
    for reason, slots in inputs.items():
        # The host repeats what a node's own check says for each input the check looks at.
        if not slots or (reason in whole and len(slots) > 1):
            told.append(reason)
        else:
            told.append(f"input{'s' * (len(slots) > 1)} {', '.join(slots)}: {reason}")
    return told


def _input_error(error: Mapping[str, Any], slot: str | None, workflow: Workflow) -> str:
    info = error.get("extra_info") or {}
    given = info.get("received_value")
    wanted, config = info.get("input_config") or ("another type", {})
    message, details = one_line(error.get("message", "")), one_line(error.get("details", ""))
    # The host starts its details with the input's name.
    said = re.sub(rf"^{re.escape(slot)}\b(?: -|[:,])?\s*", "", details) if slot else details
    kind = error.get("type")
    if kind == "required_input_missing":
        return "missing"
    if kind == "return_type_mismatch" and _is_link(info.get("linked_node")):
        source = node_name(workflow, info["linked_node"][0])
        return f"takes {wanted} but {source} gives {info.get('received_type')}"
    if kind == "value_smaller_than_min" and "min" in config:
        return f"{given} is below the least, {config['min']}"
    if kind == "value_bigger_than_max" and "max" in config:
        return f"{given} is above the greatest, {config['max']}"
    if kind == "invalid_input_type":
        return f"{given!r} is not a value of type {wanted}"
    if kind == "value_not_in_list":
        said = re.sub(r"(?<=') not in \(list of length (\d+)\)$", r" not in its \1 choices", said)
        return re.sub(r"(?<=') not in ", " is not one of ", said, count=1)
    if kind == "custom_validation_failed":
        return said or "the node refuses the value"
    return (message or "not valid") + (f" ({said})" if said else "")


def _whole_error(error: Mapping[str, Any], workflow: Workflow) -> str:
    info = error.get("extra_info") or {}
    if error.get("type") == "missing_node_type":
        name = node_name(workflow, info.get("node_id"))
        return f"{name} is of a class the server does not have; install the nodes it belongs to"
    if error.get("type") == "prompt_no_outputs":
        return "it has no output node; add one that saves or shows something, such as Save Image"
    message, details = one_line(error.get("message", "")), one_line(error.get("details", ""))
    return ": ".join(part for part in (message, details) if part) or "no reason was given"


def failure(entry: Mapping[str, Any], workflow: Workflow) -> str | None:
    """What went wrong in a finished prompt, in one sentence; None if nothing did.

    entry: the prompt's part of the host's history.
    """
    status = entry.get("status") or {}
    messages = {kind: data for kind, data in status.get("messages") or []}
    if "execution_interrupted" in messages:
        return "The prompt was interrupted on the server before it was done; submit it again."
    if "execution_error" in messages:
        return _failed_node(messages["execution_error"], workflow)
    if status.get("status_str") == "error":
        return "The server stopped the prompt and gave no reason; its log may tell."
    return None


def _failed_node(data: Mapping[str, Any], workflow: Workflow) -> str:
    name = node_name(workflow, data.get("node_id"))
    said = one_line(data.get("exception_message") or data.get("exception_type") or "no reason")
    return f"{name[0].upper()}{name[1:]} failed on the server: {said}."


class Tracker:
    """Turns the host's messages about one prompt into steps of a progress bar.

    While a node reports its own steps the bar counts those, else the nodes that are done.
    """

    def __init__(self, workflow: Workflow, prompt_id: str, progress: Progress, note: Note):
        self.workflow, self.prompt_id = workflow, prompt_id
        self.progress, self.note = progress, note
        self.done: set[str] = set()
        self.node: str | None = None
        self.blocked: str | None = None

    def take(self, message: Any) -> bool:
        """Take in a message; True if the prompt may have ended or changed its place."""
        kind = message.get("type") if isinstance(message, dict) else None
        data = message.get("data") if kind else None
        if not isinstance(data, dict):
            return False
        if kind == "status":
            if self.node is None and not self.done:
                waiting = ((data.get("status") or {}).get("exec_info") or {}).get("queue_remaining")
                self._show_nodes(f"Waiting ({waiting} in the queue)" if waiting else "Waiting")
            return True
        if data.get("prompt_id") != self.prompt_id:
            return False
        if kind == "execution_start":
            self._show_nodes("Starting")
        elif kind == "execution_cached":
            self.done.update(map(str, data.get("nodes") or []))
        elif kind == "executing" and data.get("node") is None:
            return True
        elif kind == "executing":
            if self.node is not None:
                self.done.add(self.node)
            self.node = str(data.get("display_node") or data["node"])
            self._show_nodes(self._node_title(self.node))
        elif kind == "executed":
            self.done.add(str(data.get("display_node") or data.get("node")))
        elif kind == "progress":
            self._show_steps(str(data.get("node")), data)
        elif kind == "progress_state":
            for name, state in (data.get("nodes") or {}).items():
                if state.get("state") == "finished":
                    self.done.add(str(name))
                elif state.get("state") == "running":
                    self._show_steps(str(state.get("display_node_id") or name), state)
        elif kind == "execution_error" and data.get("exception_type") == "ExecutionBlocked":
            # The host goes on with the other nodes, and its history says nothing of it.
            self.blocked = _failed_node(data, self.workflow)
            self.note(self.blocked)
        return kind in _TURNS

    def _show_nodes(self, title: str) -> None:
        self.progress(len(self.done & self.workflow.keys()), len(self.workflow), title)

    def _show_steps(self, node: str, state: Mapping[str, Any]) -> None:
        step, steps = state.get("value"), state.get("max")
        # One step of one is what a node without steps reports.
        if isinstance(step, int | float) and isinstance(steps, int | float) and steps > 1:
            self.progress(int(step), int(steps), self._node_title(node))

    def _node_title(self, node_id: str) -> str:
        node = self.workflow.get(node_id)
        return one_line(_title(node) or node["class_type"], 40) if node else f"Node {node_id}"


# --- results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultFile:
    """A file in the server's folders; type: output, temp or input."""

    filename: str
    subfolder: str
    type: str


def result_files(entry: Mapping[str, Any]) -> list[ResultFile]:
    """Every file that the output nodes of a finished prompt name, each once, in their order.

    Previews, which the host keeps for a while only, count where nothing was saved.
    """
    files: dict[ResultFile, None] = {}
    for output in (entry.get("outputs") or {}).values():
        for items in output.values() if isinstance(output, dict) else ():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict) and isinstance(item.get("filename"), str):
                    subfolder, kind = item.get("subfolder") or "", item.get("type") or "output"
                    files[ResultFile(item["filename"], str(subfolder), str(kind))] = None
    return [file for file in files if file.type != "temp"] or list(files)


def safe_name(name: str) -> str:
    """The last part of a path as a file name that every system takes and that hides nothing."""
    name = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", re.split(r"[\\/]", name)[-1])
    return name.lstrip(".").rstrip(". ") or "file"


def local_names(files: Sequence[ResultFile], folder: Path) -> list[str]:
    """A name of its own in `folder` for each file; a folder of that name is left alone."""
    taken: set[str] = set()
    names = []
    for file in files:
        wanted = Path(safe_name(file.filename))
        name, number = wanted.name, 2
        while name.lower() in taken or (folder / name).is_dir():
            name, number = f"{wanted.stem}_{number}{wanted.suffix}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names
