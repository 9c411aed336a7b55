"""The noise schedules of video UNets for the host's samplers, DynamiCrafter's rescale included."""

from __future__ import annotations

import comfy.model_sampling
import torch

from ...engine.sampling.latent_schedules import dynamic_scale
from ...engine.sampling.schedules import NoiseSchedule
from .layered_model import sigmas


class RescaledSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """The host's discrete sampling with DynamiCrafter's dynamic rescale (arXiv 2310.12190).

    The network was trained on x_t = sqrt(a) s x0 + sqrt(1 - a) e, where s falls from 1 to a base
    over the first 400 timesteps. Its released sampler multiplies the clean estimate by s' / s at
    each step. In the host's terms this is a schedule: the samplers' state is
    y = x_t / (sqrt(a) s) = x0 + sigma e with sigma = sqrt((1 - a) / a) / s, and an Euler step of y
    is that released step. So every sampler and scheduler of the host takes part in it.

    Without rescale (s = 1) this is what the host's own class does.
    """

    def __init__(self, schedule: NoiseSchedule, base: float | None):
        super().__init__()
        self.prediction = schedule.prediction
        scales = torch.ones(len(schedule), dtype=torch.float64)
        if base is not None:
            scales = dynamic_scale(base, len(schedule))
        self.register_buffer("scales", scales.float())
        self.set_sigmas(sigmas(schedule) / scales)

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t of a state y."""
        scale, spread = self._parts(sigma, noise.ndim)
        return noise * (scale / (1 + spread**2) ** 0.5)

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """x0 of a state y and what the network predicts for it."""
        scale, spread = self._parts(sigma, model_output.ndim)
        if self.prediction == "eps":
            return model_input - model_output * (spread / scale)
        # x0 = (sqrt(a) x_t - sqrt(1 - a) v) / s with a = 1 / (1 + spread^2)
        total = 1 + spread**2
        return model_input / total - model_output * (spread / (scale * total**0.5))

    def _parts(self, sigma: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """s and sqrt((1 - a) / a) at a sigma, ready to multiply with tensors of ``ndim`` sides."""
        table = self.log_sigmas
        wanted = sigma.detach().log().to(table)
        after = torch.searchsorted(table, wanted.contiguous()).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        # Between two timesteps in a line, as the host reads its own table.
        share = ((wanted - low) / (high - low)).clamp(0, 1)
        scale = torch.lerp(self.scales[after - 1], self.scales[after], share).to(sigma)
        reshape = comfy.model_sampling.reshape_sigma
        return reshape(scale, ndim), reshape(sigma * scale, ndim)


def network_output(model_sampling, sigma, denoised: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the network predicted, from what the host made of it: ``calculate_denoised`` undone.

    Any ``model_sampling`` is linear in the prediction, so that two values tell the line.
    """
    sigma = sigma.flatten()[:1].to(x)
    zero = x.new_zeros([1] * x.ndim)
    step = model_sampling.calculate_denoised(sigma, zero + 1, zero)
    return (denoised - model_sampling.calculate_denoised(sigma, zero, x)) / step
