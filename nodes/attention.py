"""The node that says how a layered model attends."""

from __future__ import annotations

from comfy_api.latest import io

from ..engine.errors import LayerLoomError
from ..engine.reuse import MEMORY_GIB, REFRESH_EVERY

CATEGORY = "LayerLoom/Layered"


class LayerAttention(io.ComfyNode):
    """Which attention runs, and which layer sees which."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from .host.attention import BACKENDS, VISIBILITY

        return io.Schema(
            node_id="LayerLoomLayerAttention",
            display_name="Layer Attention",
            category=CATEGORY,
            description=(
                "Chooses the attention of a layered model. Hiding layers from one another saves "
                "time but changes what the weights were trained to do."
            ),
            search_aliases=["segment attention", "layer visibility"],
            inputs=[
                io.Model.Input("model", tooltip="A layered model."),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default=BACKENDS[0],
                    tooltip=(
                        "host: ComfyUI's own attention with the overrides other nodes set. auto: "
                        "LayerLoom's fastest exact kernel. dispatch: torch's attention on what is "
                        "visible. triton: one fused kernel (NVIDIA). reference: slow, to compare "
                        "with. sage, int8: eight bits, not exact, where installed."
                    ),
                ),
                io.Combo.Input(
                    "visibility",
                    options=list(VISIBILITY),
                    default="full",
                    tooltip=(
                        "full: as trained. prompt_isolated: a layer reads its own prompt alone. "
                        "layer_isolated: layers do not see each other. blended_sees_all: "
                        "foreground with alpha, background alone, blended sees everything "
                        "(about 56 % of the work). given_isolated: given layers see each other "
                        "and the prompts alone."
                    ),
                ),
                io.Int.Input(
                    "frame_window",
                    default=0,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip=(
                        "Largest distance in latent frames, along all layers laid end to end, at "
                        "which one sees another; 0 is no limit."
                    ),
                ),
                io.Boolean.Input(
                    "reuse_given",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Compute given layers at some steps alone and reuse them at the others; "
                        "they then see each other and the prompts alone. Faster, but not quite "
                        "the same: the weights were trained on full attention at every step."
                    ),
                ),
                io.Int.Input(
                    "refresh_every",
                    default=REFRESH_EVERY,
                    optional=True,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip=(
                        "With reuse_given: steps after which given layers are computed anew; 0 is "
                        "never, 1 at every step."
                    ),
                ),
                io.Float.Input(
                    "reuse_memory",
                    default=MEMORY_GIB,
                    optional=True,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    advanced=True,
                    tooltip=(
                        "With reuse_given: most GiB to keep given layers in, for the length of a "
                        "run; where they need more, every step computes them."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, attending as chosen.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        backend: str,
        visibility: str,
        frame_window: int = 0,
        reuse_given: bool = False,
        refresh_every: int = REFRESH_EVERY,
        reuse_memory: float = MEMORY_GIB,
    ) -> io.NodeOutput:
        from .host.attention import LayerAttention as Choice
        from .host.attention import with_attention
        from .host.loader import layered_settings
        from .host.notices import failure

        choice = Choice(
            backend,
            visibility,
            frame_window or None,
            reuse_given,
            refresh_every or None,
            int(reuse_memory * 2**30),
        )
        try:
            layered_settings(model)
            choice.check()
        except LayerLoomError as error:
            return io.NodeOutput(None, block_execution=failure(cls.hidden.unique_id, error))
        return io.NodeOutput(with_attention(model, choice))
