"""Builds the animation stage from a recipe; or rehearses that on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ..conditioning.encoders import TextFeatures
from ..conditioning.frame_codec import FrameCodec
from ..conditioning.video_encoders import ImageFeatures
from ..errors import LayerLoomError
from ..models.starter_autoencoder import StarterAutoencoder
from ..models.starter_text import WordTokenizer
from .animate import AnimateNetwork, AnimateStage, AnimateTask
from .animate_card import AnimateCard, frame_preview_fit
from .animate_foundation import AnimateFoundation, Recipe, lay_animate_foundation
from .animate_networks import build_animate_network
from .animate_settings import AnimateSampling, ImageSettings, NoiseSettings
from .autoencoder import SpriteData
from .data.clips import ClipParts, ClipSource, open_clips
from .distributed import Processes
from .estimate import GIB
from .foundation import WordSettings
from .settings import TrainingSettings, settings_from

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Progress = Callable[[str, int, int, Mapping[str, float]], None]


def check_animate(recipe: Recipe) -> None:
    """Check the tables of an animation recipe as far as nothing needs to be opened."""
    for name, kind in (
        ("task", AnimateTask),
        ("text", WordSettings),
        ("image", ImageSettings),
        ("noise", NoiseSettings),
    ):
        if name in recipe:
            settings_from(recipe[name], kind)
    if "sampling" in recipe:
        AnimateSampling.of(recipe["sampling"])


def build_animate_stage(
    recipe: Recipe,
    settings: TrainingSettings,
    folder: Path,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> AnimateStage:
    """The stage with its data encoded."""
    found = lay_animate_foundation(recipe)
    task = settings_from(recipe["task"], AnimateTask)
    network = _network(recipe, settings, found)
    if settings.parallel == "fsdp" and any(p.ndim == 0 for p in network.parameters()):
        raise LayerLoomError(
            "parallel = 'fsdp' cannot split the image gates, which are single numbers; use ddp, or "
            "a variant without gates."
        )
    codec = found.codec(processes.device)
    text, image = found.encoders(processes.device) if found.encoders else (None, None)
    source = _data(recipe, found, folder, codec, text, image, processes, progress, note)
    empty = (None, None)
    if text is not None:
        grey = torch.zeros(1, 3, *source.sizes[0], device=processes.device)
        with torch.no_grad():
            empty = (text.encode([""])[0].cpu(), image.encode(grey)[0].cpu())
    source.release()
    tokenizer = (
        WordTokenizer(found.words["vocabulary"], found.words["tokens"]) if found.words else None
    )
    card = _card(recipe, settings, found, task, network, codec)
    for line in _report(network, settings):
        note(line)
    return AnimateStage(
        network, source, task, settings.batch, found.variant, card, tokenizer, empty
    )


def rehearse_animate(recipe: Recipe, settings: TrainingSettings) -> list[str]:
    """Check all that a recipe names on the meta device; lines with what would be trained."""
    found = lay_animate_foundation(recipe)
    settings_from(recipe["task"], AnimateTask)
    network = _network(recipe, settings, found, device="meta")
    lines = []
    if recipe["data"].get("kind", "sprites") == "folder":
        from .data.clip_folder import look_at_clips

        lines = look_at_clips(recipe["data"], found.variant, found.multiple)
    return [*lines, *_report(network, settings)]


def _network(
    recipe: Recipe, settings: TrainingSettings, found: AnimateFoundation, device: str | None = None
) -> AnimateNetwork:
    base = Path(recipe["base"]) if recipe.get("base") else None
    return build_animate_network(
        found.shapes,
        found.start,
        base,
        recipe.get("trainable", "all"),
        TYPES[settings.frozen],
        device,
    )


def _data(
    recipe: Recipe,
    found: AnimateFoundation,
    folder: Path,
    codec: FrameCodec,
    text: TextFeatures | None,
    image: ImageFeatures | None,
    processes: Processes,
    progress: Progress | None,
    note: Callable[[str], None],
) -> ClipSource:
    variant = found.variant
    parts = ClipParts(
        codec=codec,
        frames=variant.frames,
        size=(variant.height, variant.width),
        multiple=found.multiple,
        cache=folder,
        text=text,
        image=image,
        speed=variant.speed,
    )

    def step(phase: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(phase, done, total, {})) if progress else None

    # The first process reads the clips; the others find what it noted.
    if not processes.main:
        processes.wait()
    source = open_clips(recipe["data"], parts, step("checking"))
    if processes.main:
        processes.wait()
    for line in source.describe():
        note(line)
    source.encode(step("encoding"), processes.rank, processes.count)
    processes.wait()
    return source


def _card(
    recipe: Recipe,
    settings: TrainingSettings,
    found: AnimateFoundation,
    task: AnimateTask,
    network: AnimateNetwork,
    codec: FrameCodec,
) -> AnimateCard:
    metadata = dict(found.metadata)
    phase = {"steps": settings.steps, "batch": settings.batch, **asdict(task)}
    metadata["phases"] = [*metadata.get("phases", []), phase]
    autoencoder = codec.model if found.vae is not None else None
    if isinstance(autoencoder, StarterAutoencoder):
        sprites = SpriteData(size=found.variant.height, world="moving")
        metadata.setdefault("preview", frame_preview_fit(autoencoder, sprites))
        metadata["modes"] = ["animate", *(["interpolate", "loop"] if task.ends else [])]
    return AnimateCard(
        variant=found.variant,
        unet=found.shapes.unet,
        image_projector=found.shapes.projector,
        text_encoder={"kind": "words", **found.words} if found.words else None,
        image_encoder={"kind": "patches", **found.image} if found.image else None,
        vae={"kind": "starter", **found.vae} if found.vae is not None else None,
        autoencoder=autoencoder,
        metadata=metadata,
        start=found.start,
        frozen=frozenset(n for n, p in network.named_parameters() if not p.requires_grad),
    )


def _report(network: AnimateNetwork, settings: TrainingSettings) -> list[str]:
    """What is trained, and the memory that follows from weights alone."""
    every = [p.numel() for p in network.parameters()]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    held = (sum(every) - trained) * (2 if settings.frozen == "bf16" else 4)
    # Weights, gradients, AdamW's two numbers and the moving average, in fp32.
    kept = 4 * trained * (2 if settings.offload else 5)
    return [
        f"{sum(every):,} weights, {trained:,} trained; {settings.batch * settings.accumulate} "
        "clips a step and process.",
        f"Weights, gradients, optimiser and average: {(held + kept) / GIB:.2f} GiB, without what "
        "a pass through the network keeps.",
    ]
