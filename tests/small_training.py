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


SMALL_CLIPS = {"data.size": "32", "data.frames": "4", "data.scenes": "6"}
SMALL_PHASE = {
    "training.steps": "2",
    "training.batch": "2",
    "training.log_every": "1",
}
SMALL_ANIMATOR = {
    "unet.block_channels": "[8, 16]",
    "unet.num_heads": "2",
    "unet.norm_groups": "4",
    "projector.dim": "8",
    "projector.depth": "1",
    "projector.heads": "2",
    "projector.head_dim": "4",
    "projector.queries": "8",
    "text.dim": "8",
    "image.dim": "8",
    "image.width": "8",
}


def small_animator(folder: Path, phases: int = 3, **changes) -> Path:
    """Train the animator's first phases for two steps each; the last one's checkpoint."""
    made = small_autoencoder(
        folder / "autoencoder", "starter_animate_autoencoder", **{"autoencoder.width": "32"}
    )
    names = ("projector", "adapt", "detail", "finish")[:phases]
    for number, name in enumerate(names):
        overrides = {
            **SMALL_CLIPS,
            **SMALL_PHASE,
            "data.cache": str(folder / "clips"),
            "folder": str(folder / name),
            **({"start": str(made)} if number else {**SMALL_ANIMATOR, "autoencoder": str(made)}),
            **({"unet.in_channels": "8"} if name == "detail" else {}),
            **(changes if name == names[-1] else {}),
        }
        made = train_from_recipe(RECIPES / f"starter_animate_{name}.toml", overrides)
    return made
