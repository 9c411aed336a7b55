"""Stage: image animation, DynamiCrafter's three phases (arXiv 2310.12190, section 3.4).

Which phase it is follows from the network and the task. 1: single frames, no temporal layers: the
context stream (image encoder, query transformer, image attention) learns beside text. 2: clips:
the same with temporal layers. 3: the detail stream, one frame's latent joined to every frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import LayerLoomError
from ..models.dynamicrafter import SPEED, QueryTransformer, Variant
from ..models.starter_image import StarterImageEncoder
from ..models.starter_text import WordEncoder, WordTokenizer
from ..models.video_unet import VideoUNet
from ..sampling.latent_schedules import dynamic_scale, latent_schedule
from .data.clips import ClipBatch, ClipSource
from .shares import WHOLE, Shares
from .timesteps import draw_times


@dataclass(frozen=True)
class AnimateTask:
    """The ``[task]`` table: what is drawn how often.

    frames: 1 trains on single frames, 0 on whole clips. random_frame: the share of clips whose
    picture is any of their frames, not the first: the paper draws it at random, so that the network
    cannot learn to copy it to one place. ends: the share whose first and last frame are given, with
    nothing between, for interpolation and loops. condition_dropout p: text alone is left out in p
    of the samples, text and picture in p, the picture alone in p.
    change_weight: extra weight in the loss of what differs from the picture of the clip, sprites
    and what they uncover.
    uniform_timesteps, timestep_mean, timestep_spread: see ``draw_times``.
    """

    frames: int = 0
    random_frame: float = 1.0
    ends: float = 0.0
    condition_dropout: float = 0.05
    change_weight: float = 0.0
    uniform_timesteps: float = 1.0
    timestep_mean: float = 0.0
    timestep_spread: float = 1.0

    def __post_init__(self):
        if self.frames not in (0, 1):
            raise LayerLoomError(
                f"The recipe's task.frames is {self.frames}; write 1 for single frames or 0 for "
                "whole clips."
            )
        limits = {"random_frame": 1, "ends": 1, "uniform_timesteps": 1, "condition_dropout": 1 / 3}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise LayerLoomError(
                    f"The recipe's task.{name} is {getattr(self, name)}; give a share from 0 to "
                    f"{limit:.2g}."
                )
        if self.frames == 1 and self.ends:
            raise LayerLoomError(
                "The recipe's task.ends needs clips; leave it out or set task.frames = 0."
            )


class AnimateNetwork(nn.Module):
    """What is trained together, its parts named as in a checkpoint.

    The starter's encoders are inside; published models' are frozen and stay outside.
    """

    def __init__(
        self,
        unet: VideoUNet,
        image_projector: QueryTransformer,
        text_encoder: WordEncoder | None = None,
        image_encoder: StarterImageEncoder | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.image_projector = image_projector
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder


@dataclass(frozen=True)
class Drawn:
    """One share of a step, on the CPU.

    clips: what the source gave. frame: [B], the picture's number. ends: bool [B], clips whose first
    and last frame are given. timestep: [B]. noise: [B, C, T, h, w]. text, image: bool [B], whether
    the sample's text and picture are left in.
    """

    clips: ClipBatch
    frame: Tensor
    ends: Tensor
    timestep: Tensor
    noise: Tensor
    text: Tensor
    image: Tensor


class Writer(Protocol):
    """Writes an exported checkpoint."""

    def write(self, path: Path, state: Mapping[str, Tensor]) -> None: ...


class AnimateStage:
    """The variant's prediction (v or noise) on clips of latents, or on single frames.

    Args:
        network: what is trained, ``requires_grad`` marking which part.
        source: where clips come from, already encoded.
        batch: clips of a share.
        variant: prediction, noise schedule and dynamic rescale.
        card: writes the exported checkpoint.
        tokenizer: for networks that read words; None where the source gives text features.
        empty: (text features [L, D], image tokens [N, D]) of no text and no picture, for frozen
            encoders; None where the network has its own.
    """

    hidden = ("resnets.", "temp_convs.", "attentions.", "samplers.", "image_projector.layers.")

    def __init__(
        self,
        network: AnimateNetwork,
        source: ClipSource,
        task: AnimateTask,
        batch: int,
        variant: Variant,
        card: Writer,
        tokenizer: WordTokenizer | None = None,
        empty: tuple[Tensor | None, Tensor | None] = (None, None),
    ):
        self.network, self.source, self.task = network, source, task
        self.batch, self.card, self.tokenizer = batch, card, tokenizer
        self.empty_text, self.empty_image = empty
        self.schedule = latent_schedule(variant.prediction, variant.zero_terminal_snr)
        base = variant.rescale_base
        self.scales = None if base is None else dynamic_scale(base, len(self.schedule)).float()
        self.blocks = blocks_of(network.unet)
        self.channels = network.unet.conv_out.out_channels
        self.detail = network.unet.conv_in.in_channels > self.channels

    def draw(self, generator: torch.Generator, shares: Shares = WHOLE) -> list[Drawn]:
        task, total = self.task, self.batch * shares.count
        picks = self.source.draw(generator, total)
        pictures = torch.tensor(self.source.pictures)
        ends = torch.rand(total, generator=generator) < task.ends
        anywhere = torch.rand(total, generator=generator) < task.random_frame
        frame = pictures[torch.randint(len(pictures), (total,), generator=generator)]
        if not task.frames:
            frame = torch.where(anywhere & ~ends, frame, pictures[0])
        times = draw_times(
            total, generator, task.uniform_timesteps, task.timestep_mean, task.timestep_spread
        )
        timestep = (times * len(self.schedule)).long()
        dropped = torch.rand(total, generator=generator) / max(task.condition_dropout, 1e-9)
        keep_text, keep_image = dropped >= 2, (dropped < 1) | (dropped >= 3)
        rows = shares.rows(self.batch)
        own = range(rows[0].start, rows[-1].stop)
        clips = self.source.load([picks[i] for i in own], [int(frame[i]) for i in own])
        if task.frames:
            chosen = frame[own.start : own.stop]
            clips = clips._replace(latents=clips.latents[range(len(own)), chosen][:, None])
        length, channels, *area = clips.latents.shape[1:]
        noise = torch.randn(total, channels, length, *area, generator=generator)
        return [
            Drawn(
                ClipBatch(*(values[part] for values in clips)),
                frame[row],
                ends[row],
                timestep[row],
                noise[row].clone(),
                keep_text[row],
                keep_image[row],
            )
            for row, part in zip(rows, Shares(range(len(rows))).rows(self.batch), strict=True)
        ]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def text(self, drawn: Drawn) -> Tensor:
        """Features [B, L, D]; samples whose text is left out read the empty prompt."""
        texts = drawn.clips.text
        if self.tokenizer is not None:
            kept = [t if keep else "" for t, keep in zip(texts, drawn.text.tolist(), strict=True)]
            ids = torch.stack([self.tokenizer(text) for text in kept])
            return self.network.text_encoder(ids.to(self.device))
        features = texts.to(self.device).float()
        empty = self.empty_text.to(features)
        return torch.where(drawn.text[:, None, None].to(self.device), features, empty)

    def image(self, drawn: Drawn) -> Tensor:
        """Context tokens [B, N, D]; a picture that is left out is mid-grey."""
        image = drawn.clips.image.to(self.device).float()
        keep = drawn.image.to(self.device)
        if self.network.image_encoder is not None:
            tokens = self.network.image_encoder(image * keep[:, None, None, None])
        else:
            tokens = torch.where(keep[:, None, None], image, self.empty_image.to(image))
        return self.network.image_projector(tokens)

    def loss(self, drawn: Drawn) -> tuple[Tensor, dict[str, float]]:
        latents = drawn.clips.latents.to(self.device).float().transpose(1, 2)
        noise, timestep = drawn.noise.to(self.device), drawn.timestep.to(self.device)
        x0 = latents
        if self.scales is not None:
            x0 = latents * self.scales.to(self.device)[timestep][:, None, None, None, None]
        noisy = self.schedule.add_noise(x0, noise, timestep)
        if self.detail:
            given = detail_of(latents, drawn.frame.to(self.device), drawn.ends.to(self.device))
            noisy = torch.cat([noisy, given], dim=1)
        predicted = self.network.unet(
            noisy,
            timestep,
            self.text(drawn),
            image_context=self.image(drawn),
            scalars={SPEED: drawn.clips.motion.to(self.device)},
            attention=matrix_attention if self.device.type == "cpu" else None,
        )
        target = self.schedule.target(x0, noise, timestep)
        error = (predicted.float() - target).square().mean(1)
        numbers = {}
        late = drawn.timestep >= 0.8 * len(self.schedule)
        if late.any():
            numbers["loss/noisiest"] = error.detach()[late.to(error.device)].mean().item()
        if self.task.change_weight:
            rows = torch.arange(len(latents), device=self.device)
            picture = latents[rows, :, drawn.frame.to(self.device)][:, :, None]
            changed = (latents - picture).abs().amax(1) > CHANGED
            weight = 1 + self.task.change_weight * changed
            return (error * weight).sum() / weight.sum(), numbers
        return error.mean(), numbers

    def export(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self.card.write(path, state)


# Latents are about standard normal: smaller changes are the autoencoder's own noise.
CHANGED = 0.25


def detail_of(latents: Tensor, frame: Tensor, ends: Tensor) -> Tensor:
    """What the detail stream is given, [B, C, T, h, w] of latents of that shape.

    The latent of frame ``frame`` [B] in every frame; where ``ends`` [B] is true the first and the
    last frame's in their places and zeros between.
    """
    rows = torch.arange(len(latents), device=latents.device)
    everywhere = latents[rows, :, frame][:, :, None].expand_as(latents)
    outer = torch.zeros_like(latents)
    outer[:, :, 0], outer[:, :, -1] = latents[:, :, 0], latents[:, :, -1]
    return torch.where(ends[:, None, None, None, None], outer, everywhere)


def matrix_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention as plain products: several times faster backwards on a CPU than torch's fused one.

    In the type it is given: autocast would do the softmax in fp32.
    """
    with torch.autocast(q.device.type, enabled=False):
        return ((q * scale) @ k.transpose(-1, -2)).softmax(-1) @ v


def blocks_of(unet: VideoUNet) -> list[nn.Module]:
    """The repeated parts: residual blocks, temporal convolutions and transformers."""

    def parts(level: nn.Module) -> Iterable[nn.Module]:
        for name in ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules"):
            yield from getattr(level, name)

    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    first = [unet.transformer_in] if unet.transformer_in is not None else []
    return [*first, *(part for level in levels for part in parts(level))]
