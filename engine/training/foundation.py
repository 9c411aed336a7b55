"""What a layered stage stands on: shapes, start, autoencoder and text, as a recipe names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.load import Checkpoint, open_checkpoint
from ..conditioning.encoders import (
    CogVideoXCodec,
    StarterCodec,
    TextFeatures,
    VideoCodec,
    load_codec,
    load_text,
)
from ..conditioning.layers import RGB, RGBA, LayerSequence
from ..errors import LayerLoomError
from ..models.layerflow import FRAMES_PER_SECOND, PIXEL_SIZE
from ..models.starter_autoencoder import StarterAutoencoder
from .autoencoder import SpriteData, load_autoencoder
from .card import carried_metadata
from .settings import settings_from
from .sprite_world import VOCABULARY


@dataclass(frozen=True)
class WordSettings:
    """The ``[text]`` table: the starter's word encoder."""

    tokens: int
    dim: int = 64


class Lazy:
    """A frozen part that is loaded when it is first used and can be let go."""

    def __init__(self, load: Callable[[], Any]):
        self._load, self._part = load, None

    @property
    def part(self) -> Any:
        if self._part is None:
            self._part = self._load()
        return self._part

    def release(self) -> None:
        """Free its memory; the next use loads it again."""
        self._part = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class LazyCodec(Lazy):
    """CogVideoX's autoencoder, as ``VideoCodec``."""

    spatial_factor, temporal_factor = CogVideoXCodec.spatial_factor, CogVideoXCodec.temporal_factor

    @property
    def vae(self) -> Any:
        return self.part.vae

    def encode(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.part.encode(clip, generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.part.decode(latents)

    def pixel_frames(self, latent_frames: int) -> int:
        return CogVideoXCodec.pixel_frames(self, latent_frames)


class LazyText(Lazy):
    """T5, as ``TextFeatures``."""

    @property
    def model(self) -> Any:
        return self.part.model

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return self.part.encode(prompts)

    def notes(self, prompts: Sequence[str]) -> list[str]:
        return self.part.notes(prompts)


@dataclass
class Foundation:
    """Everything but the weights, the data and how long to train.

    Attributes:
        transformer: keywords of ``LayeredTransformer``.
        start: the checkpoint to begin with.
        words: a word encoder's "tokens", "dim" and "vocabulary" (a list); None with T5.
        sequence, size: layers of a clip, (height, width) in pixels.
        codec, text: frozen parts; ``text`` is None where words are read.
        autoencoder, autoencoder_config: the starter's, which go into exported files.
        variant, sampling, metadata: what an exported checkpoint says.
    """

    transformer: dict[str, Any]
    start: Checkpoint | None
    words: dict[str, Any] | None
    sequence: LayerSequence
    size: tuple[int, int]
    codec: VideoCodec
    text: TextFeatures | None
    autoencoder: StarterAutoencoder | None
    autoencoder_config: dict[str, Any] | None
    variant: str
    sampling: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        """Sides of a clip divide by this many pixels."""
        return self.codec.spatial_factor * self.transformer.get("patch_size", 2)

    @property
    def prompt_tokens(self) -> int:
        """Text tokens of all prompts together."""
        each = self.words["tokens"] if self.words else self._t5_tokens
        return 3 * each

    @property
    def _t5_tokens(self) -> int:
        return (self.metadata.get("text") or {}).get("tokens_per_prompt", 226)

    @property
    def word_encoder(self) -> dict[str, Any] | None:
        """Keywords of ``WordEncoder``."""
        if self.words is None:
            return None
        return {**self.words, "vocabulary": len(self.words["vocabulary"])}

    def check_size(self) -> None:
        """Raise LayerLoomError for clips that cannot be cut into patches or latent frames."""
        height, width = self.size
        if height % self.multiple or width % self.multiple or min(self.size) < self.multiple:
            raise LayerLoomError(
                f"Clips of {width}x{height} do not divide by {self.multiple} pixels, the "
                "autoencoder's factor times the patch; choose another size."
            )
        latents = sum(self.sequence.latent_frames(layer) for layer in self.sequence.layers)
        pixels = sum(self.sequence.pixel_frames(layer) for layer in self.sequence.layers)
        if self.codec.pixel_frames(latents) != pixels:
            raise LayerLoomError(
                f"{self.sequence.frames} frames a layer make {latents} latent frames, which the "
                f"autoencoder does not decode to {pixels} frames; use "
                f"{self.sequence.frames + self.sequence.temporal_factor}."
            )


def lay_foundation(recipe: Mapping[str, Any], device: torch.device) -> Foundation:
    """Read and check what a "layered" or "lora" recipe names; large parts are not loaded.

    With ``autoencoder`` the recipe describes a starter of its own ([transformer], [text]); without
    it everything comes from ``start``, and [transformer] changes single entries.

    Raises:
        LayerLoomError: something is missing or does not fit.
    """
    start = None
    if recipe.get("start"):
        start = open_checkpoint(Path(recipe["start"]))
        start.check()
    made = _own(recipe, start) if "autoencoder" in recipe else _of_start(recipe, start, device)
    made.check_size()
    if made.autoencoder is not None:
        made.autoencoder.eval().requires_grad_(False)
    return made


def _own(recipe: Mapping[str, Any], start: Checkpoint | None) -> Foundation:
    text = settings_from(recipe["text"], WordSettings)
    sprites = _sprites(recipe)
    config, autoencoder = load_autoencoder(Path(recipe["autoencoder"]))
    return Foundation(
        transformer=dict(recipe["transformer"]),
        start=start,
        words={"tokens": text.tokens, "dim": text.dim, "vocabulary": list(VOCABULARY)},
        sequence=LayerSequence(frames=sprites.frames),
        size=(sprites.size, sprites.size),
        codec=StarterCodec(autoencoder),
        text=None,
        autoencoder=autoencoder,
        autoencoder_config=config,
        variant="starter",
        sampling=dict(recipe["sampling"]),
        metadata={"video": _video(sprites.size, sprites.size)},
    )


def _of_start(
    recipe: Mapping[str, Any], start: Checkpoint | None, device: torch.device
) -> Foundation:
    if start is None:
        raise LayerLoomError(
            "The recipe names neither an autoencoder nor a start; give start = a checkpoint."
        )
    metadata = start.metadata
    transformer = {**start.info.transformer, **recipe.get("transformer", {})}
    settings, autoencoder, config = metadata.get("vae"), None, None
    if settings:
        config = {key: value for key, value in settings.items() if key != "kind"}
        codec = load_codec(start, None, torch.device("cpu"))
        autoencoder = codec.model
    else:
        vae = _existing(recipe, "vae", "the CogVideoX autoencoder's file or folder")
        codec = LazyCodec(lambda: load_codec(start, vae, device))
    words, text = metadata.get("text_encoder"), None
    if words:
        words = {key: words[key] for key in ("tokens", "dim", "vocabulary")}
    else:
        folder = _existing(recipe, "text_encoder", "a folder with T5-XXL and its tokenizer")
        _check_t5(folder, transformer["text_embed_dim"])
        text = LazyText(lambda: load_text(start, folder, device))
    sequence, size = _clip(recipe, metadata)
    variant = recipe.get("variant") or (
        start.info.variant if metadata.get("sequence") else "layered"
    )
    notes = {**carried_metadata(start), "video": _video(*size)}
    if not words:
        notes.setdefault("text", {"prompts": 3, "tokens_per_prompt": 226})
    return Foundation(
        transformer=transformer,
        start=start,
        words=words,
        sequence=sequence,
        size=size,
        codec=codec,
        text=text,
        autoencoder=autoencoder,
        autoencoder_config=config,
        variant=variant,
        sampling={**metadata["sampling"], **recipe.get("sampling", {})},
        metadata=notes,
    )


def _sprites(recipe: Mapping[str, Any]) -> SpriteData:
    known = {k: v for k, v in recipe["data"].items() if k in ("frames", "size", "seed")}
    return settings_from(known, SpriteData)


def _clip(
    recipe: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[LayerSequence, tuple[int, int]]:
    """Sequence and size: the data's where it says them, else the start's, else LayerFlow's."""
    if recipe["data"].get("kind", "sprites") == "sprites":
        sprites = _sprites(recipe)
        return LayerSequence(frames=sprites.frames), (sprites.size, sprites.size)
    stored, video = metadata.get("sequence"), metadata.get("video") or {}
    if stored:
        sequence = LayerSequence(**{**stored, "layers": tuple(stored["layers"])})
    else:
        sequence = LayerSequence(_layers(recipe.get("layers", "rgba")))
    if "layers" in recipe and sequence.layers != _layers(recipe["layers"]):
        raise LayerLoomError(
            f"The recipe's layers is {recipe['layers']!r}, but the start makes "
            f"{', '.join(sequence.layers)}; leave it out."
        )
    # The data's own entries, 0 where it leaves them open.
    frames, height, width = (
        recipe["data"].get(name) or default
        for name, default in (
            ("frames", sequence.frames),
            ("height", video.get("height", PIXEL_SIZE[0])),
            ("width", video.get("width", PIXEL_SIZE[1])),
        )
    )
    return replace(sequence, frames=frames), (height, width)


def _layers(name: str) -> tuple[str, ...]:
    if name not in ("rgba", "rgb"):
        raise LayerLoomError(f"The recipe's layers is {name!r}; use rgba or rgb.")
    return RGBA if name == "rgba" else RGB


def _video(height: int, width: int) -> dict[str, int]:
    return {"frames_per_second": FRAMES_PER_SECOND, "height": height, "width": width}


def _existing(recipe: Mapping[str, Any], key: str, what: str) -> Path:
    if not recipe.get(key):
        raise LayerLoomError(f"The recipe's start needs {what}; name it as {key} = ... .")
    path = Path(recipe[key])
    if not path.exists():
        raise LayerLoomError(f"The recipe's {key} {path} does not exist; give {what}.")
    return path


def _check_t5(folder: Path, width: int) -> None:
    """The width a T5 folder's settings state, before gigabytes are read."""
    inside = folder / "text_encoder" / "config.json"
    file = inside if inside.is_file() else folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["d_model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LayerLoomError(
            f"The recipe's text_encoder {folder} is no T5 folder: {file.name} with d_model is "
            "missing; give the text_encoder and tokenizer folders of CogVideoX-2b."
        ) from None
    if found != width:
        raise LayerLoomError(
            f"The recipe's text_encoder {folder} makes features {found} wide, but the start reads "
            f"{width}; give the T5-XXL of CogVideoX-2b."
        )
