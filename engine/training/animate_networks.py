"""Builds the networks of an animation stage: from nothing, a phase before, or published weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.dynamicrafter import NETWORKS, DynamiCrafterCheckpoint
from ..checkpoints.reader import TensorSpec, open_tensors
from ..checkpoints.video_names import FIRST, plan_unet
from ..errors import LayerLoomError
from ..models.dynamicrafter import SPEED, QueryTransformer
from ..models.starter_image import StarterImageEncoder
from ..models.starter_text import WordEncoder
from ..models.video_unet import VideoUNet
from .animate import AnimateNetwork

# Parts of the UNet's names.
TEMPORAL = ("temp_convs.", "temp_attentions.", "transformer_in.", "motion_modules.")
IMAGE_STREAM = (".to_k_ip.", ".to_v_ip.", ".attn2.alpha")
# What a start may lack; it begins without an effect on what the start makes.
ADDABLE = (*TEMPORAL, *IMAGE_STREAM, f"unet.{SPEED}.")
TRAINABLE = ("all", "spatial", "projector")
Weights = dict[str, tuple[TensorSpec, Callable[[], torch.Tensor]]]


@dataclass(frozen=True)
class Shapes:
    """Constructor keywords of all networks that are trained.

    unet, projector: of ``VideoUNet`` and ``QueryTransformer``. words: of ``WordEncoder``,
    vocabulary as a number; image: of ``StarterImageEncoder``. Both None where frozen encoders stay
    outside.
    """

    unet: Mapping[str, Any]
    projector: Mapping[str, Any]
    words: Mapping[str, Any] | None = None
    image: Mapping[str, Any] | None = None

    def build(self, device: str | None = None) -> AnimateNetwork:
        """The networks with drawn weights, or without any on the meta device."""
        with torch.device(device or "cpu"):
            return AnimateNetwork(
                VideoUNet(**self.unet),
                QueryTransformer(**self.projector),
                WordEncoder(**self.words) if self.words else None,
                StarterImageEncoder(**self.image) if self.image else None,
            )


def build_animate_network(
    shapes: Shapes,
    start: DynamiCrafterCheckpoint | None = None,
    base: Path | None = None,
    trainable: str = "all",
    frozen: torch.dtype = torch.float32,
    device: str | None = None,
) -> AnimateNetwork:
    """The networks with their weights, and what is trained marked by ``requires_grad``.

    Args:
        start: a phase before, or published weights; temporal layers, the image stream and further
            input channels that it lacks are added without an effect.
        base: an image or video UNet (Stable Diffusion 2, ModelScope), in diffusers' or the original
            names, whose weights take the place of the start's but for the image stream.
        trainable: "projector" (query transformer and image attention), "spatial" (these and all
            that is not temporal; the paper's choice) or "all"; what is added is always trained.
        frozen: the type of weights that are not trained.
        device: "meta" builds and compares the shapes alone.

    Raises:
        LayerLoomError: weights of another shape than the recipe's networks.
    """
    if trainable not in TRAINABLE:
        raise LayerLoomError(
            f"The recipe's trainable is {trainable!r}; give one of {', '.join(TRAINABLE)}."
        )
    expected = {k: tuple(t.shape) for k, t in shapes.build("meta").state_dict().items()}
    weights: Weights = {}
    names = []
    if start is not None:
        weights |= _of_start(start)
        names.append(start.store.name)
    if base is not None:
        found = _of_base(base, shapes.unet)
        weights |= {k: w for k, w in found.items() if not any(m in k for m in IMAGE_STREAM)}
        names.append(base.name)
    added = _compare(expected, weights, start, " and ".join(names)) if names else set(expected)
    network = shapes.build(device)
    if device != "meta":
        initialise(network, fresh=start is None and base is None)
        _take(network, weights)
    choose_trainable(network, trainable, added if names else set())
    if device != "meta":
        for parameter in network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen)
    return network


def _of_start(start: DynamiCrafterCheckpoint) -> Weights:
    """Everything of a checkpoint that may be trained, by the names of ``AnimateNetwork``."""
    parts = [part for part in NETWORKS if part in start.plan]
    # A starter's own encoders; published ones stay outside.
    parts += [p for p in ("text_encoder", "image_encoder") if start.metadata.get(p)]
    return {
        f"{part}.{name}": (
            source.spec(start.store),
            lambda source=source: source.read(start.store),
        )
        for part in parts
        for name, source in start.plan[part].items()
    }


def _of_base(path: Path, unet: Mapping[str, Any]) -> Weights:
    store = open_tensors(path)
    prefix = next((k.removesuffix(FIRST) for k in store.specs if k.endswith(FIRST)), None)
    if prefix is not None:
        sources, _ = plan_unet(store.specs, prefix, unet)
        return {
            f"unet.{name}": (
                source.spec(store),
                lambda source=source: source.read(store),
            )
            for name, source in sources.items()
        }
    last = "down_blocks.0.resnets.0.conv1.weight"
    prefix = next((k.removesuffix(last) for k in store.specs if k.endswith(last)), None)
    if prefix is None:
        raise LayerLoomError(
            f"The recipe's base {path} holds no UNet of Stable Diffusion's kind; give the weights "
            "of Stable Diffusion 2 or of ModelScope's text-to-video."
        )
    return {
        f"unet.{key.removeprefix(prefix)}": (spec, lambda key=key: store.read(key))
        for key, spec in store.specs.items()
        if key.startswith(prefix)
    }


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    weights: Weights,
    start: DynamiCrafterCheckpoint | None,
    name: str,
) -> set[str]:
    """Names that are added; what is found and not wanted is taken out of ``weights``."""
    added = set()
    for key, shape in expected.items():
        if key not in weights:
            # A base is a UNet alone: all around it is new.
            outside = start is None and not key.startswith("unet.")
            if not outside and not any(mark in key for mark in ADDABLE):
                raise LayerLoomError(_misfit(name, key, "is missing"))
            added.add(key)
            continue
        found = weights[key][0].shape
        if key == "unet.conv_in.weight" and found[1] < shape[1]:
            found = (found[0], shape[1], *found[2:])
        # Pointwise convolutions stand for linear layers in some files.
        if found != shape and (found[:2] != shape or any(side != 1 for side in found[2:])):
            raise LayerLoomError(_misfit(name, key, f"has the shape {list(found)}"))
    for key in list(weights.keys() - expected.keys()):
        if start is not None and not any(mark in key for mark in TEMPORAL):
            raise LayerLoomError(_misfit(name, key, "is not part of it"))
        del weights[key]
    return added


def _misfit(name: str, key: str, problem: str) -> str:
    return (
        f"{name} does not fit the recipe's networks: {key} {problem}; take shapes out of the "
        "recipe that the start knows itself, or give another start."
    )


@torch.no_grad()
def _take(network: AnimateNetwork, weights: Weights) -> None:
    state = network.state_dict()
    for name, (spec, read) in weights.items():
        place = state[name]
        if name == "unet.conv_in.weight" and spec.shape[1] < place.shape[1]:
            # What is new among the inputs says nothing at first.
            place.zero_()
            place = place[:, : spec.shape[1]]
        place.copy_(read().reshape(place.shape))


def choose_trainable(network: AnimateNetwork, trainable: str, added: set[str]) -> None:
    """Mark what is trained; ``added`` are names that are trained in any case."""
    for name, parameter in network.named_parameters():
        inside = name.startswith("unet.")
        context = any(mark in name for mark in IMAGE_STREAM) or not inside
        temporal = inside and any(mark in name for mark in TEMPORAL)
        chosen = context or trainable == "all" or (trainable == "spatial" and not temporal)
        parameter.requires_grad_(chosen or name in added)


def initialise(network: AnimateNetwork, fresh: bool = True) -> None:
    """Small normal words and residual branches that start at zero.

    fresh: of the whole UNet; else of temporal layers, the image stream and the speed alone, so
    that they have no effect on the weights that are taken.
    """
    unet = network.unet
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        last = name.endswith(("to_v_ip", f"{SPEED}.linear_2"))
        if ".temp_convs." in name:
            last = last or name.endswith("conv4.3")
        elif "temp_attentions." in name or name.startswith("transformer_in"):
            last = last or name.endswith("proj_out")
        elif fresh:
            last = last or name.endswith(("conv2", "proj_out", "conv_out"))
        if last:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    if network.text_encoder is not None:
        for part in (network.text_encoder.word, network.text_encoder.position):
            nn.init.normal_(part.weight, std=0.5)
