"""Reads captions.jsonl: one JSON object a line, naming a sample and saying what each layer shows.

``{"sample": "clips/dog", "foreground": "a dog runs", "background": "a park", "blended": "..."}``;
a text may be a list of paraphrases, of which one is drawn each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...conditioning.prompts import blended_prompt
from .problems import Problem

FILE = "captions.jsonl"
TEXTS = ("foreground", "background", "blended")


@dataclass(frozen=True)
class Caption:
    """A line's texts: layer name -> paraphrases, at least one each; and the line's number."""

    texts: Mapping[str, tuple[str, ...]]
    line: int = 0


def read_captions(
    folder: Path, texts: Sequence[str] = TEXTS
) -> tuple[dict[str, Caption], list[Problem]]:
    """The captions by the sample names they are written with, and every fault in the file.

    texts: the keys that a line may have beside "sample".
    """
    found: dict[str, Caption] = {}
    problems: list[Problem] = []
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        text = f'is missing; write one line a sample: {{"sample": "clips/dog", "{texts[0]}": ...}}'
        return found, [Problem(FILE, text)]
    except OSError as error:
        return found, [Problem(FILE, f"cannot be read ({error.strerror}); check its permissions")]
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        name, caption, faults = _read_line(line, number, texts)
        problems += [Problem(FILE, fault, number) for fault in faults]
        if name is None or caption is None:
            continue
        if name in found:
            fault = f"{name} has a caption in line {found[name].line} already; keep one of them"
            problems.append(Problem(FILE, fault, number))
        else:
            found[name] = caption
    return found, problems


def _read_line(
    line: bytes, number: int, known: Sequence[str]
) -> tuple[str | None, Caption | None, list[str]]:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None, None, ["is not UTF-8 text; save the file as UTF-8"]
    except json.JSONDecodeError as error:
        fault = f"is not JSON ({error.msg} at column {error.colno}); write one object a line"
        return None, None, [fault]
    except RecursionError:
        return None, None, ["is nested too deeply; write one object a line"]
    if not isinstance(entry, dict):
        return None, None, [f'is not an object; write {{"sample": ..., "{known[0]}": ...}}']
    faults = [
        f"has the unknown key {key!r}; known are {', '.join(('sample', *known))}"
        for key in entry
        if key not in ("sample", *known)
    ]
    texts: dict[str, tuple[str, ...]] = {}
    for key in known:
        if key not in entry:
            continue
        wordings = entry[key] if isinstance(entry[key], list) else [entry[key]]
        if not wordings or not all(isinstance(w, str) and w.strip() for w in wordings):
            faults.append(f"its {key!r} is no text; write what the layer shows, or leave it out")
        else:
            texts[key] = tuple(w.strip() for w in wordings)
    name = entry.get("sample")
    if not isinstance(name, str) or not _normal(name):
        return None, None, [*faults, 'names no sample; add "sample": "clips/...", say']
    return _normal(name), Caption(texts, number), faults


def _normal(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./").strip("/")


def match_captions(
    captions: Mapping[str, Caption],
    names: Sequence[str],
    needs: Mapping[str, tuple[str, ...]],
    left_out: Sequence[str] = (),
) -> tuple[dict[str, Caption], list[Problem]]:
    """Each sample's caption, found by its name with or without folder and suffix, and the faults.

    names: samples such as "clips/dog" or "mattes/cat.png". needs: kind ("clips") -> the texts
    that a sample of it cannot do without. left_out: samples whose captions do not matter.
    """
    aliases: dict[str, list[str]] = {}
    for name in (*names, *left_out):
        kind, short = name.split("/", 1)
        stem = short.rsplit(".", 1)[0]
        for alias in {name, short, stem, f"{kind}/{stem}"}:
            aliases.setdefault(alias, []).append(name)
    found: dict[str, Caption] = {}
    problems: list[Problem] = []
    for written, caption in captions.items():
        owners = aliases.get(written, [])
        # A full name is meant even where another sample's short name reads the same.
        owners = [written] if written in owners else owners
        if not owners:
            fault = f"there is no sample {written}; correct the name or remove the line"
        elif len(owners) > 1:
            fault = f"{written} may be {' or '.join(sorted(owners))}; write the whole name"
        elif owners[0] in left_out:
            continue
        elif owners[0] in found:
            other = found[owners[0]].line
            fault = f"{owners[0]} has a caption in line {other} already; keep one of them"
        else:
            found[owners[0]] = caption
            continue
        problems.append(Problem(FILE, fault, caption.line))
    for name in names:
        needed = needs[name.split("/", 1)[0]]
        if name not in found:
            keys = " and ".join(f'"{key}"' for key in needed)
            problems.append(Problem(name, f"has no caption; add a line with {keys} to {FILE}"))
            continue
        for key in needed:
            if key not in found[name].texts:
                fault = f'the caption of {name} has no "{key}"; say what that layer shows'
                problems.append(Problem(FILE, fault, found[name].line))
    return found, problems


def worded(texts: Mapping[str, tuple[str, ...]], seed: int | None = None) -> tuple[str, str, str]:
    """The (foreground, background, blended) prompts, of paraphrases one each; None: the first.

    Without a blended text the scene is put together from the other two.
    """
    rng = None if seed is None else random.Random(seed)

    def choose(key: str) -> str:
        wordings = texts[key]
        return wordings[0] if rng is None else rng.choice(wordings)

    foreground, background = choose("foreground"), choose("background")
    if "blended" in texts:
        return foreground, background, choose("blended")
    return foreground, background, blended_prompt(foreground, background)
