"""Builds the networks that a layered stage trains, from a recipe's shape or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.load import Checkpoint
from ..checkpoints.names import POSITIONS
from ..errors import LayerLoomError
from ..models.layered_transformer import LayeredTransformer
from ..models.starter_text import WordEncoder

# Parts of the transformer that a start may lack: they begin without an effect.
ADDED = ("layer_embedding.", "clean_embedding")
Trainable = str | Sequence[int]


class LayeredNetwork(nn.Module):
    """What is trained together: the transformer and, in starters, the words it reads."""

    def __init__(self, transformer: LayeredTransformer, text_encoder: WordEncoder | None = None):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


def build_network(
    transformer: Mapping[str, Any],
    words: Mapping[str, Any] | None,
    start: Checkpoint | None = None,
    trainable: Trainable | None = "all",
    frozen: torch.dtype = torch.float32,
    device: str | None = None,
) -> LayeredNetwork:
    """The network of a shape with its weights, and what is trained marked by ``requires_grad``.

    Args:
        transformer: keywords of ``LayeredTransformer``.
        words: "vocabulary" (its size), "tokens" and "dim" of a word encoder; None: text features
            come from elsewhere.
        start: weights to begin with (its adapters stay out); a starter's word encoder too.
        trainable: "all", "sixth", block numbers, or None for nothing; what the start lacks is
            trained wherever anything is.
        frozen: the type of weights that are not trained.
        device: "meta" builds the shapes alone.

    Raises:
        LayerLoomError: the start is a network of another shape; no such blocks.
    """
    if start is None:
        network = _assemble(transformer, words, device)
        if device != "meta":
            initialise(network)
        choose_trainable(network, trainable, set())
        return network
    # Weights take the start's place without being drawn first.
    network = LayeredNetwork(LayeredTransformer(**transformer, device="meta"), _words(words, None))
    added = _compare(network.transformer, start)
    if network.text_encoder is not None and "text_encoder" in start.info.parts:
        _load_words(network.text_encoder, start)
        known = set(network.text_encoder.state_dict())
    else:
        known = set()
    unknown = {
        name
        for name in network.state_dict()
        if name.removeprefix("transformer.") in added
        or (name.startswith("text_encoder.") and name.removeprefix("text_encoder.") not in known)
    }
    choose_trainable(network, trainable, unknown)
    if device == "meta":
        return network.to("meta")
    _take(network.transformer, start, added, frozen)
    return network


def _assemble(
    transformer: Mapping[str, Any], words: Mapping[str, Any] | None, device: str | None
) -> LayeredNetwork:
    return LayeredNetwork(LayeredTransformer(**transformer, device=device), _words(words, device))


def _words(words: Mapping[str, Any] | None, device: str | None) -> WordEncoder | None:
    if words is None:
        return None
    encoder = WordEncoder(**words)
    return encoder.to(device) if device else encoder


def _compare(transformer: LayeredTransformer, start: Checkpoint) -> set[str]:
    """Parameters that the start lacks and may lack."""
    wanted = {name: tuple(p.shape) for name, p in transformer.state_dict().items()}
    found = {
        name: source.spec(start.store).shape for name, source in start.plan.transformer.items()
    }
    patch = found.get("patch_embed.proj.weight", (0, 0, 1, 1))[-1]
    if transformer.patch_size == 1 and patch > 1:
        dim, channels = wanted["patch_embed.proj.weight"][:2]
        found["patch_embed.proj.weight"] = (dim, channels, 1, 1)
        for name in ("proj_out.weight", "proj_out.bias"):
            rows, *rest = found[name]
            found[name] = (rows // patch**2, *rest)
    added = {name for name in wanted.keys() - found.keys() if name.startswith(ADDED)}
    if any(found.get(name) != shape for name, shape in wanted.items() if name not in added) or (
        found.keys() - wanted.keys()
    ):
        raise LayerLoomError(
            f"{start.store.name} is a network of another shape than the recipe's [transformer]; "
            "leave that table out to take the checkpoint's own shape."
        )
    return added


def _take(
    transformer: LayeredTransformer, start: Checkpoint, added: set[str], frozen: torch.dtype
) -> None:
    """Load the start's weights, adapters left out, in the types they are kept in."""
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    without = dict.fromkeys(start.info.adapters, 0.0)
    state = dict(start.iter_transformer(without))
    if transformer.patch_size == 1:
        state = with_pixel_patches(state)
    for name, parameter in transformer.named_parameters():
        # Zeros: a prompt's index and the mark of given layers then change nothing at first; a
        # linear layer of zeros under a norm of zeros would never learn.
        if name in added:
            drawn = torch.empty(parameter.shape)
            if name.startswith("layer_embedding.proj."):
                nn.init.normal_(drawn, std=0.02)
            else:
                nn.init.zeros_(drawn)
            state[name] = drawn
    state = {
        name: tensor.to(torch.float32 if name in trained else frozen, copy=True)
        for name, tensor in state.items()
    }
    transformer.load_state_dict(state, assign=True)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in trained)


