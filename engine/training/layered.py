"""Stage: the layered transformer, all four tasks in one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conditioning.layers import GIVEN, LayerSequence
from ..conditioning.prompts import indexed_prompts
from ..models.layered_transformer import LayerSegment
from ..models.starter_autoencoder import SPATIAL_FACTOR
from ..models.starter_text import WordTokenizer
from ..sampling.schedules import NoiseSchedule, layerflow_schedule
from .card import Card
from .data.source import LatentBatch, LatentSource, Pick
from .data.sprites import WORDINGS, SpriteSource
from .networks import LayeredNetwork
from .pixel_loss import PixelLoss
from .shares import WHOLE, Shares
from .timesteps import draw_times


@dataclass(frozen=True)
class LayeredTask:
    """The ``[task]`` table: what is drawn how often.

    ``generate`` ... ``decompose`` are the tasks' shares, ``layer_weights`` the layers' weights in
    the loss (1 where not given). A share ``uniform_timesteps`` of the timesteps is uniform, the
    rest logit-normal with mean and spread (Esser et al., arXiv 2403.03206, section 3.1).
    ``pixel_weights`` by layer and ``pixel_edge_weight`` add ``PixelLoss`` of the clean latents that
    a prediction implies, as much as there is signal in what the network was given
    (all in decomposition).
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
    pixel_weights: Mapping[str, float] = field(default_factory=dict)
    pixel_edge_weight: float = 0.0

    def timesteps(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Times [batch] in [0, 1), see ``draw_times``."""
        return draw_times(
            batch, generator, self.uniform_timesteps, self.timestep_mean, self.timestep_spread
        )

    @property
    def mix(self) -> torch.Tensor:
        return torch.tensor([getattr(self, task) for task in GIVEN])


@dataclass(frozen=True)
class Drawn:
    """One share of a step, on the CPU.

    task: which layers are given. samples: latents and texts. timestep: [B]. noise: the made
    layers' [B, T, C, h, w]. kept: bool [B], samples whose text is not left out.
    """

    task: str
    samples: LatentBatch
    timestep: torch.Tensor
    noise: torch.Tensor
    kept: torch.Tensor


class LayeredStage:
    """v-prediction on the noisy layers, a task a step (LayerFlow, arXiv 2506.04228, section 3).

    Args:
        network: what is trained, ``requires_grad`` marking which part.
        source: where samples come from, already encoded.
        batch: samples of a share.
        card: what an exported checkpoint says beside its weights.
        tokenizer: for networks that read words; None where the source gives text features.
        pixels: the loss on decoded layers; None for latents alone.
    """

    hidden = ("transformer_blocks",)

    def __init__(
        self,
        network: LayeredNetwork,
        source: LatentSource,
        task: LayeredTask,
        batch: int,
        card: Card,
        tokenizer: WordTokenizer | None = None,
        schedule: NoiseSchedule | None = None,
        pixels: PixelLoss | None = None,
    ):
        self.network, self.source, self.task, self.pixels = network, source, task, pixels
        self.batch, self.card, self.tokenizer = batch, card, tokenizer
        self.sequence: LayerSequence = source.sequence
        self.schedule = schedule or layerflow_schedule()
        self.blocks = network.transformer.transformer_blocks
        self.channels = network.transformer.out_channels

    def draw(self, generator: torch.Generator, shares: Shares = WHOLE) -> list[Drawn]:
        total, rows = self.batch * shares.count, shares.rows(self.batch)
        # Scenes that all move are worded after the noise is drawn, as the shipped starter's
        # recipes always did: their numbers stay.
        late = isinstance(self.source, SpriteSource) and not self.source.clips.still
        if not late:
            own = len(shares.own)
            samples = self.source.batch(
                generator, self.batch * own, shares.own[0] // own, shares.count // own
            )
        task = list(GIVEN)[int(torch.multinomial(self.task.mix, 1, generator=generator))]
        if late:
            indices = torch.randint(len(self.source), (total,), generator=generator).tolist()
            channels = self.channels
            area = [side // SPATIAL_FACTOR for side in self.source.sizes[0]]
        else:
            channels, *area = samples.latents.shape[2:]
        timestep = (self.task.timesteps(total, generator) * len(self.schedule)).long()
        frames = sum(s.frames for s in self.sequence.segments(task) if not s.clean)
        noise = torch.randn(total, frames, channels, *area, generator=generator)
        if late:
            words = [int(torch.randint(WORDINGS, (), generator=generator)) for _ in indices]
            picks = [Pick(index, word) for index, word in zip(indices, words, strict=True)]
            samples = self.source.load(picks[rows[0].start : rows[-1].stop])
        kept = torch.rand(total, generator=generator) >= self.task.text_dropout
        return [
            Drawn(
                task,
                LatentBatch(*(values[part] for values in samples)),
                timestep[row],
                noise[row].clone(),
                kept[row],
            )
            for row, part in zip(rows, Shares(range(len(rows))).rows(self.batch), strict=True)
        ]

    def text(self, drawn: Drawn) -> torch.Tensor:
        """Features [B, prompts, tokens, D]; samples whose text is left out get zeros."""
        texts, device = drawn.samples.text, self.device
        if isinstance(texts, torch.Tensor):
            prompts = len(indexed_prompts(drawn.task, "", ""))
            features = texts[:, :prompts].to(device)
        else:
            ids = [
                torch.stack([self.tokenizer(t) for t in indexed_prompts(drawn.task, *each)])
                for each in texts
            ]
            features = self.network.text_encoder(torch.stack(ids).to(device))
        return features * drawn.kept[:, None, None, None].to(device)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def loss(self, drawn: Drawn) -> tuple[torch.Tensor, dict[str, float]]:
        segments = self.sequence.segments(drawn.task)
        latents = drawn.samples.latents.to(self.device).float()
        x0, clean = split_given(latents, segments)
        noise, timestep = drawn.noise.to(self.device), drawn.timestep.to(self.device)
        noisy = self.schedule.add_noise(x0, noise, timestep).float()
        predicted = self.network.transformer(
            noisy,
            timestep,
            self.text(drawn),
            segments,
            clean=clean,
        )
        target = self.schedule.velocity(x0, noise, timestep).float()
        error = (predicted.float() - target).square().mean((0, 2, 3, 4))
        weights = torch.cat(
            [
                torch.full((segment.frames,), float(self.task.layer_weights.get(segment.name, 1)))
                for segment in segments
                if not segment.clean
            ]
        ).to(self.device)
        loss = (error * weights).sum() / weights.sum()
        numbers = {f"loss/{drawn.task}": error.mean().item()}
        if self.pixels is not None:
            implied = self.schedule.denoised(noisy, predicted.float(), timestep)
            signal = self.schedule.alphas_cumprod[timestep.cpu()].to(loss)
            # A given scene says all, however noisy its layers are.
            known = torch.ones_like(signal) if drawn.task == "decompose" else signal
            seen = self.pixels(implied, x0, known, segments)
            loss, numbers["loss/pixels"] = loss + seen, seen.item()
        return loss, numbers

    def export(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        self.card.write(path, state)


def split_given(
    latents: torch.Tensor, segments: Sequence[LayerSegment]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Joined latents [B, T, C, h, w] as what is made and what is given (None: nothing)."""
    parts = latents.split([segment.frames for segment in segments], dim=1)
    made = [part for part, s in zip(parts, segments, strict=True) if not s.clean]
    given = [part for part, s in zip(parts, segments, strict=True) if s.clean]
    return torch.cat(made, dim=1), torch.cat(given, dim=1) if given else None


def tasks_of(task: LayeredTask) -> tuple[str, ...]:
    """The tasks that are trained at all."""
    return tuple(name for name in GIVEN if getattr(task, name) > 0)
