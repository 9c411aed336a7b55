"""Nodes that load a region animator and make clicked regions of a picture move."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError
from .based_loader import BasedLoader, file_inputs

CATEGORY = "LayerLoom/Click"


class LoadRegionAnimator(BasedLoader):
    """A starter or Follow-Your-Click file as the host's MODEL, CLIP and VAE."""

    @classmethod
    def loader(cls):
        from .host import click_loader

        return click_loader

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..engine.checkpoints.click_detect import FAMILY

        return io.Schema(
            node_id="LayerLoomLoadRegionAnimator",
            display_name="Load Region Animator (Follow-Your-Click)",
            category=CATEGORY,
            description=(
                "Loads a model that makes regions of a picture move: the starter, files in "
                "Follow-Your-Click's format, or PIA's on Stable Diffusion 1.5. What a file is, is "
                "told by its contents. Parts that it holds come out; load the others with Load "
                "CLIP and Load VAE, or Load Checkpoint."
            ),
            search_aliases=["Follow-Your-Click", "click to animate", "PIA", "AnimateDiff"],
            essentials_category="LayerLoom",
            inputs=file_inputs(
                FAMILY,
                "Stable Diffusion 1.5, for files that hold motion modules alone, such as PIA's.",
            ),
            outputs=[
                io.Model.Output("model", tooltip="The video network, for any sampler."),
                io.Clip.Output("clip", tooltip="Text encoder, if the file holds one."),
                io.Vae.Output("vae", tooltip="Autoencoder, if the file holds one."),
            ],
            hidden=[io.Hidden.unique_id],
        )


class ClickAnimate(io.ComfyNode):
    """A region, its phrase and its strength as conditioning, and the latent of the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomClickAnimate",
            display_name="Click to Animate (Follow-Your-Click)",
            category=CATEGORY,
            description=(
                "Makes a region of a picture move as a short phrase says, as far as the strength "
                "says; the rest stays. For several regions chain these nodes. Sample with "
                "KSampler, decode with VAE Decode."
            ),
            search_aliases=["regional animation", "motion mask", "image to video", "animate part"],
            essentials_category="LayerLoom",
            inputs=[
                io.Model.Input("model", tooltip="From Load Region Animator."),
                io.Vae.Input("vae", tooltip="The checkpoint's, or Stable Diffusion 1.5's."),
                io.Image.Input("image", tooltip="The first frame; of a batch the first one."),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "What moves, from Click Mask or anywhere else, of the picture's size; 0.5 "
                        "and more is inside."
                    ),
                ),
                io.Conditioning.Input(
                    "phrase",
                    tooltip="What the region does, in a few words: CLIP Text Encode.",
                ),
                io.Conditioning.Input(
                    "negative", tooltip="What shall not be; an empty text as trained."
                ),
                io.Float.Input(
                    "strength",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip=(
                        "How far the region moves: mean optical flow in pixels, 4 to 16 for "
                        "published weights. 0 is the checkpoint's default."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Frames of the clip; 0 is what the checkpoint was trained on.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Pixels; 0 takes the picture's shape at about the trained size.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Pixels; 0 takes the picture's shape at about the trained size.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Clips made at once, from different noise, one after the other.",
                ),
                io.Conditioning.Input(
                    "caption",
                    optional=True,
                    tooltip="What the whole clip shows; the phrase says it where unconnected.",
                ),
                io.Conditioning.Input(
                    "other_regions",
                    optional=True,
                    tooltip=(
                        "The positive output of another of these nodes: its regions move too, "
                        "each as its own phrase says."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="Picture, regions and phrases."),
                io.Conditioning.Output("negative", tooltip="Picture and regions, no phrases."),
                io.Latent.Output("latent", tooltip="A batch of frames; denoise 1."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image,
        mask,
        phrase,
        negative,
        strength: float,
        frames: int,
        width: int,
        height: int,
        batch_size: int = 1,
        caption=None,
        other_regions=None,
    ) -> io.NodeOutput:
        from .host.click_conditioning import ClickWish, animate_region
        from .host.notices import failure, tell

        wish = ClickWish(strength, frames, width, height, batch_size)
        try:
            made = animate_region(
                model, vae, image, mask, phrase, negative, wish, caption, other_regions
            )
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        tell(cls.hidden.unique_id, " ".join(made.notes))
        return io.NodeOutput(made.positive, made.negative, made.latent)


class HoldBackground(io.ComfyNode):
    """The picture itself around what moves."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomHoldBackground",
            display_name="Hold Background Still",
            category=CATEGORY,
            description=(
                "Puts the picture back around what moves, pixel by pixel. A composite: what the "
                "model made is kept where a region is, and where motion hangs together with it."
            ),
            search_aliases=["freeze background", "still background", "composite motion"],
            essentials_category="LayerLoom",
            inputs=[
                io.Image.Input("images", tooltip="The clip, decoded."),
                io.Image.Input("image", tooltip="The picture that the clip was made from."),
                io.Mask.Input(
                    "mask", tooltip="What moves, of the picture's size; of a batch all of them."
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The clip's own: what it alone changes in the picture is no motion.",
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The clip with the picture's own background.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, image, mask, vae) -> io.NodeOutput:
        from .host.click_still import hold_background
        from .host.notices import failure

        try:
            return io.NodeOutput(hold_background(images, image, mask, vae))
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
