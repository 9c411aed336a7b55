"""Schedules, guidance and samplers against the official arrays, diffusers and known answers."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from layerloom.engine.errors import LayerLoomError
from layerloom.engine.sampling.guidance import constant, dynamic_as_released, guidance
from layerloom.engine.sampling.samplers import (
    SAMPLER_NAMES,
    StepInfo,
    draw_noise,
    sample,
    sample_as_released,
)
from layerloom.engine.sampling.schedules import (
    layerflow_schedule,
    nearest_sqrt_alphas,
    released_schedule,
)

SCHEDULE_CASES = {"n50": (50, 50), "n20": (20, 20), "n6": (6, 6), "n6_guider50": (6, 50)}
MEAN, STD = 0.7, 0.5


@pytest.fixture(scope="module")
def schedule():
    return layerflow_schedule()


def load_case(golden_dir, name):
    tensors = load_file(golden_dir / f"{name}.safetensors")
    info = json.loads((golden_dir / f"{name}.json").read_text())
    return tensors, {entry["tensor"]: entry["atol"] for entry in info["expected"]}, info


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_predictor(schedule, timestep_log=None):
    """The exact v for data drawn from N(MEAN, STD^2): E[x0 | x_t] in closed form."""

    def predict(x, timestep, scale):
        if timestep_log is not None:
            timestep_log.append((timestep, scale))
        a = float(schedule.alphas_cumprod[timestep])
        gain = STD**2 * math.sqrt(a) / (a * STD**2 + 1 - a)
        x0 = MEAN + gain * (x - math.sqrt(a) * MEAN)
        return (math.sqrt(a) * x - x0) / math.sqrt(1 - a)

    return predict


def run(name, schedule, steps, shape=(64,), seed=0, callback=None, dtype=torch.float32):
    generator = seeded(seed)
    noise = draw_noise(shape, generator, dtype=dtype)
    result = sample(
        name,
        gaussian_predictor(schedule),
        noise,
        steps=steps,
        guidance=constant(1.0),
        generator=generator,
        schedule=schedule,
        callback=callback,
    )
    return noise, result


# The schedule


def test_tables_equal_the_official_ones(golden_dir, schedule):
    tensors, atol, _ = load_case(golden_dir, "lf_schedule")
    for name, ours in {
        "out.sqrt_alphas_cumprod_1000": schedule.alphas_cumprod.sqrt(),
        "out.alphas_cumprod_1000_f64_before_zero_snr": schedule.alphas_cumprod_before_rescale,
        "out.denoiser.quantized_sigma": nearest_sqrt_alphas(schedule, tensors["in.denoiser.sigma"]),
    }.items():
        torch.testing.assert_close(ours, tensors[name].double(), atol=atol[name], rtol=0)
    assert schedule.zero_terminal_snr


@pytest.mark.parametrize("case", SCHEDULE_CASES)
def test_released_arrays_equal_the_official_ones(golden_dir, schedule, case):
    tensors, atol, _ = load_case(golden_dir, "lf_schedule")
    steps, guider_steps = SCHEDULE_CASES[case]
    arrays = released_schedule(schedule, steps)
    g = dynamic_as_released(6, num_steps=guider_steps)
    ours = {
        "timesteps_in_order": torch.tensor(arrays.timesteps),
        "sqrt_alpha_cumprod": arrays.sqrt_alphas,
        "denoiser_sqrt_alpha": arrays.denoiser_sqrt_alphas,
        "mult": arrays.coefficients,
        "dynamic_cfg": torch.tensor(
            [g(i, t, steps) for i, t in enumerate(arrays.timesteps)], dtype=torch.float64
        ),
    }
    for name, value in ours.items():
        key = f"out.{case}.{name}"
        torch.testing.assert_close(value.double(), tensors[key].double(), atol=atol[key], rtol=0)


def test_released_arrays_are_usable_at_every_step_count(schedule):
    for steps in (1, 2, 3, 7, 99, 450, 999, 1000):
        arrays = released_schedule(schedule, steps)
        assert len(set(arrays.timesteps)) == steps
        assert arrays.coefficients.isfinite().all()
        assert float(arrays.sqrt_alphas[0]) == 0.0


def test_table_equals_diffusers(schedule):
    from diffusers import CogVideoXDDIMScheduler

    theirs = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True)
    # diffusers takes the same cumulative product in float64: only the last digits may differ.
    torch.testing.assert_close(
        schedule.alphas_cumprod, theirs.alphas_cumprod, atol=1e-12, rtol=0, check_dtype=False
    )


def test_training_helpers_equal_diffusers_and_invert(schedule):
    from diffusers import CogVideoXDDIMScheduler

    theirs = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True)
    x0, noise = draw_noise((2, 5, 3, 4), seeded()).chunk(2)
    x0, noise = x0.expand(4, -1, -1, -1), noise.expand(4, -1, -1, -1)
    t = torch.tensor([0, 1, 500, 999])
    noisy, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    # float32 arithmetic on values of about 3; diffusers roots 1 - a in float32.
    torch.testing.assert_close(noisy, theirs.add_noise(x0, noise, t), atol=3e-6, rtol=0)
    torch.testing.assert_close(v, theirs.get_velocity(x0, noise, t), atol=3e-6, rtol=0)
    torch.testing.assert_close(schedule.denoised(noisy, v, t), x0, atol=2e-6, rtol=0)
    assert torch.equal(noisy[3], noise[3])
    half = schedule.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    assert half.dtype == torch.bfloat16


def test_trailing_timesteps_are_exact_in_number(schedule):
    assert schedule.trailing_timesteps(50) == list(range(999, 0, -20))
    assert schedule.trailing_timesteps(1) == [999]
    # 61, 103, 121 and 122 gain a timestep of -1 where the spacing is left to float rounding.
    for steps in (3, 6, 61, 103, 121, 122, 1000):
        timesteps = schedule.trailing_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert all(a > b for a, b in pairwise(timesteps))


@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, True])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_unusable_step_counts_are_refused_before_work(schedule, name, steps):
    def predict(x, timestep, scale):
        raise AssertionError("the network must not run")

    with pytest.raises(LayerLoomError, match="1 to 1000"):
        sample(
            name,
            predict,
            torch.zeros(2),
            steps=steps,
            guidance=constant(1.0),
            generator=seeded(),
            schedule=schedule,
        )


def test_released_sampler_refuses_a_schedule_it_was_not_made_for():
    plain = layerflow_schedule(zero_terminal_snr=False)
    with pytest.raises(LayerLoomError, match="ddim"):
        run("released", plain, 4)
    noise, result = run("ddim", plain, 4)
    assert result.isfinite().all()


# Guidance


def test_smooth_guidance_rises_from_one_to_the_scale():
    for steps in (2, 6, 50):
        g = guidance("dynamic", 6.0, steps)
        values = [g(i, 999 - i, steps) for i in range(steps)]
        assert values[0] == 1.0
        assert values[-1] == pytest.approx(6.0)
        assert all(b >= a for a, b in pairwise(values))
    assert guidance("dynamic", 6.0, 1)(0, 999, 1) == pytest.approx(6.0)


def test_released_guidance_jumps_about_with_the_published_mean(schedule):
    g = guidance("dynamic-released", 6.0, 50)
    values = [g(i, t, 50) for i, t in enumerate(released_schedule(schedule, 50).timesteps)]
    assert sum(values) / 50 == pytest.approx(3.815, abs=5e-4)
    assert 1 <= min(values) and max(values) <= 7
    assert any(b < a for a, b in pairwise(values))


def test_constant_guidance_and_refusals():
    g = guidance("constant", 4.5, 20)
    assert {g(i, 900 - i, 20) for i in range(20)} == {4.5}
    with pytest.raises(LayerLoomError, match="constant, dynamic, dynamic-released"):
        guidance("strong", 6.0, 50)
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(LayerLoomError, match="0 or more"):
            guidance("constant", scale, 50)


# Samplers


@pytest.mark.parametrize("case", ["lf_sample_rgb_gen", "lf_sample_rgba_bg2fg"])
def test_released_trajectory_equals_the_official_one(golden_dir, case):
    """The official network outputs are fed step by step: this checks the sampler alone."""
    tensors, atol, info = load_case(golden_dir, case)
    settings = info["config"]["sampler"]
    steps = settings["num_steps"]
    calls, infos = [], []

    def predict(x, timestep, scale):
        index = len(calls)
        calls.append(timestep)
        # The recordings are of the same trajectory, so each input must agree, too.
        torch.testing.assert_close(
            x, tensors[f"rec.step{index}.net_in"], atol=atol["out.x_steps"], rtol=0
        )
        uncond = tensors[f"rec.step{index}.net_out_uncond"]
        return uncond + scale * (tensors[f"rec.step{index}.net_out_cond"] - uncond)

    # One draw in the first step, two from then on of which the second counts, none in the last.
    noise = [tensors[f"in.noise.step{i}"] for i in range(steps - 1)]
    unused = torch.full_like(noise[0], torch.nan)
    draws = [noise[0]] + [draw for used in noise[1:] for draw in (unused, used)]
    final = sample_as_released(
        predict,
        tensors["in.x_init"],
        steps,
        dynamic_as_released(6, num_steps=settings["guider_num_steps"]),
        seeded(),
        infos.append,
        noise_source=lambda: draws.pop(0),
    )
    assert not draws
    assert calls == tensors["out.timesteps_in_order"].tolist()
    assert [(info.step, info.total) for info in infos] == [(i + 1, steps) for i in range(steps)]
    for name, ours in {
        "out.final": final,
        "out.x_steps": torch.stack([info.latents for info in infos]),
        "out.denoised_steps": torch.stack([info.denoised for info in infos]),
    }.items():
        # Ten times under the recorded tolerance: with the network's outputs given, errors
        # do not feed back through it.
        torch.testing.assert_close(ours, tensors[name], atol=atol[name] / 10, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m-sde"])
def test_standard_samplers_equal_diffusers_driven_by_hand(schedule, name):
    """Where steps divides 1000, diffusers' own timesteps are exact and must give the same."""
    import diffusers

    make = diffusers.CogVideoXDDIMScheduler if name == "ddim" else diffusers.CogVideoXDPMScheduler
    theirs = make(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        clip_sample=False,
    )
    theirs.set_timesteps(10)
    timesteps = theirs.timesteps.tolist()
    predict = gaussian_predictor(schedule)
    generator = seeded(3)
    x, old = draw_noise((4, 5), generator), None
    for index, t in enumerate(timesteps):
        v = predict(x, t, 1.0)
        if name == "ddim":
            x, old = theirs.step(v, t, x, return_dict=False)
        else:
            back = timesteps[index - 1] if index else None
            x, old = theirs.step(v, old, t, back, x, generator=generator, return_dict=False)

    infos = []
    _, ours = run(name, schedule, 10, shape=(4, 5), seed=3, callback=infos.append)
    assert [info.timestep for info in infos] == timesteps
    # Same formulas on a table equal to 1e-12: only float32 rounding is left.
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=0)


