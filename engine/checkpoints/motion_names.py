"""Maps AnimateDiff's original names of motion modules to the engine's, which are diffusers'.

Follow-Your-Click stores its whole network under these names; the rest of them are diffusers'
already.
"""

from __future__ import annotations

import re

# What the motion modules call their parts, and what diffusers calls them.
PARTS = (
    (r"attention_blocks\.(\d+)", lambda found: f"attn{int(found[1]) + 1}"),
    (r"\bnorms\.(\d+)", lambda found: f"norm{int(found[1]) + 1}"),
    (r"\bff_norm\b", lambda found: "norm3"),
)
# Sine-cosine positions are stored with their default values and computed here.
POSITIONS = (".pos_encoder.pe", ".pos_embed.pe")


def engine_name(key: str) -> str | None:
    """The engine's name of a stored tensor, or None for one that is computed."""
    # What a distributed training run leaves; the official loader drops it anywhere in a name.
    key = key.replace("module.", "")
    if key.endswith(POSITIONS):
        return None
    head, found, rest = key.partition(".temporal_transformer.")
    if not found:
        return key
    for pattern, name in PARTS:
        rest = re.sub(pattern, name, rest)
    return f"{head}.{rest}"
