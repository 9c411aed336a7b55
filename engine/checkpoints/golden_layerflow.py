"""LayerFlow's golden cases: schedule, network forwards and whole sampling runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..conditioning.layers import LayerSequence
from ..models.layered_transformer import LayerSegment, sincos_3d
from ..sampling.guidance import dynamic_as_released
from ..sampling.samplers import StepInfo, sample_as_released
from ..sampling.schedules import layerflow_schedule, nearest_sqrt_alphas, released_schedule
from .detect import TableLayout
from .golden import CaseResult, GoldenCase, compare
from .load import Checkpoint, from_store, load_transformer
from .reader import memory_store

SAT_PREFIX = "model.diffusion_model."
POSITIONS = SAT_PREFIX + "mixins.pos_embed.pos_embedding"
# The official code's names for what is given and what is made ("bl": the blended layer is given).
TASKS = {
    "gen": "generate",
    "fg2bg": "foreground",
    "bg2fg": "background",
    "seg": "decompose",
    "bl": "decompose",
}


def run_schedule(case: GoldenCase) -> Iterator[CaseResult]:
    """Tables, timesteps, guidance values and solver coefficients of the released sampler."""
    schedule = layerflow_schedule()
    table = schedule.alphas_cumprod.sqrt()
    yield compare(case, "out.sqrt_alphas_cumprod_1000", table)
    before = schedule.alphas_cumprod_before_rescale
    yield compare(case, "out.alphas_cumprod_1000_f64_before_zero_snr", before)
    snapped = nearest_sqrt_alphas(schedule, case.tensors["in.denoiser.sigma"])
    yield compare(case, "out.denoiser.quantized_sigma", snapped)
    for name in sorted(case.tensors):
        found = re.fullmatch(r"out\.(n(\d+)(?:_guider(\d+))?)\.timesteps_in_order", name)
        if not found:
            continue
        run, steps, guider = found[1], int(found[2]), int(found[3] or found[2])
        arrays = released_schedule(schedule, steps)
        guidance = dynamic_as_released(6.0, guider)
        scales = [guidance(i, t, steps) for i, t in enumerate(arrays.timesteps)]
        yield compare(case, name, arrays.timesteps)
        yield compare(case, f"out.{run}.sqrt_alpha_cumprod", arrays.sqrt_alphas)
        yield compare(case, f"out.{run}.denoiser_sqrt_alpha", arrays.denoiser_sqrt_alphas)
        yield compare(case, f"out.{run}.dynamic_cfg", torch.tensor(scales, dtype=torch.float64))
        yield compare(case, f"out.{run}.mult", arrays.coefficients)


def run_forward(case: GoldenCase) -> Iterator[CaseResult]:
    """The network, loaded from the official format, against the official network's outputs."""
    checkpoint = official_checkpoint(case)
    yield compare(case, "out.pos_embedding", computed_positions(checkpoint))
    for name in sorted(case.tensors):
        found = re.fullmatch(r"out\.(([a-z0-9]+)(?:_b\d+)?@scale([\d.]+))\.y", name)
        if not found:
            continue
        run, task, motion = found[1], TASKS[found[2]], float(found[3])
        network = load_transformer(checkpoint, adapters={"motion": motion})
        latents = case.tensors[f"in.{run}.x"]
        clean = case.tensors.get(f"in.{run}.cond_input")
        text = split_prompts(case.tensors[f"in.{run}.context"], latents.shape[0])
        segments = segments_of(checkpoint, task, clean)
        with torch.no_grad():
            v = network(latents, case.tensors[f"in.{run}.timesteps"], text, segments, clean)
        yield compare(case, name, v, run)


