"""What the stage of subjects along boxes stands on: settings, shapes, start and frozen parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.click import grown_state
from ..checkpoints.dreamvideo import TrajectoryCheckpoint, open_trajectory
from ..checkpoints.dreamvideo_detect import BASE_NAME, TrajectoryInfo
from ..conditioning.encoders import TextFeatures
from ..conditioning.frame_codec import FrameCodec, StarterFrameCodec
from ..conditioning.video_encoders import load_frame_codec, load_text_features
from ..errors import LayerLoomError
from ..models.dreamvideo import DreamVideo, TrajectorySettings
from ..models.starter_text import WordEncoder
from ..sampling.guidance import DROPS
from .animator_start import AnimatorStart, open_animator, starter_parts, without_picture
from .autoencoder import load_autoencoder
from .moving_world import WORDS
from .settings import settings_from
from .trajectory import TrajectoryNetwork
from .trajectory_world import TOKENS

Recipe = Mapping[str, Any]
TRAINABLE = ("all", "additions")


@dataclass(frozen=True)
class TrajectoryText:
    """The ``[text]`` table: the starter's word encoder."""

    tokens: int = TOKENS
    dim: int = 64


@dataclass(frozen=True)
class ControlSettings:
    """The ``[control]`` table: the box encoder's stem, and its heads over time."""

    widths: tuple[int, ...] = (16, 32, 96, 256)
    heads: int = 8


@dataclass(frozen=True)
class TrajectorySampling:
    """The ``[sampling]`` table: defaults that an exported starter carries."""

    steps: int = 25
    guidance: float = 2.0
    guidance_drops: str = "text"
    reference_weight: float = 0.75

    def __post_init__(self):
        if self.guidance_drops not in DROPS:
            raise LayerLoomError(
                f"The recipe's sampling.guidance_drops is {self.guidance_drops!r}; use one of "
                f"{', '.join(DROPS)}."
            )
        if self.steps < 1 or self.guidance < 0 or not 0 <= self.reference_weight <= 1:
            raise LayerLoomError(
                "The recipe's sampling.steps must be 1 or more, sampling.guidance 0 or more and "
                "sampling.reference_weight within 0 and 1."
            )


@dataclass(frozen=True)
class Foundation:
    """Everything but the data and how long to train.

    network: ``DreamVideo`` keywords but for its settings. words: of the starter's word encoder, the
    vocabulary as a list; None where a frozen encoder is used. vae: the starter's autoencoder's
    keywords, or None. codec, text: load the frozen parts. phases: what was trained before.
    """

    settings: TrajectorySettings
    network: dict[str, Any]
    words: dict[str, Any] | None
    vae: dict[str, Any] | None
    codec: Callable[[torch.device], FrameCodec]
    text: Callable[[torch.device], TextFeatures] | None
    start: TrajectoryCheckpoint | AnimatorStart | None
    phases: list[dict[str, Any]]

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        levels = len(self.network["unet"]["block_channels"])
        return self.settings.spatial_factor * 2 ** (levels - 1)

    def build(self, device: str | None = None) -> TrajectoryNetwork:
        """The networks with drawn weights, or without any on the meta device."""
        with torch.device(device or "cpu"):
            words = None
            if self.words is not None:
                count = len(self.words["vocabulary"])
                words = WordEncoder(**{**self.words, "vocabulary": count})
            return TrajectoryNetwork(DreamVideo(**self.network, settings=self.settings), words)


