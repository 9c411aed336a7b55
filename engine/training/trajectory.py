"""Stage: subjects along boxes, after DreamVideo-2 (arXiv 2410.13830), and the base it stands on.

First the base learns to make clips of words. Then it is frozen, and reference attention, box
encoder and ControlNet are trained together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import LayerLoomError
from ..models.dreamvideo import DreamVideo, Placement, TrajectorySettings, pool_masks
from ..models.starter_text import WordEncoder, WordTokenizer
from ..sampling.latent_schedules import latent_schedule
from .animate import blocks_of, matrix_attention
from .data.source import Pick
from .data.trajectory_sprites import TrajectoryBatch
from .shares import WHOLE, Shares
from .timesteps import draw_times


@dataclass(frozen=True)
class TrajectoryTask:
    """The ``[task]`` table: what is drawn how often, and how errors count.

    box_weight: lambda_L, how much errors inside of boxes count beside those outside, 2 in the
    paper; 1 is the plain loss.
    reference_weight: lambda_M, see ``BoxShares``; 0.75 in the paper.
    text_dropout: the share of samples without any text.
    uniform_timesteps, timestep_mean, timestep_spread: see ``draw_times``.
    """

    box_weight: float = 2.0
    reference_weight: float = 0.75
    text_dropout: float = 0.1
    uniform_timesteps: float = 1.0
    timestep_mean: float = 0.0
    timestep_spread: float = 1.0

    def __post_init__(self):
        for name in ("reference_weight", "text_dropout", "uniform_timesteps"):
            if not 0 <= getattr(self, name) <= 1:
                raise LayerLoomError(
                    f"The recipe's task.{name} is {getattr(self, name)}; give a share from 0 to 1."
                )
        if not self.box_weight >= 0:
            raise LayerLoomError(
                f"The recipe's task.box_weight is {self.box_weight}; give a number from 0 up."
            )


class TrajectoryNetwork(nn.Module):
    """What is trained together: the video network, and a starter's words.

    Published models' text encoder is frozen and stays outside.
    """

    def __init__(self, video: DreamVideo, text_encoder: WordEncoder | None = None):
        super().__init__()
        self.video, self.text_encoder = video, text_encoder


class TrajectorySource(Protocol):
    """Clips with boxes and subjects; draws depend on the generator's state alone."""

    def draw(self, generator: torch.Generator, batch: int) -> list[Pick]: ...

    def load(self, picks: list[Pick]) -> TrajectoryBatch: ...


@dataclass(frozen=True)
class Drawn:
    """One share of a step, on the CPU.

    timestep: [B]. noise: [B, C, T, h, w]. text: bool [B], there is text at all.
    """

    clips: TrajectoryBatch
    timestep: Tensor
    noise: Tensor
    text: Tensor


class Writer(Protocol):
    """Writes an exported checkpoint."""

    def write(self, path: Path, state: Mapping[str, Tensor]) -> None: ...


