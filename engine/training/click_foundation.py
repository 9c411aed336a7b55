"""What the stage of clicked regions stands on: settings, shapes, start and frozen parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.click import ClickCheckpoint, grown_state, open_click
from ..checkpoints.click_detect import PUBLISHED
from ..conditioning.click_encoders import load_click_text
from ..conditioning.encoders import TextFeatures
from ..conditioning.frame_codec import FrameCodec, StarterFrameCodec
from ..conditioning.video_encoders import load_frame_codec
from ..errors import LayerLoomError
from ..models.follow_your_click import SCALARS, ClickSettings
from ..models.starter_autoencoder import StarterAutoencoder
from ..models.starter_text import WordEncoder
from ..models.video_unet import VideoUNet
from .animator_start import AnimatorStart, open_animator, starter_parts, with_mask
from .autoencoder import load_autoencoder
from .click import ClickNetwork
from .click_world import STRENGTH_RANGE, TOKENS
from .moving_world import WORDS
from .settings import settings_from

Recipe = Mapping[str, Any]
# Parts of the UNet's names that "temporal" trains: the paper keeps the spatial layers.
TEMPORAL = ("motion_modules.", "conv_in.", *(f"{name}." for name in SCALARS))
STARTER = ClickSettings(name="starter", latent_scale=1.0, stride=1.0, strength_range=STRENGTH_RANGE)


@dataclass(frozen=True)
class ClickText:
    """The ``[text]`` table: the starter's word encoder."""

    tokens: int = TOKENS
    dim: int = 64


@dataclass(frozen=True)
class ClickSampling:
    """The ``[sampling]`` table: defaults that an exported starter carries.

    picture, mask: "first" or "all", the frames that they are joined to; see ``ClickSettings``.
    """

    steps: int = 25
    guidance: float = 2.0
    strength: float = 8.0
    picture: str = "all"
    mask: str = "all"

    def __post_init__(self):
        if self.picture not in ("first", "all") or self.mask not in ("first", "all"):
            raise LayerLoomError(
                "The recipe's sampling.picture and sampling.mask say where they go; write first or "
                "all."
            )
        if self.steps < 1 or self.guidance < 0:
            raise LayerLoomError(
                "The recipe's sampling.steps must be 1 or more and sampling.guidance 0 or more."
            )


@dataclass(frozen=True)
class Foundation:
    """Everything but the data and how long to train.

    unet: ``VideoUNet`` keywords. words: of the starter's word encoder, the vocabulary as a list;
    None where a frozen encoder is used. vae: the starter's autoencoder's keywords, or None.
    codec, text: load the frozen parts. phases: what was trained before.
    """

    settings: ClickSettings
    unet: dict[str, Any]
    words: dict[str, Any] | None
    vae: dict[str, Any] | None
    codec: Callable[[torch.device], FrameCodec]
    text: Callable[[torch.device], TextFeatures] | None
    start: ClickCheckpoint | AnimatorStart | None
    phases: list[dict[str, Any]]

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        return self.settings.spatial_factor * 2 ** (len(self.unet["block_channels"]) - 1)

    def build(self, device: str | None = None) -> ClickNetwork:
        """The networks with drawn weights, or without any on the meta device."""
        with torch.device(device or "cpu"):
            words = None
            if self.words is not None:
                count = len(self.words["vocabulary"])
                words = WordEncoder(**{**self.words, "vocabulary": count})
            return ClickNetwork(VideoUNet(**self.unet), words)


