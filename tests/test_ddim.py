"""DDIM and two-condition guidance against the official arrays, diffusers and known answers."""

import math
from itertools import pairwise

import pytest
import torch

from layerloom.engine.checkpoints.golden import load_case, run_cases
from layerloom.engine.checkpoints.golden_ddim import run_recorded, run_whole
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.sampling.ddim import KnownFrames, ddim_table, sample_ddim
from layerloom.engine.sampling.latent_schedules import (
    dynamic_scale,
    latent_schedule,
    spaced_timesteps,
)
from layerloom.engine.sampling.samplers import draw_noise, sample
from layerloom.engine.sampling.streams import StreamGuidance, rescale_spread

TRAJECTORIES = (
    "dc_ddim_256like_eta0",
    "dc_ddim_256like_eta1",
    "dc_ddim_512like_eta0",
    "dc_ddim_512like_eta1",
    "dc_ddim_512like_multicond",
)
# Step counts at which the official sampler returns NaN with eta 1 (its golden notes).
NAN_STEPS = (7, 11, 14, 15, 20, 25, 33, 34, 35, 37, 38, 39, 61, 62, 63, 64)
EXTRA_STEPS = (61, 103, 121, 122)
MEAN, STD = 0.7, 0.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(schedule, scales=None):
    """The exact prediction for data drawn from N(MEAN, STD^2), rescaled as the forward process."""

    def predict(x, timestep, index):
        a = float(schedule.alphas_cumprod[timestep])
        scale = 1.0 if scales is None else float(scales[timestep])
        mean, std = MEAN * scale, STD * scale
        gain = std**2 * math.sqrt(a) / (a * std**2 + 1 - a)
        x0 = mean + gain * (x - math.sqrt(a) * mean)
        noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        return (
            noise
            if schedule.prediction == "eps"
            else (math.sqrt(a) * noise - math.sqrt(1 - a) * x0)
        )

    return predict


def run(schedule, steps, eta=0.0, *, spacing="trailing", base=None, shape=(500,), seed=0, **more):
    generator = seeded(seed)
    noise = draw_noise(shape, generator)
    table = ddim_table(schedule, steps, spacing, eta, base)
    scales = None if base is None else dynamic_scale(base)
    result = sample_ddim(
        more.pop("predict", gaussian(schedule, scales)),
        noise,
        table,
        prediction=schedule.prediction,
        generator=generator,
        **more,
    )
    return noise, result


# Golden numbers


def test_schedules_equal_the_official_ones(golden_dir):
    results = run_cases(golden_dir, pattern="dc_schedule_*")
    # Six tables and seven step counts of six arrays; five tables and eight counts of five.
    assert len(results) > 80
    assert [r.case for r in results if not r.passed] == []


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_over_recorded_outputs_equal_the_official_ones(golden_dir, name):
    case = load_case(golden_dir, name)
    results = list(run_recorded(case))
    assert [r.case.split()[-1] for r in results] == [
        "timesteps_in_order",
        "pred_x0_steps",
        "x_prev_steps",
        "final",
    ]
    # The network's outputs are given, so only rounding is left: the cases' own advice.
    largest = float(case.tensors["out.x_prev_steps"].abs().max())
    assert max(r.max_error for r in results) <= 1e-5 * largest


@pytest.mark.parametrize("name", ["dc_ddim_256like_eta1", "dc_ddim_512like_multicond"])
def test_whole_trajectories_of_the_network_equal_the_official_ones(golden_dir, name):
    """From the official weights and noise to the last latent; `layerloom verify` runs all five."""
    case = load_case(golden_dir, name)
    results = [r for r in run_whole(case) if "recorded" not in r.case]
    assert len(results) == 4
    assert [r.case for r in results if not r.passed] == []
    # Within what other kernels do to the official run, which the case measured.
    allowed = case.description["conditioning"]["other_cpu_kernels"]
    assert max(r.max_error for r in results) < allowed


