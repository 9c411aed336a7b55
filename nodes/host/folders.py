"""The host's output and temporary folders, its file names, and what it embeds in files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import LayerLoomError


@dataclass(frozen=True)
class SavePath:
    """Where files of one save go: `stem` carries the host's running number.

    subfolder: of `folder` inside the output folder, as the host's messages name it.
    """

    folder: Path
    stem: str
    subfolder: str

    def subfolder_of(self, file: Path) -> str:
        """The subfolder of a file at or below `folder`."""
        inner = (Path(self.subfolder) / file.parent.relative_to(self.folder)).as_posix()
        return "" if inner == "." else inner


def check_prefix(prefix: str) -> str | None:
    """A sentence saying why a file name prefix cannot be used, or None."""
    name = os.path.normpath(prefix) if prefix.strip() else ""
    if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
        return f"The prefix {prefix} leads out of the output folder; give a name inside it."
    if not name or name == os.curdir:
        return "The file name prefix is empty; give a name such as layers/LayerLoom."
    return None


def save_path(prefix: str, width: int, height: int) -> SavePath:
    """The next free place in the output folder, by the host's naming rules.

    Errors: LayerLoomError for a prefix that leads out of it or through a file.
    """
    import folder_paths

    problem = check_prefix(prefix)
    if problem:
        raise LayerLoomError(problem)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    except OSError as error:
        raise LayerLoomError(
            f"The folder of {prefix} cannot be made ({error.strerror}); choose another prefix."
        ) from error
    except Exception as error:
        # The host has no exception of its own for this; links can lead out, too.
        raise LayerLoomError(
            f"The prefix {prefix} leads out of the output folder; give a name inside it."
        ) from error
    return SavePath(Path(folder), f"{name}_{counter:05}", subfolder)


def temp_folder() -> Path:
    """The host's folder for previews, emptied when it starts."""
    import folder_paths

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def workflow_metadata(prompt: object, extra: Mapping[str, object] | None) -> dict[str, str]:
    """What the host embeds in files: the prompt and the workflow as JSON; nothing if disabled."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    texts = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return {**texts, **{key: json.dumps(value) for key, value in (extra or {}).items()}}
