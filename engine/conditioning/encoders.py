"""Text encoders and video autoencoders, the starters' and CogVideoX's, behind two interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import LayerLoomError
from ..models.starter_autoencoder import SPATIAL_FACTOR, StarterAutoencoder
from ..models.starter_text import WordEncoder, WordTokenizer

if TYPE_CHECKING:
    from ..checkpoints.load import Checkpoint

WHERE_VAE = "the `vae` folder of the CogVideoX-2b repository (THUDM/CogVideoX-2b on Hugging Face)"
WHERE_TEXT = (
    "the `text_encoder` and `tokenizer` folders of the CogVideoX-2b repository "
    "(THUDM/CogVideoX-2b on Hugging Face)"
)
# CogVideoX-2B's VAE (diffusers' AutoencoderKLCogVideoX defaults); LayerFlow uses it unchanged.
COGVIDEOX_SCALE = 1.15258426


class VideoCodec(Protocol):
    """Pixels [B, F, 3, H, W] in [-1, 1] to standardised latents [B, T, C, h, w] and back."""

    spatial_factor: int
    temporal_factor: int

    def encode(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...

    def pixel_frames(self, latent_frames: int) -> int:
        """How many frames ``decode`` makes of so many latent ones."""


class TextFeatures(Protocol):
    """Prompts to features [prompts, tokens, D]."""

    def encode(self, prompts: Sequence[str]) -> torch.Tensor: ...

    def notes(self, prompts: Sequence[str]) -> list[str]: ...


class StarterCodec:
    """The starters' autoencoder, from the checkpoint itself; it draws no noise."""

    spatial_factor = SPATIAL_FACTOR

    def __init__(self, model: StarterAutoencoder):
        self.model, self.temporal_factor = model, model.temporal_factor

    def encode(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.model.encode(clip)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latents)

    def pixel_frames(self, latent_frames: int) -> int:
        return latent_frames * self.temporal_factor