class TrajectoryStage:
    """Noise prediction (or v) on clips of latents, errors inside of boxes re-weighted.

    Args:
        network: what is trained, ``requires_grad`` marking which part. Without reference attention
            and control it is the base, which sees words alone.
        source: where clips come from, already encoded.
        batch: clips of a share.
        card: writes the exported checkpoint.
        tokenizer: for networks that read words; None where the source gives features.
        empty: features [L, D] of no text, for a frozen encoder.
    """

    hidden = (
        "resnets.",
        "attentions.",
        "temp_convs.",
        "transformer_in.",
        "samplers.",
        "reference.",
    )

    def __init__(
        self,
        network: TrajectoryNetwork,
        source: TrajectorySource,
        task: TrajectoryTask,
        batch: int,
        settings: TrajectorySettings,
        card: Writer,
        tokenizer: WordTokenizer | None = None,
        empty: Tensor | None = None,
    ):
        self.network, self.source, self.task = network, source, task
        self.batch, self.settings, self.card = batch, settings, card
        self.tokenizer, self.empty = tokenizer, empty
        self.schedule = latent_schedule(
            settings.prediction, settings.zero_terminal_snr, betas=settings.betas
        )
        self.blocks = _blocks(network.video)

    def draw(self, generator: torch.Generator, shares: Shares = WHOLE) -> list[Drawn]:
        task, total = self.task, self.batch * shares.count
        picks = self.source.draw(generator, total)
        times = draw_times(
            total, generator, task.uniform_timesteps, task.timestep_mean, task.timestep_spread
        )
        timestep = (times * len(self.schedule)).long()
        text = torch.rand(total, generator=generator) >= task.text_dropout
        rows = shares.rows(self.batch)
        own = range(rows[0].start, rows[-1].stop)
        clips = self.source.load([picks[i] for i in own])
        frames, channels, *area = clips.latents.shape[1:]
        noise = torch.randn(total, channels, frames, *area, generator=generator)
        return [
            Drawn(
                TrajectoryBatch(*(values[part] for values in clips)),
                timestep[row],
                noise[row].clone(),
                text[row],
            )
            for row, part in zip(rows, Shares(range(len(rows))).rows(self.batch), strict=True)
        ]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def texts(self, prompts: list[str]) -> Tensor:
        """Features [B, L, D] of words."""
        ids = torch.stack([self.tokenizer(prompt) for prompt in prompts])
        return self.network.text_encoder(ids.to(self.device))

    def context(self, clips: TrajectoryBatch, kept: Tensor) -> Tensor:
        """Features [B, L, D] of captions; of no text where ``kept``, bool [B], is false."""
        captions = clips.captions
        if self.tokenizer is not None:
            pairs = zip(captions, kept.tolist(), strict=True)
            return self.texts([caption if keep else "" for caption, keep in pairs])
        features = captions.to(self.device).float()
        return torch.where(kept[:, None, None].to(self.device), features, self.empty.to(features))

    def place(self, clips: TrajectoryBatch) -> Placement | None:
        """Boxes and subjects as the network takes them; None where it is the base alone."""
        video = self.network.video
        if video.reference is None and video.control is None:
            return None
        features = None
        if video.reference is not None:
            nothing = self.context(clips, torch.zeros(len(clips.captions), dtype=torch.bool))
            features = video.subject_features(
                clips.subjects.to(self.device), nothing, self._attention
            )
        masks = clips.masks.to(self.device)
        return video.place(masks, features, self.task.reference_weight, self._attention)

    @property
    def _attention(self):
        return matrix_attention if self.device.type == "cpu" else None

    def loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, float]]:
        device, clips = self.device, drawn.clips
        latents = clips.latents.to(device).float().transpose(1, 2)
        noise, timestep = drawn.noise.to(device), drawn.timestep.to(device)
        noisy = self.schedule.add_noise(latents, noise, timestep)
        context = self.context(clips, drawn.text)
        predicted = self.network.video(
            noisy, timestep, context, placement=self.place(clips), attention=self._attention
        )
        target = self.schedule.target(latents, noise, timestep)
        error = (predicted.float() - target).square().mean(1)
        inside = pool_masks(clips.masks.to(device).amax(1), error.shape[-2:])
        # (lambda_L M + 1 - M) |e|^2 (arXiv 2410.13830, section 3.4).
        weight = 1 + (self.task.box_weight - 1) * inside
        shown = {"loss/boxes": _mean(error.detach(), inside)}
        late = drawn.timestep >= 0.8 * len(self.schedule)
        if late.any():
            shown["loss/noisiest"] = error.detach()[late.to(device)].mean().item()
        return (weight * error).mean(), shown

    def export(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self.card.write(path, state)


def _blocks(video: DreamVideo) -> list[nn.Module]:
    """The repeated parts of the base and of its ControlNet."""
    found = blocks_of(video.unet)
    levels = [] if video.control is None else [*video.control.down_blocks, video.control.mid_block]
    return found + [part for level in levels for part in (*level.resnets, *level.attentions)]


def _mean(values: Tensor, weight: Tensor) -> float:
    return float((values * weight).sum() / weight.sum().clamp(min=1e-6))