def lay_trajectory_foundation(recipe: Recipe) -> Foundation:
    """Read and check what a recipe names.

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
        made = _fresh(recipe)
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
    control = made.network["control"]
    if control and 2 ** (len(control["widths"]) - 1) != made.settings.spatial_factor:
        raise LayerLoomError(
            f"The recipe's control.widths halve a side {len(control['widths']) - 1} times and the "
            f"autoencoder makes it {made.settings.spatial_factor} times smaller; give one width "
            "more than halvings."
        )
    return made


def _open_start(recipe: Recipe) -> TrajectoryCheckpoint | AnimatorStart:
    path, base = Path(recipe["start"]), recipe.get("base") or None
    transformers = recipe.get("unet", {}).get("temporal_transformer", True)
    animator = open_animator(path, TOKENS, without_picture, transformers)
    if animator is not None:
        return animator
    start = open_trajectory(path, None if base is None else Path(base))
    if start.info.needs_base:
        raise LayerLoomError(
            f"{start.store.name} holds what was added to a base and not the base; name that as "
            "base = ... ."
        )
    return start


def _fresh(recipe: Recipe) -> Foundation:
    """A network described by the recipe alone."""
    config, model = load_autoencoder(Path(recipe["autoencoder"]))
    if model.temporal_factor != 1:
        raise LayerLoomError(
            f"The autoencoder folds {model.temporal_factor} frames into one, but paths need one "
            "that codes frame by frame; train starter_animate_autoencoder."
        )
    words = asdict(settings_from(recipe.get("text", {}), TrajectoryText))
    words["vocabulary"] = list(WORDS)
    unet = {
        "context_dim": words["dim"],
        "in_channels": model.latent_channels,
        "out_channels": model.latent_channels,
        **recipe["unet"],
    }
    if "num_heads" in unet:
        unet.setdefault("head_dim", None)
    frozen = model.eval().requires_grad_(False)
    return Foundation(
        settings=_sampled(recipe, TrajectorySettings(name="starter", latent_scale=1.0), {}),
        network={"unet": unet, **_additions(recipe, False, None)},
        words=words,
        vae=config,
        codec=lambda device: StarterFrameCodec(frozen.to(device)),
        text=None,
        start=None,
        phases=[],
    )


def _on_animator(recipe: Recipe, start: AnimatorStart) -> Foundation:
    """A base that begins with an animator's network and keeps its noise schedule."""
    variant = start.checkpoint.variant
    settings = TrajectorySettings(
        name="starter",
        latent_scale=1.0,
        prediction=variant.prediction,
        zero_terminal_snr=variant.zero_terminal_snr,
    )
    return Foundation(
        settings=_sampled(recipe, settings, {}),
        network={
            "unet": {**start.unet, **recipe.get("unet", {})},
            **_additions(recipe, False, None),
        },
        **starter_parts(start.metadata),
        codec=lambda device: load_frame_codec(start.checkpoint, None, device),
        text=None,
        start=start,
        phases=[],
    )


def _continued(recipe: Recipe, start: TrajectoryCheckpoint) -> Foundation:
    """A starter's next phase: shapes, autoencoder and words are the start's."""
    info = start.info
    return Foundation(
        settings=_sampled(recipe, start.variant, _before(start.variant), info),
        network={"unet": info.unet, **_additions(recipe, info.reference, info.control)},
        **starter_parts(start.metadata),
        codec=lambda device: load_frame_codec(start, None, device),
        text=None,
        start=start,
        phases=list(start.metadata.get("phases", [])),
    )


def _published(recipe: Recipe, start: TrajectoryCheckpoint) -> Foundation:
    """ModelScope's text-to-video, or what was added to it, with frozen encoders."""
    paths: dict[str, Path | None] = {}
    for part in ("vae", "text_encoder"):
        # A folder in diffusers' layout brings what a file of weights does not.
        folders = [recipe.get("base"), recipe["start"]]
        around = next((f for f in folders if f and Path(f).is_dir()), None)
        given = recipe.get(part) or (around if part not in start.info.parts else None)
        if not given and part not in start.info.parts:
            raise LayerLoomError(
                f"The recipe needs ModelScope's {part.replace('_', ' ')}, a file or a folder; name "
                f"it as {part} = ..., or give all of the weights as a folder."
            )
        paths[part] = Path(given) if given else None
        if given and not paths[part].exists():
            raise LayerLoomError(f"The recipe's {part} {given} does not exist; check the path.")
    info, settings = start.info, start.variant
    if settings.name == BASE_NAME:
        settings = replace(settings, name=TrajectorySettings.name)
    return Foundation(
        settings=_sampled(recipe, settings, _before(settings), info),
        network={"unet": info.unet, **_additions(recipe, info.reference, info.control)},
        words=None,
        vae=None,
        codec=lambda device: load_frame_codec(start, paths["vae"], device),
        text=lambda device: load_text_features(start, paths["text_encoder"], device),
        start=start,
        phases=list(start.metadata.get("phases", [])),
    )


def _before(settings: TrajectorySettings) -> dict[str, Any]:
    return {
        "steps": settings.steps,
        "guidance": settings.guidance,
        "guidance_drops": settings.guidance_drops,
        "reference_weight": settings.reference_weight,
    }


def _additions(
    recipe: Recipe, reference: bool, control: Mapping[str, Any] | None
) -> dict[str, Any]:
    if "control" in recipe:
        table = dict(recipe["control"])
        if "widths" in table:
            table["widths"] = tuple(table["widths"])
        control = asdict(settings_from(table, ControlSettings))
    return {"reference": recipe.get("reference", reference), "control": control}


