"""How the layered network attends inside the host: which kernel, and which layer sees which."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ... import kernels
from ...engine.errors import LayerLoomError
from ...engine.reuse import MEMORY_GIB, REFRESH_EVERY

# Entry of a model's transformer_options, and one of a run's alone.
OPTION, CACHES = "layerloom_attention", "layerloom_kept"
BACKENDS = ("host", "auto", "dispatch", "triton", "reference", "sage", "int8")
VISIBILITY = {
    "full": kernels.full,
    "prompt_isolated": kernels.prompt_isolated,
    "layer_isolated": kernels.layer_isolated,
    "blended_sees_all": kernels.blended_sees_all,
    "given_isolated": kernels.clean_sees_clean,
}


@dataclass(frozen=True)
class LayerAttention:
    """A user's choice; the default is the host's own attention, everything seeing everything.

    kernel: "host" sends every piece through the host's ``optimized_attention``, with whatever
        override other nodes have put there; "auto" is what our policy prefers, the rest are
        our backends by name.
    visibility: name of a preset. frame_window: largest distance in latent frames, or None.
    reuse: compute given layers at some steps alone; they then see nothing but each other and the
        prompts. refresh_every: after how many steps they are computed anew, None is never.
    reuse_bytes: most memory to keep them in.
    """

    kernel: str = "host"
    visibility: str = "full"
    frame_window: int | None = None
    reuse: bool = False
    refresh_every: int | None = REFRESH_EVERY
    reuse_bytes: int = int(MEMORY_GIB * 2**30)

    @property
    def uses_host(self) -> bool:
        return self.kernel == "host"

    @property
    def backend(self) -> str | None:
        """The backend to insist on, None for the policy's; the host's runs inside "dispatch"."""
        return {"host": "dispatch", "auto": None}.get(self.kernel, self.kernel)

    def check(self) -> None:
        """Raise LayerLoomError where this machine lacks the kernel."""
        for info in kernels.list_backends():
            if info.name == self.kernel and not info.available:
                raise LayerLoomError(
                    f"The attention backend {self.kernel} cannot run here: {info.reason}; choose "
                    "host or auto."
                )

    def mask(self, layout: kernels.SequenceLayout) -> kernels.SegmentMask | None:
        """Who sees whom in a layout; None for full attention."""
        if self.visibility == "full" and self.frame_window is None and not self.reuse:
            return None
        mask = replace(VISIBILITY[self.visibility](layout), frame_window=self.frame_window)
        return kernels.clean_sees_clean(layout, mask) if self.reuse else mask


def with_attention(model, choice: LayerAttention):
    """A clone of a MODEL that attends as chosen."""
    from .reuse import install, remove

    model = model.clone()
    options = dict(model.model_options.get("transformer_options", {}))
    options[OPTION] = choice
    model.model_options["transformer_options"] = options
    (install if choice.reuse else remove)(model)
    return model
