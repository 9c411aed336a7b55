"""Nodes that say how a clip follows its picture and its prompt (DynamiCrafter)."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Animate"


class DualStreamGuider(io.ComfyNode):
    """Image and text pull apart, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomDualStreamGuider",
            display_name="Dual Stream Guider",
            category=CATEGORY,
            description=(
                "Guidance for SamplerCustomAdvanced with a scale for the text and one for the "
                "image: more image keeps the picture, more text obeys the prompt. Equal scales "
                "are plain guidance and cost two forwards a step; others cost three."
            ),
            search_aliases=["DynamiCrafter guidance", "multi condition cfg", "image cfg"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Animator."),
                io.Conditioning.Input("positive", tooltip="From Animate Image."),
                io.Conditioning.Input("image_only", tooltip="From Animate Image."),
                io.Conditioning.Input("negative", tooltip="From Animate Image."),
                io.Float.Input(
                    "text_scale",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=(
                        "How strongly the prompt pulls: 7.5 as published, 4 for the starter, 1 "
                        "for none."
                    ),
                ),
                io.Float.Input(
                    "image_scale",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the picture pulls; as the text as published, 1 for none.",
                ),
                io.Float.Input(
                    "rescale",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Pulls contrast back to that of the unguided prediction: 0.7 as published "
                        "for 512 and 1024, 0 for 256 and the starter."
                    ),
                ),
            ],
            outputs=[io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        image_only,
        negative,
        text_scale: float,
        image_scale: float,
        rescale: float,
    ) -> io.NodeOutput:
        from ..engine.sampling.streams import StreamGuidance
        from .host.notices import failure
        from .host.video_guider import DualStreamGuider as Guider
        from .host.video_model import animate_settings

        try:
            animate_settings(model)
            guider = Guider(model)
            guider.set_streams(StreamGuidance(text_scale, image_scale, rescale))
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        guider.set_conds(positive, image_only, negative)
        return io.NodeOutput(guider)


class ImageStreamGate(io.ComfyNode):
    """How much the picture says in each layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from .host.video_gate import CHOICES

        return io.Schema(
            node_id="LayerLoomImageStreamGate",
            display_name="Image Stream Gate",
            category=CATEGORY,
            description=(
                "Scales what the picture's tokens say in the network's attention layers. Less in "
                "the middle ones (7 to 9) lets the shape change for more motion, more holds it. "
                "Gates one after another multiply."
            ),
            search_aliases=["DynamiCrafter gate", "image cross attention scale", "ip scale"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Animator."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 is as trained, 0 leaves the image stream out of these layers.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(CHOICES),
                    default=CHOICES[0],
                    tooltip="All layers, the middle ones of the paper (7 to 9), or a list.",
                ),
                io.String.Input(
                    "layer_list",
                    default="7-9",
                    advanced=True,
                    tooltip=(
                        "With listed: layers from 1 on, such as 7-9 or 1, 4, 12:0.5; a number "
                        "behind a colon is a strength of its own."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with the gate set.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, strength: float, layers: str, layer_list: str = "7-9") -> io.NodeOutput:
        from .host.notices import failure
        from .host.video_gate import gated

        try:
            return io.NodeOutput(gated(model, strength, layers, layer_list))
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
