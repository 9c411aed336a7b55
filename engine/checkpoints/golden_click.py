"""Follow-Your-Click's golden cases: network, noise schedule, and a whole sampling run."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from ..models.follow_your_click import FollowYourClick, join_conditions, latent_mask
from ..models.video_blocks import frame_positions
from ..sampling.ddim import leading_table, sample_ddim
from ..sampling.latent_schedules import latent_schedule, leading_timesteps
from ..sampling.samplers import StepInfo
from .click import from_store
from .golden import CaseResult, GoldenCase, compare
from .reader import memory_store


def official_network(case: GoldenCase) -> FollowYourClick:
    """The case's network through the loader of the official format."""
    store = memory_store(case.weights("module."), case.name)
    return from_store(store).load("cpu", None, None)


def run_forward(case: GoldenCase) -> Iterator[CaseResult]:
    """The UNet over noise, mask and first frame, against the official network's outputs."""
    network, given = official_network(case), case.tensors
    if "out.pe_example" in given:
        positions = frame_positions(*given["out.pe_example"].shape[1:])
        yield compare(case, "out.pe_example", positions[None])
    for name in sorted(given):
        found = re.fullmatch(r"out\.(\w+)\.y", name)
        if not found:
            continue
        run = f"in.{found[1]}"
        with torch.no_grad():
            made = network(
                given[f"{run}.noisy"],
                given[f"{run}.timestep"],
                given[f"{run}.context"],
                mask=given[f"{run}.mask"],
                picture=given[f"{run}.first_latents"],
                strength=given[f"{run}.flow"],
                stride=given[f"{run}.fps"],
            )
        yield compare(case, name, made)


def run_schedule(case: GoldenCase) -> Iterator[CaseResult]:
    """Betas, timesteps and DDIM coefficients at several step counts."""
    schedule = latent_schedule(betas="linear")
    yield compare(case, "out.betas", schedule.betas)
    yield compare(case, "out.alphas_cumprod", schedule.alphas_cumprod)
    for name in sorted(case.tensors):
        found = re.fullmatch(r"out\.n(\d+)\.timesteps", name)
        if not found:
            continue
        run, table = f"out.n{found[1]}", leading_table(schedule, int(found[1]), eta=1.0)
        yield compare(case, name, leading_timesteps(schedule, int(found[1])))
        yield compare(case, f"{run}.alpha_t", table.alphas)
        yield compare(case, f"{run}.alpha_prev", table.alphas_prev)
        yield compare(case, f"{run}.sigma_eta1", table.sigmas)


def run_sampling(case: GoldenCase) -> Iterator[CaseResult]:
    """Five guided steps, the conditions joined as the official pipeline joins them."""
    network, given, settings = official_network(case), case.tensors, case.description["config"]
    noise, picture = given["in.latents"], given["in.first_latents"]
    # The colours are one: the official pipeline reads the first.
    grey = given["in.mask255"][:, :, 0] / 255
    mask = latent_mask(grey, tuple(noise.shape[-2:]))
    joined = join_conditions(noise, mask, picture, network.settings)
    yield compare(case, "out.unet_input_step0", joined)
    steps: list[StepInfo] = []

    def predict(x: torch.Tensor, timestep: int, index: int) -> torch.Tensor:
        def branch(context: torch.Tensor) -> torch.Tensor:
            return network(
                x,
                torch.tensor([timestep]),
                context,
                mask=mask,
                picture=picture,
                strength=torch.tensor([float(settings["flow_control"])]),
                stride=torch.tensor([float(settings["fps"])]),
            )

        without = branch(given["in.context_uncond"])
        return torch.lerp(without, branch(given["in.context"]), settings["guidance_scale"])

    final = sample_ddim(
        predict,
        noise,
        leading_table(latent_schedule(betas="linear"), settings["steps"], settings["eta"]),
        prediction="v",
        generator=torch.Generator(),
        callback=steps.append,
    )
    for name, found in (
        ("timesteps_in_order", [info.timestep for info in steps]),
        ("pred_x0_steps", torch.stack([info.denoised for info in steps])),
        ("latents_steps", torch.stack([info.latents for info in steps])),
        ("final", final),
    ):
        yield compare(case, f"out.{name}", found)