def _sampled(
    recipe: Recipe,
    settings: TrajectorySettings,
    before: Mapping[str, Any],
    start: TrajectoryInfo | None = None,
) -> TrajectorySettings:
    """The settings with the recipe's sampling, size, length and kind of reference attention.

    Raises:
        LayerLoomError: the start has reference attention, and of the other kind.
    """
    placed = recipe.get("placed_reference", settings.placed_reference)
    if start is not None and start.reference and placed != settings.placed_reference:
        raise LayerLoomError(
            f"The recipe's placed_reference is {str(placed).lower()} and {recipe['start']} was "
            "trained otherwise; leave it out, or start from a base."
        )
    chosen = settings_from({**before, **recipe.get("sampling", {})}, TrajectorySampling)
    data = recipe["data"]
    starter = settings.latent_scale == 1.0
    size = data.get("size", 96) if starter else None
    return replace(
        settings,
        height=size or data.get("height") or settings.height,
        width=size or data.get("width") or settings.width,
        frames=data.get("frames") or settings.frames,
        placed_reference=placed,
        steps=chosen.steps,
        guidance=chosen.guidance,
        guidance_drops=chosen.guidance_drops,
        reference_weight=chosen.reference_weight,
    )


def build_network(
    found: Foundation,
    trainable: str | None = None,
    frozen: torch.dtype = torch.float32,
    device: str | None = None,
) -> TrajectoryNetwork:
    """The networks with their weights, and what is trained marked by ``requires_grad``.

    trainable: "all", or "additions" to the base; None is all of a new base, else the additions.
    frozen: type of weights that are not trained.

    Raises:
        LayerLoomError: nothing would be trained, or weights that do not fit.
    """
    network = found.build(device)
    start = found.start
    if device != "meta":
        _give_weights(start, network)
    new = start is None or isinstance(start, AnimatorStart)
    only_additions = (trainable or ("all" if new else "additions")) == "additions"
    for name, parameter in network.named_parameters():
        base = name.startswith(("video.unet.", "text_encoder."))
        parameter.requires_grad_(not (only_additions and base))
        if device != "meta" and not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise LayerLoomError(
            "The recipe trains additions to the base and adds none; write reference = true and a "
            "table [control], or trainable = 'all'."
        )
    return network


def _give_weights(
    start: TrajectoryCheckpoint | AnimatorStart | None, network: TrajectoryNetwork
) -> None:
    """The start's weights, and drawn ones for what it lacks."""
    if start is None or isinstance(start, AnimatorStart):
        initialise(network)
        if start is not None:
            _take_over(start, network)
        return
    video = network.video
    for part in start.networks:
        own = getattr(video, part)
        if own is not None and part in start.plan:
            own.load_state_dict(start.part_state(part, torch.float32))
    if network.text_encoder is not None:
        words = start.part_state("text_encoder", torch.float32)
        network.text_encoder.load_state_dict(words)
    if "control" not in start.plan:
        video.start_from_base()


def _take_over(start: AnimatorStart, network: TrajectoryNetwork) -> None:
    """Give a base an animator's weights, but for transformers where it has none.

    Transformers that the animator lacks keep their own weights, which have no effect at first.

    Raises:
        LayerLoomError: weights of another shape than the recipe's network.
    """
    unet = network.video.unet
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    state = start.part_state("unet", torch.float32)
    kept = {name: t for name, t in state.items() if name in shapes or "attentions." not in name}
    grown = grown_state(kept, shapes)
    strange = sorted(n for n in shapes.keys() - grown.keys() if "attentions." not in n)
    if strange:
        raise LayerLoomError(
            f"{start.store.name} does not fit the recipe's network: {strange[0]} is missing; of "
            "its [unet] give attention_levels and temporal_transformer alone."
        )
    unet.load_state_dict(grown, strict=False)
    network.text_encoder.load_state_dict(start.part_state("text_encoder", torch.float32))


def initialise(network: TrajectoryNetwork) -> None:
    """A starter's first weights: small normal words, and residual branches that begin at zero."""
    for name, module in network.video.unet.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name.endswith(("conv2", "proj_out", "conv_out", "conv4.3")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    for part in (network.text_encoder.word, network.text_encoder.position):
        nn.init.normal_(part.weight, std=0.5)
