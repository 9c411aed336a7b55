"""Stage: the layered transformer and its word encoder, all four tasks in one network."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import autocast, nn

from ..checkpoints.load import open_checkpoint
from ..conditioning.layers import GIVEN, LayerSequence
from ..conditioning.prompts import indexed_prompts
from ..errors import LayerLoomError
from ..models.layered_transformer import LayeredTransformer
from ..models.starter_autoencoder import SPATIAL_FACTOR, TEMPORAL_FACTOR, StarterAutoencoder
from ..models.starter_text import WordEncoder, WordTokenizer
from ..sampling.schedules import layerflow_schedule
from .autoencoder import SpriteData, layer_clips
from .sprite_world import VOCABULARY, prompts, render, scene_at

ENCODE_SCENES = 16


@dataclass(frozen=True)
class LayeredTask:
    """The ``[task]`` table: what is drawn how often.

    ``generate`` ... ``decompose`` are the tasks' shares, ``layer_weights`` the layers' weights in
    the loss (1 where not given). A share ``uniform_timesteps`` of the timesteps is uniform, the
    rest logit-normal with mean and spread (Esser et al., arXiv 2403.03206, section 3.1).
    """

    generate: float = 0.4
    foreground: float = 0.2
    background: float = 0.2
    decompose: float = 0.2
    text_dropout: float = 0.1
    uniform_timesteps: float = 1.0
    timestep_mean: float = 0.0
    timestep_spread: float = 1.0
    layer_weights: Mapping[str, float] = field(default_factory=dict)

    def timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Times [batch] in [0, 1), one in each of ``batch`` equally likely slices.

        The expectation is that of independent draws, the variance smaller.
        """
        slices = torch.arange(batch) + torch.rand(batch, generator=generator)
        uniform = (slices / batch).clamp(1e-4, 1 - 1e-4)
        normal = torch.special.ndtri(uniform)
        focused = torch.sigmoid(self.timestep_mean + self.timestep_spread * normal)
        plain = torch.rand(batch, generator=generator) < self.uniform_timesteps
        return torch.where(plain, uniform, focused)

    @property
    def mix(self) -> torch.Tensor:
        return torch.tensor([getattr(self, task) for task in GIVEN])


class LayeredNetwork(nn.Module):
    """What is trained together: the transformer and the text encoder it reads from."""

    def __init__(self, transformer: LayeredTransformer, text_encoder: WordEncoder):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


