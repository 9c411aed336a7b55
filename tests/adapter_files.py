"""Adapters for the starter, and a starter that carries some: random, but of a size that shows."""

from __future__ import annotations

from pathlib import Path

import torch

from layerloom.engine.checkpoints.load import open_checkpoint
from layerloom.engine.checkpoints.lora import LoRA
from layerloom.engine.checkpoints.save import save_checkpoint
from layerloom.engine.layered import STARTER
from layerloom.engine.models.layered_transformer import LayeredTransformer
from layerloom.engine.models.lora import targets_of


def random_lora(name: str, rank: int, alpha: float, size: float) -> LoRA:
    """Pairs for the starter's attention that move each weight by about ``size``."""
    checkpoint = open_checkpoint(STARTER)
    network = LayeredTransformer(**checkpoint.info.transformer, device="meta")
    generator = torch.Generator().manual_seed(rank)
    weights = {}
    for module in targets_of(network):
        layer = network.get_submodule(module)
        a = torch.randn(rank, layer.in_features, generator=generator)
        b = torch.randn(layer.out_features, rank, generator=generator)
        weights[module] = (a, b * size * rank**0.5 / alpha)
    return LoRA(name, rank, alpha, weights)


def own_adapters() -> dict[str, LoRA]:
    """A motion and a content adapter."""
    motion, content = random_lora("motion", 4, 1.0, 0.02), random_lora("content", 8, 8.0, 0.015)
    return {"motion": motion, "content": content}


def starter_with_adapters(path: Path, adapters: dict[str, LoRA] | None = None) -> Path:
    """The starter's base with these adapters (default: ``own_adapters``) in place of its own."""
    adapters = own_adapters() if adapters is None else adapters
    starter = open_checkpoint(STARTER)
    settings = ("vae", "text_encoder", "sequence", "sampling")
    save_checkpoint(
        path,
        starter.transformer_state(dict.fromkeys(starter.info.adapters, 0.0)),
        variant="starter",
        transformer=starter.info.transformer,
        **{key: starter.metadata[key] for key in settings},
        parts={part: starter.part_state(part) for part in ("vae", "text_encoder")},
        adapters={name: lora.weights for name, lora in adapters.items()},
        adapter_scales={"motion": 0.0},
        adapter_alphas={name: lora.alpha for name, lora in adapters.items()},
        metadata={key: starter.metadata.get(key) for key in ("video", "preview")},
    )
    return path