def run_sampling(case: GoldenCase) -> Iterator[CaseResult]:
    """A whole run of the released sampler with recorded noise, guidance and the real network."""
    checkpoint = official_checkpoint(case)
    network = load_transformer(checkpoint, adapters={"motion": 0.0})
    settings = case.description["config"]["sampler"]
    noise = case.tensors["in.x_init"]
    clean = case.tensors.get("in.cond_input")
    segments = segments_of(checkpoint, TASKS[case.name.rpartition("_")[2]], clean)
    conditional = split_prompts(case.tensors["in.context"], noise.shape[0])
    text = torch.cat([torch.zeros_like(conditional), conditional])
    both_clean = None if clean is None else torch.cat([clean, clean])

    def predict(x: torch.Tensor, timestep: int, scale: float) -> torch.Tensor:
        times = torch.full((2 * x.shape[0],), float(timestep))
        v = network(torch.cat([x, x]), times, text, segments, both_clean)
        without, with_text = v.chunk(2)
        return without + scale * (with_text - without)

    def recorded() -> Iterator[torch.Tensor]:
        # Two draws from the second step on, the second one used; only used ones were recorded.
        yield case.tensors["in.noise.step0"]
        for step in range(1, settings["num_steps"] - 1):
            yield from 2 * [case.tensors[f"in.noise.step{step}"]]

    steps: list[StepInfo] = []
    draws = recorded()
    final = sample_as_released(
        predict,
        noise,
        settings["num_steps"],
        dynamic_as_released(
            settings["guider_scale"], settings["guider_num_steps"], settings["guider_exp"]
        ),
        torch.Generator(),
        steps.append,
        schedule=layerflow_schedule(settings["shift_scale"]),
        noise_source=lambda: next(draws),
    )
    yield compare(case, "out.timesteps_in_order", [step.timestep for step in steps])
    yield compare(case, "out.denoised_steps", torch.stack([step.denoised for step in steps]))
    yield compare(case, "out.x_steps", torch.stack([step.latents for step in steps]))
    yield compare(case, "out.final", final)


def official_checkpoint(case: GoldenCase) -> Checkpoint:
    """The case's weights as an official file would hold them, opened like one."""
    return from_store(memory_store(official_state(case), case.name), layout_of(case))


def official_state(case: GoldenCase) -> dict[str, torch.Tensor]:
    """Official names and tensors of a case, the position table included."""
    state = case.weights(SAT_PREFIX)
    state.setdefault(POSITIONS, case.tensors["out.pos_embedding"])
    return state


def layout_of(case: GoldenCase) -> TableLayout:
    """How the tiny model's position table is cut."""
    changed = case.description["config"]["overrides"]
    return TableLayout(
        text_length=changed["text_length"],
        tokens_per_prompt=changed["text_length"] // changed["n_txt"],
        latent_height=changed["latent_height"],
        latent_width=changed["latent_width"],
    )


def computed_positions(checkpoint: Checkpoint) -> torch.Tensor:
    """The sin-cos table [1, text + video, C] the engine makes for clips no stored table fits."""
    settings = checkpoint.info.transformer
    dim = settings["num_attention_heads"] * settings["attention_head_dim"]
    text, *grid = settings["position_table"]
    scales = (settings["spatial_interpolation_scale"], settings["temporal_interpolation_scale"])
    return torch.cat([torch.zeros(text, dim), sincos_3d(dim, *grid, *scales)])[None]


def split_prompts(context: torch.Tensor, batch: int) -> torch.Tensor:
    """Official text rows [B*P, L, D], sample by sample, to [B, P, L, D]."""
    return context.reshape(batch, -1, *context.shape[1:])


def segments_of(
    checkpoint: Checkpoint, task: str, clean: torch.Tensor | None
) -> tuple[LayerSegment, ...]:
    """The layers of a case; the released RGB decomposition gives fewer blended latents than all."""
    settings = checkpoint.metadata["sequence"]
    sequence = LayerSequence(**{**settings, "layers": tuple(settings["layers"])})
    if task == "decompose" and clean is not None:
        sequence = replace(sequence, decompose_latents=clean.shape[1])
    return sequence.segments(task)
