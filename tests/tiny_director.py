"""A whole network that moves subjects along boxes, small enough for a test, random weights."""

from pathlib import Path

import torch
from test_video_unet import randomised

from layerloom.engine.checkpoints.dreamvideo_save import network_states, save_trajectory
from layerloom.engine.models.dreamvideo import DreamVideo, TrajectorySettings
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordEncoder

SIDE = 32
WORDS = ("a", "sprite", "moving", "over", "blue", "stripes")
SETTINGS = TrajectorySettings(
    name="tiny",
    height=SIDE,
    width=SIDE,
    frames=4,
    latent_scale=1.0,
    steps=4,
    guidance=2.0,
)
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_channels": (16, 16),
    "layers_per_block": 1,
    "attention_levels": (True, False),
    "context_dim": 16,
    "head_dim": 8,
    "norm_groups": 4,
}
CONTROL = {"widths": (4, 8, 8, 16), "heads": 2}
NETWORK = {"unet": UNET, "reference": True, "control": CONTROL}
VAE = {
    "latent_channels": 4,
    "temporal_factor": 1,
    "width": 32,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "blocks": "dense",
}


def build(**changes) -> DreamVideo:
    """The network after a training: nothing is zero any more."""
    torch.manual_seed(0)
    return randomised(DreamVideo(**{**NETWORK, "settings": SETTINGS, **changes}))


def write_director(path: Path, **changes) -> Path:
    """Write it; ``changes`` replace keywords of the network."""
    network = build(**changes)
    states = network_states(network)
    keywords = {**NETWORK, "settings": SETTINGS, **changes}
    torch.manual_seed(0)
    words = WordEncoder(vocabulary=len(WORDS), tokens=8, dim=16)
    for part, made in (("vae", StarterAutoencoder(**VAE)), ("text_encoder", words)):
        states[part] = made.state_dict()
    save_trajectory(
        path,
        states,
        **keywords,
        vae={"kind": "starter", **VAE},
        text_encoder={"kind": "words", "tokens": 8, "dim": 16, "vocabulary": list(WORDS)},
    )
    return path
