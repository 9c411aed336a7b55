"""Maps the published checkpoints' tensor names to the engine's, without reading a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .reader import TensorSpec, TensorStore

# Weights of other networks that a training run may have left in the same file.
IGNORED_PREFIXES = ("conditioner.", "first_stage_model.")
PART_NAMES = ("vae", "text_encoder")

# LayerFlow's SAT names (SwissArmyTransformer) outside the blocks.
SAT_MODULES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.pos_embed.txt_embedder.0": "layer_embedding.proj",
    "mixins.pos_embed.txt_embedder.1": "layer_embedding.norm",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "transformer.final_layernorm": "norm_final",
}
SAT_POSITIONS = "mixins.pos_embed.pos_embedding"
SAT_MARK = "mixins.patch_embed.proj.weight"
POSITIONS = "patch_embed.pos_embedding"

# Inside block N: SAT module -> ((engine module, rows taken, equal parts the rows come in), ...).
# The 12 AdaLN parts are shift, scale, gate of attention and MLP for video, then for text;
# diffusers keeps attention and MLP apart.
SAT_BLOCK = {
    r"mixins\.adaln_layer\.adaLN_modulations\.(\d+)\.1": (
        ("norm1.linear", (0, 1, 2, 6, 7, 8), 12),
        ("norm2.linear", (3, 4, 5, 9, 10, 11), 12),
    ),
    r"mixins\.adaln_layer\.query_layernorm_list\.(\d+)": (("attn1.norm_q", (0,), 1),),
    r"mixins\.adaln_layer\.key_layernorm_list\.(\d+)": (("attn1.norm_k", (0,), 1),),
    r"transformer\.layers\.(\d+)\.input_layernorm": (("norm1.norm", (0,), 1),),
    r"transformer\.layers\.(\d+)\.post_attention_layernorm": (("norm2.norm", (0,), 1),),
    r"transformer\.layers\.(\d+)\.attention\.query_key_value(?:\.original)?": (
        ("attn1.to_q", (0,), 3),
        ("attn1.to_k", (1,), 3),
        ("attn1.to_v", (2,), 3),
    ),
    r"transformer\.layers\.(\d+)\.attention\.dense(?:\.original)?": (("attn1.to_out.0", (0,), 1),),
    r"transformer\.layers\.(\d+)\.mlp\.dense_h_to_4h": (("ff.net.0.proj", (0,), 1),),
    r"transformer\.layers\.(\d+)\.mlp\.dense_4h_to_h": (("ff.net.2", (0,), 1),),
}
SAT_LORA = re.compile(
    r"transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([ABCD])\.(\d)"
)
SAT_LORA_TARGETS = {
    "query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "dense": ("attn1.to_out.0",),
}
# Which adapter a matrix belongs to, and which half of it: y += scale / rank * B(A(x)).
SAT_LORA_MATRICES = {
    "A": ("motion", "A"),
    "B": ("motion", "B"),
    "C": ("content", "A"),
    "D": ("content", "B"),
}


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor comes from: rows of a stored one, cut into ``of`` equal parts.

    ``form`` is "" for a tensor as it is, "matrix" for a pointwise convolution's weight
    [out, in, 1, ...] taken as a linear layer's [out, in], "transposed" for [in, out].
    """

    key: str
    pieces: tuple[int, ...] = (0,)
    of: int = 1
    form: str = ""

    def spec(self, store: TensorStore) -> TensorSpec:
        """Shape and type of the tensor this makes."""
        spec = store.specs[self.key]
        if self.form == "transposed":
            return TensorSpec(spec.shape[::-1], spec.dtype)
        if self.form == "matrix":
            ones = spec.shape[2:] == (1,) * (len(spec.shape) - 2)
            return TensorSpec(spec.shape[:2], spec.dtype) if ones else spec
        if self.of == 1:
            return spec
        rows = spec.shape[0] // self.of * len(self.pieces)
        return TensorSpec((rows, *spec.shape[1:]), spec.dtype)

    def read(self, store: TensorStore) -> torch.Tensor:
        """The tensor; it may share memory with the file."""
        tensor = store.read(self.key)
        if self.form:
            tensor = tensor.T if self.form == "transposed" else tensor.flatten(1)
            return tensor.contiguous()
        if self.of == 1:
            return tensor
        parts = tensor.chunk(self.of)
        chosen = [parts[i] for i in self.pieces]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


