"""A whole animator in LayerLoom's own format, small enough for a test."""

from dataclasses import replace
from pathlib import Path

import torch

from layerloom.engine.checkpoints.dynamicrafter import open_dynamicrafter
from layerloom.engine.checkpoints.dynamicrafter_save import save_dynamicrafter
from layerloom.engine.models.dynamicrafter import VARIANTS
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_image import StarterImageEncoder
from layerloom.engine.models.starter_text import WordEncoder

SIDE = 64
WORDS = ("a", "red", "circle", "moving", "right", "left")
VAE = {
    "kind": "starter",
    "latent_channels": 4,
    "temporal_factor": 1,
    "width": 32,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "blocks": "dense",
}


def write_animator(path: Path, source: Path, name: str = "512") -> Path:
    """The networks of ``source``, a file in the official layout, with encoders of its own.

    Sixteen-wide golden networks make much of rounding; the last layer is made small, so that a
    clip stays near its picture and two samplers can be compared.
    """
    torch.manual_seed(0)
    opened = open_dynamicrafter(source, name)
    unet, projector = opened.info.unet, opened.info.image_projector
    variant = replace(VARIANTS[name], name="tiny", height=SIDE, width=SIDE)
    image = {"size": 32, "dim": projector["in_dim"], "width": 8}
    text = {"tokens": 8, "dim": unet["context_dim"], "vocabulary": WORDS}
    words = WordEncoder(vocabulary=len(WORDS), tokens=8, dim=unet["context_dim"])
    autoencoder = StarterAutoencoder(**{k: v for k, v in VAE.items() if k != "kind"})
    networks = opened.part_state("unet")
    for key in ("conv_out.weight", "conv_out.bias"):
        networks[key] = networks[key] * 0.01
    save_dynamicrafter(
        path,
        {
            "unet": networks,
            "image_projector": opened.part_state("image_projector"),
            "vae": autoencoder.state_dict(),
            "text_encoder": words.state_dict(),
            "image_encoder": StarterImageEncoder(**image).state_dict(),
        },
        variant=variant,
        unet=unet,
        image_projector=projector,
        vae=VAE,
        text_encoder={**text, "vocabulary": list(WORDS)},
        image_encoder={"kind": "starter", **image},
        metadata={
            "modes": ["animate", "interpolate", "loop"],
            "preview": {"factors": [[0.3, 0.2, 0.1]] * 4, "bias": [0.0, 0.1, 0.2]},
        },
    )
    return path