@pytest.mark.parametrize("detail", ["rescale", "base_scale", "cfg_img", "eta", "zero_snr"])
def test_the_trajectories_notice_a_missing_detail(golden_dir, detail):
    """Guidance rescale, dynamic rescale, the image scale, eta or the zero-SNR table left out."""
    name = "dc_ddim_512like_eta1" if detail == "eta" else "dc_ddim_512like_multicond"
    case = load_case(golden_dir, name)
    settings = case.description["config"]
    changed = {
        "rescale": {"guidance_rescale": 0.0},
        "base_scale": {"dynamic_rescale": False},
        "cfg_img": {"cfg_img": None},
        "eta": {"eta": 0.0},
        "zero_snr": {"zero_snr": False},
    }
    settings.update(changed[detail])
    errors = [r.max_error / r.tolerance for r in run_recorded(case) if r.tolerance]
    assert max(errors) > 20


# Timesteps


@pytest.mark.parametrize("spacing", ["trailing", "uniform"])
def test_every_step_count_is_exact(spacing):
    schedule = latent_schedule()
    for steps in range(1, 1001):
        timesteps = spaced_timesteps(schedule, spacing, steps)
        assert len(timesteps) == steps
        assert timesteps[0] <= 999 and timesteps[-1] >= 0
        assert all(a > b for a, b in pairwise(timesteps))


