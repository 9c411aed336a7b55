"""The animator in miniature: networks, an autoencoder and cached clips for tests."""

import torch

from layerloom.engine.conditioning.frame_codec import StarterFrameCodec
from layerloom.engine.models.dynamicrafter import VARIANTS, QueryTransformer
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_image import StarterImageEncoder
from layerloom.engine.models.starter_text import WordEncoder, WordTokenizer
from layerloom.engine.models.video_unet import VideoUNet
from layerloom.engine.training.animate import AnimateNetwork, AnimateStage, AnimateTask
from layerloom.engine.training.animate_networks import initialise
from layerloom.engine.training.data.clips import ClipParts
from layerloom.engine.training.data.moving_sprites import MovingClips, MovingSprites
from layerloom.engine.training.moving_world import TOKENS, WORDS
from layerloom.engine.training.shares import Shares

UNET = {
    "out_channels": 4,
    "block_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "context_dim": 8,
    "head_dim": None,
    "num_heads": 2,
    "norm_groups": 4,
    "image_attention": True,
    "image_tokens_per_frame": 2,
    "scalar_embeddings": ("fps_embedding",),
}
PROJECTOR = {
    "dim": 8,
    "depth": 1,
    "heads": 2,
    "head_dim": 4,
    "queries": 8,
    "in_dim": 8,
    "out_dim": 8,
}


def frame_autoencoder() -> StarterAutoencoder:
    torch.manual_seed(0)
    return StarterAutoencoder(
        latent_channels=4,
        temporal_factor=1,
        width=32,
        encoder_blocks=1,
        decoder_blocks=1,
        blocks="dense",
    ).eval()


def moving_sprites(folder, **changes) -> MovingSprites:
    clips = MovingClips(frames=4, size=32, scenes=5, returning=0.4, **changes)
    codec = StarterFrameCodec(frame_autoencoder())
    return MovingSprites(clips, ClipParts(codec, 4, (32, 32), 16, folder))


def small_network(in_channels: int = 8) -> AnimateNetwork:
    torch.manual_seed(1)
    network = AnimateNetwork(
        VideoUNet(in_channels=in_channels, **UNET),
        QueryTransformer(**PROJECTOR),
        WordEncoder(vocabulary=len(WORDS), tokens=TOKENS, dim=8),
        StarterImageEncoder(size=32, dim=8, width=8),
    )
    initialise(network)
    return network


def small_stage(folder, task: AnimateTask, batch: int = 4, variant: str = "512", network=None):
    source = moving_sprites(folder)
    source.encode()
    tokenizer = WordTokenizer(WORDS, TOKENS)
    network = network or small_network()
    return AnimateStage(network, source, task, batch, VARIANTS[variant], None, tokenizer)


def draw(stage, seed: int = 0, shares: Shares | None = None):
    generator = torch.Generator().manual_seed(seed)
    return stage.draw(generator, *([shares] if shares else []))
