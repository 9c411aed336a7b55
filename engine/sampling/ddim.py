"""DDIM with eta, dynamic rescale and known frames: DynamiCrafter's, Stable Diffusion's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayerLoomError
from .latent_schedules import dynamic_scale, leading_timesteps, spaced_timesteps
from .samplers import Callback, StepInfo, draw_noise
from .schedules import NoiseSchedule

Predictor = Callable[[Tensor, int, int], Tensor]
"""(x_t, timestep, step index from 0) -> the guided prediction (v or noise), in x_t's shape."""


@dataclass(frozen=True, eq=False)
class DDIMTable:
    """The numbers of each step, in step order; all tensors float64 [S].

    alphas, alphas_prev: a at this step's timestep and at the next one's; DynamiCrafter's last step
        ends at the schedule's first entry (0.99915), not at 1, as published.
    sigmas: standard deviation of the fresh noise.
    directions: factor on the predicted noise.
    scales, scales_prev: the dynamic rescale's factor on clean latents before and after the step.
    """

    timesteps: list[int]
    alphas: Tensor
    alphas_prev: Tensor
    sigmas: Tensor
    directions: Tensor
    scales: Tensor
    scales_prev: Tensor


@dataclass(frozen=True, eq=False)
class KnownFrames:
    """Clean latents that shall come out as they are, blended into every prediction.

    latents: of the result's shape. mask: broadcastable to it, 1 where the latents are kept, 0
    where the network decides.
    """

    latents: Tensor
    mask: Tensor


def ddim_table(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "trailing",
    eta: float = 1.0,
    base_scale: float | None = None,
) -> DDIMTable:
    """The coefficients of Song et al. 2021 (arXiv 2010.02502), equations 12 and 16.

    eta: 0 (deterministic) to 1 (as much fresh noise as DDPM). base_scale: of the dynamic rescale,
    None for none.
    Raises LayerLoomError for a step count, spacing or eta that cannot be used.
    """
    timesteps = spaced_timesteps(schedule, spacing, steps)
    return _table(schedule, timesteps, schedule.alphas_cumprod[:1], eta, base_scale)


def leading_table(schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> DDIMTable:
    """The same over ``leading_timesteps``, ending clean: Stable Diffusion's DDIM.

    Raises LayerLoomError for a step count or eta that cannot be used.
    """
    end = torch.ones(1, dtype=torch.float64)
    return _table(schedule, leading_timesteps(schedule, steps), end, eta, None)


def _table(
    schedule: NoiseSchedule,
    timesteps: list[int],
    end: Tensor,
    eta: float,
    base_scale: float | None,
) -> DDIMTable:
    check_eta(eta)
    index = torch.tensor(timesteps)
    alphas = schedule.alphas_cumprod[index]
    alphas_prev = torch.cat([alphas[1:], end])
    sigmas = eta * ((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)).sqrt()
    if base_scale is None:
        scales = torch.ones_like(alphas)
    else:
        scales = dynamic_scale(base_scale, len(schedule))[index]
    return DDIMTable(
        timesteps=timesteps,
        alphas=alphas,
        alphas_prev=alphas_prev,
        sigmas=sigmas,
        # At pure noise and eta 1 nothing is left of the noise: rounding must not make it -6e-8,
        # whose root is NaN in the released code at 7, 11, 14 ... steps.
        directions=(1 - alphas_prev - sigmas**2).clamp(min=0).sqrt(),
        scales=scales,
        scales_prev=torch.cat([scales[1:], scales[-1:]]),
    )


def check_eta(eta: float) -> None:
    """Raise LayerLoomError unless eta is within 0 .. 1."""
    if not 0 <= eta <= 1:
        raise LayerLoomError(
            f"eta is {eta:g}; give a number from 0 (no fresh noise) to 1 (as published)."
        )


@torch.no_grad()
def sample_ddim(
    predict: Predictor,
    noise: Tensor,
    table: DDIMTable,
    *,
    prediction: str,
    generator: torch.Generator,
    known: KnownFrames | None = None,
    callback: Callback | None = None,
    noise_source: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Sample with the steps of a `ddim_table`; the result has the noise's shape, device and dtype.

    prediction: "v" or "eps", what `predict` gives. generator: on the CPU, the source of fresh
    noise, which is drawn only where it counts; noise_source replaces it. The callback's `denoised`
    is free of the dynamic rescale. States are kept in float32 at least.
    An exception from the callback (cancel) ends the run and reaches the caller.
    """
    total, work = len(table.timesteps), torch.promote_types(noise.dtype, torch.float32)
    if noise_source is None:

        def noise_source() -> Tensor:
            return draw_noise(noise.shape, generator)

    x = noise.to(work)
    for index, timestep in enumerate(table.timesteps):
        a, a_prev = float(table.alphas[index]), float(table.alphas_prev[index])
        scale, scale_prev = float(table.scales[index]), float(table.scales_prev[index])
        out = predict(x.to(noise.dtype), timestep, index).to(work)
        clean, direction = _clean_and_noise(x, out, a, prediction)
        if known is not None:
            clean = torch.lerp(clean, known.latents.to(clean) * scale, known.mask.to(clean))
            # The noise that this clean latent leaves in x, so that the frame stays on its path.
            implied = (x - a**0.5 * clean) / (1 - a) ** 0.5
            direction = torch.lerp(direction, implied, known.mask.to(clean))
        clean = clean * (scale_prev / scale)
        x = a_prev**0.5 * clean + float(table.directions[index]) * direction
        if sigma := float(table.sigmas[index]):
            x = x + sigma * noise_source().to(x)
        if known is not None and index == total - 1:
            x = torch.lerp(x, known.latents.to(x), known.mask.to(x))
        if callback is not None:
            preview = (clean / scale_prev).to(noise.dtype)
            callback(StepInfo(index + 1, total, timestep, x.to(noise.dtype), preview))
    return x.to(noise.dtype)


def _clean_and_noise(x: Tensor, out: Tensor, a: float, prediction: str) -> tuple[Tensor, Tensor]:
    """x0 and noise of x = sqrt(a) x0 + sqrt(1 - a) noise, from what the network predicts."""
    signal, spread = a**0.5, (1 - a) ** 0.5
    if prediction == "v":
        return signal * x - spread * out, signal * out + spread * x
    return (x - spread * out) / signal, out
