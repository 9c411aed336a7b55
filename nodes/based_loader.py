"""What the loader nodes share whose files may stand on another file, their base."""

from __future__ import annotations

from abc import abstractmethod
from types import ModuleType

from comfy_api.latest import io

from ..engine.errors import LayerLoomError


class BasedLoader(io.ComfyNode):
    """A file, and the base it may stand on, as the host's MODEL, CLIP and VAE.

    A node of this kind writes its schema with ``file_inputs`` and names its loader.
    """

    @classmethod
    @abstractmethod
    def loader(cls) -> ModuleType:
        """The module of ``nodes.host`` with ``open_parts`` and ``load_parts``."""

    @classmethod
    def validate_inputs(cls, checkpoint: str, base: str) -> bool | str:
        try:
            cls.loader().open_parts(checkpoint, base)
        except LayerLoomError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, base: str) -> str:
        from .host.loader import NONE, find_checkpoint

        files = [find_checkpoint(name) for name in (checkpoint, base) if name != NONE]
        return ":".join(f"{path}:{path.stat().st_mtime_ns}" for path in files)

    @classmethod
    def execute(cls, checkpoint: str, base: str) -> io.NodeOutput:
        from .host.notices import failure

        try:
            loaded = cls.loader().load_parts(checkpoint, base)
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae)


def file_inputs(family: str, base_tooltip: str) -> list[io.Combo.Input]:
    """The two choices: a checkpoint of the family, and which one it stands on."""
    from .host.loader import NONE, list_checkpoints

    names = list_checkpoints(family)
    return [
        io.Combo.Input(
            "checkpoint",
            options=names,
            default=names[0] if names else None,
            tooltip=(
                "The starter comes with the pack; other files are those in models/checkpoints and "
                "models/diffusion_models."
            ),
        ),
        io.Combo.Input(
            "base",
            options=[NONE, *(name for name in names if not name.startswith("starter/"))],
            default=NONE,
            advanced=True,
            tooltip=base_tooltip,
        ),
    ]
