"""Nodes that say what the layered generator shall make: prompts, sizes and given layers."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.conditioning.prompts import indexed_prompts
from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Layered"
TASKS = ("foreground", "background", "decompose")


class LayerPrompts(io.ComfyNode):
    """One prompt a layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomLayerPrompts",
            display_name="Layer Prompts",
            category=CATEGORY,
            description=(
                "Encodes the prompts of foreground, background and scene one by one, each with "
                "its index, as layered models read them."
            ),
            search_aliases=["LayerFlow prompts", "layer text encode"],
            essentials_category="LayerLoom",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The starter's CLIP, or T5-XXL from CLIPLoader with type cogvideox.",
                ),
                io.String.Input(
                    "foreground",
                    multiline=True,
                    default="a red circle moving right",
                    tooltip="What the transparent foreground shows.",
                ),
                io.String.Input(
                    "background",
                    multiline=True,
                    default="green stripes",
                    tooltip="What the background shows.",
                ),
                io.String.Input(
                    "blended",
                    multiline=True,
                    default="",
                    tooltip="The whole scene; empty puts it together from the other two.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The prompts of all layers."),
                io.Conditioning.Output("negative", tooltip="No text at all: zeros."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, foreground: str = "-", background: str = "-") -> bool | str:
        for name, text in (("foreground", foreground), ("background", background)):
            if text is not None and not text.strip():
                return f"The {name} prompt is empty; say what the layer shows."
        return True

    @classmethod
    def execute(cls, clip, foreground: str, background: str, blended: str = "") -> io.NodeOutput:
        from .host.conditioning import encode_prompts
        from .host.notices import failure, tell

        texts = indexed_prompts("generate", foreground, background, blended.strip() or None)
        try:
            positive, negative, note = encode_prompts(clip, texts)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        if note:
            tell(cls.hidden.unique_id, note)
        return io.NodeOutput(positive, negative)


def size_inputs(advanced: bool = False) -> list[io.Input]:
    """Width, height and frames; 0 is what the checkpoint was trained on."""
    return [
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=8192,
            step=8,
            advanced=advanced,
            tooltip="Pixels; 0 is the checkpoint's own. Rounded to what the network takes.",
        ),
        io.Int.Input(
            "height",
            default=0,
            min=0,
            max=8192,
            step=8,
            advanced=advanced,
            tooltip="Pixels; 0 is the checkpoint's own. Rounded to what the network takes.",
        ),
        io.Int.Input(
            "frames",
            default=0,
            min=0,
            max=1024,
            advanced=advanced,
            tooltip="Frames a layer, a multiple of 4; 0 is what the checkpoint was trained on.",
        ),
    ]


def batch_input(advanced: bool) -> io.Input:
    """How many clips are made at once."""
    return io.Int.Input(
        "batch_size",
        default=1,
        min=1,
        max=64,
        advanced=advanced,
        tooltip="Layered clips made at once, from different noise.",
    )


class LayeredLatent(io.ComfyNode):
    """An empty latent for all layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomLayeredLatent",
            display_name="Empty Layered Latent",
            category=CATEGORY,
            description="An empty latent that holds all layers of a model, end to end in time.",
            search_aliases=["empty latent layers", "layered video latent"],
            inputs=[
                io.Model.Input("model", tooltip="Says which layers, size and length."),
                *size_inputs(),
                batch_input(advanced=False),
            ],
            outputs=[io.Latent.Output("latent", tooltip="For a sampler, with denoise 1.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        from .host.conditioning import empty_latent
        from .host.loader import layered_settings
        from .host.notices import failure, tell

        try:
            settings = layered_settings(model)
            settings.check_task("generate")
            size = settings.size(width, height)
            latent = empty_latent(settings, settings.frames(frames), size, batch_size)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        for note in settings.notes(width, height, frames):
            tell(cls.hidden.unique_id, note)
        return io.NodeOutput(latent)


class ConditionLayers(io.ComfyNode):
    """Gives a layer: the others are made to fit it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomConditionLayers",
            display_name="Condition on Layers",
            category=CATEGORY,
            description=(
                "Gives one layer to the model. foreground: a background and the scene are made "
                "for it. background: a foreground with alpha and the scene are made on it. "
                "decompose: a scene is taken apart into foreground, alpha and background."
            ),
            search_aliases=["LayerFlow conditioning", "decompose video", "video to layers"],
            essentials_category="LayerLoom",
            inputs=[
                io.Model.Input("model", tooltip="A layered model made for the task."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                io.Conditioning.Input("positive", tooltip="From Layer Prompts."),
                io.Conditioning.Input("negative", tooltip="From Layer Prompts."),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default=TASKS[0],
                    tooltip="Which layer the clip is: foreground, background, or the whole scene.",
                ),
                io.MultiType.Input(
                    "clip",
                    types=[io.Image, io.Video],
                    tooltip="The given layer: a batch of images or a video, resized if need be.",
                ),
                io.Mask.Input(
                    "alpha",
                    optional=True,
                    tooltip=(
                        "Alpha of a given foreground, 1 is opaque; not needed if the clip itself "
                        "is transparent. One mask serves all frames."
                    ),
                ),
                *size_inputs(),
                batch_input(advanced=True),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="With the given layer."),
                io.Conditioning.Output("negative", tooltip="With the given layer."),
                io.Latent.Output("latent", tooltip="For a sampler, with denoise 1."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        negative,
        task: str,
        clip,
        width: int,
        height: int,
        frames: int,
        batch_size: int,
        alpha=None,
    ) -> io.NodeOutput:
        from .host.conditioning import condition, given_latent
        from .host.given import given_layers
        from .host.loader import layered_settings
        from .host.notices import failure, tell

        notes: list[str] = []
        try:
            settings = layered_settings(model)
            settings.check_task(task)
            sequence, size = settings.frames(frames), settings.size(width, height)
            layers = given_layers(task, clip, alpha, sequence, size, notes)
            notes += settings.notes(width, height, frames)
            given, latent = given_latent(settings, vae, layers, sequence, task, size, batch_size)
            conditions = [condition(entry, task, given) for entry in (positive, negative)]
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        if notes:
            tell(cls.hidden.unique_id, " ".join(notes))
        return io.NodeOutput(*conditions, latent)
