"""Trains an adapter on a MODEL: the host's weights and memory manager, the engine's trainer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from PIL import Image

from ...engine.checkpoints.load import open_checkpoint
from ...engine.checkpoints.lora import LoRA, read_lora
from ...engine.conditioning.layers import GIVEN
from ...engine.errors import LayerLoomError
from ...engine.models.layered_transformer import LayeredTransformer
from ...engine.models.lora import targets_of
from ...engine.training.borrowed import (
    AdapterRun,
    BorrowedNetwork,
    borrow,
    borrowed_stage,
    step_memory,
)
from ...engine.training.data.in_memory import GivenClip, MemorySource
from ...engine.training.layered import LayeredTask
from ...engine.training.loss_plot import loss_plot
from ...engine.training.settings import AdapterSettings, TrainingSettings
from .lora import find_lora, own_strengths, patched_copy, toggled
from .progress import PreviewedSteps
from .training_clips import HostCodec

NAME = re.compile(r"[\w-]+(/[\w-]+)*")
# The share of a device's memory beyond which blocks are computed twice instead of kept.
FILLED = 0.85
# Seeds are multiplied with a million inside the trainer.
SEEDS = 2**40


@dataclass(frozen=True)
class TrainOptions:
    """The widgets of ``LayerLoomTrainLora``, which says what each is."""

    name: str
    kind: str
    rank: int
    lora_alpha: float
    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    continue_from: str
    blocks: str
    video_share: float
    text_dropout: float
    accumulate: int
    save_every: int
    width: int
    height: int
    frames: int


@dataclass(frozen=True)
class Trained:
    """An adapter, the file it is in as the host lists it, and the picture of its losses."""

    lora: LoRA
    file: str
    plot: Image.Image


def check_name(name: str) -> str | None:
    """A sentence saying why an adapter cannot be called so, or None."""
    if NAME.fullmatch(name):
        return None
    return (
        f"The adapter's name is {name!r}; give letters, digits, - and _, with folders apart by /, "
        "without .safetensors."
    )


def loras_folder() -> Path:
    """The first folder that the host reads adapters from."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def free_file(name: str) -> Path:
    """A file in models/loras that is not there yet: ``name``, or name-2, name-3 ...

    Raises:
        LayerLoomError: a bad name, or a folder that cannot be written to.
    """
    problem = check_name(name)
    if problem:
        raise LayerLoomError(problem)
    file = loras_folder() / f"{name}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise LayerLoomError(f"{file.parent} cannot be written to; choose another name or folder.")
    stem, number = file.stem, 2
    while file.exists():
        file = file.with_name(f"{stem}-{number}.safetensors")
        number += 1
    return file


class EngineCall:
    """The host's network behind the engine's call, in the type that it computes in."""

    def __init__(self, network: LayeredTransformer, dtype: torch.dtype):
        self.network, self.dtype = network, dtype
        self.dim, self.heads, self.out_channels = network.dim, network.heads, network.out_channels
        self.transformer_blocks = network.transformer_blocks

    def __call__(self, latents, timestep, text, segments, clean=None) -> torch.Tensor:
        # The host's class puts a call of its own in front of this one.
        return LayeredTransformer.forward(
            self.network,
            latents.to(self.dtype),
            timestep,
            text.to(self.dtype),
            segments,
            clean=clean,
        )