AdapterSources = dict[str, dict[str, TensorSource]]


@dataclass
class Plan:
    """Engine names to stored tensors, for everything a file holds.

    Attributes:
        transformer: parameter name -> source.
        adapters: adapter name -> module path -> {"A": source, "B": source}.
        parts: "vae" / "text_encoder" -> parameter name -> source.
        left_over: stored names that nothing in the engine takes.
    """

    transformer: dict[str, TensorSource] = field(default_factory=dict)
    adapters: dict[str, AdapterSources] = field(default_factory=dict)
    parts: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)

    def add_adapter(self, name: str, module: str, half: str, source: TensorSource) -> None:
        """Note one half ("A" or "B") of an adapter's pair for a module."""
        self.adapters.setdefault(name, {}).setdefault(module, {})[half] = source


def sat_prefix(keys: Iterable[str]) -> str | None:
    """What stands before the transformer's SAT names, or None when there is no such network."""
    for key in keys:
        if key.endswith(SAT_MARK) and not key.startswith(IGNORED_PREFIXES):
            return key.removesuffix(SAT_MARK)
    return None


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether these are a CogVideoX transformer's names in diffusers."""
    wanted = {
        "patch_embed.text_proj.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "transformer_blocks.0.attn1.norm_q.weight",
        "norm_out.linear.weight",
        "proj_out.weight",
    }
    return wanted <= set(keys)


def plan_sat(keys: Iterable[str], prefix: str) -> Plan:
    """Plan for LayerFlow's (or CogVideoX-2B's) SAT names; keys outside ``prefix`` are ignored."""
    plan = Plan()
    for key in keys:
        if key.startswith(prefix) and not key.startswith(IGNORED_PREFIXES):
            if not _plan_sat_key(plan, key, key.removeprefix(prefix)):
                plan.left_over.append(key)
    return plan


def _plan_sat_key(plan: Plan, key: str, name: str) -> bool:
    if name == SAT_POSITIONS:
        plan.transformer[POSITIONS] = TensorSource(key)
        return True
    if lora := SAT_LORA.fullmatch(name):
        block, kind, matrix, index = lora.groups()
        targets = SAT_LORA_TARGETS[kind]
        if int(index) >= len(targets):
            return False
        adapter, half = SAT_LORA_MATRICES[matrix]
        module = f"transformer_blocks.{int(block)}.{targets[int(index)]}"
        plan.add_adapter(adapter, module, half, TensorSource(key))
        return True
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return False
    if module in SAT_MODULES:
        plan.transformer[f"{SAT_MODULES[module]}.{kind}"] = TensorSource(key)
        return True
    for pattern, targets in SAT_BLOCK.items():
        if found := re.fullmatch(pattern, module):
            for target, pieces, of in targets:
                engine = f"transformer_blocks.{int(found[1])}.{target}.{kind}"
                plan.transformer[engine] = TensorSource(key, pieces, of)
            return True
    return False


def plan_diffusers(keys: Iterable[str]) -> Plan:
    """Plan for diffusers' CogVideoX names, which are the engine's own."""
    return Plan(transformer={key: TensorSource(key) for key in keys})


def plan_own(keys: Iterable[str]) -> Plan:
    """Plan for LayerLoom's own files: ``transformer.``, ``adapters.`` and one prefix a part."""
    plan = Plan()
    adapter = re.compile(r"adapters\.([^.]+)\.(.+)\.lora_([AB])\.weight")
    for key in keys:
        head, _, rest = key.partition(".")
        if head == "transformer":
            plan.transformer[rest] = TensorSource(key)
        elif found := adapter.fullmatch(key):
            plan.add_adapter(*found.groups(), TensorSource(key))
        elif head in PART_NAMES:
            plan.parts.setdefault(head, {})[rest] = TensorSource(key)
        else:
            plan.left_over.append(key)
    return plan


def adapter_key(adapter: str, module: str, half: str) -> str:
    """Name of one half of an adapter's pair in LayerLoom's own files."""
    return f"adapters.{adapter}.{module}.lora_{half}.weight"
