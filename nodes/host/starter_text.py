"""The starters' word encoder as a CLIP of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch

from ...engine.models.starter_text import WordEncoder, WordTokenizer

NAME = "words"


def starter_clip(settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> comfy.sd.CLIP:
    """A CLIP from a starter's text encoder settings (tokens, dim, vocabulary) and weights."""
    vocabulary, tokens = tuple(settings["vocabulary"]), int(settings["tokens"])

    class Tokenizer(HostTokenizer):
        words = WordTokenizer(vocabulary, tokens)

    class Encoder(HostWordEncoder):
        shape = {"vocabulary": len(vocabulary), "tokens": tokens, "dim": int(settings["dim"])}

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Encoder)
    parameters = sum(tensor.numel() for tensor in weights.values())
    clip = comfy.sd.CLIP(target, parameters=parameters)
    clip.load_sd(dict(weights))
    return clip


class HostTokenizer:
    """Text to the host's token batches: {"words": [[(id, weight), ...]]}."""

    words: WordTokenizer

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options: Any):
        ids = self.words(text).tolist()
        if return_word_ids:
            return {NAME: [[(token, 1.0, index + 1) for index, token in enumerate(ids)]]}
        return {NAME: [[(token, 1.0) for token in ids]]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class HostWordEncoder(torch.nn.Module):
    """The word encoder behind the calls that the host's CLIP makes."""

    shape: dict[str, int]

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__()
        self.dtypes = {dtype}
        self.encoder = WordEncoder(**self.shape, operations=comfy.ops.manual_cast)
        self.encoder.to(device=device, dtype=dtype)
        self.device = device

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        self.device = options.get("execution_device", self.device)

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: Mapping[str, Sequence]) -> tuple[torch.Tensor, None]:
        """Features [1, tokens, D] of a prompt; the starters have no pooled output."""
        ids = torch.tensor([token[0] for token in tokens[NAME][0]], device=self.device)
        return self.encoder(ids[None]).float(), None

    def load_sd(self, weights: Mapping[str, torch.Tensor]):
        return self.encoder.load_state_dict(weights, strict=True)
