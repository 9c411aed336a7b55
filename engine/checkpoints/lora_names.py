"""Maps the names that adapter files use for weights to the engine's modules."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .names import SAT_BLOCK, SAT_MODULES

# Linear modules of the layered transformer; convolutions and norms take no low-rank pair.
BLOCK_MODULES = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
)
OTHER_MODULES = (
    "patch_embed.text_proj",
    "layer_embedding.proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "norm_out.linear",
    "proj_out",
)
# What trainers and hosts put in front: PEFT, the host, diffusers (pipelines and older ones).
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
)
# The same in names whose dots became underscores (kohya's scripts, OneTrainer).
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
# How the halves of a pair end: A goes down to the rank, B comes back up. PEFT may put the
# adapter's name before "weight"; older diffusers files write "_lora" onto the module.
HALVES = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.(?!weight$)[^.]+)?"
    r"|[._]lora[._](?P<way>down|up)"
    r"|\.lora_linear_layer\.(?P<linear>down|up))"
    r"(?:\.weight)?"
)
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_FLAT_BLOCK = re.compile(r"transformer_blocks_(\d+)_(.+)")
_FLAT_MODULES = {name.replace(".", "_"): name for name in BLOCK_MODULES}
_FLAT_OTHERS = {name.replace(".", "_"): name for name in OTHER_MODULES}


@dataclass(frozen=True)
class Target:
    """An engine module, and which of ``of`` equal row blocks of B are its own (fused q, k, v)."""

    module: str
    pieces: tuple[int, ...] = (0,)
    of: int = 1


def split_key(key: str) -> tuple[str, str] | None:
    """A stored name as (module as the file calls it, "A" | "B" | "alpha"), or None."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    found = HALVES.fullmatch(key)
    if found is None:
        return None
    if found["peft"]:
        return found["module"], found["peft"]
    return found["module"], "A" if (found["way"] or found["linear"]) == "down" else "B"


def targets_for(name: str) -> tuple[Target, ...]:
    """The engine modules that a file's name for a module stands for; empty when there is none."""
    for candidate in _without_prefixes(name):
        if found := _dotted(candidate) or _sat(candidate):
            return found
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            return _flat(name.removeprefix(prefix))
    return ()


def flat_name(module: str) -> str:
    """An engine module's path with underscores for dots."""
    return module.replace(".", "_")


def _without_prefixes(name: str):
    """The name, then the name with one prefix after the other taken off."""
    yield name
    stripped = True
    while stripped:
        stripped = next((name[len(p) :] for p in PREFIXES if name.startswith(p)), None)
        if stripped:
            name = stripped
            yield name


def _dotted(name: str) -> tuple[Target, ...]:
    if name in OTHER_MODULES:
        return (Target(name),)
    found = _BLOCK.fullmatch(name)
    if found is None:
        return ()
    # Older diffusers files leave the index of the output projection out, or add "processor".
    inner = found[2].replace(".processor.", ".")
    inner = "attn1.to_out.0" if inner == "attn1.to_out" else inner
    if inner not in BLOCK_MODULES:
        return ()
    return (Target(f"transformer_blocks.{int(found[1])}.{inner}"),)


def _flat(name: str) -> tuple[Target, ...]:
    if name in _FLAT_OTHERS:
        return (Target(_FLAT_OTHERS[name]),)
    found = _FLAT_BLOCK.fullmatch(name)
    inner = _FLAT_MODULES.get(found[2]) if found else None
    return (Target(f"transformer_blocks.{int(found[1])}.{inner}"),) if inner else ()


def _sat(name: str) -> tuple[Target, ...]:
    """LayerFlow's own (SAT) names, whose fused matrices stand for several modules."""
    module = SAT_MODULES.get(name)
    if module in OTHER_MODULES:
        return (Target(module),)
    for pattern, parts in SAT_BLOCK.items():
        if found := re.fullmatch(pattern, name):
            return tuple(
                Target(f"transformer_blocks.{int(found[1])}.{part}", pieces, of)
                for part, pieces, of in parts
                if part in BLOCK_MODULES
            )
    return ()