def _load_words(encoder: WordEncoder, start: Checkpoint) -> None:
    try:
        encoder.load_state_dict(start.part_state("text_encoder"))
    except RuntimeError as error:
        raise LayerLoomError(
            f"{start.store.name} reads other words than the recipe's [text] describes; leave that "
            "table out to take the checkpoint's own."
        ) from error


def choose_trainable(network: LayeredNetwork, trainable: Trainable | None, added: set[str]) -> None:
    """Mark what is trained: everything, or some blocks and what the start lacks.

    "sixth" is LayerFlow's choice (arXiv 2506.04228): blocks 5, 11, 17, ... A stored position table
    stays as it is.

    Raises:
        LayerLoomError: there are no such blocks.
    """
    blocks = network.transformer.transformer_blocks
    network.requires_grad_(trainable == "all")
    if trainable not in ("all", None):
        if trainable == "sixth":
            chosen = [index for index in range(len(blocks)) if index % 6 == 5]
        elif isinstance(trainable, str):
            raise LayerLoomError(
                f"The recipe's trainable is {trainable!r}; give all, sixth or a list of block "
                "numbers."
            )
        else:
            chosen = list(trainable)
        known = range(len(blocks))
        if not chosen or any(not isinstance(i, int) or i not in known for i in chosen):
            raise LayerLoomError(
                f"The recipe's trainable is {trainable!r}, but the network's blocks are 0 to "
                f"{len(blocks) - 1}; choose among those."
            )
        for index in chosen:
            blocks[index].requires_grad_(True)
        for name, parameter in network.named_parameters():
            if name in added:
                parameter.requires_grad_(True)
    for name, parameter in network.named_parameters():
        if name.endswith(POSITIONS):
            parameter.requires_grad_(False)


def with_pixel_patches(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a transformer for patches of one latent pixel instead of several.

    A patch's pixels are nearly equal, so one of them through the summed input kernel embeds like
    the whole patch, and the mean of the output rows starts at the patch's mean (the patch resizing
    of FlexiViT, arXiv 2212.08013, for piecewise constant pictures). Use it with the spatial
    interpolation scale multiplied by the old patch size: positions then stay where they were.
    """
    state = dict(state)
    kernel = state["patch_embed.proj.weight"]
    pixels = kernel[0, 0].numel()
    state["patch_embed.proj.weight"] = kernel.sum((2, 3), keepdim=True)
    for name in ("proj_out.weight", "proj_out.bias"):
        rows = state[name]
        state[name] = rows.unflatten(0, (len(rows) // pixels, pixels)).mean(1)
    return state


def initialise(network: LayeredNetwork) -> None:
    """Small normal words; gates and the output projection start at zero (AdaLN-zero)."""
    transformer = network.transformer
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
