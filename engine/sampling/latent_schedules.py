"""Noise schedules and timesteps of networks on Stable Diffusion's latents (DynamiCrafter)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayerLoomError
from .schedules import NoiseSchedule, check_steps, rescale_zero_snr

SPACINGS = ("trailing", "uniform", "uniform-released")
# Timesteps over which DynamiCrafter's dynamic rescale falls from 1 to its base.
RESCALE_RAMP = 400


def latent_schedule(
    prediction: str = "v",
    zero_terminal_snr: bool = True,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    steps: int = 1000,
    betas: str = "scaled",
) -> NoiseSchedule:
    """Stable Diffusion's scaled-linear betas, with zero terminal SNR where wanted.

    prediction: "v" or "eps"; DynamiCrafter's 512, 1024 and interpolation weights are "v" with
    zero terminal SNR (Lin et al. 2023, arXiv 2305.08891), its 256 ones "eps" without.
    betas: "scaled" (linear in their roots) or "linear" (AnimateDiff and what follows it).
    """
    if betas not in ("scaled", "linear"):
        raise ValueError(f"betas must be scaled or linear, not {betas!r}")
    power = 2 if betas == "scaled" else 1
    ends = (beta_start ** (1 / power), beta_end ** (1 / power))
    table = torch.linspace(*ends, steps, dtype=torch.float64) ** power
    alphas = torch.cumprod(1 - table, dim=0)
    rescaled = rescale_zero_snr(alphas.sqrt()) ** 2 if zero_terminal_snr else alphas
    return NoiseSchedule(rescaled, alphas, prediction)


def spaced_timesteps(schedule: NoiseSchedule, spacing: str, steps: int) -> list[int]:
    """Timesteps to sample at, noisiest first, all different.

    spacing: "trailing" (from the last timestep down), "uniform" (from 1 up), both in exactly
        `steps` steps; or "uniform-released", as DynamiCrafter's code spaces them: every
        (1000 // steps)-th timestep, which makes 31 of 30, 63 of 60, and as many where `steps`
        divides 1000.
    Raises LayerLoomError for an unknown spacing or a step count out of range.
    """
    total = len(schedule)
    if spacing == "trailing":
        return schedule.trailing_timesteps(steps)
    if spacing not in SPACINGS:
        raise LayerLoomError(
            f"There is no timestep spacing {spacing!r}; choose one of {', '.join(SPACINGS)}."
        )
    check_steps(steps, total)
    if spacing == "uniform":
        # Equal to the released spacing wherever `steps` divides the whole, but for 1000 steps,
        # which reach past the last timestep there.
        first = 1 if steps < total else 0
        return [i * total // steps + first for i in reversed(range(steps))]
    made = [t + 1 for t in range(0, total, total // steps)]
    if made[-1] >= total:
        raise LayerLoomError(
            f"The released uniform spacing of {steps} steps reaches past the last timestep; use "
            f"the spacing 'uniform' or another number of steps."
        )
    return made[::-1]


def leading_timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Timesteps as Stable Diffusion's DDIM spaces them, noisiest first: "leading", offset 1.

    Every (1000 // steps)-th from 1 up, so that 50 steps begin at 981 and never at 999. One step a
    timestep would reach past the last one and begins at 0.
    Raises LayerLoomError for a step count out of range.
    """
    total = len(schedule)
    check_steps(steps, total)
    first = 1 if steps < total else 0
    return [i * (total // steps) + first for i in reversed(range(steps))]


def dynamic_scale(base: float, total: int = 1000) -> Tensor:
    """DynamiCrafter's dynamic rescale: the factor on clean latents at each timestep, float64 [N].

    Falls in a line from 1 to `base` over the first 400 timesteps and stays there; the forward
    process adds noise to `scale[t] * x0`.
    """
    if not 0 < base <= 1:
        raise ValueError(f"the base of the dynamic rescale is {base}, not within (0, 1]")
    ramp = torch.linspace(1, base, min(RESCALE_RAMP, total), dtype=torch.float64)
    return torch.cat([ramp, torch.full((total - len(ramp),), base, dtype=torch.float64)])