@torch.no_grad()
def encode_scenes(
    autoencoder: StarterAutoencoder,
    data: SpriteData,
    sequence: LayerSequence,
    count: int,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Joined latents [count, T, C, h, w] (bfloat16) of training scenes 0 .. count - 1."""
    parts = []
    for start in range(0, count, ENCODE_SCENES):
        indices = range(start, min(count, start + ENCODE_SCENES))
        batch = render(
            [scene_at(data.seed, i) for i in indices], data.frames, (data.size, data.size)
        )
        with autocast("cpu", torch.bfloat16):
            latents = autoencoder.encode(sequence.join_pixels(layer_clips(batch)))
        parts.append(latents.bfloat16())
        if progress:
            progress(indices.stop, count)
    return torch.cat(parts)


@torch.no_grad()
def preview_fit(
    autoencoder: StarterAutoencoder, data: SpriteData, scenes: int = 64
) -> dict[str, list]:
    """Least-squares fit from a latent position's channels to the mean colour of its pixels.

    Returns "factors" [C, 3] and "bias" [3] for colours in [-1, 1], what hosts preview latents
    with.
    """
    size = (data.size, data.size)
    batch = render([scene_at(data.seed, i) for i in range(scenes)], data.frames, size)
    clip = layer_clips(batch)["blended"]
    latents = autoencoder.encode(clip).movedim(2, -1).flatten(0, -2)
    cell = (TEMPORAL_FACTOR, SPATIAL_FACTOR, SPATIAL_FACTOR)
    means = nn.functional.avg_pool3d(clip.transpose(1, 2), cell)
    colours = means.movedim(1, -1).flatten(0, -2)
    columns = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    fit = torch.linalg.lstsq(columns, colours).solution
    rounded = [[round(value, 4) for value in row] for row in fit.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}


class LayeredStage:
    """v-prediction on the noisy layers, a task a step (LayerFlow, arXiv 2506.04228, section 3).

    ``latents`` are the joined latents of sprite world's training scenes, as ``encode_scenes``
    gives them; captions are worded anew each time a scene is drawn. ``sampling`` are the
    defaults written into the checkpoint.
    """

    hidden = ("transformer_blocks",)

    def __init__(
        self,
        transformer: Mapping[str, Any],
        text: Mapping[str, Any],
        data: SpriteData,
        task: LayeredTask,
        batch: int,
        autoencoder: tuple[Mapping[str, Any], StarterAutoencoder],
        latents: torch.Tensor,
        sampling: Mapping[str, Any],
    ):
        self.sampling = dict(sampling)
        self.config = {"transformer": dict(transformer), "text_encoder": dict(text)}
        self.data, self.task, self.batch = data, task, batch
        self.autoencoder_config, self.autoencoder = autoencoder
        self.sequence = LayerSequence(frames=data.frames)
        self.schedule = layerflow_schedule()
        self.tokenizer = WordTokenizer(VOCABULARY, text["tokens"])
        self.latents = latents
        self.network = LayeredNetwork(
            LayeredTransformer(**transformer),
            WordEncoder(vocabulary=len(VOCABULARY), tokens=text["tokens"], dim=text["dim"]),
        )
        initialise(self.network)
        self.blocks = self.network.transformer.transformer_blocks

    def start_from(self, path: Path) -> None:
        """Take the weights of a checkpoint of the same shape, its text encoder's where it has one.

        The checkpoint may have larger patches (``with_pixel_patches``).

        Raises:
            LayerLoomError: another network, or not a checkpoint.
        """
        checkpoint = open_checkpoint(path)
        state = checkpoint.transformer_state()
        transformer = self.network.transformer
        if transformer.patch_size == 1:
            state = with_pixel_patches(state)
        try:
            transformer.load_state_dict(state)
            if "text_encoder" in checkpoint.info.parts:
                self.network.text_encoder.load_state_dict(checkpoint.part_state("text_encoder"))
        except RuntimeError as error:
            raise LayerLoomError(
                f"{path} is a network of another shape than the recipe's [transformer] and [text]."
            ) from error

    def text(self, indices: torch.Tensor, task: str, generator: torch.Generator) -> torch.Tensor:
        """Features [B, prompts, tokens, D]; a share of the batch gets zeros (no text)."""
        ids = []
        for index in indices.tolist():
            rng = random.Random(int(torch.randint(2**40, (), generator=generator)))
            texts = prompts(scene_at(self.data.seed, index), rng)
            ids.append(torch.stack([self.tokenizer(t) for t in indexed_prompts(task, *texts)]))
        features = self.network.text_encoder(torch.stack(ids))
        kept = torch.rand(len(ids), generator=generator) >= self.task.text_dropout
        return features * kept[:, None, None, None]

    def loss(self, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        task = list(GIVEN)[int(torch.multinomial(self.task.mix, 1, generator=generator))]
        indices = torch.randint(len(self.latents), (self.batch,), generator=generator)
        layers = self.sequence.split_latents(self.latents[indices].float())
        segments = self.sequence.segments(task)
        given = self.sequence.given(task)
        made = {name: layer for name, layer in layers.items() if name not in given}
        clean = {name: layer for name, layer in layers.items() if name in given}
        x0 = self.sequence.join_latents(made)
        times = self.task.timesteps(self.batch, generator)
        timestep = (times * len(self.schedule.alphas_cumprod)).long()
        noise = torch.randn(x0.shape, generator=generator)
        predicted = self.network.transformer(
            self.schedule.add_noise(x0, noise, timestep).float(),
            timestep,
            self.text(indices, task, generator),
            segments,
            clean=self.sequence.join_latents(clean) if clean else None,
        )
        target = self.schedule.velocity(x0, noise, timestep).float()
        error = (predicted.float() - target).square().mean((0, 2, 3, 4))
        weights = torch.cat(
            [
                torch.full((layer.shape[1],), float(self.task.layer_weights.get(name, 1.0)))
                for name, layer in made.items()
            ]
        )
        loss = (error * weights).sum() / weights.sum()
        return loss, {f"loss/{task}": error.mean().item()}

    def export(self, path: Path, network: nn.Module) -> None:
        from ..checkpoints.save import save_checkpoint

        text = self.config["text_encoder"]
        save_checkpoint(
            path,
            network.transformer.state_dict(),
            variant="starter",
            transformer=self.config["transformer"],
            vae={"kind": "starter", **self.autoencoder_config},
            text_encoder={"kind": "words", **text, "vocabulary": list(VOCABULARY)},
            sequence={"layers": list(self.sequence.layers), "frames": self.data.frames},
            sampling=self.sampling,
            parts={
                "vae": self.autoencoder.state_dict(),
                "text_encoder": network.text_encoder.state_dict(),
            },
            metadata={
                "tasks": list(GIVEN),
                "preview": preview_fit(self.autoencoder, self.data),
                "video": {
                    "frames_per_second": 8,
                    "height": self.data.size,
                    "width": self.data.size,
                },
                "trained_with": asdict(self.task),
            },
            half=True,
        )


def with_pixel_patches(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a transformer for patches of one latent pixel instead of several.

    A patch's pixels are nearly equal, so one of them through the summed input kernel embeds like
    the whole patch, and the mean of the output rows starts at the patch's mean (the patch resizing
    of FlexiViT, arXiv 2212.08013, for piecewise constant pictures). Use it with the spatial
    interpolation scale multiplied by the old patch size: positions then stay where they were.
    """
    state = dict(state)
    kernel = state["patch_embed.proj.weight"]
    pixels = kernel[0, 0].numel()
    state["patch_embed.proj.weight"] = kernel.sum((2, 3), keepdim=True)
    for name in ("proj_out.weight", "proj_out.bias"):
        rows = state[name]
        state[name] = rows.unflatten(0, (len(rows) // pixels, pixels)).mean(1)
    return state


def initialise(network: LayeredNetwork) -> None:
    """Small normal words; gates and the output projection start at zero (AdaLN-zero)."""
    transformer = network.transformer
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
