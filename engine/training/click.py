"""Stage: animation of clicked regions, after Follow-Your-Click (arXiv 2403.08268, section 3).

The network reads a picture's latent, part of it hidden, a mask of what is meant and how far it
moves; the whole caption goes to the UNet's cross-attention, the short phrase to the motion
modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import LayerLoomError
from ..models.follow_your_click import STRENGTH, STRIDE, ClickSettings, join_conditions
from ..models.starter_text import WordEncoder, WordTokenizer
from ..models.video_unet import VideoUNet
from ..sampling.latent_schedules import latent_schedule
from .animate import CHANGED, blocks_of, matrix_attention
from .data.click_sprites import ClickBatch, ClickSource
from .shares import WHOLE, Shares
from .timesteps import draw_times


@dataclass(frozen=True)
class ClickTask:
    """The ``[task]`` table: what is drawn how often.

    first_frame_masking: the share of the picture's latent positions that are hidden, 0.7 in the
    paper, so that the network cannot learn to copy the picture to all frames. masked: the share of
    samples in which that is done, 1 in the paper.
    captions: the share of samples whose cross-attention reads the whole caption, as in the paper's
    training; the rest read the phrase there, as at inference.
    phrases: the motion modules read the short phrase; where false, what the cross-attention reads.
    text_dropout: the share of samples without any text.
    change_weight: extra weight in the loss of what differs from the picture.
    first_weight: extra weight of the first frame, which is the picture, in samples where the
    picture is not hidden.
    uniform_timesteps, timestep_mean, timestep_spread: see ``draw_times``.
    """

    first_frame_masking: float = 0.7
    masked: float = 1.0
    captions: float = 1.0
    phrases: bool = True
    text_dropout: float = 0.1
    change_weight: float = 0.0
    first_weight: float = 0.0
    uniform_timesteps: float = 1.0
    timestep_mean: float = 0.0
    timestep_spread: float = 1.0

    def __post_init__(self):
        for name in (
            "first_frame_masking",
            "masked",
            "captions",
            "text_dropout",
            "uniform_timesteps",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise LayerLoomError(
                    f"The recipe's task.{name} is {getattr(self, name)}; give a share from 0 to 1."
                )


class ClickNetwork(nn.Module):
    """What is trained together, its parts named as in a checkpoint.

    A starter's words are inside; published models' text encoder is frozen and stays outside.
    """

    def __init__(self, unet: VideoUNet, text_encoder: WordEncoder | None = None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


@dataclass(frozen=True)
class Drawn:
    """One share of a step, on the CPU.

    shown: [B, 1, h, w], 1 where the picture's latent is not hidden. timestep: [B]. noise:
    [B, C, T, h, w]. caption: bool [B], the cross-attention reads the whole caption. text: bool
    [B], there is text at all.
    """

    clips: ClickBatch
    shown: Tensor
    timestep: Tensor
    noise: Tensor
    caption: Tensor
    text: Tensor


class Writer(Protocol):
    """Writes an exported checkpoint."""

    def write(self, path: Path, state: Mapping[str, Tensor]) -> None: ...


class ClickStage:
    """v-prediction (or noise) on clips of latents, the picture's hidden in part.

    Args:
        network: what is trained, ``requires_grad`` marking which part.
        source: where clips come from, already encoded.
        batch: clips of a share.
        settings: prediction, noise schedule, and where picture and mask go.
        card: writes the exported checkpoint.
        tokenizer: for networks that read words; None where the source gives features.
        empty: features [L, D] of no text, for a frozen encoder.
    """

    hidden = ("resnets.", "attentions.", "motion_modules.", "samplers.")

    def __init__(
        self,
        network: ClickNetwork,
        source: ClickSource,
        task: ClickTask,
        batch: int,
        settings: ClickSettings,
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
        self.blocks = blocks_of(network.unet)

    def draw(self, generator: torch.Generator, shares: Shares = WHOLE) -> list[Drawn]:
        task, total = self.task, self.batch * shares.count
        picks = self.source.draw(generator, total)
        times = draw_times(
            total, generator, task.uniform_timesteps, task.timestep_mean, task.timestep_spread
        )
        timestep = (times * len(self.schedule)).long()
        caption = torch.rand(total, generator=generator) < task.captions
        text = torch.rand(total, generator=generator) >= task.text_dropout
        masked = torch.rand(total, generator=generator) < task.masked
        rows = shares.rows(self.batch)
        own = range(rows[0].start, rows[-1].stop)
        clips = self.source.load([picks[i] for i in own])
        frames, channels, *area = clips.latents.shape[1:]
        noise = torch.randn(total, channels, frames, *area, generator=generator)
        # One spatial mask for all channels of the latent.
        kept = torch.rand(total, 1, *area, generator=generator) >= task.first_frame_masking
        shown = (kept | ~masked[:, None, None, None]).float()
        return [
            Drawn(
                ClickBatch(*(values[part] for values in clips)),
                shown[row],
                timestep[row],
                noise[row].clone(),
                caption[row],
                text[row],
            )
            for row, part in zip(rows, Shares(range(len(rows))).rows(self.batch), strict=True)
        ]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def texts(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Features [B, L, D] for the cross-attention and for the motion modules."""
        if self.tokenizer is None:
            return self._frozen_texts(drawn)
        context, phrases = [], []
        for caption, phrase, whole, kept in zip(
            drawn.clips.captions,
            drawn.clips.phrases,
            drawn.caption.tolist(),
            drawn.text.tolist(),
            strict=True,
        ):
            context.append("" if not kept else caption if whole else phrase)
            phrases.append(phrase if kept and self.task.phrases else context[-1])
        return self._features(context), self._features(phrases)

    def _frozen_texts(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """The same of features that were made before."""
        captions = drawn.clips.captions.to(self.device).float()
        phrases = drawn.clips.phrases.to(self.device).float()
        whole, kept = (x[:, None, None].to(self.device) for x in (drawn.caption, drawn.text))
        context = torch.where(whole, captions, phrases)
        own = phrases if self.task.phrases else context
        empty = self.empty.to(context)
        return torch.where(kept, context, empty), torch.where(kept, own, empty)

    def _features(self, texts: list[str]) -> Tensor:
        ids = torch.stack([self.tokenizer(text) for text in texts])
        return self.network.text_encoder(ids.to(self.device))

    def loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, float]]:
        device = self.device
        latents = drawn.clips.latents.to(device).float().transpose(1, 2)
        noise, timestep = drawn.noise.to(device), drawn.timestep.to(device)
        noisy = self.schedule.add_noise(latents, noise, timestep)
        picture = latents[:, :, 0] * drawn.shown.to(device)
        joined = join_conditions(noisy, drawn.clips.mask.to(device), picture, self.settings)
        context, phrase = self.texts(drawn)
        numbers = {
            STRIDE: torch.full((len(latents),), self.settings.stride, device=device),
            STRENGTH: drawn.clips.strength.to(device),
        }
        predicted = self.network.unet(
            joined,
            timestep,
            context,
            scalars={name: numbers[name] for name in self.network.unet.scalar_embeddings},
            attention=matrix_attention if device.type == "cpu" else None,
            phrase=phrase,
        )
        target = self.schedule.target(latents, noise, timestep)
        error = (predicted.float() - target).square().mean(1)
        shown: dict[str, float] = {}
        late = drawn.timestep >= 0.8 * len(self.schedule)
        if late.any():
            shown["loss/noisiest"] = error.detach()[late.to(device)].mean().item()
        weight = torch.ones_like(error)
        if self.task.change_weight:
            changed = (latents - latents[:, :, :1]).abs().amax(1) > CHANGED
            weight = weight + self.task.change_weight * changed
        whole = drawn.shown.to(device).amin((1, 2, 3))
        weight[:, 0] += self.task.first_weight * whole[:, None, None]
        return (error * weight).sum() / weight.sum(), shown

    def export(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self.card.write(path, state)
