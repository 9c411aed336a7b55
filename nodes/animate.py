"""Nodes that load DynamiCrafter and make a clip start from a picture."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError

CATEGORY = "LayerLoom/Animate"


class LoadAnimator(io.ComfyNode):
    """A starter or DynamiCrafter file as the host's MODEL, CLIP, CLIP_VISION and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..engine.checkpoints.dynamicrafter_detect import FAMILY
        from .host.loader import list_checkpoints
        from .host.video_loader import CHOICES

        names = list_checkpoints(FAMILY)
        return io.Schema(
            node_id="LayerLoomLoadAnimator",
            display_name="Load Animator (DynamiCrafter)",
            category=CATEGORY,
            description=(
                "Loads a model that animates pictures. What a file is, is told by its contents. "
                "Parts that it holds come out; for the others load SD 2.x's text encoder with "
                "CLIPLoader, CLIP-ViT-H-14 with CLIPVisionLoader, Stable Diffusion's VAE with "
                "VAELoader."
            ),
            search_aliases=["DynamiCrafter", "image to video", "img2vid", "animate"],
            essentials_category="LayerLoom",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=names,
                    default=names[0] if names else None,
                    tooltip=(
                        "The starter comes with the pack; other files are those in "
                        "models/checkpoints and models/diffusion_models."
                    ),
                ),
                io.Combo.Input(
                    "variant",
                    options=list(CHOICES),
                    default=CHOICES[0],
                    tooltip=(
                        "Which published weights these are. auto looks into the file; pruned files "
                        "of 512, 1024 and 512_interp look alike, so say which."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The video network, for any sampler."),
                io.Clip.Output("clip", tooltip="Text encoder, if the file holds one."),
                io.ClipVision.Output(
                    "clip_vision", tooltip="Image encoder, if the file holds one."
                ),
                io.Vae.Output("vae", tooltip="Autoencoder, if the file holds one."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str, variant: str) -> bool | str:
        from .host.video_loader import open_animator

        try:
            open_animator(checkpoint, variant)
        except LayerLoomError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, variant: str) -> str:
        from .host.loader import find_checkpoint

        path = find_checkpoint(checkpoint)
        return f"{path}:{path.stat().st_mtime_ns}:{variant}"

    @classmethod
    def execute(cls, checkpoint: str, variant: str) -> io.NodeOutput:
        from .host.notices import failure, tell
        from .host.video_loader import load_animator

        try:
            loaded = load_animator(checkpoint, variant)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        if loaded.note:
            tell(cls.hidden.unique_id, loaded.note)
        return io.NodeOutput(loaded.model, loaded.clip, loaded.clip_vision, loaded.vae)


class AnimateImage(io.ComfyNode):
    """Pictures and prompts as conditioning, and the latent of the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomAnimateImage",
            display_name="Animate Image (DynamiCrafter)",
            category=CATEGORY,
            description=(
                "Makes a clip start from a picture; with an end image, go from one to the other; "
                "as a loop, come back. Sample with KSampler or the Dual Stream Guider, decode with "
                "VAE Decode."
            ),
            search_aliases=["image to video", "img2vid", "interpolate frames", "loop video"],
            essentials_category="LayerLoom",
            inputs=[
                io.Model.Input("model", tooltip="From Load Animator."),
                io.Conditioning.Input("positive", tooltip="What happens: CLIP Text Encode."),
                io.Conditioning.Input(
                    "negative", tooltip="What does not; an empty text as trained."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip=(
                        "Sees the start image whole, squashed to a square as trained: nothing is "
                        "cut off."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The checkpoint's, or Stable Diffusion's."),
                io.Image.Input("start_image", tooltip="The first frame."),
                io.Boolean.Input(
                    "loop",
                    default=False,
                    tooltip=(
                        "Comes back to the start image. One more frame is made than kept: cut it "
                        "off with ImageFromBatch and the output frames."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Frames of the clip; 0 is what the checkpoint was trained on (16). Longer "
                        "ones are seen in overlapping windows."
                    ),
                ),
                io.Float.Input(
                    "motion",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    tooltip=(
                        "How much moves, in the checkpoint's own measure; 0 is its default. "
                        "Starter and 256: frame stride 1 to 6, default 3, larger moves more. 512: "
                        "fps 15 to 30, default 24; 1024: 5 to 20, default 10; 512_interp: 5 to "
                        "30, default 5: smaller moves more."
                    ),
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
                    "overlap",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="Frames that windows of a long clip share; 0 is half a window.",
                ),
                io.Boolean.Input(
                    "exact_frames",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Keeps given images' latents in their frames by a noise mask: exact up to "
                        "the VAE, but motion near them may hesitate."
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Clips made at once, from different noise, one after the other.",
                ),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="The last frame, of any size: what lies between is made.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip=(
                        "Another picture for the image stream. In CLIP Vision Encode set crop to "
                        "none: center hides the picture's ends."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="Picture and prompt."),
                io.Conditioning.Output("negative", tooltip="Neither: a grey picture's tokens."),
                io.Conditioning.Output(
                    "image_only", tooltip="The picture without the prompt, for Dual Stream Guider."
                ),
                io.Latent.Output("latent", tooltip="A batch of frames; denoise 1."),
                io.Int.Output("frames", tooltip="Frames to keep: one less than made for a loop."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        clip_vision,
        vae,
        start_image,
        loop: bool,
        frames: int,
        motion: float,
        width: int,
        height: int,
        overlap: int = 0,
        exact_frames: bool = False,
        batch_size: int = 1,
        end_image=None,
        clip_vision_output=None,
    ) -> io.NodeOutput:
        from .host.notices import failure, tell
        from .host.video_conditioning import Wish, animate

        wish = Wish(loop, frames, motion, width, height, overlap, exact_frames, batch_size)
        pictures = [start_image] if end_image is None else [start_image, end_image]
        try:
            made = animate(
                model, positive, negative, vae, clip_vision, pictures, clip_vision_output, wish
            )
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        tell(cls.hidden.unique_id, " ".join(made.notes))
        return io.NodeOutput(made.positive, made.negative, made.image_only, made.latent, made.kept)
