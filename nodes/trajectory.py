"""Nodes that load DreamVideo-2 and let subjects of pictures go along paths of boxes."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError
from ..engine.sampling.guidance import DROPS
from .based_loader import BasedLoader, file_inputs

CATEGORY = "LayerLoom/Trajectory"
# What guidance drops is the checkpoint's own.
TRAINED = "as trained"


class LoadSubjectModel(BasedLoader):
    """A starter or DreamVideo-2 file as the host's MODEL, CLIP and VAE."""

    @classmethod
    def loader(cls):
        from .host import trajectory_loader

        return trajectory_loader

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..engine.checkpoints.dreamvideo_detect import FAMILY

        return io.Schema(
            node_id="LayerLoomLoadSubjectModel",
            display_name="Load Subject Model (DreamVideo-2)",
            category=CATEGORY,
            description=(
                "Loads a model that lets subjects of pictures go along paths of boxes: the "
                "starter, or weights that LayerLoom trained on ModelScope's text-to-video. What a "
                "file is, is told by its contents. Parts that it holds come out; load the others "
                "with Load CLIP and Load VAE."
            ),
            search_aliases=["DreamVideo-2", "subject to video", "customization", "ModelScope"],
            essentials_category="LayerLoom",
            inputs=file_inputs(
                FAMILY,
                "ModelScope's text-to-video UNet, for files that hold what was added to "
                "it and not the base.",
            ),
            outputs=[
                io.Model.Output("model", tooltip="The video network, for any sampler."),
                io.Clip.Output("clip", tooltip="Text encoder, if the file holds one."),
                io.Vae.Output("vae", tooltip="Autoencoder, if the file holds one."),
            ],
            hidden=[io.Hidden.unique_id],
        )


class SubjectTrajectory(io.ComfyNode):
    """A subject, its boxes and a text as conditioning, and the latent of the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomSubjectTrajectory",
            display_name="Subject Trajectory (DreamVideo-2)",
            category=CATEGORY,
            description=(
                "Lets the subject of a picture go along a path of boxes in a new clip. For several "
                "subjects chain these nodes. Sample with KSampler, decode with VAE Decode."
            ),
            search_aliases=["subject to video", "motion control", "bbox to video", "move subject"],
            essentials_category="LayerLoom",
            inputs=[
                io.Model.Input("model", tooltip="From Load Subject Model."),
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "The prompts' own: the network looks at the picture with an empty text."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The checkpoint's, or Stable Diffusion's."),
                io.Image.Input(
                    "image", tooltip="A picture of the subject; of a batch the first one."
                ),
                io.MultiType.Input(
                    "boxes",
                    [io.BoundingBox, io.Tracks, io.String],
                    tooltip=(
                        "Where the subject goes: boxes of Box Trajectory or Boxes From Mask. "
                        "BOUNDING_BOX and TRACKS are in pixels of the clip."
                    ),
                ),
                io.Conditioning.Input("positive", tooltip="What the clip shows: CLIP Text Encode."),
                io.Conditioning.Input(
                    "negative", tooltip="What it shall not show; an empty text as trained."
                ),
                io.Int.Input(
                    "subject",
                    default=1,
                    min=1,
                    max=16,
                    tooltip=(
                        "Which of the boxes' paths is this subject's, counted from 1: one Box "
                        "Trajectory serves several of these nodes."
                    ),
                ),
                io.Float.Input(
                    "reference_weight",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "How much subjects count outside of their boxes: 0 is in the boxes alone, "
                        "1 everywhere; trained with 0.75. Of several nodes the last one's holds."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Frames of the clip; 0 is what the checkpoint was trained on. Paths of "
                        "another length keep their shape."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Pixels; 0 is what the checkpoint was trained on.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Pixels; 0 is what the checkpoint was trained on.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Clips made at once, from different noise, one after the other.",
                ),
                io.Combo.Input(
                    "guidance_drops",
                    options=[TRAINED, *DROPS],
                    default=TRAINED,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What the sampler's cfg compares with: text, the same subjects and boxes "
                        "without the text; all, neither, which draws subjects more sharply."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "What of the picture is the subject, from Click Mask or anywhere else, of "
                        "the picture's size; unconnected its transparency, or all of it."
                    ),
                ),
                io.Conditioning.Input(
                    "other_subjects",
                    optional=True,
                    tooltip=(
                        "The positive output of another of these nodes: its subjects are in the "
                        "clip too, in front where boxes overlap."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The text, subjects and boxes."),
                io.Conditioning.Output("negative", tooltip="What cfg compares with."),
                io.Latent.Output("latent", tooltip="A batch of frames; denoise 1."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        image,
        boxes,
        positive,
        negative,
        subject: int,
        reference_weight: float,
        frames: int,
        width: int,
        height: int,
        batch_size: int = 1,
        guidance_drops: str = TRAINED,
        mask=None,
        other_subjects=None,
    ) -> io.NodeOutput:
        from .host.notices import failure, tell
        from .host.trajectory_conditioning import TrajectoryWish, move_subject

        drops = None if guidance_drops == TRAINED else guidance_drops
        wish = TrajectoryWish(subject, reference_weight, frames, width, height, batch_size, drops)
        try:
            made = move_subject(
                model, clip, vae, image, mask, boxes, positive, negative, wish, other_subjects
            )
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        if made.notes:
            tell(cls.hidden.unique_id, " ".join(made.notes))
        return io.NodeOutput(made.positive, made.negative, made.latent)