def test_spacings_equal_the_published_ones_where_those_are_exact():
    schedule = latent_schedule()
    for steps in (1, 2, 5, 10, 20, 25, 50, 100, 500):
        released = spaced_timesteps(schedule, "uniform-released", steps)
        assert spaced_timesteps(schedule, "uniform", steps) == released
        trailing = spaced_timesteps(schedule, "trailing", steps)
        assert trailing == list(range(999, 0, -1000 // steps))
    assert spaced_timesteps(schedule, "trailing", 50)[-1] == 19
    assert len(spaced_timesteps(schedule, "uniform-released", 30)) == 31
    assert len(spaced_timesteps(schedule, "uniform-released", 60)) == 63


def test_unusable_spacings_and_counts_are_a_sentence():
    schedule = latent_schedule()
    for steps in (0, -1, 1001, 2.5, True):
        for spacing in ("trailing", "uniform", "uniform-released"):
            with pytest.raises(LayerLoomError, match="1 to 1000"):
                ddim_table(schedule, steps, spacing)
    for steps in (3, 9, 1000):
        with pytest.raises(LayerLoomError, match="'uniform'"):
            ddim_table(schedule, steps, "uniform-released")
    with pytest.raises(LayerLoomError, match="trailing, uniform, uniform-released"):
        ddim_table(schedule, 5, "leading")
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(LayerLoomError, match="eta"):
            ddim_table(schedule, 5, eta=eta)


# The sampler


@pytest.mark.parametrize("steps", sorted({*NAN_STEPS, *EXTRA_STEPS, 6, 30, 50}))
def test_no_step_count_gives_nan_or_stray_noise(steps):
    schedule = latent_schedule()
    table = ddim_table(schedule, steps, eta=1.0)
    assert all(bool(t.isfinite().all()) for t in (table.sigmas, table.directions, table.scales))
    # From pure noise with eta 1 the predicted noise has no part in what follows.
    assert float(table.directions[0]) < 1e-7
    _, result = run(schedule, steps, 1.0, base=0.7)
    assert bool(result.isfinite().all())


def test_deterministic_ddim_equals_diffusers():
    from diffusers import DDIMScheduler

    for zero_snr in (False, True):
        schedule = latent_schedule("v" if zero_snr else "eps", zero_snr)
        theirs = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction" if zero_snr else "epsilon",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=zero_snr,
        )
        theirs.set_timesteps(10)
        x = draw_noise((64,), seeded())
        predict = gaussian(schedule)
        for t in theirs.timesteps.tolist():
            x = theirs.step(predict(x, t, 0), t, x).prev_sample
        # diffusers' table is a float32 cumulative product.
        torch.testing.assert_close(run(schedule, 10, shape=(64,))[1], x, atol=2e-4, rtol=0)


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_ddim_converges_to_the_known_answer(prediction):
    """For Gaussian data the probability flow is affine: noise n must end at MEAN + STD n."""
    schedule = latent_schedule(prediction, prediction == "v")
    errors = {}
    for steps in (50, 200, 1000):
        noise, result = run(schedule, steps)
        # The published end leaves sqrt(1 - 0.99915) of the noise, 0.03 a standard deviation.
        errors[steps] = float((result - (MEAN + STD * noise)).abs().max())
    assert errors[50] > errors[200] > errors[1000]
    # Without zero SNR the sampler starts from noise where 7 % of the mean belongs.
    assert errors[1000] < (0.08 if prediction == "v" else 0.15)


@pytest.mark.parametrize("base", [None, 0.7, 0.3])
def test_full_eta_draws_from_the_data(base):
    """The dynamic rescale must undo what the forward process scaled: the mean and the spread."""
    infos = []
    schedule = latent_schedule()
    _, result = run(schedule, 200, 1.0, base=base, shape=(20_000,), callback=infos.append)
    # The published last step keeps the last timestep's scale (t = 4: within 1 % of 1).
    assert float(result.mean()) == pytest.approx(MEAN, rel=0.03)
    # Scaling the denoised latent loses a little of its spread at every step.
    assert float(result.std()) == pytest.approx(STD, rel=0.06)
    assert float(infos[-1].denoised.mean()) == pytest.approx(MEAN, rel=0.03)


def test_eta_zero_draws_nothing_and_seeds_repeat():
    schedule = latent_schedule()

    def no_draws():
        raise AssertionError("no noise is needed")

    run(schedule, 7, 0.0, noise_source=no_draws)
    first, again, other = (run(schedule, 7, 1.0, seed=seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_cancel_from_the_callback_ends_the_run():
    class Cancelled(BaseException):
        pass

    steps = []

    def callback(info):
        steps.append(info.step)
        if info.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(latent_schedule(), 10, callback=callback)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("base", [None, 0.7])
def test_known_frames_come_out_to_the_bit_and_stay_on_their_path(eta, base):
    schedule = latent_schedule()
    known = KnownFrames(draw_noise((1, 4, 5, 2, 2), seeded(9)), torch.zeros(1, 1, 5, 1, 1))
    known.mask[:, :, 0] = 1
    table, infos, inputs = ddim_table(schedule, 12, eta=eta, base_scale=base), [], []
    inner = gaussian(schedule, None if base is None else dynamic_scale(base))

    def predict(x, timestep, index):
        inputs.append(x)
        return inner(x, timestep, index)

    noise = draw_noise((1, 4, 5, 2, 2), seeded(1))
    result = sample_ddim(
        predict,
        noise,
        table,
        prediction="v",
        generator=seeded(2),
        known=known,
        callback=infos.append,
    )
    assert torch.equal(result[:, :, 0], known.latents[:, :, 0])
    free = run(schedule, 12, eta, base=base, shape=(1, 4, 5, 2, 2), seed=1)[1]
    if eta == 0:
        # The network here looks at one number at a time: other frames do not notice.
        torch.testing.assert_close(result[:, :, 1:], free[:, :, 1:], atol=1e-5, rtol=0)
        # What the network is shown is the kept latent at the right noise level.
        for x, a, scale in zip(inputs, table.alphas, table.scales, strict=True):
            a, scale = float(a), float(scale)
            wanted = a**0.5 * scale * known.latents + (1 - a) ** 0.5 * noise
            torch.testing.assert_close(x[:, :, 0], wanted[:, :, 0], atol=1e-4, rtol=0)
    for info in infos:
        torch.testing.assert_close(
            info.denoised[:, :, 0], known.latents[:, :, 0], atol=1e-5, rtol=0
        )


def test_the_other_samplers_take_a_network_that_predicts_noise():
    schedule = latent_schedule("eps", False)
    predict = gaussian(schedule)
    noise = draw_noise((500,), seeded())
    result = sample(
        "ddim",
        lambda x, timestep, scale: predict(x, timestep, 0),
        noise,
        steps=100,
        guidance=lambda *_: 1.0,
        generator=seeded(),
        schedule=schedule,
    )
    assert float((result - (MEAN + STD * noise)).abs().max()) < 0.15


def test_a_noise_prediction_at_pure_noise_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        latent_schedule("eps", True)
    schedule = latent_schedule("eps", False)
    x0, noise = draw_noise((2, 4, 3), seeded()).chunk(2)
    t = torch.tensor([500])
    noisy = schedule.add_noise(x0, noise, t)
    assert torch.equal(schedule.target(x0, noise, t), noise)
    torch.testing.assert_close(schedule.denoised(noisy, noise, t), x0, atol=1e-5, rtol=0)


# Guidance


def branches(shape=(2, 4, 3, 5, 5)):
    return draw_noise((3, *shape), seeded(5)).unbind(0)


@pytest.mark.parametrize(
    ("text", "image", "needed"),
    [
        (7.5, 2.0, ("both", "image", "none")),
        (7.5, 7.5, ("both", "none")),
        (7.5, 1.0, ("both", "image")),
        (1.0, 1.0, ("both",)),
        (1.0, 3.0, ("both", "image", "none")),
        (0.0, 0.0, ("both", "none")),
    ],
)
def test_only_the_branches_that_count_are_asked_for(text, image, needed):
    guidance = StreamGuidance(text, image)
    assert guidance.branches == needed
    parts = dict(zip(("both", "image", "none"), branches(), strict=True))
    formula = (
        parts["none"]
        + image * (parts["image"] - parts["none"])
        + text * (parts["both"] - parts["image"])
    )
    given = {name: part if name in needed else None for name, part in parts.items()}
    torch.testing.assert_close(guidance.combine(**given), formula, atol=2e-5, rtol=0)


def test_the_scales_pull_apart():
    """Text alone moves along the text, image alone along the image."""
    both, image, none = branches()
    base = StreamGuidance(1.0, 1.0).combine(both, None, None)
    more_text = StreamGuidance(4.0, 1.0).combine(both, image, None) - base
    more_image = StreamGuidance(1.0, 4.0).combine(both, image, none) - base
    torch.testing.assert_close(more_text, 3 * (both - image), atol=1e-5, rtol=0)
    torch.testing.assert_close(more_image, 3 * (image - none), atol=1e-5, rtol=0)


def test_rescale_sets_the_spread_back_for_each_sample():
    both, _, none = branches()
    guided = StreamGuidance(7.5, 7.5).combine(both, None, none)
    full = StreamGuidance(7.5, 7.5, 1.0).combine(both, None, none)
    torch.testing.assert_close(full.flatten(1).std(1), both.flatten(1).std(1))
    half = rescale_spread(guided, both, 0.5)
    torch.testing.assert_close(half, (guided + full) / 2)
    assert torch.equal(rescale_spread(guided, both, 0.0), guided)


def test_rescale_of_a_constant_prediction_is_no_nan():
    flat = torch.full((1, 4, 2, 3, 3), 0.5)
    assert torch.equal(rescale_spread(flat, flat, 0.7), flat)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"text": -1.0}, "text scale is -1"),
        ({"image": math.inf}, "image scale is inf"),
        ({"rescale": 1.5}, "guidance rescale is 1.5"),
        ({"rescale": math.nan}, "guidance rescale is nan"),
    ],
)
def test_unusable_guidance_is_a_sentence(changed, words):
    with pytest.raises(LayerLoomError, match=words):
        StreamGuidance(**changed).check()
