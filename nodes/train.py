"""The node that trains an adapter on layers from the graph."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..engine.checkpoints.lora import EXTRA_RANGE
from ..engine.errors import LayerLoomError
from .layered_inputs import size_inputs

CATEGORY = "LayerLoom/Adapters"


class TrainLora(io.ComfyNode):
    """Layers in, an adapter out: a file in models/loras, and the model with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..engine.training.data.in_memory import KINDS
        from .host.lora import NONE, list_loras

        low, high = EXTRA_RANGE
        return io.Schema(
            node_id="LayerLoomTrainLora",
            display_name="Train Adapter (LoRA)",
            category=CATEGORY,
            description=(
                "Trains an adapter for a layered model on the layers you connect and saves it in "
                "models/loras. The plot shows how the loss falls; cancelling keeps the adapter as "
                "far as it got."
            ),
            search_aliases=["train lora", "finetune layers", "LayerFlow training", "motion LoRA"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A layered model, with the adapters that the new one shall come on top of."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="From Layer Prompts: what the layers show. A list gives each clip one.",
                ),
                io.Image.Input(
                    "foreground",
                    tooltip=(
                        "Frames of the foreground, straight colour. A list of batches is a list of "
                        "clips."
                    ),
                ),
                io.Image.Input(
                    "background", tooltip="As many frames, or one that stands for all of them."
                ),
                io.String.Input(
                    "name",
                    default="my_adapter",
                    tooltip=(
                        "File in models/loras, with folders apart by /. A name that is taken gets "
                        "a number."
                    ),
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="plain",
                    tooltip=(
                        "plain: moving clips as they are. motion: every frame as a still clip, so "
                        "that strength 1 stands still. content: every frame as a still clip with "
                        "the model's motion adapter on, which keeps what is learnt free of "
                        "stillness, mixed with moving clips."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=8,
                    min=1,
                    max=1024,
                    tooltip="How much it can hold; LayerFlow takes 8 for motion, 256 for content.",
                ),
                io.Float.Input(
                    "lora_alpha",
                    default=8.0,
                    min=0.001,
                    max=4096.0,
                    step=0.1,
                    tooltip="Strength 1 adds alpha / rank; a larger one learns faster.",
                ),
                io.Int.Input(
                    "steps",
                    default=200,
                    min=1,
                    max=1_000_000,
                    tooltip="How often the adapter is updated.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-3,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="How far a step goes; falls to zero over the second half.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Samples a step; more of them are steadier, slower and need memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate="fixed",
                    tooltip="Of the first weights, the noise and the order of samples.",
                ),
                io.Combo.Input(
                    "continue_from",
                    options=list_loras(),
                    default=NONE,
                    tooltip="An adapter to go on from, which then sets rank, alpha and blocks.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=low,
                    max=high,
                    step=0.05,
                    tooltip="How strongly the outputs have it; the file is at 1.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=["all", "sixth"],
                    default="all",
                    advanced=True,
                    tooltip="Blocks it changes: all, or every sixth as LayerFlow trains.",
                ),
                io.Float.Input(
                    "video_share",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "With kind content: how often moving clips are drawn. 0 for batches of "
                        "pictures that do not follow each other."
                    ),
                ),
                io.Float.Input(
                    "text_dropout",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How often the prompts are left out, which guidance needs.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Batches a step sums up, for larger ones than fit into memory.",
                ),
                io.Int.Input(
                    "save_every",
                    default=100,
                    min=1,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps after which the file is written; at the end it always is.",
                ),
                *size_inputs(advanced=True),
                io.Mask.Input(
                    "alpha",
                    optional=True,
                    tooltip=(
                        "The foreground's alpha, 1 is opaque; not needed if it is transparent. "
                        "Load Image gives the reverse: invert it."
                    ),
                ),
                io.Image.Input(
                    "blended",
                    optional=True,
                    tooltip="The scene; without it the foreground is laid over the background.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the new adapter."),
                io.LoraModel.Output("lora", tooltip="The adapter, for Adapter Toggles."),
                io.String.Output("file", tooltip="Its file, as Load Adapter lists it."),
                io.Image.Output("loss_plot", tooltip="The losses of all steps as a picture."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            # Lists come whole: one run trains on all clips.
            is_input_list=True,
        )

    @classmethod
    def validate_inputs(cls, name: list[str], continue_from: list[str]) -> bool | str:
        from .host.lora import find_lora
        from .host.train import check_name

        try:
            for listed in continue_from:
                find_lora(listed)
        except LayerLoomError as error:
            return str(error)
        return next(filter(None, map(check_name, name)), True)

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        foreground,
        background,
        name,
        kind,
        rank,
        lora_alpha,
        steps,
        learning_rate,
        batch_size,
        seed,
        continue_from,
        strength,
        blocks,
        video_share,
        text_dropout,
        accumulate,
        save_every,
        width,
        height,
        frames,
        alpha=None,
        blended=None,
    ) -> io.NodeOutput:
        from .host.loader import layered_settings
        from .host.lora import add_extra, at_strength
        from .host.notices import tell
        from .host.pictures import as_image
        from .host.train import LoraTraining, TrainOptions
        from .host.training_clips import collect_clips

        # Errors are raised, as in Save Layers: an adapter that is not there is a failed run.
        model = model[0]
        layered_settings(model)
        options = TrainOptions(
            name=name[0],
            kind=kind[0],
            rank=rank[0],
            lora_alpha=lora_alpha[0],
            steps=steps[0],
            learning_rate=learning_rate[0],
            batch_size=batch_size[0],
            seed=seed[0],
            continue_from=continue_from[0],
            blocks=blocks[0],
            video_share=video_share[0],
            text_dropout=text_dropout[0],
            accumulate=accumulate[0],
            save_every=save_every[0],
            width=width[0],
            height=height[0],
            frames=frames[0],
        )
        none = [None]
        clips = collect_clips(
            model, positive, foreground, background, alpha or none, blended or none
        )

        def say(text: str) -> None:
            tell(cls.hidden.unique_id, text)

        trained = LoraTraining(model, vae[0], clips, options, say).run()
        tensors = at_strength(trained.lora, strength[0])
        adapted = model.clone()
        add_extra(adapted, tensors, trained.lora.name)
        plot = as_image(trained.plot)
        shown = ui.PreviewImage(plot, cls=cls)
        return io.NodeOutput(adapted, tensors, trained.file, plot, ui=shown)
