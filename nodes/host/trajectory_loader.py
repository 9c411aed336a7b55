"""Makes the host's MODEL, CLIP and VAE of a checkpoint that moves subjects along boxes."""

from __future__ import annotations

from pathlib import Path

from ...engine.checkpoints.dreamvideo import TrajectoryCheckpoint, open_trajectory
from ...engine.checkpoints.dreamvideo_detect import NETWORKS
from ...engine.errors import LayerLoomError
from .loader import NONE, Loaded, find_checkpoint
from .patcher import blocker, clip_of, latent_format, make_patcher, network_dtypes, vae_of
from .trajectory_model import TrajectoryConfig, TrajectoryModel


def open_parts(name: str, base: str = NONE) -> TrajectoryCheckpoint:
    """A listed checkpoint on its base, opened; reads names alone.

    Raises:
        LayerLoomError: no such file, or not one that moves subjects along boxes.
    """
    return _open(find_checkpoint(name), None if base == NONE else find_checkpoint(base))


def _open(path: Path, base: Path | None) -> TrajectoryCheckpoint:
    opened = open_trajectory(path, base)
    if opened.info.needs_base:
        raise LayerLoomError(
            f"{path.name} holds what was added to a base and not the base; choose ModelScope's "
            "text-to-video weights as base."
        )
    if not opened.info.reference:
        raise LayerLoomError(
            f"{path.name} is {opened.info.variant}, a base that reads neither subjects nor boxes; "
            "choose weights that LayerLoom trained, and this one as their base."
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
        clip_of(checkpoint)
        or blocker(name, "text encoder", "OpenCLIP ViT-H/14's (that of SD 2.x) with Load CLIP"),
        vae_of(checkpoint) or blocker(name, "VAE", "Stable Diffusion's with Load VAE"),
    )


def load_model(path: str, base: str | None = None, disable_dynamic: bool = False):
    """The MODEL alone; the host calls this again where it needs a second copy."""
    checkpoint = _open(Path(path), None if base is None else Path(base))
    config = TrajectoryConfig(checkpoint, latent_format(checkpoint), network_dtypes(checkpoint))
    prefixes = {part: f"{part}." for part in NETWORKS}
    again = (load_model, (path, base))
    return make_patcher(checkpoint, config, TrajectoryModel, prefixes, again, disable_dynamic)