def lay_click_foundation(recipe: Recipe) -> Foundation:
    """Read and check what a recipe names; large parts are not loaded.

    Raises:
        LayerLoomError: something is missing or does not fit.
    """
    start = None
    if recipe.get("start"):
        start = _open_start(recipe)
        start.check()
    if (start is None) == ("autoencoder" not in recipe):
        raise LayerLoomError(
            "The recipe must name either an autoencoder, to begin from nothing, or a start, which "
            "brings its own."
        )
    if start is None:
        made = _starter(recipe)
    elif isinstance(start, AnimatorStart):
        made = _on_animator(recipe, start)
    elif start.metadata.get("vae"):
        made = _continued(recipe, start)
    else:
        made = _published(recipe, start)
    height, width = made.settings.height, made.settings.width
    if height % made.multiple or width % made.multiple:
        raise LayerLoomError(
            f"Clips of {width}x{height} do not divide by {made.multiple} pixels, the autoencoder's "
            "factor times the UNet's; choose another size or fewer block_channels."
        )
    return made


def _open_start(recipe: Recipe) -> ClickCheckpoint | AnimatorStart:
    path, base = Path(recipe["start"]), recipe.get("base") or None
    transformers = recipe.get("unet", {}).get("temporal_transformer", True)
    animator = open_animator(path, TOKENS, with_mask, transformers)
    return animator or open_click(path, None if base is None else Path(base))


def _starter(recipe: Recipe) -> Foundation:
    """A starter described by the recipe alone."""
    config, model = load_autoencoder(Path(recipe["autoencoder"]))
    _check_frame_by_frame(model)
    words = asdict(settings_from(recipe.get("text", {}), ClickText))
    words["vocabulary"] = list(WORDS)
    unet: dict[str, Any] = {
        "context_dim": words["dim"],
        "scalar_embeddings": SCALARS,
        "in_channels": 2 * model.latent_channels + 1,
        "out_channels": model.latent_channels,
        **recipe["unet"],
    }
    if "num_heads" in unet:
        unet.setdefault("head_dim", None)
    frozen = model.eval().requires_grad_(False)
    return Foundation(
        settings=_sampled(recipe, STARTER, {}),
        unet=unet,
        words=words,
        vae=config,
        codec=lambda device: StarterFrameCodec(frozen.to(device)),
        text=None,
        start=None,
        phases=[],
    )


def _on_animator(recipe: Recipe, start: AnimatorStart) -> Foundation:
    """A starter that begins with an animator's network, as the paper's with Stable Diffusion."""
    return Foundation(
        settings=_sampled(recipe, STARTER, {}),
        unet={**start.unet, "scalar_embeddings": SCALARS, **recipe.get("unet", {})},
        **starter_parts(start.metadata),
        codec=lambda device: load_frame_codec(start.checkpoint, None, device),
        text=None,
        start=start,
        phases=[],
    )


def _continued(recipe: Recipe, start: ClickCheckpoint) -> Foundation:
    """A starter's next phase: shapes, autoencoder and words are the start's."""
    return Foundation(
        settings=_sampled(recipe, start.variant, _before(start.variant)),
        unet={**start.info.unet, **recipe.get("unet", {})},
        **starter_parts(start.metadata),
        codec=lambda device: load_frame_codec(start, None, device),
        text=None,
        start=start,
        phases=list(start.metadata.get("phases", [])),
    )


def _published(recipe: Recipe, start: ClickCheckpoint) -> Foundation:
    """Stable Diffusion 1.5 with motion modules, or what was made of it, with frozen encoders.

    What Follow-Your-Click's network has beyond the start, the paper's module among it, is added.
    """
    paths = {}
    for part in ("vae", "text_encoder"):
        given = recipe.get(part) or (recipe.get("base") if part not in start.info.parts else None)
        if not given and part not in start.info.parts:
            raise LayerLoomError(
                f"The recipe needs Stable Diffusion 1.5's {part.replace('_', ' ')}, a file or a "
                f"folder; name it as {part} = ... ."
            )
        paths[part] = Path(given) if given else None
        if given and not paths[part].exists():
            raise LayerLoomError(f"The recipe's {part} {given} does not exist; check the path.")
    channels = start.info.unet["out_channels"]
    unet = {
        **start.info.unet,
        "in_channels": 2 * channels + 1,
        "scalar_embeddings": SCALARS,
        **recipe.get("unet", {}),
    }
    settings = start.variant
    if not settings.reads_regions:
        settings = replace(PUBLISHED["follow-your-click"], positions=settings.positions)
    settings = replace(settings, name="click")
    return Foundation(
        settings=_sampled(recipe, settings, _before(settings)),
        unet=unet,
        words=None,
        vae=None,
        codec=lambda device: load_frame_codec(start, paths["vae"], device),
        text=lambda device: load_click_text(start, paths["text_encoder"], device),
        start=start,
        phases=list(start.metadata.get("phases", [])),
    )


