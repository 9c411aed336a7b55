"""Noise schedules: how much of a latent is signal and how much is noise at each timestep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import LayerLoomError

PREDICTIONS = ("v", "eps")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule, x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise.

    alphas_cumprod: a_t for t = 0 .. N-1, float64 [N] on the CPU, falling from nearly 1;
        the last entry is exactly 0 with zero terminal SNR.
    alphas_cumprod_before_rescale: the same table before the zero terminal SNR rescale, which the
        released LayerFlow sampler repeats on the timesteps it uses (see `released_schedule`).
        Equal to `alphas_cumprod` when there was no rescale.
    prediction: what the network predicts: "v", that is sqrt(a) noise - sqrt(1 - a) x0 (Salimans &
        Ho 2022, appendix D), or "eps", the noise itself, which says nothing at pure noise and
        so excludes zero terminal SNR.
    """

    alphas_cumprod: Tensor
    alphas_cumprod_before_rescale: Tensor
    prediction: str = "v"

    def __post_init__(self) -> None:
        tables = (self.alphas_cumprod, self.alphas_cumprod_before_rescale)
        for table in tables:
            if table.dtype != torch.float64 or table.ndim != 1 or table.device.type != "cpu":
                raise ValueError("a noise schedule needs 1-D float64 tables on the CPU")
        if tables[0].shape != tables[1].shape:
            raise ValueError("the two tables of a noise schedule must be equally long")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {self.prediction!r}")
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise ValueError("prediction 'eps' needs a schedule without zero terminal SNR")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return float(self.alphas_cumprod[-1]) == 0.0

    @property
    def betas(self) -> Tensor:
        """The variance added at each timestep, 1 - a_t / a_(t-1), float64 [N]; a_(-1) is 1."""
        before = torch.cat([torch.ones(1).double(), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for a batch: x0 and noise [B, ...], t [B] integers in 0 .. N-1; x0's dtype."""
        signal, spread = self._coefficients(t, x0)
        return (signal * x0 + spread * noise).to(x0.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(a) noise - sqrt(1 - a) x0; shapes as `add_noise`."""
        signal, spread = self._coefficients(t, x0)
        return (signal * noise - spread * x0).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to give: v or the noise; shapes as `add_noise`."""
        return self.velocity(x0, noise, t) if self.prediction == "v" else noise

    def denoised(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent implied by a prediction.

        x0 = sqrt(a) x_t - sqrt(1 - a) v, or (x_t - sqrt(1 - a) noise) / sqrt(a).
        """
        signal, spread = self._coefficients(t, x_t)
        if self.prediction == "v":
            return (signal * x_t - spread * prediction).to(x_t.dtype)
        return ((x_t - spread * prediction) / signal).to(x_t.dtype)

    def trailing_timesteps(self, steps: int) -> list[int]:
        """`steps` timesteps, noisiest first, from N-1 down, evenly spaced and all different.

        "Trailing" spacing of Lin et al. 2023 (arXiv 2305.08891, table 2), as diffusers rounds it:
        round(N - N i / steps) - 1. Raises LayerLoomError unless 1 <= steps <= N.
        """
        total = len(self)
        check_steps(steps, total)
        # Rounding lets arange run one too far for some counts (61, 103 ...): a timestep of -1.
        spaced = np.arange(total, 0, -total / steps)[:steps]
        return [int(t) - 1 for t in np.round(spaced)]

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), broadcastable against `like`, at least float32."""
        # The roots are taken in float64: 1 - a near t = 0 loses digits in float32.
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1,) + (1,) * (like.ndim - 1)
        t = t.to(like.device)
        signal = self.alphas_cumprod.sqrt().to(dtype).to(like.device)[t]
        spread = (1 - self.alphas_cumprod).sqrt().to(dtype).to(like.device)[t]
        return signal.reshape(shape), spread.reshape(shape)


def layerflow_schedule(
    snr_shift: float = 3.0,
    zero_terminal_snr: bool = True,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    steps: int = 1000,
) -> NoiseSchedule:
    """The schedule of CogVideoX-2B and LayerFlow: scaled-linear betas, shifted, zero terminal SNR.

    snr_shift s maps a to a / (s + (1 - s) a), which divides the signal-to-noise ratio by s.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    alphas = alphas / (snr_shift + (1 - snr_shift) * alphas)
    rescaled = rescale_zero_snr(alphas.sqrt()) ** 2 if zero_terminal_snr else alphas
    return NoiseSchedule(rescaled, alphas)


@dataclass(frozen=True, eq=False)
class ReleasedSchedule:
    """What the released LayerFlow sampler computes for one step count, in step order.

    timesteps: [steps] fed to the network.
    sqrt_alphas: float64 [steps + 1], sqrt(a) used by the solver; the last is 1.
    denoiser_sqrt_alphas: float64 [steps], sqrt(a) used to turn v into the denoised latent.
    coefficients: float64 [steps - 1, 5], columns m1 .. m4 and m_noise of
        x_next = m1 x - m2 (m3 denoised - m4 old_denoised) + m_noise noise;
        the last step has no row, it returns the denoised latent.
    """

    timesteps: list[int]
    sqrt_alphas: Tensor
    denoiser_sqrt_alphas: Tensor
    coefficients: Tensor


def released_schedule(schedule: NoiseSchedule, steps: int) -> ReleasedSchedule:
    """The arrays of LayerFlow's released sampler (SDE-DPM++ 2M) for `steps` steps.

    They differ from a fixed table in two ways: the zero terminal SNR rescale is repeated on the
    chosen timesteps alone, with their own first and last value, and the denoiser then takes the
    nearest entry of the full table while the solver keeps the exact value.
    Raises LayerLoomError for a step count out of range or a schedule without zero terminal SNR.
    """
    check_steps(steps, len(schedule))
    if not schedule.zero_terminal_snr:
        raise LayerLoomError(
            "the released LayerFlow sampler needs a schedule with zero terminal SNR, and this "
            "checkpoint's has none; choose the sampler 'dpmpp-2m-sde' or 'ddim'"
        )
    # np.linspace, not exact integers: where 999 i / steps is whole, its rounding decides.
    spaced = np.linspace(len(schedule) - 1, 0, steps, endpoint=False)
    timesteps = [int(t) for t in spaced]
    ascending = schedule.alphas_cumprod_before_rescale[timesteps[::-1]].sqrt()
    sqrt_alphas = torch.cat([rescale_zero_snr(ascending).flip(0), torch.ones(1).double()])
    return ReleasedSchedule(
        timesteps=timesteps,
        sqrt_alphas=sqrt_alphas,
        denoiser_sqrt_alphas=nearest_sqrt_alphas(schedule, sqrt_alphas[:-1]),
        coefficients=_sde_dpmpp_2m_coefficients(sqrt_alphas[:-1]),
    )


def nearest_sqrt_alphas(schedule: NoiseSchedule, sqrt_alphas: Tensor) -> Tensor:
    """For each value [K] the nearest sqrt(a_t) of the full table, float64 [K]."""
    # Compared in float32 as the released code does, so that a near tie falls the same way.
    table = schedule.alphas_cumprod.sqrt()
    distance = (sqrt_alphas.float()[:, None] - table.float()[None, :]).abs()
    return table[distance.argmin(dim=1)]


def check_steps(steps: int, total: int) -> None:
    """Raise LayerLoomError unless `steps` is a whole number in 1 .. total."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= total:
        raise LayerLoomError(
            f"steps is {steps}, but sampling takes a whole number from 1 to {total}; "
            "6 is a quick look, 50 is what the papers use"
        )


def rescale_zero_snr(sqrt_alphas: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1, sqrt(a) for rising t: the last becomes 0, the first stays."""
    first, last = sqrt_alphas[0], sqrt_alphas[-1]
    if len(sqrt_alphas) == 1:
        # The formula is 0 / 0 for one timestep, which is both first and last; it is the noisiest.
        return torch.zeros_like(sqrt_alphas)
    return (sqrt_alphas - last) * (first / (first - last))


def _sde_dpmpp_2m_coefficients(sqrt_alphas: Tensor) -> Tensor:
    """m1 .. m4 and m_noise between neighbouring noise levels: [S] -> [S - 1, 5].

    Lu et al. 2022 (arXiv 2211.01095), SDE-DPM-Solver++(2M), with lambda = log(sqrt(a / (1 - a))),
    h the step in lambda and r = h_before / h. At pure noise lambda is -inf, so the first step has
    h = inf (m1 = 0) and the second r = inf (m4 = 0): both are first order.
    """
    alphas = sqrt_alphas**2
    lambdas = 0.5 * (alphas / (1 - alphas)).log()
    h = lambdas.diff()
    ratio = torch.full_like(h, torch.inf)
    ratio[1:] = h[:-1] / h[1:]
    m1 = ((1 - alphas[1:]) / (1 - alphas[:-1])).sqrt() * (-h).exp()
    m2 = torch.expm1(-2 * h) * sqrt_alphas[1:]
    m4 = 1 / (2 * ratio)
    m_noise = (1 - alphas[1:]).sqrt() * (-torch.expm1(-2 * h)).sqrt()
    return torch.stack([m1, m2, 1 + m4, m4, m_noise], dim=1)
