"""Nodes that turn clicks on a picture into a mask."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Click"


class LoadSegmenter(io.ComfyNode):
    """The starter segmenter or a segment-anything file as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from .host.segmenter import list_segmenters

        names = list_segmenters()
        return io.Schema(
            node_id="LayerLoomLoadSegmenter",
            display_name="Load Segmenter (SAM)",
            category=CATEGORY,
            description=(
                "Loads what turns clicks into masks: the starter, or segment-anything's ViT-B, "
                "ViT-L or ViT-H. What a file is, is told by its contents."
            ),
            search_aliases=["segment anything", "SAM", "sam_vit", "click to mask"],
            essentials_category="LayerLoom",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=names,
                    default=names[0] if names else None,
                    tooltip=(
                        "The starter comes with the pack and knows coloured shapes; "
                        "segment-anything files lie in models/sams."
                    ),
                )
            ],
            outputs=[
                io.Model.Output("segmenter", tooltip="For Click Mask; samplers cannot use it.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        from .host.segmenter import check_segmenter

        try:
            check_segmenter(checkpoint)
        except LayerLoomError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str) -> str:
        from .host.segmenter import find_segmenter

        path = find_segmenter(checkpoint)
        return f"{path}:{path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        from .host.notices import failure
        from .host.segmenter import load_segmenter_model

        try:
            return io.NodeOutput(load_segmenter_model(checkpoint))
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))


class ClickMask(io.ComfyNode):
    """Clicks on a picture, made in the node, as a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from .host.segmenter import BEST, CANDIDATES

        return io.Schema(
            node_id="LayerLoomClickMask",
            display_name="Click Mask",
            category=CATEGORY,
            description=(
                "Click on things in the picture and get their mask, shown at once. Left adds, "
                "right or Alt takes away, drag moves, Ctrl + drag draws a box."
            ),
            search_aliases=["points editor", "segment anything", "click to mask", "SAM points"],
            essentials_category="LayerLoom",
            inputs=[
                io.Model.Input("segmenter", tooltip="From Load Segmenter."),
                io.Image.Input(
                    "image",
                    tooltip="The picture to click on; of a batch the first one.",
                ),
                io.String.Input(
                    "clicks",
                    default="",
                    socketless=True,
                    extra_dict={"hidden": True},
                    tooltip=(
                        "What was clicked, as JSON: points and boxes in shares of width and "
                        "height, so that they stay when the picture is resized."
                    ),
                ),
                io.Combo.Input(
                    "candidate",
                    options=list(CANDIDATES),
                    default=BEST,
                    tooltip=(
                        "A click may mean a part, a thing or what it belongs to: 0, 1 and 2 are "
                        "these three answers, best takes the one with the highest score."
                    ),
                ),
                io.Int.Input(
                    "dilate",
                    default=0,
                    min=-512,
                    max=512,
                    tooltip="Grows the mask by so many pixels; below 0 shrinks it.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=512.0,
                    step=1.0,
                    tooltip="Pixels over which the edge fades, half inside and half outside.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="What was clicked, 1 inside, of the picture's size.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, clicks: str | None = None) -> bool | str:
        from ..engine.conditioning.clicks import parse_clicks

        if clicks is None:
            return True
        try:
            # Whether points in pixels lie inside shows when the picture is there.
            parse_clicks(clicks, size=(2**31, 2**31)).require()
        except LayerLoomError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, segmenter, image, clicks: str, candidate: str, dilate: int, feather: float
    ) -> io.NodeOutput:
        from ..engine.conditioning.clicks import parse_clicks
        from .host.notices import failure, tell
        from .host.pictures import as_pixels, keep_for_editor
        from .host.segmenter import clicked_mask, segmenter_of

        pixels = as_pixels(image)
        shown = {"layerloom_picture": [keep_for_editor(pixels)]}
        try:
            wanted = parse_clicks(clicks, pixels.shape[:2])
            network = segmenter_of(segmenter)
            made = clicked_mask(network, network.embed(pixels), wanted, candidate, dilate, feather)
        except LayerLoomError as error:
            blocked = failure(cls.hidden.unique_id, error)
            return io.NodeOutput(None, ui=shown, block_execution=blocked)
        scores = ", ".join(f"{score:.2f}" for score in made.scores)
        tell(
            cls.hidden.unique_id,
            f"Candidate {made.candidate} (scores {scores}), {made.share:.1%} of the picture",
        )
        return io.NodeOutput(made.mask[None], ui=shown)
