"""Prompts of the layers: their index prefixes and what a missing scene prompt becomes."""

from __future__ import annotations


def blended_prompt(foreground: str, background: str) -> str:
    """The scene prompt used when none is given."""
    return f"{foreground} over {background}"


def indexed_prompts(
    task: str, foreground: str, background: str, blended: str | None = None
) -> list[str]:
    """The texts to encode: ``"0, <fg>"``, ``"1, <bg>"``, ``"2, <blended>"``.

    Without layer embedding the index is all that tells the prompts apart (LayerFlow), so it is
    always there. Decomposition has no scene prompt.
    """
    texts = [foreground, background]
    if task != "decompose":
        texts.append(blended or blended_prompt(foreground, background))
    return [f"{index}, {text.strip()}" for index, text in enumerate(texts)]
