"""A segment-anything of a few thousand weights, random, for tests of mechanics."""

from pathlib import Path

import numpy as np
import torch

from layerloom.engine.models.segmenter import SegmenterSettings, build_segmenter

TINY = SegmenterSettings(
    image_size=64,
    patch_size=8,
    width=32,
    depth=2,
    heads=4,
    mlp=64,
    window=3,
    global_blocks=(1,),
    channels=32,
    mask_channels=8,
    decoder_mlp=48,
    score_width=24,
)


def tiny_segmenter(seed: int = 0):
    """The network; its decoder's answers depend on where was clicked."""
    torch.manual_seed(seed)
    network = build_segmenter(TINY)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def write_segmenter(path: Path, seed: int = 0) -> Path:
    """As segment-anything's files are: a pickle of names and weights."""
    torch.save(tiny_segmenter(seed).state_dict(), path)
    return path


def picture(height: int = 48, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
