"""Samplers: turn noise into latents with a network that predicts v, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayerLoomError
from .guidance import Guidance
from .schedules import NoiseSchedule, layerflow_schedule, released_schedule

Predictor = Callable[[Tensor, int, float], Tensor]
"""(x_t, timestep, guidance scale) -> v, in x_t's shape.

The predictor runs both guidance branches; guiding v is the same as guiding x0, which is linear in
v with one x_t.
"""

SAMPLER_NAMES = ("released", "dpmpp-2m-sde", "ddim")


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What a callback gets after each step.

    step: steps finished, 1 .. total. timestep: what the network was given in this step.
    latents: the state after the step. denoised: the clean latents predicted in this step (the
    preview). Both tensors are the sampler's own: read them, do not write to them.
    """

    step: int
    total: int
    timestep: int
    latents: Tensor
    denoised: Tensor


Callback = Callable[[StepInfo], None]


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise, drawn on the CPU in float32, then moved: one seed, one noise, any device."""
    _check_generator(generator)
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    return noise.to(device=device, dtype=dtype)


def sample(
    name: str,
    predict: Predictor,
    noise: Tensor,
    *,
    steps: int,
    guidance: Guidance,
    generator: torch.Generator,
    schedule: NoiseSchedule | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with the sampler of a name: "released", "dpmpp-2m-sde" or "ddim".

    noise: the state at the noisiest timestep, any shape and device; the result has its shape,
    device and dtype. generator: on the CPU, the source of every further draw. schedule:
    LayerFlow's when None. An exception from the callback (cancel) ends the run and reaches the
    caller.
    Raises LayerLoomError for an unknown name or a step count out of range, before the first step.
    """
    if name == "released":
        return sample_as_released(
            predict, noise, steps, guidance, generator, callback, schedule=schedule
        )
    return sample_standard(
        name, predict, noise, steps, guidance, generator, callback, schedule=schedule
    )


@torch.no_grad()
def sample_as_released(
    predict: Predictor,
    noise: Tensor,
    steps: int,
    guidance: Guidance,
    generator: torch.Generator,
    callback: Callback | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    noise_source: Callable[[], Tensor] | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) as LayerFlow released it (arXiv 2506.04228; equations in `schedules`).

    From the second step on it draws twice and uses the second draw; the last step draws nothing and
    returns the denoised latent. noise_source replaces the draws from `generator`.
    """
    arrays = released_schedule(schedule or layerflow_schedule(), steps)
    if noise_source is None:
        _check_generator(generator)

        def noise_source() -> Tensor:
            return draw_noise(noise.shape, generator)

    coefficients = arrays.coefficients.tolist()
    x, denoised = noise, None
    for index, timestep in enumerate(arrays.timesteps):
        v = predict(x, timestep, guidance(index, timestep, steps))
        previous = denoised
        denoised = _denoised(x, v, float(arrays.denoiser_sqrt_alphas[index]))
        if index == steps - 1:
            x = denoised
        else:
            m1, m2, m3, m4, m_noise = coefficients[index]
            if previous is None:
                target = denoised
            else:
                noise_source()  # The released code draws one it never uses.
                target = m3 * denoised - m4 * previous
            fresh = noise_source().to(device=x.device, dtype=x.dtype)
            x = m1 * x - m2 * target + m_noise * fresh
        if callback is not None:
            callback(StepInfo(index + 1, steps, timestep, x, denoised))
    return x


@torch.no_grad()
def sample_standard(
    name: str,
    predict: Predictor,
    noise: Tensor,
    steps: int,
    guidance: Guidance,
    generator: torch.Generator,
    callback: Callback | None = None,
    *,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """The same solvers on one fixed table, by diffusers' CogVideoX schedulers.

    name: "dpmpp-2m-sde" (SDE-DPM-Solver++(2M)) or "ddim" (deterministic; draws nothing).
    State updates run in float32 at least, whatever the latents' dtype.
    Raises LayerLoomError for an unknown name or a step count out of range, before the first step.
    """
    if name not in SAMPLER_NAMES or name == "released":
        raise LayerLoomError(
            f"there is no sampler named {name!r}; choose one of {', '.join(SAMPLER_NAMES)}"
        )
    schedule = schedule or layerflow_schedule()
    timesteps = schedule.trailing_timesteps(steps)
    _check_generator(generator)
    scheduler = _respaced_scheduler(name, schedule, timesteps)

    work = torch.promote_types(noise.dtype, torch.float32)
    x, denoised = noise, None
    for index, timestep in enumerate(timesteps):
        v = predict(x, timestep, guidance(index, timestep, steps)).to(work)
        level = steps - 1 - index
        if name == "ddim":
            x_next, denoised = scheduler.step(v, level, x.to(work), return_dict=False)
        else:
            x_next, denoised = scheduler.step(
                v,
                denoised,
                level,
                level + 1 if index > 0 else None,
                x.to(work),
                generator=generator,
                return_dict=False,
            )
        x = x_next.to(noise.dtype)
        if callback is not None:
            callback(StepInfo(index + 1, steps, timestep, x, denoised.to(noise.dtype)))
    return x


def _respaced_scheduler(name: str, schedule: NoiseSchedule, timesteps: list[int]):
    """diffusers' scheduler over the chosen timesteps only, numbered 0 .. steps - 1.

    diffusers takes t - 1000 // steps as the next timestep, which misses the next trailing one
    whenever steps does not divide 1000: the last step then leaves noise in the latents. Numbering
    the chosen levels one by one (Nichol & Dhariwal 2021, section 4) makes the neighbours exact.
    """
    # Imported by module, and here: loading diffusers takes a second that other paths need not pay.
    if name == "ddim":
        from diffusers.schedulers.scheduling_ddim_cogvideox import (
            CogVideoXDDIMScheduler as Scheduler,
        )
    else:
        from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler as Scheduler
    scheduler = Scheduler(
        num_train_timesteps=len(timesteps),
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction" if schedule.prediction == "v" else "epsilon",
        timestep_spacing="trailing",
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod[timesteps[::-1]]
    scheduler.set_timesteps(len(timesteps))
    return scheduler


def _denoised(x: Tensor, v: Tensor, sqrt_alpha: float) -> Tensor:
    """x0 = sqrt(a) x - sqrt(1 - a) v."""
    return sqrt_alpha * x - (1 - sqrt_alpha**2) ** 0.5 * v


def _check_generator(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise ValueError("noise is drawn on the CPU; pass a CPU generator, it is moved afterwards")
