"""Builds the stage of clicked regions from a recipe; or rehearses that on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.click import ClickCheckpoint, grown_state, open_click
from ..checkpoints.click_save import save_click
from ..conditioning.frame_codec import StarterFrameCodec
from ..conditioning.video_encoders import load_frame_codec
from ..errors import LayerLoomError
from ..models.follow_your_click import SCALARS, ClickSettings
from ..models.starter_autoencoder import SPATIAL_FACTOR, StarterAutoencoder
from ..models.starter_text import WordEncoder, WordTokenizer
from ..models.video_unet import VideoUNet
from .animate_card import frame_preview_fit
from .autoencoder import SpriteData, load_autoencoder
from .card import below
from .click import ClickNetwork, ClickStage, ClickTask
from .click_world import STRENGTH_RANGE, TOKENS, WORDS
from .data.click_sprites import ClickSprites, open_click_sprites
from .data.clips import ClipParts
from .distributed import Processes
from .settings import TrainingSettings, settings_from

Recipe = Mapping[str, Any]
Progress = Callable[[str, int, int, Mapping[str, float]], None]
TRAINABLE = ("all", "temporal")
# Parts of the UNet's names that "temporal" trains: the paper keeps the spatial layers.
TEMPORAL = ("motion_modules.", "conv_in.", *(f"{name}." for name in SCALARS))


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

    unet: ``VideoUNet`` keywords. words: of the word encoder, the vocabulary as a list. vae: the
    autoencoder's keywords. phases: what was trained before.
    """

    settings: ClickSettings
    unet: dict[str, Any]
    words: dict[str, Any]
    vae: dict[str, Any]
    codec: StarterFrameCodec
    start: ClickCheckpoint | None
    phases: list[dict[str, Any]]

    def build(self, device: str | None = None) -> ClickNetwork:
        """The networks with drawn weights, or without any on the meta device."""
        words = {**self.words, "vocabulary": len(self.words["vocabulary"])}
        with torch.device(device or "cpu"):
            return ClickNetwork(VideoUNet(**self.unet), WordEncoder(**words))


@dataclass(frozen=True)
class ClickCard:
    """Settings of an exported checkpoint, as ``save_click`` takes them."""

    foundation: Foundation
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint in half precision of a ``ClickNetwork``'s state."""
        found = self.foundation
        states = {part: below(state, f"{part}.") for part in ("unet", "text_encoder")}
        save_click(
            path,
            {**states, "vae": found.codec.model.state_dict()},
            settings=found.settings,
            unet=found.unet,
            vae={"kind": "starter", **found.vae},
            text_encoder={"kind": "words", **found.words},
            metadata=self.metadata,
            half=True,
        )


def check_click(recipe: Recipe) -> None:
    """Check the tables of a recipe as far as nothing needs to be opened."""
    for name, kind in (("task", ClickTask), ("text", ClickText), ("sampling", ClickSampling)):
        if name in recipe:
            settings_from(recipe[name], kind)
    if recipe.get("trainable", "all") not in TRAINABLE:
        raise LayerLoomError(
            f"The recipe's trainable is {recipe['trainable']!r}; give one of "
            f"{', '.join(TRAINABLE)}."
        )