class LoraTraining:
    """One run of the node; what can be wrong is found before anything is computed.

    Args:
        model, vae: the host's MODEL and VAE.
        clips: as ``collect_clips`` gives them.
        say: called with sentences for the user.

    Raises:
        LayerLoomError: an option, a clip or an adapter that does not fit the model.
    """

    def __init__(
        self, model, vae, clips: list[GivenClip], options: TrainOptions, say: Callable[[str], None]
    ):
        self.model, self.options, self.say = model, options, say
        self.settings = settings = model.model.settings
        self.start = self._start()
        self.adapter = AdapterSettings(
            name=options.name.rpartition("/")[2],
            rank=self.start.rank if self.start else options.rank,
            alpha=self.start.alpha if self.start else options.lora_alpha,
            blocks=options.blocks,
            still={"motion": 1.0},
        )
        self.others = self._others()
        sequence = settings.frames(options.frames)
        size = settings.size(options.width, options.height)
        codec = HostCodec(model, vae, sequence)
        self.source = MemorySource(clips, options.kind, sequence, size, codec, options.video_share)
        self.file = free_file(options.name)
        self.listed = str(self.file.relative_to(loras_folder()))
        said = settings.notes(options.width, options.height, options.frames)
        say(" ".join([*self.source.describe(), *said]))

    def _start(self) -> LoRA | None:
        network = self.model.model.diffusion_model
        path = find_lora(self.options.continue_from)
        if path is None:
            targets_of(network, self.options.blocks)
            return None
        lora = read_lora(path)
        lora.check({n: tuple(p.shape) for n, p in network.named_parameters()}, self.settings.name)
        return lora

    def _others(self) -> dict[str, LoRA]:
        """The model's motion adapter: still clips come with it, as LayerFlow trains."""
        if self.options.kind != "content":
            return {}
        if "motion" not in self.model.model.adapters:
            self.say(
                f"{self.settings.name} has no motion adapter, so what is learnt from still clips "
                "may hold things still."
            )
            return {}
        return {
            "motion": open_checkpoint(Path(self.model.cached_patcher_init[1][0])).lora("motion")
        }

    def run(self) -> Trained:
        """Encode, train and save; a cancel keeps the adapter of the last whole step."""
        steps = self.options.steps
        bar = PreviewedSteps(len(self.source) + steps)
        bar.at(0)
        self.source.encode(lambda done, _: bar.at(done))

        def report(step: int, losses: list[float]) -> None:
            bar.at(len(self.source) + step, lambda: self.plot(losses))

        # The host's own nodes run in inference mode, where nothing can be learnt.
        with torch.inference_mode(False), self._network() as (network, settings):
            run = self._trainer(network, settings, report)
            before = run.check()
            try:
                run.run()
            finally:
                if run.step < steps:
                    self.say(self._stopped(run.saved_step))
            self.say(
                f"Saved as models/loras/{self.listed}. Loss on the same few draws: {before:.4g} "
                f"before, {run.check():.4g} after."
            )
            return Trained(run.adapter(), self.listed, self.plot(run.losses))

    def plot(self, losses: list[float]) -> Image.Image:
        """The picture of the losses so far."""
        return loss_plot(losses, self.options.steps, f"{self.adapter.name}: loss by step")

    def _stopped(self, steps: int) -> str:
        if not steps:
            return "Stopped before the first step was done: there is no adapter yet."
        return (
            f"Stopped after {steps} of {self.options.steps} steps; the adapter so far is kept as "
            f"models/loras/{self.listed}."
        )

    @contextmanager
    def _network(self) -> Iterator[tuple[BorrowedNetwork, TrainingSettings]]:
        """The adapter on a copy of the model that the host has loaded, with room for a step."""
        kept = own_strengths(self.model)
        if self.others:
            # Attached below, to be on with still clips and off with others.
            kept = {name: value for name, value in kept.items() if name not in self.others}
        management = comfy.model_management
        copy = patched_copy(toggled(self.model, kept) if self.others else self.model)
        copy.model.requires_grad_(False)
        dtype = copy.model.manual_cast_dtype or copy.model.get_dtype()
        if dtype == torch.float16:
            # Gradients are too small for it.
            dtype = torch.float32
            copy.set_model_compute_dtype(dtype)
        network = borrow(
            copy.model.diffusion_model,
            EngineCall(copy.model.diffusion_model, dtype),
            self.adapter,
            self.others,
            self.start,
            self.options.seed % SEEDS,
            self.settings.name,
        )
        bf16 = dtype != torch.float32
        settings = self._training_settings()
        needed = step_memory(network, self._tokens(), settings, bf16)
        room = management.get_total_memory(copy.load_device) * FILLED
        if needed + copy.model_size() > room:
            settings = replace(settings, gradient_checkpointing=True)
            needed = step_memory(network, self._tokens(), settings, bf16)
        before, management.in_training = getattr(management, "in_training", False), True
        try:
            with torch.no_grad():
                management.load_models_gpu([copy], memory_required=needed, force_full_load=True)
            yield network.to(copy.load_device), settings
        finally:
            management.in_training = before
            copy.detach()

    def _training_settings(self) -> TrainingSettings:
        options = self.options
        return TrainingSettings(
            steps=options.steps,
            batch=options.batch_size,
            learning_rate=options.learning_rate,
            accumulate=options.accumulate,
            warmup=max(1, min(20, options.steps // 10)),
            decay_from=0.5,
            weight_decay=0.0,
            ema=0.99,
            seed=options.seed % SEEDS,
            checkpoint_every=options.save_every,
        )

    def _tokens(self) -> int:
        """Text and video tokens of one sample."""
        sequence, (height, width) = self.source.sequence, self.source.sizes[0]
        frames = sum(sequence.latent_frames(layer) for layer in sequence.layers)
        area = (height // self.settings.multiple) * (width // self.settings.multiple)
        return self.source.clips[0].text[..., 0].numel() + frames * area

    def _trainer(
        self, network: BorrowedNetwork, training: TrainingSettings, report: Callable
    ) -> AdapterRun:
        settings, options = self.settings, self.options
        shares = {
            task: getattr(LayeredTask, task) if task in settings.tasks else 0.0 for task in GIVEN
        }
        task = LayeredTask(**shares, text_dropout=options.text_dropout)
        stage = borrowed_stage(
            network, self.adapter, self.source, task, options.batch_size, settings.schedule
        )
        notes = {
            "kind": options.kind,
            "trained_on": settings.name,
            "learning_rate": options.learning_rate,
            "seed": options.seed,
        }
        return AdapterRun(stage, training, self.file, report, self.say, notes)
