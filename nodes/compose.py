"""A node that lays a generated foreground over any other clip."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.conditioning.compose import LENGTHS, REPEATS, frame_count, place_foreground
from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Layers"


class CompositeLayers(io.ComfyNode):
    """Foreground over background, at a place and size of one's choice."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomCompositeLayers",
            display_name="Composite Layers",
            category=CATEGORY,
            description=(
                "Lays a foreground with alpha over any background, moved and scaled. Clips of "
                "different length are looped or held."
            ),
            search_aliases=["overlay video", "alpha over", "paste layer", "merge layers"],
            essentials_category="LayerLoom",
            inputs=[
                io.Image.Input("foreground", tooltip="What goes on top, its colours straight."),
                io.Mask.Input(
                    "alpha",
                    tooltip="The foreground's alpha, 1 is opaque. One mask serves all frames.",
                ),
                io.Image.Input("background", tooltip="What lies below; sets the size."),
                io.Float.Input(
                    "x",
                    default=0.5,
                    min=-2.0,
                    max=3.0,
                    step=0.01,
                    tooltip="Centre of the foreground from the left, as a share of the width.",
                ),
                io.Float.Input(
                    "y",
                    default=0.5,
                    min=-2.0,
                    max=3.0,
                    step=0.01,
                    tooltip="Centre of the foreground from the top, as a share of the height.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.01,
                    max=16.0,
                    step=0.01,
                    tooltip="1 fits the foreground inside the background.",
                ),
                io.Combo.Input(
                    "length",
                    options=list(LENGTHS),
                    default=LENGTHS[0],
                    tooltip="Whose number of frames the result has.",
                ),
                io.Combo.Input(
                    "repeat",
                    options=list(REPEATS),
                    default=REPEATS[0],
                    tooltip="A clip that is too short starts again or keeps its last frame.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The composite, as large as the background."),
                io.Mask.Output("mask", tooltip="Where the foreground lies, 1 is opaque."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        foreground,
        alpha,
        background,
        x: float,
        y: float,
        scale: float,
        length: str,
        repeat: str,
    ) -> io.NodeOutput:
        from .host.notices import failure
        from .host.progress import steps

        try:
            image, mask = place_foreground(
                foreground,
                alpha,
                background,
                x=x,
                y=y,
                scale=scale,
                length=length,
                repeat=repeat,
                on_frame=steps(frame_count(len(foreground), len(background), length)),
            )
        except LayerLoomError as error:
            # The host drops a block that comes without any output.
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        return io.NodeOutput(image, mask)