def _before(settings: ClickSettings) -> dict[str, Any]:
    return {
        "steps": settings.steps,
        "guidance": settings.guidance,
        "strength": settings.strength_default,
        "picture": settings.picture,
        "mask": settings.mask,
    }


def _sampled(recipe: Recipe, settings: ClickSettings, before: Mapping[str, Any]) -> ClickSettings:
    """The settings with the recipe's sampling, size and length."""
    chosen = settings_from({**before, **recipe.get("sampling", {})}, ClickSampling)
    data = recipe["data"]
    starter = settings.latent_scale == 1.0
    size = data.get("size", 96) if starter else None
    frames = data.get("frames", 16)
    return replace(
        settings,
        picture=chosen.picture,
        mask=chosen.mask,
        height=size or data.get("height") or settings.height,
        width=size or data.get("width") or settings.width,
        frames=frames,
        positions=max(frames, settings.positions),
        strength_default=chosen.strength,
        steps=chosen.steps,
        guidance=chosen.guidance,
    )


def _check_frame_by_frame(model: StarterAutoencoder) -> None:
    if model.temporal_factor != 1:
        raise LayerLoomError(
            f"The autoencoder folds {model.temporal_factor} frames into one, but clicks need one "
            "that codes frame by frame; train starter_animate_autoencoder."
        )


def build_network(
    found: Foundation,
    trainable: str = "all",
    frozen: torch.dtype = torch.float32,
    device: str | None = None,
) -> ClickNetwork:
    """The networks with their weights, and what is trained marked by ``requires_grad``.

    What the start lacks is added without an effect and trained in any case. ``frozen`` is the type
    of weights that are not trained.

    Raises:
        LayerLoomError: weights of another shape than the recipe's networks.
    """
    network = found.build(device)
    added: set[str] = set()
    if device != "meta":
        initialise(network)
    if found.start is not None:
        shapes = {k: tuple(t.shape) for k, t in network.unet.state_dict().items()}
        state = found.start.part_state("unet", torch.float32)
        grown = grown_state(state, shapes)
        added = {f"unet.{name}" for name in shapes.keys() - grown.keys()}
        strange = sorted(n for n in added if not any(mark in n for mark in TEMPORAL))
        if strange:
            raise LayerLoomError(
                f"{found.start.store.name} does not fit the recipe's network: {strange[0]} is "
                "missing; take shapes out of the recipe that the start knows itself."
            )
        if device != "meta":
            network.unet.load_state_dict(grown, strict=False)
            if network.text_encoder is not None:
                words = found.start.part_state("text_encoder", torch.float32)
                network.text_encoder.load_state_dict(words)
    for name, parameter in network.named_parameters():
        temporal = any(mark in name for mark in TEMPORAL)
        parameter.requires_grad_(trainable == "all" or temporal or name in added)
        if device != "meta" and not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    return network


def initialise(network: ClickNetwork) -> None:
    """Small normal words, and residual branches that start at zero."""
    for name, module in network.unet.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        last = name.endswith(("conv2", "proj_out", "conv_out", "phrase_attn.to_out.0"))
        if last or name.endswith(tuple(f"{scalar}.linear_2" for scalar in SCALARS)):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    if network.text_encoder is not None:
        for part in (network.text_encoder.word, network.text_encoder.position):
            nn.init.normal_(part.weight, std=0.5)
