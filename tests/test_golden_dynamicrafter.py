"""The video UNet's golden numbers, DynamiCrafter's through the official-format loader."""

import pytest
import torch

from layerloom.engine.checkpoints.golden import load_case, runners
from layerloom.engine.checkpoints.golden_dynamicrafter import official_networks, predict, whole
from layerloom.engine.models.video_blocks import CrossAttention, TemporalConvolution

CASES = {
    "dc_unet_512like_c32": 4,
    "dc_unet_256like_c32": 1,
    "dc_unet_256like_eps": 1,
    "dc_ckpt_tiny_512like": 4,
    "dc_ckpt_tiny_256like": 2,
    "dc_resampler": 2,
    # The same network with motion modules.
    "fyc_unet_c32": 3,
    "fyc_unet_eps": 2,
    "fyc_unet_tiny_stored": 1,
    "fyc_schedule": 18,
    "fyc_sample": 5,
}


def run(folder, name):
    known = runners()
    prefix = max((p for p in known if name.startswith(p)), key=len)
    return list(known[prefix](load_case(folder, name)))


@pytest.mark.parametrize("name", CASES)
def test_the_official_numbers_come_out(golden_dir, name):
    results = run(golden_dir, name)
    assert [r.case for r in results if not r.passed] == [] and len(results) == CASES[name]
    # Forwards at released group sizes stay within six times the official code's own rounding.
    assert all(r.max_error <= r.strict for r in results if r.strict is not None)


def changed(networks, detail):
    """The networks with one detail wrong."""
    for module in networks.unet.modules():
        if detail == "gate" and isinstance(module, CrossAttention):
            module.alpha.data.zero_()
        if detail == "temporal convolution" and isinstance(module, TemporalConvolution):
            module.conv4[3].weight.data.zero_()
        if detail.startswith("eps") and isinstance(module, torch.nn.GroupNorm):
            transformer = module.eps < 5e-6
            if transformer == (detail == "eps of transformers"):
                module.eps = 1.1e-5 if transformer else 1e-6
    return networks


@pytest.mark.parametrize(
    "detail", ["gate", "temporal convolution", "eps of transformers", "eps of residual blocks"]
)
def test_the_cases_notice_a_wrong_detail(golden_dir, detail):
    """In the case made for it every eps matters; what is off is far outside the tolerance."""
    case = load_case(golden_dir, "dc_unet_256like_eps")
    network = changed(official_networks(case), detail).unet
    given = [case.tensors[f"in.t16.{name}"] for name in ("x", "timesteps", "context", "fs")]
    error = (predict(network, *given) - case.tensors["out.t16.y"]).abs().max()
    assert error > 100 * case.tolerance("out.t16.y")[0]


@pytest.mark.parametrize("name", ["dc_ckpt_tiny_512like", "dc_ckpt_tiny_256like"])
def test_the_tiny_checkpoints_are_held_to_their_rounding(golden_dir, name):
    """Their allowance is wider than the file's tolerance: it must still catch another network."""
    case = load_case(golden_dir, name)
    networks = official_networks(case)
    _, made = whole(networks, case.tensors, torch.float32)
    _, exact = whole(networks.double(), case.tensors, torch.float64)
    allowance = 6 * float((made - exact).abs().max())
    # Of what lies between float64 and the file, this processor has no part.
    distance = (exact - case.tensors["out.y"]).abs()
    assert distance.max() < 1.5e-3 and distance.median() < 2.5e-5
    wrong = changed(networks, "eps of residual blocks")
    error = (whole(wrong, case.tensors, torch.float64)[1] - case.tensors["out.y"]).abs().max()
    assert error > 2 * allowance
