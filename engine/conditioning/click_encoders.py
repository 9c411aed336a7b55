"""Finds the text encoder of networks on Stable Diffusion 1.5: CLIP ViT-L/14, or a starter's own.

It comes from the path that is named, else from the checkpoint. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.click_names import TEXT
from ..checkpoints.reader import open_tensors
from ..errors import LayerLoomError
from .clip import TEXT_MODEL, ClipTextFeatures, load_tokenizer, text_tower
from .encoders import TextFeatures, first_line
from .video_encoders import load_text_features

if TYPE_CHECKING:
    from ..checkpoints.click import ClickCheckpoint

WHERE = (
    "the `text_encoder` and `tokenizer` folders of a Stable Diffusion 1.5 repository, or OpenAI's "
    "CLIP ViT-L/14 text weights"
)


def load_click_text(
    checkpoint: ClickCheckpoint, path: Path | None, device: torch.device
) -> TextFeatures:
    """The text encoder at ``path`` (a file, or a folder with its tokenizer), else the checkpoint's.

    A folder that holds a tokenizer alone goes with the checkpoint's own encoder.

    Raises:
        LayerLoomError: there is none, it has no tokenizer, or its features are of another width.
    """
    inside = "text_encoder" in checkpoint.info.parts
    if path is None and inside and checkpoint.metadata.get("text_encoder"):
        return load_text_features(checkpoint, None, device)
    name, folder = checkpoint.store.name, path if path is not None and path.is_dir() else None
    if folder is not None and (weights := _weights(folder)) is not None:
        state, name = _read(weights), weights.name
    elif path is not None and folder is None:
        state, name = _read(path), path.name
    elif inside:
        state = checkpoint.part_state("text_encoder")
    else:
        raise LayerLoomError(
            f"{name} holds no text encoder: name it with --text-encoder, it is {WHERE}."
        )
    model = text_tower(state, name, skip=0, activation="quick_gelu")
    end = model.config.vocab_size - 1
    features = ClipTextFeatures(model.to(device), _tokenizer(folder), padding=end)
    wanted = checkpoint.info.unet["context_dim"]
    if features.width != wanted:
        raise LayerLoomError(
            f"The text encoder makes features {features.width} wide and {checkpoint.store.name} "
            f"reads {wanted}; give {WHERE}."
        )
    return features


def _weights(folder: Path) -> Path | None:
    """The weight file of a folder in transformers' or diffusers' layout."""
    for place in (folder / "text_encoder", folder):
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (place / name).is_file():
                return place / name
    return None


def _read(path: Path) -> dict[str, torch.Tensor]:
    store = open_tensors(path)
    # The tower's own prefix is missing from what some versions of transformers write.
    for prefix, own in (("", TEXT_MODEL), (TEXT, TEXT_MODEL), ("", "encoder.layers.")):
        start = prefix + own
        if not any(key.startswith(start) for key in store.specs):
            continue
        missing = "" if own == TEXT_MODEL else TEXT_MODEL
        return {
            missing + key.removeprefix(prefix): store.read(key)
            for key in store.specs
            if key.startswith(prefix) and not key.endswith(".position_ids")
        }
    raise LayerLoomError(f"{path.name} holds no CLIP text encoder; give {WHERE}.")


def _tokenizer(folder: Path | None) -> Any:
    places = [] if folder is None else [folder / "tokenizer", folder]
    names = ("vocab.json", "tokenizer.json")
    found = next((p for p in places for name in names if (p / name).exists()), None)
    try:
        words = load_tokenizer(found)
    except Exception as error:  # the library fails in its own ways on a wrong folder
        raise LayerLoomError(
            f"{found} does not hold CLIP's tokenizer ({first_line(error)}); give {WHERE}."
        ) from error
    if words is None:
        raise LayerLoomError(
            "CLIP's tokenizer is not installed; pip install open_clip_torch, or name a folder that "
            "holds it (vocab.json, merges.txt) with --text-encoder."
        )
    return words
