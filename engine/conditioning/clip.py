"""OpenCLIP ViT-H/14's two towers as DynamiCrafter reads them, through transformers.

Weights come from the checkpoint, from a file under OpenCLIP's or transformers' names, or from a
folder of transformers. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..checkpoints.dynamicrafter_names import IMAGE, IMAGE_RULES, TEXT, TEXT_RULES, apply_rules
from ..checkpoints.reader import open_tensors
from ..errors import LayerLoomError

# OpenAI's statistics, which OpenCLIP keeps (open_clip/constants.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOKENS = 77
# ViT-H/14's image tower has heads 80 wide; elsewhere in CLIP they are 64 wide.
HEAD_WIDTHS, HEAD_WIDTH = {1280: 80}, 64
TEXT_MODEL, VISION_MODEL = "text_model.", "vision_model."
Tokenizer = Callable[[str], list[int]]
"""A prompt to ids with start and end, neither cut nor padded."""


def squash(pictures: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, H, W] to squares of `side` pixels, whole: squeezed, nothing cut off.

    Bicubic with aligned corners after a Gaussian where it shrinks: kornia's "antialias", with
    which the weights were trained. A centre crop would hide the picture's ends from the network.
    """
    if tuple(pictures.shape[-2:]) == (side, side):
        return pictures
    try:
        from kornia.geometry.transform import resize
    except ModuleNotFoundError:
        raise LayerLoomError(
            "Pictures are made ready for CLIP by the package kornia, which is not installed; "
            "pip install kornia."
        ) from None
    return resize(
        pictures, (side, side), interpolation="bicubic", align_corners=True, antialias=True
    )


class ClipImageTokens:
    """The image tower: all tokens after the last block, without final norm and projection."""

    def __init__(self, model: Any):
        self.model, self.side = model, int(model.config.image_size)
        self.width = int(model.config.hidden_size)

    def encode(self, pictures: Tensor) -> Tensor:
        """Tokens [B, 1 + patches, D] of pictures [B, 3, H, W] in [-1, 1], of any size."""
        mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (MEAN, STD))
        unit = (squash(pictures.float().cpu(), self.side) + 1) / 2
        pixels = ((unit - mean) / std).to(next(self.model.parameters()))
        return self.model(pixel_values=pixels).last_hidden_state.float()


