"""LayerFlow's golden numbers, reached through the official-format loader and the real network."""

import json
import shutil

import pytest
import torch

from layerloom.engine.checkpoints.golden import load_case, recipe_weights, run_cases
from layerloom.engine.checkpoints.golden_layerflow import layout_of, official_state
from layerloom.engine.checkpoints.load import load_transformer, open_checkpoint
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.layered_transformer import LayerSegment

FORWARDS = {
    "lf_dit_rgba_gen": 2,
    "lf_dit_rgba_cond": 4,
    "lf_dit_rgba_seg": 2,
    "lf_dit_rgb": 5,
    "lf_dit_rgb_seg": 1,
    "lf_dit_rgb_eps": 1,
}


@pytest.fixture(scope="module")
def results(golden_dir):
    return run_cases(golden_dir, pattern="lf_*")


def test_every_layerflow_case_passes_its_tolerance(results):
    failed = [result for result in results if result.case.startswith("lf_") and not result.passed]
    assert not failed
    for name, runs in FORWARDS.items():
        found = [r for r in results if r.case.split()[0] == name and "@scale" in r.case]
        assert len(found) == runs, name
    # Timesteps, denoised steps, states and the final latents of both trajectories.
    assert sum(result.case.startswith("lf_sample_") for result in results) == 8
    assert any(result.case.startswith("lf_schedule ") for result in results)


def test_forwards_stay_within_rounding_of_the_official_code(results):
    strict = [result for result in results if result.strict is not None]
    assert len(strict) == sum(FORWARDS.values())
    # The cases' own measure: six times the official float32 run's distance to float64.
    assert [r.case for r in strict if not r.max_error <= r.strict] == []


def test_trajectories_stay_close_to_their_conditioning(results):
    # The cases' tolerance of 1e-3 also admits a wrong schedule; a perturbation of 1e-6 moves the
    # result by 7e-6, so 1e-4 separates rounding from another formula.
    runs = [r for r in results if r.case.startswith("lf_sample_")]
    assert runs and max(result.max_error for result in runs) < 1e-4


@pytest.mark.parametrize("change", ["motion", "content", "prompts"])
def test_the_cases_notice_a_wrong_detail(golden_dir, tmp_path, change):
    """The same official weights in a SAT pickle, one detail wrong: far outside the tolerance."""
    case = load_case(golden_dir, "lf_dit_rgba_gen")
    path = tmp_path / "weights.bin"
    torch.save({"module": official_state(case)}, path)
    strengths = {"motion": 0.0, "content": 1.0}
    text = case.tensors["in.gen@scale0.context"][None]
    if change == "prompts":
        text = text.flip(1)
    else:
        strengths[change] = 1.0 - strengths[change]
    checkpoint = open_checkpoint(path, layout_of(case))
    error = {}
    for name, wanted in (("right", {"motion": 0.0, "content": 1.0}), ("wrong", strengths)):
        network = load_transformer(checkpoint, adapters=wanted)
        fed = case.tensors["in.gen@scale0.context"][None] if name == "right" else text
        with torch.no_grad():
            v = network(
                case.tensors["in.gen@scale0.x"],
                case.tensors["in.gen@scale0.timesteps"],
                fed,
                [LayerSegment("all", 16)],
            )
        error[name] = float((v - case.tensors["out.gen@scale0.y"]).abs().max())
    tolerance, strict = case.tolerance("out.gen@scale0.y")
    assert error["right"] <= strict
    assert error["wrong"] > 100 * tolerance


def test_a_changed_recipe_is_refused(golden_dir):
    recipe = json.loads((golden_dir / "lf_dit_rgb_eps.json").read_text())["weight_recipe"]
    assert sum(array.size for array in recipe_weights(recipe).values()) == recipe["n_params"]
    with pytest.raises(LayerLoomError, match="checksum"):
        recipe_weights({**recipe, "seed": "another"})


def test_a_wrong_case_fails_and_an_unknown_one_is_skipped(golden_dir, tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(golden_dir / f"lf_dit_rgb_eps{suffix}", tmp_path / f"lf_dit_rgb_eps{suffix}")
    description = json.loads((tmp_path / "lf_dit_rgb_eps.json").read_text())
    description["weight_recipe"]["seed"] = "another"
    (tmp_path / "lf_dit_rgb_eps.json").write_text(json.dumps(description))
    (tmp_path / "zz_other.json").write_text("{}")
    (tmp_path / "lf_dit_lone.json").write_text("{}")
    found = {result.case: result for result in run_cases(tmp_path)}
    assert found["lf_dit_rgb_eps"].passed is False
    assert found["lf_dit_lone"].passed is False and "cannot be read" in found["lf_dit_lone"].note
    assert found["zz_other"].passed is None and "zz_" in found["zz_other"].note


def test_a_folder_without_cases_is_one_sentence(tmp_path):
    with pytest.raises(LayerLoomError, match="no golden cases"):
        run_cases(tmp_path)
    with pytest.raises(LayerLoomError, match="no folder"):
        run_cases(tmp_path / "absent")