def lay_click_foundation(recipe: Recipe) -> Foundation:
    """Read and check what a recipe names.

    Raises:
        LayerLoomError: something is missing or does not fit.
    """
    data = recipe["data"]
    size, frames = data.get("size", 96), data.get("frames", 16)
    start = None
    if recipe.get("start"):
        start = open_click(Path(recipe["start"]))
        start.check()
        if not start.metadata.get("vae"):
            raise LayerLoomError(
                f"{start.store.name} has no starter's autoencoder and words inside, which this "
                "stage trains with; begin from a checkpoint of a starter_click recipe."
            )
    if (start is None) == ("autoencoder" not in recipe):
        raise LayerLoomError(
            "The recipe must name either an autoencoder, to begin from nothing, or a start, which "
            "brings its own."
        )
    if start is None:
        config, model = load_autoencoder(Path(recipe["autoencoder"]))
        codec = StarterFrameCodec(model.eval().requires_grad_(False))
        words = asdict(settings_from(recipe.get("text", {}), ClickText))
        words["vocabulary"] = list(WORDS)
        base: dict[str, Any] = {"context_dim": words["dim"], "scalar_embeddings": SCALARS}
        base |= {"out_channels": model.latent_channels}
        base |= {"in_channels": 2 * model.latent_channels + 1}
        settings, phases = ClickSettings(name="starter", latent_scale=1.0, stride=1.0), []
        before: dict[str, Any] = {}
    else:
        config = {k: v for k, v in start.metadata["vae"].items() if k != "kind"}
        codec = load_frame_codec(start, None, torch.device("cpu"))
        model = codec.model
        words = {k: start.metadata["text_encoder"][k] for k in ("tokens", "dim", "vocabulary")}
        base, settings = start.info.unet, start.variant
        phases = list(start.metadata.get("phases", []))
        before = {
            "steps": settings.steps,
            "guidance": settings.guidance,
            "strength": settings.strength_default,
            "picture": settings.picture,
            "mask": settings.mask,
        }
    if model.temporal_factor != 1:
        raise LayerLoomError(
            f"The autoencoder folds {model.temporal_factor} frames into one, but clicks need one "
            "that codes frame by frame; train starter_animate_autoencoder."
        )
    unet = {**base, **recipe.get("unet", {})}
    if "num_heads" in unet:
        unet.setdefault("head_dim", None)
    levels = len(unet["block_channels"])
    if size % (SPATIAL_FACTOR * 2 ** (levels - 1)):
        raise LayerLoomError(
            f"Clips of {size}x{size} do not divide by {SPATIAL_FACTOR * 2 ** (levels - 1)} pixels, "
            "the autoencoder's factor times the UNet's; choose another size or fewer "
            "block_channels."
        )
    chosen = settings_from({**before, **recipe.get("sampling", {})}, ClickSampling)
    settings = replace(
        settings,
        picture=chosen.picture,
        mask=chosen.mask,
        height=size,
        width=size,
        frames=frames,
        positions=max(frames, settings.positions),
        strength_default=chosen.strength,
        strength_range=STRENGTH_RANGE,
        steps=chosen.steps,
        guidance=chosen.guidance,
    )
    return Foundation(settings, unet, words, config, codec, start, phases)


def build_network(
    found: Foundation, trainable: str = "all", device: str | None = None
) -> ClickNetwork:
    """The networks with their weights, and what is trained marked by ``requires_grad``.

    What the start lacks is added without an effect and trained in any case.

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
            words = found.start.part_state("text_encoder", torch.float32)
            network.text_encoder.load_state_dict(words)
    for name, parameter in network.named_parameters():
        temporal = any(mark in name for mark in TEMPORAL)
        parameter.requires_grad_(trainable == "all" or temporal or name in added)
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
    for part in (network.text_encoder.word, network.text_encoder.position):
        nn.init.normal_(part.weight, std=0.5)


def build_click_stage(
    recipe: Recipe,
    settings: TrainingSettings,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> ClickStage:
    """The stage with its data encoded."""
    found = lay_click_foundation(recipe)
    task = settings_from(recipe["task"], ClickTask)
    network = build_network(found, recipe.get("trainable", "all"))
    found.codec.model.to(processes.device)
    source = _data(recipe, found, folder, processes, progress, note)
    phase = {"steps": settings.steps, "batch": settings.batch, **asdict(task)}
    metadata: dict[str, Any] = {
        "phases": [*found.phases, phase],
        "preview": _preview(found),
        "motion": "v2" if (found.unet.get("motion_modules") or {}).get("middle") else "v1",
    }
    note(_report(network, settings))
    return ClickStage(
        network,
        source,
        task,
        settings.batch,
        found.settings,
        ClickCard(found, metadata),
        WordTokenizer(found.words["vocabulary"], found.words["tokens"]),
    )


def rehearse_click(recipe: Recipe, settings: TrainingSettings) -> list[str]:
    """Check all that a recipe names on the meta device; lines with what would be trained."""
    found = lay_click_foundation(recipe)
    settings_from(recipe["task"], ClickTask)
    open_click_sprites(recipe["data"], _parts(found, Path()))
    network = build_network(found, recipe.get("trainable", "all"), device="meta")
    return [_report(network, settings)]


def _parts(found: Foundation, folder: Path) -> ClipParts:
    size = (found.settings.height, found.settings.width)
    return ClipParts(found.codec, found.settings.frames, size, SPATIAL_FACTOR, folder)


def _data(
    recipe: Recipe,
    found: Foundation,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> ClickSprites:
    source = open_click_sprites(recipe["data"], _parts(found, folder))
    for line in source.describe():
        note(line)
    step = (lambda done, total: progress("encoding", done, total, {})) if progress else None
    source.encode(step, processes.rank, processes.count)
    processes.wait()
    return source


def _preview(found: Foundation) -> dict[str, list]:
    model: StarterAutoencoder = found.codec.model
    device = next(model.parameters()).device
    fit = frame_preview_fit(model.cpu(), SpriteData(size=found.settings.height, world="moving"))
    model.to(device)
    return fit


def _report(network: ClickNetwork, settings: TrainingSettings) -> str:
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return f"{count:,} weights, {trained:,} trained; {settings.batch} clips a step and process."
