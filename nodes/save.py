"""A node that saves layers, one file a layer, and shows them in a viewer."""

from __future__ import annotations

import uuid

from comfy_api.latest import io

from ..engine.conditioning.compose import layer_bytes
from ..engine.errors import LayerLoomError
from ..engine.export import FORMATS, MIME, check_layers, export_layers, require_format
from ..engine.sprite_sheets import sprite_sheets

CATEGORY = "LayerLoom/Layers"


class SaveLayers(io.ComfyNode):
    """Writes layers to the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomSaveLayers",
            display_name="Save Layers",
            category=CATEGORY,
            description=(
                "Saves each layer as a file of its own, the foreground with its transparency, and "
                "plays them in the node."
            ),
            search_aliases=["export layers", "transparent video", "ProRes", "alpha video"],
            essentials_category="LayerLoom",
            inputs=[
                io.Image.Input(
                    "foreground",
                    optional=True,
                    tooltip="Saved with the alpha as its transparency; colours are straight.",
                ),
                io.Mask.Input(
                    "alpha",
                    optional=True,
                    tooltip="The foreground's alpha, 1 is opaque; also saved by itself, in grey.",
                ),
                io.Image.Input("background", optional=True, tooltip="Saved as it is."),
                io.Image.Input(
                    "blended", optional=True, tooltip="The whole scene, saved as it is."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="layers/LayerLoom",
                    tooltip=(
                        "Folder and beginning of the file names; %width%, %date:yyyy-MM-dd% and "
                        "the like are filled in. The layer's name follows the number."
                    ),
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip=(
                        "webm: VP9 with alpha. mov: ProRes 4444 for editing programs. png: a "
                        "folder of pictures a layer. webp: animated. png and webp are lossless."
                    ),
                ),
                io.Float.Input(
                    "fps",
                    default=8.0,
                    min=0.1,
                    max=240.0,
                    step=0.1,
                    tooltip="Frames a second; layered models are trained with 8.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str = "-", format: str = FORMATS[0]) -> bool | str:
        from .host.folders import check_prefix

        try:
            require_format(format)
        except LayerLoomError as error:
            return str(error)
        return check_prefix(filename_prefix or "") or True

    @classmethod
    def execute(
        cls,
        filename_prefix: str,
        format: str,
        fps: float,
        foreground=None,
        alpha=None,
        background=None,
        blended=None,
    ) -> io.NodeOutput:
        from .host.folders import save_path, temp_folder, workflow_metadata
        from .host.progress import steps

        # Not stopped with a notice as in other nodes: nothing follows an output node, and what was
        # not saved has to count as a failed run.
        layers = layer_bytes(foreground, alpha, background, blended)
        check_layers({name: frames.shape[:3] for name, frames in layers.items()})
        count, height, width = next(iter(layers.values())).shape[:3]
        step = steps(len(layers) * (count + 1))
        place = save_path(filename_prefix, width, height)
        files = export_layers(
            place.folder,
            place.stem,
            layers,
            format,
            fps,
            metadata=workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo),
            on_frame=step,
            advice="choose another prefix or output folder",
        )

        shown = []
        for name, frames in layers.items():
            sheets = sprite_sheets(frames, layers.get("alpha") if name == "foreground" else None)
            names = sheets.save(temp_folder(), f"layerloom_{uuid.uuid4().hex}")
            shown.append(
                {
                    "name": name,
                    "frames": sheets.frames,
                    "fps": fps,
                    "width": sheets.width,
                    "height": sheets.height,
                    "columns": sheets.columns,
                    "per_sheet": sheets.per_sheet,
                    "sheets": [{"filename": n, "subfolder": "", "type": "temp"} for n in names],
                }
            )
            step()
        saved = [
            {
                "filename": file.name,
                "subfolder": place.subfolder_of(file),
                "type": "output",
                "format": MIME[format],
                "layer": name,
            }
            for name, paths in files.items()
            for file in paths
        ]
        return io.NodeOutput(ui={"layerloom_layers": shown, "video": saved})
