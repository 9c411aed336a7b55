"""What an animation stage stands on: variant, shapes, start and frozen parts, as a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoints.dynamicrafter import DynamiCrafterCheckpoint, open_dynamicrafter
from ..conditioning.encoders import TextFeatures
from ..conditioning.frame_codec import FrameCodec, StarterFrameCodec
from ..conditioning.video_encoders import (
    ImageFeatures,
    load_frame_codec,
    load_image_features,
    load_text_features,
)
from ..errors import LayerLoomError
from ..models.dynamicrafter import IMAGE_PROJECTOR, VARIANTS, Variant, published_unet
from ..models.starter_autoencoder import SPATIAL_FACTOR
from .animate_networks import Shapes
from .animate_settings import AnimateSampling, ImageSettings, NoiseSettings
from .autoencoder import load_autoencoder
from .foundation import WordSettings
from .moving_world import MOTION_RANGE, WORDS
from .settings import settings_from

# A starter's own notes that go on into what is trained from it.
CARRIED = ("preview", "modes", "sampling", "phases")
# What published networks stand on, where the start does not hold it.
PLACES = {
    "vae": "Stable Diffusion's autoencoder, a file or a folder",
    "text_encoder": "OpenCLIP ViT-H-14's text half, a file or a folder with its tokenizer",
    "image_encoder": "OpenCLIP ViT-H-14's image half, a file or a folder",
}
Recipe = Mapping[str, Any]


@dataclass
class AnimateFoundation:
    """Everything but the weights that are trained, the data and how long to train.

    words, image: settings of the starter's own encoders, the vocabulary as a list; None where
    frozen encoders are used.
    parts: the frozen ones: "codec", and "text" and "image" where they are frozen.
    """

    variant: Variant
    shapes: Shapes
    start: DynamiCrafterCheckpoint | None
    words: dict[str, Any] | None
    image: dict[str, Any] | None
    vae: dict[str, Any] | None
    metadata: dict[str, Any]
    codec: Callable[[torch.device], FrameCodec]
    encoders: Callable[[torch.device], tuple[TextFeatures, ImageFeatures]] | None

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        levels = len(self.shapes.unet["block_channels"])
        return self.variant.spatial_factor * 2 ** (levels - 1)


def lay_animate_foundation(recipe: Recipe) -> AnimateFoundation:
    """Read and check what a recipe names; large parts are not loaded.

    Raises:
        LayerLoomError: something is missing or does not fit.
    """
    start = None
    if recipe.get("start"):
        start = open_dynamicrafter(Path(recipe["start"]), recipe.get("variant"))
        start.check()
    if "autoencoder" in recipe:
        made = _starter(recipe, start)
    elif start is not None and start.metadata.get("vae"):
        made = _continued(recipe, start)
    else:
        made = _published(recipe, start)
    if made.variant.height % made.multiple or made.variant.width % made.multiple:
        raise LayerLoomError(
            f"Clips of {made.variant.width}x{made.variant.height} do not divide by "
            f"{made.multiple} pixels, the autoencoder's factor times the UNet's; choose another "
            "size or fewer block_channels."
        )
    return made


def _starter(recipe: Recipe, start: DynamiCrafterCheckpoint | None) -> AnimateFoundation:
    """A starter described by the recipe alone."""
    if start is not None:
        raise LayerLoomError(
            "The recipe names an autoencoder and a start; a start brings its own: leave one out."
        )
    config, autoencoder = load_autoencoder(Path(recipe["autoencoder"]))
    if autoencoder.temporal_factor != 1:
        raise LayerLoomError(
            f"The autoencoder {recipe['autoencoder']} folds {autoencoder.temporal_factor} frames "
            "into one, but animation needs one that codes frame by frame; train "
            "starter_animate_autoencoder."
        )
    words = asdict(settings_from(recipe["text"], WordSettings))
    image = asdict(settings_from(recipe["image"], ImageSettings))
    noise = settings_from(recipe.get("noise", {}), NoiseSettings)
    sampling = AnimateSampling.of(recipe.get("sampling", {}))
    data = recipe["data"]
    size, frames = data.get("size", 96), data.get("frames", 16)
    unet = {
        "in_channels": autoencoder.latent_channels,
        "out_channels": autoencoder.latent_channels,
        "context_dim": words["dim"],
        **recipe["unet"],
    }
    if "num_heads" in unet:
        unet.setdefault("head_dim", None)
    projector = {"in_dim": image["dim"], "out_dim": unet["context_dim"], **recipe["projector"]}
    unet.setdefault("image_tokens_per_frame", projector["queries"] // frames)
    variant = Variant(
        name="starter",
        height=size,
        width=size,
        prediction=noise.prediction,
        zero_terminal_snr=noise.zero_terminal_snr,
        rescale_base=None,
        image_gate=bool(unet.get("image_gate")),
        spacing=sampling.spacing,
        guidance_rescale=sampling.guidance_rescale,
        speed="frame stride",
        speed_default=sampling.motion,
        speed_range=(int(MOTION_RANGE[0]), int(MOTION_RANGE[1])),
        more_is_faster=True,
        frame_by_frame=True,
        frames=frames,
        latent_scale=1.0,
        spatial_factor=SPATIAL_FACTOR,
        steps=sampling.steps,
        eta=sampling.eta,
        guidance=sampling.text_scale,
    )
    return AnimateFoundation(
        variant=variant,
        shapes=_shapes(unet, projector, {**words, "vocabulary": list(WORDS)}, image, size),
        start=None,
        words={**words, "vocabulary": list(WORDS)},
        image={**image, "size": size},
        vae=config,
        metadata={"sampling": sampling.stored, "phases": []},
        codec=lambda device: StarterFrameCodec(autoencoder.eval().requires_grad_(False).to(device)),
        encoders=None,
    )


def _continued(recipe: Recipe, start: DynamiCrafterCheckpoint) -> AnimateFoundation:
    """A starter's next phase: shapes, autoencoder and encoders are the start's."""
    metadata = start.metadata
    sampling = AnimateSampling.of({**metadata.get("sampling", {}), **recipe.get("sampling", {})})
    words = {k: metadata["text_encoder"][k] for k in ("tokens", "dim", "vocabulary")}
    image = {k: v for k, v in metadata["image_encoder"].items() if k != "kind"}
    unet = {**start.info.unet, **recipe.get("unet", {})}
    size, frames = recipe["data"].get("size", 96), recipe["data"].get("frames", 16)
    if frames != start.variant.frames:
        # What a frame's own tokens are follows from the length.
        unet["image_tokens_per_frame"] = start.info.image_projector["queries"] // frames
    return AnimateFoundation(
        variant=replace(
            start.variant,
            height=size,
            width=size,
            frames=frames,
            spacing=sampling.spacing,
            guidance_rescale=sampling.guidance_rescale,
            speed_default=sampling.motion,
            steps=sampling.steps,
            eta=sampling.eta,
            guidance=sampling.text_scale,
        ),
        shapes=_shapes(unet, start.info.image_projector, words, image, image["size"]),
        start=start,
        words=words,
        image=image,
        vae={k: v for k, v in metadata["vae"].items() if k != "kind"},
        metadata={
            **{k: metadata[k] for k in CARRIED if k in metadata},
            "sampling": sampling.stored,
        },
        codec=lambda device: load_frame_codec(start, None, device),
        encoders=None,
    )


def _shapes(
    unet: Mapping[str, Any],
    projector: Mapping[str, Any],
    words: Mapping[str, Any],
    image: Mapping[str, Any],
    size: int,
) -> Shapes:
    return Shapes(
        unet,
        projector,
        {**words, "vocabulary": len(words["vocabulary"])},
        {**image, "size": size},
    )


def _published(recipe: Recipe, start: DynamiCrafterCheckpoint | None) -> AnimateFoundation:
    """Published weights with frozen encoders, or the paper's first phases towards them."""
    if start is not None:
        variant, unet = start.variant, start.info.unet
        projector = start.info.image_projector or IMAGE_PROJECTOR
        described: Any = start
    else:
        name = recipe.get("variant")
        if name not in VARIANTS or not recipe.get("base"):
            raise LayerLoomError(
                "The recipe names neither an autoencoder nor a start; give start = a checkpoint, "
                f"or base = a UNet's weights and variant = one of {', '.join(VARIANTS)}."
            )
        variant, unet, projector = VARIANTS[name], {}, IMAGE_PROJECTOR
        described = None
    if described is None:
        unet = published_unet(variant)
    unet = {**unet, **recipe.get("unet", {})}
    projector = {**projector, **recipe.get("projector", {})}
    if described is None:
        # What the encoders' loaders ask of a checkpoint.
        described = SimpleNamespace(
            store=SimpleNamespace(name="the recipe's network"),
            metadata={},
            variant=variant,
            info=SimpleNamespace(parts=(), unet=unet, image_projector=projector),
        )
    data = recipe["data"]
    variant = replace(
        variant,
        frames=data.get("frames") or variant.frames,
        height=data.get("height") or variant.height,
        width=data.get("width") or variant.width,
    )
    inside = () if start is None else start.info.parts
    paths = {key: _path(recipe, key, key in inside) for key in PLACES}
    return AnimateFoundation(
        variant=variant,
        shapes=Shapes(unet, projector),
        start=start,
        words=None,
        image=None,
        vae=None,
        metadata={},
        codec=lambda device: load_frame_codec(described, paths["vae"], device),
        encoders=lambda device: (
            load_text_features(described, paths["text_encoder"], device),
            load_image_features(described, paths["image_encoder"], device),
        ),
    )


def _path(recipe: Recipe, key: str, inside: bool) -> Path | None:
    if not recipe.get(key):
        if inside:
            return None
        raise LayerLoomError(f"The recipe needs {PLACES[key]}; name it as {key} = ... .")
    path = Path(recipe[key])
    if not path.exists():
        raise LayerLoomError(f"The recipe's {key} {path} does not exist; check the path.")
    return path
