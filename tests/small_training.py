"""A recipe small enough to train in a second, and what tests change about it."""

from pathlib import Path

from layerloom.engine.training import recipe as recipes
from layerloom.engine.training.recipe import train_from_recipe

RECIPES = Path(recipes.__file__).parent / "recipes"
SMALL_AUTOENCODER = {
    "data.size": "32",
    "data.frames": "4",
    "autoencoder.latent_channels": "4",
    "autoencoder.width": "8",
    "autoencoder.encoder_blocks": "1",
    "autoencoder.decoder_blocks": "1",
    "training.steps": "2",
    "training.batch": "4",
    "training.log_every": "1",
}
SMALL_LAYERED = {
    "data.size": "32",
    "data.frames": "4",
    "scenes": "4",
    "transformer.num_layers": "1",
    "transformer.num_attention_heads": "1",
    "transformer.attention_head_dim": "16",
    "transformer.in_channels": "4",
    "transformer.out_channels": "4",
    "transformer.text_embed_dim": "8",
    "text.dim": "8",
    "training.steps": "2",
    "training.batch": "2",
    "training.log_every": "1",
    "training.compile": "false",
}
# Float32 and AdamW: what is compared must not depend on how sums are ordered.
EXACT = {"training.precision": "fp32", "training.optimizer": "adamw", "training.warmup": "1"}
SMALL_ADAPTER = {
    "data.size": "32",
    "data.frames": "4",
    "data.scenes": "4",
    "adapter.rank": "2",
    "adapter.blocks": "all",
    "training.steps": "2",
    "training.batch": "2",
    "training.log_every": "1",
    "training.compile": "false",
}


def small_autoencoder(folder: Path, name: str = "starter_autoencoder", **changes) -> Path:
    """Train a tiny autoencoder for two steps; its checkpoint."""
    overrides = {**SMALL_AUTOENCODER, "folder": str(folder), **changes}
    return train_from_recipe(RECIPES / f"{name}.toml", overrides)


def small_starter(folder: Path, **changes) -> Path:
    """A tiny starter with its own autoencoder inside; its checkpoint."""
    autoencoder = small_autoencoder(folder / "autoencoder")
    overrides = {
        **SMALL_LAYERED,
        "folder": str(folder / "starter"),
        "autoencoder": str(autoencoder),
        **changes,
    }
    return train_from_recipe(RECIPES / "starter_layered.toml", overrides)


def small_adapter(name: str, start: Path, folder: Path, **changes) -> Path:
    """Train a tiny adapter beside a tiny starter; its checkpoint."""
    overrides = {**SMALL_ADAPTER, "start": str(start), "folder": str(folder), **changes}
    return train_from_recipe(RECIPES / f"{name}.toml", overrides)
