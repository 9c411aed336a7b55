"""DynamiCrafter's golden cases: UNet forwards, whole tiny checkpoints, the query transformer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models.dynamicrafter import SPEED, DynamiCrafter, QueryTransformer
from ..models.video_unet import VideoUNet
from .dynamicrafter import from_store, load_dynamicrafter
from .dynamicrafter_names import PROJECTOR, plan_projector
from .golden import CaseResult, GoldenCase, compare
from .reader import memory_store

UNET_PREFIX = "model.diffusion_model."
# The official network's context: text tokens, then image tokens.
TEXT_TOKENS = 77


def run_forward(case: GoldenCase) -> Iterator[CaseResult]:
    """The UNet, loaded from the official format, against the official network's outputs."""
    network = official_networks(case).unet
    for name in sorted(case.tensors):
        found = re.fullmatch(r"out\.(\w+)\.y", name)
        if not found:
            continue
        run = f"in.{found[1]}"
        # Left out, the number is the configured default.
        speed = case.tensors.get(f"{run}.fs")
        if speed is None:
            speed = torch.full((1,), case.description["config"]["default_fs"])
        x, time = case.tensors[f"{run}.x"], case.tensors[f"{run}.timesteps"]
        yield compare(case, name, predict(network, x, time, case.tensors[f"{run}.context"], speed))


def run_checkpoint(case: GoldenCase) -> Iterator[CaseResult]:
    """A complete official file: image tokens through the query transformer into the UNet.

    Networks 4 to 16 channels wide amplify rounding: changing the input by 1e-7 of itself moves
    the output by up to 8e-4, ten times the tolerance, so the rounding is measured and allowed.
    """
    networks, given = official_networks(case), case.tensors
    tokens, made = whole(networks, given, torch.float32)
    _, exact = whole(networks.double(), given, torch.float64)
    rounding = float((made - exact).abs().max())
    yield compare(case, "out.image_tokens", tokens)
    yield compare(case, "out.y", made, rounding=rounding)
    if "out.x0_from_v" in given:
        # v-prediction: x0 = a x - s v, eps = a v + s x with a^2 + s^2 = 1.
        alpha = given["alphas_cumprod"].double()[given["in.timesteps"]].item()
        a, s = alpha**0.5, (1 - alpha) ** 0.5
        clean, noise = a * given["in.x"] - s * made, a * made + s * given["in.x"]
        yield compare(case, "out.x0_from_v", clean, rounding=s * rounding)
        yield compare(case, "out.eps_from_v", noise, rounding=a * rounding)


def whole(
    networks: DynamiCrafter, given: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context tokens of a case's image, and the prediction with them."""
    with torch.no_grad():
        tokens = networks.image_projector(given["in.image_embeds"].to(dtype))
    x = torch.cat([given["in.x"], given["in.c_concat"]], dim=1).to(dtype)
    context = torch.cat([given["in.text"].to(dtype), tokens], dim=1)
    return tokens, predict(networks.unet, x, given["in.timesteps"], context, given["in.fs"])


def run_projector(case: GoldenCase) -> Iterator[CaseResult]:
    """The query transformer alone."""
    network, given = projector(case), case.tensors["in.x"]
    with torch.no_grad():
        yield compare(case, "out.y", network(given))
        yield compare(case, "out.y_zeros", network(torch.zeros_like(given)))


def predict(
    network: VideoUNet,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    speed: torch.Tensor,
) -> torch.Tensor:
    """One forward on the official network's inputs."""
    text, image = context[:, :TEXT_TOKENS], context[:, TEXT_TOKENS:]
    scalars = {SPEED: speed.expand(x.shape[0])}
    with torch.no_grad():
        return network(x, timesteps, text, image_context=image, scalars=scalars)


def official_networks(case: GoldenCase) -> DynamiCrafter:
    """The case's networks, its weights opened like an official file."""
    return load_dynamicrafter(from_store(memory_store(case.weights(UNET_PREFIX), case.name)))


def projector(case: GoldenCase) -> QueryTransformer:
    """The query transformer of a case that holds nothing else."""
    store = memory_store(case.weights(PROJECTOR), case.name)
    network = QueryTransformer(**projector_keywords(case.description["config"]))
    sources, _ = plan_projector(store.specs, "")
    network.load_state_dict({name: source.read(store) for name, source in sources.items()})
    return network.eval()


def projector_keywords(config: Mapping[str, Any]) -> dict[str, Any]:
    """``QueryTransformer`` keywords of an official configuration."""
    return {
        "dim": config["dim"],
        "depth": config["depth"],
        "heads": config["heads"],
        "head_dim": config["dim_head"],
        "queries": config["num_queries"] * config["video_length"],
        "in_dim": config["embedding_dim"],
        "out_dim": config["output_dim"],
        "mlp_ratio": config["ff_mult"],
    }