def test_ddim_converges_to_the_known_answer(schedule):
    """For Gaussian data the probability flow is affine: noise n must end at MEAN + STD n."""
    errors = {}
    for steps in (60, 300, 600, 1000):
        noise, result = run("ddim", schedule, steps, shape=(500,))
        errors[steps] = float((result - (MEAN + STD * noise)).abs().max())
    # First order: the error falls with the step size, also where steps does not divide 1000
    # (diffusers' own neighbours there leave an error of 0.7 at 600 steps). 1000 steps still end
    # at t = 0, from which the last step takes the mean: that and the steps leave 0.022.
    assert errors[1000] < 0.03
    assert errors[600] < errors[300] / 1.5
    assert errors[300] < errors[60] / 3


@pytest.mark.parametrize("name", ["released", "dpmpp-2m-sde"])
@pytest.mark.parametrize("steps", [50, 60])
def test_stochastic_samplers_draw_from_the_data(schedule, name, steps):
    infos = []
    noise, result = run(name, schedule, steps, shape=(40_000,), callback=infos.append)
    # The last step returns E[x0 | x_t], which lacks the variance of x0 given x_t.
    a = float(schedule.alphas_cumprod[infos[-1].timestep])
    missing = STD**2 * (1 - a) / (a * STD**2 + 1 - a)
    # Standard errors are 0.0025 and 0.0018; the solver's bias at this step size is about 1.5 %.
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(result.std()) == pytest.approx(math.sqrt(STD**2 - missing), rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack([noise, result]))[0, 1])) < 0.03


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_same_seed_same_result(schedule, name):
    _, first = run(name, schedule, 7, seed=5)
    _, again = run(name, schedule, 7, seed=5)
    _, other = run(name, schedule, 7, seed=6)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_one_step_returns_the_denoised_latent(schedule, name):
    infos = []
    _, result = run(name, schedule, 1, callback=infos.append)
    # At pure noise the best guess is the mean of the data, whatever the noise was.
    torch.testing.assert_close(result, torch.full_like(result, MEAN), atol=1e-6, rtol=0)
    assert [(info.step, info.total, info.timestep) for info in infos] == [(1, 1, 999)]


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_the_last_step_ends_at_the_denoised_latent(schedule, name):
    infos: list[StepInfo] = []
    for steps in (6, 7):
        _, result = run(name, schedule, steps, callback=infos.append)
        torch.testing.assert_close(result, infos[-1].denoised, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_cancel_from_the_callback_ends_the_run(schedule, name):
    class Cancelled(Exception):
        pass

    seen = []

    def cancel(info):
        seen.append(info.step)
        if info.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(name, schedule, 10, callback=cancel)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_guidance_sees_the_step_and_reaches_the_network(schedule, name):
    log, asked = [], []

    def rising(step_index, timestep, total_steps):
        asked.append((step_index, timestep, total_steps))
        return 1.0 + step_index

    sample(
        name,
        gaussian_predictor(schedule, log),
        draw_noise((3,), seeded()),
        steps=4,
        guidance=rising,
        generator=seeded(),
        schedule=schedule,
    )
    assert [index for index, _, _ in asked] == [0, 1, 2, 3]
    assert {total for _, _, total in asked} == {4}
    assert log == [(t, 1.0 + index) for index, t, _ in asked]


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_half_precision_follows_the_float32_trajectory(schedule, name):
    _, full = run(name, schedule, 10)
    _, half = run(name, schedule, 10, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # Same noise, rounded: bfloat16 has 8 bits, and 10 steps round the state 10 times.
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0)


def test_unknown_sampler_is_refused(schedule):
    with pytest.raises(LayerLoomError, match="released, dpmpp-2m-sde, ddim"):
        run("euler", schedule, 4)
    # A step count that is wrong too must not hide the name.
    with pytest.raises(LayerLoomError, match="euler"):
        run("euler", schedule, 0)


def test_noise_comes_from_a_cpu_generator():
    assert torch.equal(
        draw_noise((2, 3), seeded(), dtype=torch.bfloat16),
        torch.randn(2, 3, generator=seeded()).bfloat16(),
    )
