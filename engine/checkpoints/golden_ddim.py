"""DynamiCrafter's golden sampling cases: schedules, and DDIM over recorded network outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from ..sampling.ddim import Predictor, ddim_table, sample_ddim
from ..sampling.latent_schedules import dynamic_scale, latent_schedule
from ..sampling.samplers import StepInfo
from ..sampling.streams import StreamGuidance
from .golden import CaseResult, GoldenCase, compare
from .golden_dynamicrafter import official_networks
from .golden_dynamicrafter import predict as forward

# The official code's names for how timesteps are spaced.
SPACINGS = {"uniform": "uniform-released", "uniform_trailing": "trailing"}
Branch = Callable[[torch.Tensor, int, int, str], torch.Tensor]
"""(x_t, timestep, step index, branch of `StreamGuidance`) -> the network's prediction."""


def run_schedule(case: GoldenCase) -> Iterator[CaseResult]:
    """Tables, timesteps, DDIM coefficients and the dynamic rescale at several step counts."""
    zero_snr = "out.scale_arr" in case.tensors
    schedule = latent_schedule("v" if zero_snr else "eps", zero_snr)
    alphas = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1).double(), alphas[:-1]])
    yield compare(case, "out.betas", schedule.betas)
    yield compare(case, "out.alphas_cumprod", alphas)
    yield compare(case, "out.alphas_cumprod_prev", before)
    yield compare(case, "out.sqrt_alphas_cumprod", alphas.sqrt())
    yield compare(case, "out.sqrt_one_minus_alphas_cumprod", (1 - alphas).sqrt())
    base = None
    if zero_snr:
        # The official array goes on past the last timestep.
        stored = case.tensors["out.scale_arr"]
        base = float(stored[-1])
        yield compare(case, "out.scale_arr", dynamic_scale(base, len(stored)))
    spacing = "trailing" if zero_snr else "uniform-released"
    for name in sorted(case.tensors):
        found = re.fullmatch(r"out\.(S(\d+))\.timesteps", name)
        if not found:
            continue
        run, table = found[1], ddim_table(schedule, int(found[2]), spacing, 1.0, base)
        # The official arrays run upwards and are walked in reverse.
        yield compare(case, name, table.timesteps[::-1])
        for entry, values in (
            ("alphas", table.alphas),
            ("alphas_prev", table.alphas_prev),
            ("sqrt_one_minus_alphas", (1 - table.alphas).sqrt()),
            ("sigmas_eta1", table.sigmas),
            ("rescale", table.scales_prev / table.scales),
        ):
            if f"out.{run}.{entry}" in case.tensors:
                yield compare(case, f"out.{run}.{entry}", values.flip(0))


def run_recorded(case: GoldenCase) -> Iterator[CaseResult]:
    """The sampler alone: the official network's outputs are fed step by step."""
    names = {"both": "model_cond", "none": "model_uncond", "image": "model_uncond_img"}

    def recorded(x: torch.Tensor, timestep: int, index: int, branch: str) -> torch.Tensor:
        return case.tensors[f"rec.step{index}.{names[branch]}"]

    yield from run_trajectory(case, recorded, "recorded ")


def run_whole(case: GoldenCase) -> Iterator[CaseResult]:
    """The sampler over recorded outputs, then over the network itself from the first step on."""
    yield from run_recorded(case)
    network, given = official_networks(case).unet, case.tensors
    speed = torch.tensor([case.description["config"]["fs"]])

    def branch(x: torch.Tensor, timestep: int, index: int, name: str) -> torch.Tensor:
        text = given["in.text" if name == "both" else "in.text_uncond"]
        image = given["in.image_tokens_uncond" if name == "none" else "in.image_tokens"]
        context = torch.cat([text, image], dim=1)
        x = torch.cat([x, given["in.c_concat"]], dim=1)
        return forward(network, x, torch.tensor([timestep]), context, speed)

    yield from run_trajectory(case, branch)


def run_trajectory(case: GoldenCase, branch: Branch, label: str = "") -> Iterator[CaseResult]:
    """A whole run with recorded noise over any network, compared at every step."""
    settings = case.description["config"]
    prediction = settings["parameterization"]
    schedule = latent_schedule(prediction, settings["zero_snr"])
    text, image = settings["cfg_text"], settings["cfg_img"]
    guidance = StreamGuidance(text, text if image is None else image, settings["guidance_rescale"])
    table = ddim_table(
        schedule,
        settings["S"],
        SPACINGS[settings["timestep_spacing"]],
        settings["eta"],
        settings["base_scale"] if settings["dynamic_rescale"] else None,
    )
    steps: list[StepInfo] = []
    final = sample_ddim(
        guided(branch, guidance),
        case.tensors["in.x_T"],
        table,
        prediction=prediction,
        generator=torch.Generator(),
        callback=steps.append,
        noise_source=lambda: case.tensors[f"in.noise.step{len(steps)}"],
    )
    # The official record is of the clean latents as the step used them.
    scales = table.scales_prev.tolist()
    clean = [info.denoised * scale for info, scale in zip(steps, scales, strict=True)]
    for name, found in (
        ("timesteps_in_order", [info.timestep for info in steps]),
        ("pred_x0_steps", torch.stack(clean)),
        ("x_prev_steps", torch.stack([info.latents for info in steps])),
        ("final", final),
    ):
        yield compare(case, f"out.{name}", found, label + name)


def guided(branch: Branch, guidance: StreamGuidance) -> Predictor:
    """The guided prediction of a network that is asked for one branch at a time."""

    def predict(x: torch.Tensor, timestep: int, index: int) -> torch.Tensor:
        made = {name: branch(x, timestep, index, name) for name in guidance.branches}
        return guidance.combine(made["both"], made.get("image"), made.get("none"))

    return predict
