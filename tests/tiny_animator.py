"""A whole animator in LayerLoom's own format, small enough for a test, with random weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from layerloom.engine.checkpoints.dynamicrafter_save import save_dynamicrafter
from layerloom.engine.models.dynamicrafter import SPEED, VARIANTS, QueryTransformer
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_image import StarterImageEncoder
from layerloom.engine.models.starter_text import WordEncoder
from layerloom.engine.models.video_unet import VideoUNet

SIDE = 64
WORDS = ("a", "red", "circle", "moving", "right", "left")
# Wider than the golden networks, which blow rounding up until samplers cannot be compared.
UNET = {
    "in_channels": 8,
    "out_channels": 4,
    "block_channels": (32, 48),
    "layers_per_block": 1,
    "attention_levels": (True, False),
    "context_dim": 16,
    "head_dim": 8,
    "norm_groups": 8,
    "initial_temporal_transformer": True,
    "image_attention": True,
    "image_tokens_per_frame": 4,
    "scalar_embeddings": (SPEED,),
}
PROJECTOR = {
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "head_dim": 8,
    "queries": 64,
    "in_dim": 20,
    "out_dim": 16,
}
VAE = {
    "kind": "starter",
    "latent_channels": 4,
    "temporal_factor": 1,
    "width": 32,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "blocks": "dense",
}
IMAGE = {"size": 32, "dim": 20, "width": 8}


def write_animator(path: Path, vocabulary: Sequence[str] = WORDS) -> Path:
    """Write it: v-prediction with zero terminal SNR and dynamic rescale, as 512."""
    torch.manual_seed(0)
    words = WordEncoder(vocabulary=len(vocabulary), tokens=8, dim=16)
    autoencoder = StarterAutoencoder(**{k: v for k, v in VAE.items() if k != "kind"})
    parts = {
        "unet": VideoUNet(**UNET),
        "image_projector": QueryTransformer(**PROJECTOR),
        "vae": autoencoder,
        "text_encoder": words,
        "image_encoder": StarterImageEncoder(**IMAGE),
    }
    save_dynamicrafter(
        path,
        {part: network.state_dict() for part, network in parts.items()},
        variant=replace(VARIANTS["512"], name="tiny", height=SIDE, width=SIDE),
        unet=UNET,
        image_projector=PROJECTOR,
        vae=VAE,
        text_encoder={"kind": "starter", "tokens": 8, "dim": 16, "vocabulary": list(vocabulary)},
        image_encoder={"kind": "starter", **IMAGE},
        metadata={
            "modes": ["animate", "interpolate", "loop"],
            "preview": {"factors": [[0.3, 0.2, 0.1]] * 4, "bias": [0.0, 0.1, 0.2]},
        },
    )
    return path
