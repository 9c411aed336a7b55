"""Nodes that make paths of boxes: drawn in the node, or from a clip of masks."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Trajectory"
# Without a picture: what DreamVideo-2 was trained with.
PLAIN_SIZE = (256, 448)


class BoxTrajectory(io.ComfyNode):
    """Boxes that move over a picture, drawn in the node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomBoxTrajectory",
            display_name="Box Trajectory",
            category=CATEGORY,
            description=(
                "Draw boxes over a picture and key them along a timeline: a box a frame for each "
                "subject, as boxes and as masks."
            ),
            search_aliases=["bbox path", "keyframes", "motion path", "box editor", "spline editor"],
            essentials_category="LayerLoom",
            inputs=[
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="The clip's length; paths drawn for another length keep their shape.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Pixels; 0 takes the picture's, or 448 without one.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    tooltip="Pixels; 0 takes the picture's, or 256 without one.",
                ),
                io.Int.Input(
                    "subject",
                    default=0,
                    min=0,
                    max=16,
                    tooltip="Which subject's boxes come out, counted from 1; 0 for all of them.",
                ),
                io.String.Input(
                    "boxes",
                    default="",
                    socketless=True,
                    extra_dict={"hidden": True},
                    tooltip=(
                        "What was drawn, as JSON: key frames of boxes in shares of width and "
                        "height, so that they stay when the size changes."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The picture or clip to draw over; after a run the editor shows its frames."
                    ),
                ),
                io.MultiType.Input(
                    "path",
                    [io.BoundingBox, io.Tracks, io.String],
                    optional=True,
                    tooltip=(
                        "Boxes or tracks from other nodes; they become further subjects behind "
                        "those drawn here."
                    ),
                ),
            ],
            outputs=[
                io.BoundingBox.Output(
                    "bounding_boxes", tooltip="A list of boxes a frame, in pixels."
                ),
                io.Mask.Output("mask", tooltip="1 inside the boxes, a mask a frame."),
                io.Image.Output("preview", tooltip="The picture or clip with the boxes drawn on."),
                io.String.Output("boxes", tooltip="The key frames as JSON, for other nodes."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, boxes: str | None = None, frames: int | None = None) -> bool | str:
        from ..engine.conditioning.boxes import MOST_FRAMES, parse_boxes

        try:
            # A length that another node gives shows when it is there.
            parse_boxes(boxes or "", frames or MOST_FRAMES)
        except LayerLoomError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        frames: int,
        width: int,
        height: int,
        subject: int,
        boxes: str,
        image=None,
        path=None,
    ) -> io.NodeOutput:
        from ..engine.conditioning.box_paths import track_masks
        from ..engine.conditioning.box_preview import draw_boxes
        from ..engine.conditioning.box_sources import read_path, to_bounding_boxes
        from ..engine.conditioning.boxes import parse_boxes
        from .host.boxes import as_frames, clip_to_draw_on, keep_clip_for_editor, masks_of
        from .host.notices import failure
        from .host.pictures import as_pixels, keep_for_editor

        own = PLAIN_SIZE if image is None else image.shape[1:3]
        size = (height or own[0], width or own[1])
        shown = {}
        if image is not None:
            shown["layerloom_picture"] = [keep_for_editor(as_pixels(image))]
            if clip := keep_clip_for_editor(image, frames):
                shown["layerloom_clip"] = [clip]
        try:
            paths = parse_boxes(boxes, frames)
            if path is not None:
                given = read_path(path, size, frames)
                shown["layerloom_path"] = [given.to_json()]
                paths = paths.joined(given)
            paths = paths.require().only(subject)
        except LayerLoomError as error:
            blocked = failure(cls.hidden.unique_id, error)
            return io.NodeOutput(None, None, None, None, ui=shown, block_execution=blocked)
        preview = draw_boxes(paths, clip_to_draw_on(image, size, frames))
        return io.NodeOutput(
            to_bounding_boxes(paths, size),
            masks_of(track_masks(paths, size).any(0)),
            as_frames(preview),
            paths.to_json(),
            ui=shown,
        )


class BoxesFromMask(io.ComfyNode):
    """The path of what a clip of masks shows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomBoxesFromMask",
            display_name="Boxes From Mask",
            category=CATEGORY,
            description=(
                "Follows what a clip of masks shows, such as a tracked subject of a reference "
                "video or a layer's alpha, and gives its path as boxes."
            ),
            search_aliases=["mask to bbox", "mask to box", "track mask", "video to path"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "A mask a frame, inside from 0.5 on; where a frame's is empty the box "
                        "moves on evenly to the next one."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Length that the path is fitted to; 0 keeps a frame for each mask.",
                ),
                io.Int.Input(
                    "smooth",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Frames on either side that are averaged, against shaking masks.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.005,
                    min=0.0,
                    max=0.2,
                    step=0.001,
                    tooltip=(
                        "How far boxes may be off, as a share of the picture, for the sake of "
                        "fewer key frames."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("boxes", tooltip="Key frames as JSON: for Box Trajectory's path."),
                io.BoundingBox.Output(
                    "bounding_boxes", tooltip="A list with one box for each frame, in pixels."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, mask, frames: int, smooth: int, tolerance: float) -> io.NodeOutput:
        from ..engine.conditioning.box_sources import from_masks, to_bounding_boxes
        from .host.notices import failure

        try:
            masks = mask.cpu().numpy()
            paths = from_masks(masks, min(smooth, len(masks)), keep=tolerance)
            paths = paths.retimed(frames or paths.frames)
        except LayerLoomError as error:
            blocked = failure(cls.hidden.unique_id, error)
            return io.NodeOutput(None, None, block_execution=blocked)
        size = tuple(mask.shape[1:])
        return io.NodeOutput(paths.to_json(), to_bounding_boxes(paths, size))