class CogVideoXCodec:
    """CogVideoX's 3D causal VAE through diffusers; latents are posterior samples, scaled.

    diffusers encodes and decodes a few frames at a time and carries the convolutions' state over,
    where LayerFlow made one pass; GroupNorm statistics, and so pixels, differ slightly.
    """

    spatial_factor, temporal_factor = 8, 4

    def __init__(self, vae: Any):
        self.vae = vae

    def encode(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        frames = clip.transpose(1, 2).to(self.vae.dtype)
        posterior = self.vae.encode(frames).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        latents = posterior.mean + posterior.std * noise
        return latents.transpose(1, 2).float() * COGVIDEOX_SCALE

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = (latents / COGVIDEOX_SCALE).transpose(1, 2).to(self.vae.dtype)
        return self.vae.decode(scaled).sample.transpose(1, 2).float()

    def pixel_frames(self, latent_frames: int) -> int:
        # An odd number starts with one frame of its own, the causal video's first.
        return (latent_frames - latent_frames % 2) * self.temporal_factor + latent_frames % 2


class WordFeatures:
    """The starters' word encoder, from the checkpoint itself."""

    def __init__(self, tokenizer: WordTokenizer, model: WordEncoder):
        self.tokenizer, self.model = tokenizer, model

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        ids = torch.stack([self.tokenizer(prompt) for prompt in prompts])
        return self.model(ids.to(self.model.word.weight.device))

    def notes(self, prompts: Sequence[str]) -> list[str]:
        tokens = self.tokenizer.tokens
        notes = [
            f"A prompt is longer than {tokens} words; its end is cut: {prompt!r}"
            for prompt in prompts
            if len(self.tokenizer.words(prompt)) > tokens
        ]
        unknown = sorted({w for prompt in prompts for w in self.tokenizer.unknown_words(prompt)})
        if unknown:
            notes.append(
                f"The starter does not know {', '.join(repr(word) for word in unknown)}; it was "
                "trained on coloured shapes over plain, striped, checkered or gradient backgrounds."
            )
        return notes


class T5Features:
    """T5-XXL's encoder through transformers, prompts padded to 226 tokens."""

    def __init__(self, tokenizer: Any, model: Any, tokens: int = 226):
        self.tokenizer, self.model, self.tokens = tokenizer, model, tokens

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        batch = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        # CogVideoX passes no attention mask: padding tokens are read like words.
        return self.model(batch.input_ids.to(self.model.device))[0].float()

    def notes(self, prompts: Sequence[str]) -> list[str]:
        long = [p for p in prompts if len(self.tokenizer(p).input_ids) > self.tokens]
        return [
            f"A prompt is longer than {self.tokens} tokens; its end is cut: {p!r}" for p in long
        ]


def load_codec(checkpoint: Checkpoint, path: Path | None, device: torch.device) -> VideoCodec:
    """The checkpoint's own autoencoder, or CogVideoX's from ``path``.

    Raises:
        LayerLoomError: the checkpoint holds none and ``path`` is missing or not one.
    """
    settings = checkpoint.metadata.get("vae")
    if path is None and settings:
        keywords = {key: value for key, value in settings.items() if key != "kind"}
        model = StarterAutoencoder(**keywords)
        model.load_state_dict(checkpoint.part_state("vae"))
        return StarterCodec(model.float().eval().to(device))
    if path is None:
        raise LayerLoomError(
            f"{checkpoint.store.name} needs the CogVideoX VAE: name it with --vae, it is "
            f"{WHERE_VAE}."
        )
    from diffusers import AutoencoderKLCogVideoX

    try:
        if path.is_dir():
            folder = path / "vae" if (path / "vae" / "config.json").exists() else path
            vae = AutoencoderKLCogVideoX.from_pretrained(folder, local_files_only=True)
        else:
            from safetensors.torch import load_file

            vae = AutoencoderKLCogVideoX()
            vae.load_state_dict(load_file(path))
    except Exception as error:  # each library fails in its own way on a wrong file
        raise LayerLoomError(
            f"--vae {path} is not the CogVideoX VAE in diffusers format "
            f"({first_line(error)}); it is {WHERE_VAE}."
        ) from error
    channels, wanted = vae.config.latent_channels, checkpoint.info.transformer["in_channels"]
    if channels != wanted:
        raise LayerLoomError(
            f"--vae {path} has {channels} latent channels and {checkpoint.store.name} reads "
            f"{wanted}; give {WHERE_VAE}."
        )
    return CogVideoXCodec(vae.eval().to(device))


def load_text(checkpoint: Checkpoint, path: Path | None, device: torch.device) -> TextFeatures:
    """The checkpoint's own text encoder, or T5-XXL from the folder ``path``.

    Raises:
        LayerLoomError: the checkpoint holds none and ``path`` is missing or not one.
    """
    settings = checkpoint.metadata.get("text_encoder")
    if path is None and settings:
        tokens, dim = settings["tokens"], settings["dim"]
        words = settings["vocabulary"]
        model = WordEncoder(vocabulary=len(words), tokens=tokens, dim=dim)
        model.load_state_dict(checkpoint.part_state("text_encoder"))
        return WordFeatures(WordTokenizer(words, tokens), model.float().eval().to(device))
    if path is None:
        raise LayerLoomError(
            f"{checkpoint.store.name} needs the T5-XXL text encoder: name its folder with "
            f"--text-encoder, it is {WHERE_TEXT}."
        )
    if not path.is_dir():
        raise LayerLoomError(
            f"--text-encoder {path} is a file; give a folder with T5-XXL and its tokenizer, "
            f"that is {WHERE_TEXT}."
        )
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    tokenizer = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    tokens = (checkpoint.metadata.get("text") or {}).get("tokens_per_prompt", 226)
    try:
        model = T5EncoderModel.from_pretrained(encoder, local_files_only=True)
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:  # each library fails in its own way on a wrong folder
        raise LayerLoomError(
            f"--text-encoder {path} does not hold T5 and its tokenizer "
            f"({first_line(error)}); give {WHERE_TEXT}."
        ) from error
    width, wanted = model.config.d_model, checkpoint.info.transformer["text_embed_dim"]
    if width != wanted:
        raise LayerLoomError(
            f"--text-encoder {path} makes features {width} wide and {checkpoint.store.name} reads "
            f"{wanted}; give {WHERE_TEXT}."
        )
    return T5Features(words, model.eval().to(device), tokens)


def first_line(error: Exception) -> str:
    """The start of a library's message, short enough to sit inside a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".")
