"""Nodes of the layered generator: its model, its guidance and the layers it made."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.conditioning.layers import clip_to_layers, sequence_for
from ..engine.errors import LayerLoomError
from ..engine.sampling.guidance import GUIDANCE_NAMES

CATEGORY = "LayerLoom/Layered"


class LoadCheckpoint(io.ComfyNode):
    """A starter or LayerFlow file as the host's MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from .host.loader import list_checkpoints

        names = list_checkpoints()
        return io.Schema(
            node_id="LayerLoomLoadCheckpoint",
            display_name="Load LayerLoom Checkpoint",
            category=CATEGORY,
            description=(
                "Loads a layered video model. What a file is, is told by its contents. Starters "
                "bring their own CLIP and VAE; for LayerFlow files load both with the core's "
                "CLIPLoader (type cogvideox) and VAELoader."
            ),
            search_aliases=["LayerFlow", "layered video model", "layerloom loader"],
            essentials_category="LayerLoom",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=names,
                    default=names[0] if names else None,
                    tooltip=(
                        "Starters come with the pack; other files are those in models/checkpoints "
                        "and models/diffusion_models."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The layered network, for any sampler."),
                io.Clip.Output("clip", tooltip="Text encoder; only starters hold one."),
                io.Vae.Output("vae", tooltip="Autoencoder; only starters hold one."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        from .host.loader import check_checkpoint

        try:
            check_checkpoint(checkpoint)
        except LayerLoomError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str) -> str:
        from .host.loader import find_checkpoint

        path = find_checkpoint(checkpoint)
        return f"{path}:{path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        from .host.loader import load_checkpoint
        from .host.notices import failure

        try:
            loaded = load_checkpoint(checkpoint)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae)


class LayeredGuider(io.ComfyNode):
    """Classifier-free guidance by LayerFlow's formulas, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomLayeredGuider",
            display_name="Layered Guider",
            category=CATEGORY,
            description=(
                "Guidance for SamplerCustomAdvanced. Constant is what KSampler's cfg does; dynamic "
                "rises smoothly from 1 to the scale; dynamic-released is LayerFlow's published "
                "formula, which jumps about between 1 and 1 + scale."
            ),
            search_aliases=["LayerFlow guidance", "dynamic cfg"],
            inputs=[
                io.Model.Input("model", tooltip="A layered model."),
                io.Conditioning.Input("positive", tooltip="The prompts of the layers."),
                io.Conditioning.Input("negative", tooltip="The unconditional branch: zeros."),
                io.Combo.Input(
                    "formula",
                    options=list(GUIDANCE_NAMES),
                    default="constant",
                    tooltip="How the scale runs over the steps.",
                ),
                io.Float.Input(
                    "guidance",
                    default=2.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Scale: 2.5 for the starter, 6 for LayerFlow, 1 for decomposition.",
                ),
            ],
            outputs=[io.Guider.Output("guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, formula: str, guidance: float) -> io.NodeOutput:
        from .host.guider import LayeredGuider as Guider
        from .host.loader import layered_settings
        from .host.notices import failure

        try:
            layered_settings(model)
            guider = Guider(model)
            guider.set_formula(formula, guidance)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        guider.set_conds(positive, negative)
        return io.NodeOutput(guider)


class DecodeLayers(io.ComfyNode):
    """The layers of a sampled latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LayerLoomDecodeLayers",
            display_name="Decode Layers",
            category=CATEGORY,
            description=(
                "Decodes all layers in one pass and takes them apart. The foreground comes back "
                "as straight colour with its alpha apart."
            ),
            search_aliases=["VAE decode layers", "split layers"],
            essentials_category="LayerLoom",
            inputs=[
                io.Latent.Input("samples", tooltip="A sampled layered latent."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                io.Combo.Input(
                    "layers",
                    options=["auto", "rgba", "rgb"],
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Which layers the latent holds; auto knows, unless the latent was loaded "
                        "from a file and both are possible."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("foreground", tooltip="Foreground frames, straight colour."),
                io.Mask.Output("alpha", tooltip="Its alpha: 1 is opaque. Opaque for RGB models."),
                io.Image.Output("background", tooltip="Background frames."),
                io.Image.Output("blended", tooltip="The scene as the network blended it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, layers: str = "auto") -> io.NodeOutput:
        import torch

        from .host.notices import failure

        latents = samples["samples"]
        try:
            sequence = samples.get("layerloom_sequence") if layers == "auto" else None
            sequence = sequence or sequence_for(tuple(latents.shape), layers)
            pixels = vae.decode(latents)
            if pixels.ndim == 4:
                pixels = pixels[None]
            clip = pixels[..., :3].movedim(-1, 2) * 2 - 1
            made = clip_to_layers(clip, sequence)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        images = {name: layer.movedim(2, -1).flatten(0, 1) for name, layer in made.items()}
        alpha = images.get("alpha")
        alpha = torch.ones(images["foreground"].shape[:3]) if alpha is None else alpha[..., 0]
        return io.NodeOutput(images["foreground"], alpha, images["background"], images["blended"])