class ClipTextFeatures:
    """The text tower: its last block kept, then the final norm, 77 tokens a prompt.

    padding: the id that fills a prompt up; Stable Diffusion 1 repeats the end token.
    """

    def __init__(self, model: Any, tokenize: Tokenizer, padding: int = 0):
        self.model, self.tokenize, self.padding = model, tokenize, padding
        self.width = int(model.config.hidden_size)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Features [prompts, 77, D]; "" is the unconditional text."""
        rows = []
        for prompt in prompts:
            ids = self.tokenize(prompt)
            if len(ids) > TOKENS:
                ids = [*ids[: TOKENS - 1], ids[-1]]
            # OpenCLIP pads with 0, which is a token like any other: there is no mask.
            row = functional.pad(torch.tensor(ids), (0, TOKENS - len(ids)), value=self.padding)
            rows.append(row)
        ids = torch.stack(rows).to(next(self.model.parameters()).device)
        return self.model(input_ids=ids).last_hidden_state.float()

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """What a user should know about prompts that do not fit."""
        return [
            f"A prompt is longer than {TOKENS} tokens; its end is cut: {prompt!r}"
            for prompt in prompts
            if len(self.tokenize(prompt)) > TOKENS
        ]


def image_tower(state: Mapping[str, Tensor], name: str, heads: int | None = None) -> Any:
    """transformers' ``CLIPVisionModel`` with these weights, under its names.

    heads: None for ViT-H/14's 16, or as many as are 64 wide. Raises LayerLoomError where a tensor
    is missing; `name` is the file's, for messages.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state = _half(state, VISION_MODEL)
    width, _, patch, _ = _shape(state, "embeddings.patch_embedding.weight", name)
    positions = _shape(state, "embeddings.position_embedding.weight", name)[0]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(state, "encoder.layers.0.mlp.fc1.weight", name)[0],
        num_hidden_layers=_blocks(state),
        num_attention_heads=heads or max(1, width // HEAD_WIDTHS.get(width, HEAD_WIDTH)),
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    return _load(CLIPVisionModel, config, state, name)


def text_tower(
    state: Mapping[str, Tensor],
    name: str,
    heads: int | None = None,
    skip: int = 1,
    activation: str = "gelu",
) -> Any:
    """transformers' ``CLIPTextModel`` with these weights, without the last ``skip`` blocks.

    That makes the model's own output the wanted one: the last block but one's, normed. OpenAI's
    own CLIP, in Stable Diffusion 1, is read whole and has the activation "quick_gelu". Other
    arguments and errors as for `image_tower`.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    state = _half(state, TEXT_MODEL)
    vocabulary, width = _shape(state, "embeddings.token_embedding.weight", name)
    blocks = _blocks(state) - skip
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(state, "encoder.layers.0.mlp.fc1.weight", name)[0],
        num_hidden_layers=blocks,
        num_attention_heads=heads or max(1, width // HEAD_WIDTH),
        max_position_embeddings=_shape(state, "embeddings.position_embedding.weight", name)[0],
        hidden_act=activation,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    last = tuple(f"encoder.layers.{blocks + number}." for number in range(skip))
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(last)}
    return _load(CLIPTextModel, config, kept, name)


def read_tower(path: Path, half: str) -> dict[str, Tensor]:
    """One half of CLIP from a weight file, under transformers' names.

    half: ``TEXT_MODEL`` or ``VISION_MODEL``. Takes OpenCLIP's own file, a DynamiCrafter checkpoint
    and a file of transformers. Raises LayerLoomError where there is none.
    """
    store = open_tensors(path)
    if any(key.startswith(half) for key in store.specs):
        return {key: store.read(key) for key in store.specs if key.startswith(half)}
    rules, inside = (TEXT_RULES, TEXT) if half == TEXT_MODEL else (IMAGE_RULES, IMAGE)
    for prefix in (inside, ""):
        found, _ = apply_rules(store.specs, prefix, rules)
        if any(".encoder.layers." in key for key in found):
            return {key: source.read(store) for key, source in found.items()}
    what = "text" if half == TEXT_MODEL else "image"
    raise LayerLoomError(
        f"{path.name} holds no CLIP {what} encoder; give OpenCLIP ViT-H-14's weights (laion2b)."
    )


def load_tokenizer(folder: Path | None = None) -> Tokenizer | None:
    """CLIP's tokenizer: from a folder of transformers, else OpenCLIP's own; None without either."""
    if folder is not None:
        from transformers import CLIPTokenizer

        words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return lambda prompt: list(words(prompt).input_ids)
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ModuleNotFoundError:
        return None
    words = SimpleTokenizer()
    return lambda prompt: [words.sot_token_id, *words.encode(prompt), words.eot_token_id]


def _half(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tower's tensors without transformers' prefix; projections are left out."""
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def _load(kind: Any, config: Any, state: Mapping[str, Tensor], name: str) -> Any:
    with torch.device("meta"):
        model = kind(config)
    expected = model.state_dict()
    # Some versions of transformers keep the prefix in this class, some do not.
    prefix = VISION_MODEL if next(iter(expected)).startswith(VISION_MODEL) else ""
    prefix = TEXT_MODEL if next(iter(expected)).startswith(TEXT_MODEL) else prefix
    loaded = {prefix + key: tensor.float() for key, tensor in state.items()}
    wrong = [k for k in expected if k not in loaded or loaded[k].shape != expected[k].shape]
    if wrong:
        raise LayerLoomError(
            f"{name} holds a CLIP tower whose {wrong[0]} is missing or has another shape; the file "
            "is incomplete or of another version."
        )
    model.load_state_dict({key: loaded[key] for key in expected}, assign=True)
    # Not stored, and so still without values.
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1])[None]
    return model.eval()


def _shape(state: Mapping[str, Tensor], key: str, name: str) -> tuple[int, ...]:
    if key not in state:
        raise LayerLoomError(
            f"{name} holds a CLIP tower without {key}; give OpenCLIP ViT-H-14's weights (laion2b)."
        )
    return tuple(state[key].shape)


def _blocks(state: Mapping[str, Tensor]) -> int:
    start = "encoder.layers."
    return 1 + max(int(key.split(".")[2]) for key in state if key.startswith(start))
