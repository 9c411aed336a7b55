"""LayerFlow's published variants: which layers, tasks and prompts each weight file was made for."""

from __future__ import annotations

from dataclasses import dataclass

RGB_LAYERS = ("foreground", "background", "blended")
RGBA_LAYERS = ("foreground", "alpha", "background", "blended")


@dataclass(frozen=True)
class LayerFlowVariant:
    """One distinguishable kind of LayerFlow weights (arXiv 2506.04228, CogVideoX-2B based).

    Attributes:
        name: what ``layerloom info`` prints.
        layers: the layers in their order on the time axis.
        tasks: what the weights can be asked for. The three RGB files share one set of shapes, so
            "rgb" lists three tasks although a single file was trained for one of them.
        prompts: text prompts in front of the video, each with its index prefix.
        latent_frames: length of the stored position table in latent frames (4 video frames each);
            the RGB tables are one longer than the three layers need.
        layer_embedding: the prompt's index is added to its text tokens.
        duplicate_first_frame: the clip's first frame is repeated once in front.
        tokens_per_prompt: T5 tokens a prompt is padded to.
        frames_per_layer: video frames of one layer.
    """

    name: str
    layers: tuple[str, ...]
    tasks: tuple[str, ...]
    prompts: int
    latent_frames: int
    layer_embedding: bool
    duplicate_first_frame: bool = False
    tokens_per_prompt: int = 226
    frames_per_layer: int = 16

    @property
    def text_length(self) -> int:
        """Text tokens of all prompts together."""
        return self.prompts * self.tokens_per_prompt


VARIANTS: dict[str, LayerFlowVariant] = {
    variant.name: variant
    for variant in (
        LayerFlowVariant("rgb", RGB_LAYERS, ("generate", "foreground", "background"), 3, 13, False),
        LayerFlowVariant("rgb-decompose", RGB_LAYERS, ("decompose",), 2, 13, False),
        LayerFlowVariant("rgba-generate", RGBA_LAYERS, ("generate",), 3, 16, True),
        LayerFlowVariant("rgba-decompose", RGBA_LAYERS, ("decompose",), 2, 16, False),
        LayerFlowVariant(
            "rgba-conditioned",
            RGBA_LAYERS,
            ("foreground", "background"),
            3,
            17,
            True,
            duplicate_first_frame=True,
        ),
    )
}

# Released weights take one latent frame for four video frames, patches of 2x2 latent positions
# and 480x720 pixels at 8 frames a second (latents of 60x90).
TEMPORAL_FACTOR = 4
FRAMES_PER_SECOND = 8
PIXEL_SIZE = (480, 720)

# Two adapters were trained: motion on still clips (off when sampling), content (always on).
ADAPTER_SCALES = {"motion": 0.0, "content": 1.0}


def find_variant(
    prompts: int, latent_frames: int, layer_embedding: bool
) -> LayerFlowVariant | None:
    """The published variant with these shapes, or None."""
    wanted = (prompts, latent_frames, layer_embedding)
    for variant in VARIANTS.values():
        if (variant.prompts, variant.latent_frames, variant.layer_embedding) == wanted:
            return variant
    return None
