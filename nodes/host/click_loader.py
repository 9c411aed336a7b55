"""Makes the host's MODEL, CLIP and VAE of a checkpoint that animates regions."""

from __future__ import annotations

from pathlib import Path

from ...engine.checkpoints.click import ClickCheckpoint, open_click
from ...engine.errors import LayerLoomError
from .click_model import ClickConfig, ClickModel
from .loader import NONE, Loaded, find_checkpoint
from .patcher import blocker, clip_of, latent_format, make_patcher, network_dtypes, vae_of

PUBLISHED = "Stable Diffusion 1.5's with Load"


def open_parts(name: str, base: str = NONE) -> ClickCheckpoint:
    """A listed checkpoint on its base, opened; reads names alone.

    Raises:
        LayerLoomError: no such file, or not one that animates regions.
    """
    return _open(find_checkpoint(name), None if base == NONE else find_checkpoint(base))


def _open(path: Path, base: Path | None) -> ClickCheckpoint:
    opened = open_click(path, base)
    if opened.info.needs_base:
        raise LayerLoomError(
            f"{path.name} holds motion modules alone; choose the Stable Diffusion 1.5 checkpoint "
            "they stand on as base."
        )
    if not opened.variant.reads_picture:
        raise LayerLoomError(
            f"{path.name} is {opened.info.variant}, which reads neither a picture nor a mask and "
            "is a start for training alone; choose Follow-Your-Click's or PIA's weights, or ones "
            "that LayerLoom trained."
        )
    return opened


def load_parts(name: str, base: str = NONE) -> Loaded:
    """All parts of a listed checkpoint.

    In place of those that the file lacks come blockers that say which loader of the host to use.
    """
    checkpoint = open_parts(name, base)
    checkpoint.check()
    base_path = None if base == NONE else str(find_checkpoint(base))
    return Loaded(
        load_model(str(find_checkpoint(name)), base_path),
        clip_of(checkpoint) or blocker(name, "text encoder", f"{PUBLISHED} CLIP or Checkpoint"),
        vae_of(checkpoint) or blocker(name, "VAE", f"{PUBLISHED} VAE or Checkpoint"),
    )


def load_model(path: str, base: str | None = None, disable_dynamic: bool = False):
    """The MODEL alone; the host calls this again where it needs a second copy."""
    checkpoint = _open(Path(path), None if base is None else Path(base))
    config = ClickConfig(
        checkpoint.info.unet,
        checkpoint.variant,
        latent_format(checkpoint),
        network_dtypes(checkpoint),
    )
    again = (load_model, (path, base))
    return make_patcher(checkpoint, config, ClickModel, {"unet": ""}, again, disable_dynamic)
