"""Nodes of adapters: switches for a checkpoint's own, and further ones from files."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.checkpoints.lora import EXTRA_RANGE, OWN_RANGE
from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Adapters"


class LoraToggles(io.ComfyNode):
    """Motion and content adapters as switches, as weight patches of the host."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        low, high = OWN_RANGE
        return io.Schema(
            node_id="LayerLoomLoraToggles",
            display_name="Adapter Toggles (LoRA)",
            category=CATEGORY,
            description=(
                "Switches the adapters of a layered checkpoint on and off and adds further ones. "
                "Steps take no longer, and the file stays as it is. LayerFlow generates with "
                "motion off and content on."
            ),
            search_aliases=["LayerFlow LoRA", "motion LoRA", "content LoRA", "lora toggle"],
            essentials_category="LayerLoom",
            inputs=[
                io.Model.Input("model", tooltip="A layered model, with its own adapters or none."),
                io.Boolean.Input(
                    "motion",
                    default=False,
                    label_on="on",
                    label_off="off",
                    tooltip=(
                        "The adapter trained on still clips: on, clips stand still; off, they move."
                    ),
                ),
                io.Float.Input(
                    "motion_strength",
                    default=1.0,
                    min=low,
                    max=high,
                    step=0.05,
                    tooltip=(
                        "1 stands still, 0 is as without it; below 0 and above 1 it goes beyond "
                        "what it was trained for."
                    ),
                ),
                io.Boolean.Input(
                    "content",
                    default=True,
                    label_on="on",
                    label_off="off",
                    tooltip=(
                        "The adapter trained on layered images: on, mattes and colours are better."
                    ),
                ),
                io.Float.Input(
                    "content_strength",
                    default=1.0,
                    min=low,
                    max=high,
                    step=0.05,
                    tooltip="1 is what the checkpoint was made for.",
                ),
                io.Autogrow.Input(
                    "adapters",
                    template=io.Autogrow.TemplatePrefix(
                        input=io.LoraModel.Input("adapter", tooltip="A further adapter."),
                        prefix="adapter_",
                        min=0,
                        max=8,
                    ),
                    optional=True,
                    tooltip=(
                        "Further adapters, added to the others: from Load Adapter, or fresh from "
                        "training. A free slot appears as you connect them."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with the adapters as chosen.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        motion: bool,
        motion_strength: float,
        content: bool,
        content_strength: float,
        adapters: io.Autogrow.Type | None = None,
    ) -> io.NodeOutput:
        from .host.loader import layered_settings
        from .host.lora import add_extra, toggled
        from .host.notices import failure, tell

        strengths = {}
        if motion:
            strengths["motion"] = motion_strength
        try:
            settings = layered_settings(model)
            if content and "content" in model.model.adapters:
                strengths["content"] = content_strength
            elif content:
                # On by default, so no mistake: checkpoints of the first stage have none yet.
                note = f"{settings.name} has no content adapter; that switch does nothing."
                tell(cls.hidden.unique_id, note)
            model = toggled(model, strengths)
            for slot, tensors in (adapters or {}).items():
                if tensors is not None:
                    add_extra(model, tensors, slot.rpartition(".")[2])
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        return io.NodeOutput(model)


class LoadLora(io.ComfyNode):
    """An adapter file at a strength, as the host's LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from .host.lora import NONE, list_loras

        low, high = EXTRA_RANGE
        return io.Schema(
            node_id="LayerLoomLoadLora",
            display_name="Load Adapter (LoRA)",
            category=CATEGORY,
            description=(
                "Reads an adapter for a layered model from models/loras: LayerLoom's own, or one "
                "in the names of diffusers, PEFT, kohya or ComfyUI. Connect it to Adapter Toggles."
            ),
            search_aliases=["load lora", "layered lora", "LORA_MODEL"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=list_loras(),
                    default=NONE,
                    tooltip="A file in models/loras; [None] adds nothing.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=low,
                    max=high,
                    step=0.05,
                    tooltip="How strongly it changes the model; 0 is off, below 0 the reverse.",
                ),
            ],
            outputs=[io.LoraModel.Output("lora", tooltip="The adapter, its strength inside.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str, strength: float) -> str:
        from .host.lora import find_lora

        path = find_lora(adapter)
        return f"{path}:{path.stat().st_mtime_ns if path else 0}:{strength}"

    @classmethod
    def execute(cls, adapter: str, strength: float) -> io.NodeOutput:
        from .host.lora import lora_model
        from .host.notices import failure

        try:
            tensors = lora_model(adapter, strength)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        return io.NodeOutput(tensors)
