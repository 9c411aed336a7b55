"""A whole region animator in LayerLoom's own format, small enough for a test, random weights."""

from pathlib import Path

import torch
from test_video_unet import randomised

from layerloom.engine.checkpoints.click_save import save_click
from layerloom.engine.models.follow_your_click import ClickSettings, FollowYourClick, click_unet
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordEncoder

SIDE = 32
WORDS = ("a", "red", "circle", "moving", "right", "left", "jumps")
SETTINGS = ClickSettings(
    name="tiny",
    picture="all",
    mask="all",
    betas="scaled",
    height=SIDE,
    width=SIDE,
    frames=4,
    positions=8,
    strength_default=2.0,
    strength_range=(1.0, 4.0),
    stride=1.0,
    latent_scale=1.0,
    steps=4,
    guidance=2.0,
)
UNET = click_unet(
    "v2",
    phrase=True,
    block_channels=(16, 16),
    layers_per_block=1,
    attention_levels=(False, True),
    context_dim=16,
    num_heads=2,
    norm_groups=4,
)
VAE = {
    "latent_channels": 4,
    "temporal_factor": 1,
    "width": 32,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "blocks": "dense",
}


def write_clicker(path: Path, settings: ClickSettings = SETTINGS, **changes) -> Path:
    """Write it; ``changes`` replace keywords of the UNet."""
    unet = {**UNET, **changes}
    torch.manual_seed(0)
    words = WordEncoder(vocabulary=len(WORDS), tokens=8, dim=16)
    parts = {
        "unet": randomised(FollowYourClick(unet=unet, settings=settings).unet),
        "vae": StarterAutoencoder(**VAE),
        "text_encoder": words,
    }
    save_click(
        path,
        {part: network.state_dict() for part, network in parts.items()},
        settings=settings,
        unet=unet,
        vae={"kind": "starter", **VAE},
        text_encoder={"kind": "words", "tokens": 8, "dim": 16, "vocabulary": list(WORDS)},
    )
    return path
