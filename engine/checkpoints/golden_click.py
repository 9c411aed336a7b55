"""Follow-Your-Click's golden network cases: Stable Diffusion 1.5 with motion modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from ..models.video_blocks import frame_positions
from ..models.video_unet import VideoUNet
from .golden import CaseResult, GoldenCase, compare
from .motion_names import engine_name


def run_forward(case: GoldenCase) -> Iterator[CaseResult]:
    """The UNet over noise, mask and first frame, against the official network's outputs."""
    network, given = official_unet(case), case.tensors
    if "out.pe_example" in given:
        positions = frame_positions(*given["out.pe_example"].shape[1:])
        yield compare(case, "out.pe_example", positions[None])
    for name in sorted(given):
        found = re.fullmatch(r"out\.(\w+)\.y", name)
        if not found:
            continue
        run = f"in.{found[1]}"
        noisy = given[f"{run}.noisy"]
        # The given picture's latent is in frame 0 alone, as the official code has it.
        first = torch.zeros_like(noisy)
        first[:, :, 0] = given[f"{run}.first_latents"]
        x = torch.cat([noisy, given[f"{run}.mask"], first], dim=1)
        scalars = {
            "fps_embedding": given[f"{run}.fps"],
            "motion_embedding": given[f"{run}.flow"],
        }
        with torch.no_grad():
            made = network(x, given[f"{run}.timestep"], given[f"{run}.context"], scalars=scalars)
        yield compare(case, name, made)


def official_unet(case: GoldenCase) -> VideoUNet:
    """The case's network with its weights."""
    config = case.description["config"]
    widths = tuple(config["block_out_channels"])
    network = VideoUNet(
        in_channels=9,
        out_channels=config["out_channels"],
        block_channels=widths,
        layers_per_block=config["layers_per_block"],
        context_dim=config["cross_attention_dim"],
        head_dim=None,
        num_heads=config["attention_head_dim"],
        norm_groups=math.gcd(config["norm_num_groups"], *widths),
        linear_projection=False,
        temporal_convolution=False,
        temporal_transformer=False,
        initial_temporal_transformer=False,
        motion_modules={
            "heads": config["motion_module_kwargs"]["num_attention_heads"],
            "middle": False,
            "norm_over_frames": False,
        },
        scalar_embeddings=("fps_embedding", "motion_embedding"),
        norm_over_frames=True,
    )
    weights = case.weights("module.")
    names = {key: engine_name(key) for key in weights}
    network.load_state_dict({name: weights[key] for key, name in names.items() if name})
    return network.eval()
