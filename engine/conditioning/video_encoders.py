"""Finds the parts around a DynamiCrafter network: autoencoder, text encoder, image encoder.

Each comes from the path that is named, else from the checkpoint. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import LayerLoomError
from ..models.starter_autoencoder import StarterAutoencoder
from ..models.starter_text import WordEncoder, WordTokenizer
from .clip import (
    TEXT_MODEL,
    VISION_MODEL,
    ClipImageTokens,
    ClipTextFeatures,
    image_tower,
    load_tokenizer,
    read_tower,
    text_tower,
)
from .encoders import TextFeatures, WordFeatures, first_line
from .frame_codec import WHERE as WHERE_VAE
from .frame_codec import (
    FrameCodec,
    KLCodec,
    StarterFrameCodec,
    kl_autoencoder,
    read_autoencoder,
)

if TYPE_CHECKING:
    from ..checkpoints.dynamicrafter import DynamiCrafterCheckpoint

WHERE_CLIP = "OpenCLIP ViT-H-14 (laion/CLIP-ViT-H-14-laion2B-s32B-b79K on Hugging Face)"
# Blocks that are read of ViT-H/14's 24 in the text half; a folder may hold them all, or these.
_TEXT_BLOCKS = 23


class ImageFeatures(Protocol):
    """Pictures [B, 3, H, W] in [-1, 1], of any size, to tokens [B, N, D]."""

    def encode(self, pictures: Tensor) -> Tensor: ...


def load_frame_codec(
    checkpoint: DynamiCrafterCheckpoint, path: Path | None, device: torch.device
) -> FrameCodec:
    """The autoencoder at ``path``, else the checkpoint's own.

    Raises:
        LayerLoomError: there is none, or it makes other latents than the network reads.
    """
    name = checkpoint.store.name
    if path is not None:
        vae = read_autoencoder(path)
    elif "vae" not in checkpoint.info.parts:
        raise LayerLoomError(f"{name} holds no autoencoder: name it with --vae, it is {WHERE_VAE}.")
    elif checkpoint.metadata.get("vae"):
        return _starter_codec(checkpoint, device)
    else:
        vae = kl_autoencoder(checkpoint.part_state("vae"), name)
    codec = KLCodec(vae.to(device), checkpoint.variant.latent_scale)
    wanted, factor = checkpoint.info.unet["out_channels"], checkpoint.variant.spatial_factor
    if (codec.channels, codec.spatial_factor) != (wanted, factor):
        raise LayerLoomError(
            f"{path or name} codes {codec.spatial_factor}x{codec.spatial_factor} pixels in "
            f"{codec.channels} numbers and the network of {name} reads {factor}x{factor} in "
            f"{wanted}; give {WHERE_VAE}."
        )
    return codec


def load_text_features(
    checkpoint: DynamiCrafterCheckpoint, path: Path | None, device: torch.device
) -> TextFeatures:
    """The text encoder at ``path`` (a file, or a folder with its tokenizer), else the checkpoint's.

    A folder that holds a tokenizer alone goes with the checkpoint's own encoder.

    Raises:
        LayerLoomError: there is none, it has no tokenizer, or its features are of another width.
    """
    name, settings = checkpoint.store.name, checkpoint.metadata.get("text_encoder")
    inside = "text_encoder" in checkpoint.info.parts
    if path is None and inside and settings:
        return _starter_text(checkpoint, device)
    folder = path if path is not None and path.is_dir() else None
    if folder is not None and _has_weights(folder / "text_encoder", folder):
        model = _text_folder(folder)
    elif path is not None and folder is None:
        model = text_tower(read_tower(path, TEXT_MODEL), path.name)
    elif inside:
        model = text_tower(checkpoint.part_state("text_encoder"), name)
    else:
        raise LayerLoomError(
            f"{name} holds no text encoder: name it with --text-encoder, it is {WHERE_CLIP}."
        )
    features = ClipTextFeatures(model.to(device), _tokenizer(folder, name))
    _check_width("text encoder", features.width, checkpoint.info.unet["context_dim"], name)
    return features


def load_image_features(
    checkpoint: DynamiCrafterCheckpoint, path: Path | None, device: torch.device
) -> ImageFeatures:
    """The image encoder at ``path`` (a file or a folder), else the checkpoint's own.

    Raises:
        LayerLoomError: there is none, or its tokens are of another width.
    """
    name = checkpoint.store.name
    inside = "image_encoder" in checkpoint.info.parts
    if path is None and inside and checkpoint.metadata.get("image_encoder"):
        return _starter_image(checkpoint, device)
    if path is not None and path.is_dir():
        model = _image_folder(path)
    elif path is not None:
        model = image_tower(read_tower(path, VISION_MODEL), path.name)
    elif inside:
        model = image_tower(checkpoint.part_state("image_encoder"), name)
    else:
        raise LayerLoomError(
            f"{name} holds no image encoder: name it with --image-encoder, it is {WHERE_CLIP}."
        )
    features = ClipImageTokens(model.to(device))
    projector = checkpoint.info.image_projector or {}
    _check_width("image encoder", features.width, projector.get("in_dim", features.width), name)
    return features


def _starter_text(checkpoint: DynamiCrafterCheckpoint, device: torch.device) -> WordFeatures:
    settings = checkpoint.metadata["text_encoder"]
    words, tokens = settings["vocabulary"], settings["tokens"]
    model = WordEncoder(vocabulary=len(words), tokens=tokens, dim=settings["dim"])
    model.load_state_dict(checkpoint.part_state("text_encoder"))
    return WordFeatures(WordTokenizer(words, tokens), model.float().eval().to(device))


def _tokenizer(folder: Path | None, name: str) -> Any:
    """CLIP's tokenizer from the folder if it has one, else OpenCLIP's own."""
    places = [] if folder is None else [folder / "tokenizer", folder]
    found = next((place for place in places if (place / "vocab.json").exists()), None)
    found = found or next((p for p in places if (p / "tokenizer.json").exists()), None)
    try:
        words = load_tokenizer(found)
    except Exception as error:  # the library fails in its own ways on a wrong folder
        raise LayerLoomError(
            f"{found} does not hold CLIP's tokenizer ({first_line(error)}); give the `tokenizer` "
            f"folder of {WHERE_CLIP}."
        ) from error
    if words is None:
        raise LayerLoomError(
            f"CLIP's tokenizer is neither in {name} nor installed; pip install open_clip_torch, or "
            "name a folder that holds it (vocab.json, merges.txt) with --text-encoder."
        )
    return words


def _has_weights(*folders: Path) -> bool:
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return any(next(f.glob(p), None) for f in folders if f.is_dir() for p in patterns)


def _text_folder(path: Path) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    try:
        config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
        # Stable Diffusion 2's folders hold 23 blocks, OpenCLIP's own 24, of which 23 are read.
        config.num_hidden_layers = min(config.num_hidden_layers, _TEXT_BLOCKS)
        with quiet_loading():
            model = CLIPTextModel.from_pretrained(folder, config=config, local_files_only=True)
        return model.float().eval()
    except Exception as error:  # the library fails in its own ways on a wrong folder
        raise LayerLoomError(
            f"--text-encoder {path} does not hold a CLIP text encoder ({first_line(error)}); give "
            f"{WHERE_CLIP}."
        ) from error


def _image_folder(path: Path) -> Any:
    from transformers import CLIPVisionModel

    folder = path / "image_encoder" if (path / "image_encoder").is_dir() else path
    try:
        with quiet_loading():
            model = CLIPVisionModel.from_pretrained(folder, local_files_only=True)
        return model.float().eval()
    except Exception as error:  # the library fails in its own ways on a wrong folder
        raise LayerLoomError(
            f"--image-encoder {path} does not hold a CLIP image encoder ({first_line(error)}); "
            f"give {WHERE_CLIP}."
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the library's own progress bars, which would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_width(what: str, width: int, wanted: int, name: str) -> None:
    if width != wanted:
        raise LayerLoomError(
            f"The {what} makes features {width} wide and {name} reads {wanted}; give {WHERE_CLIP}."
        )


def _starter_codec(checkpoint: DynamiCrafterCheckpoint, device: torch.device) -> FrameCodec:
    model = StarterAutoencoder(**_settings(checkpoint, "vae"))
    model.load_state_dict(checkpoint.part_state("vae"))
    return StarterFrameCodec(model.float().eval().to(device))


class StarterImageFeatures:
    """The starters' image encoder, from the checkpoint itself."""

    def __init__(self, model: Any):
        self.model = model

    def encode(self, pictures: Tensor) -> Tensor:
        return self.model(pictures.to(self.model.position))


def _starter_image(checkpoint: DynamiCrafterCheckpoint, device: torch.device) -> ImageFeatures:
    from ..models.starter_image import StarterImageEncoder

    model = StarterImageEncoder(**_settings(checkpoint, "image_encoder"))
    model.load_state_dict(checkpoint.part_state("image_encoder"))
    return StarterImageFeatures(model.float().eval().to(device))


def _settings(checkpoint: DynamiCrafterCheckpoint, part: str) -> dict[str, Any]:
    """Constructor keywords of a starter's part."""
    return {key: value for key, value in checkpoint.metadata[part].items() if key != "kind"}
