"""AdaLN, gates and q/k LayerNorm by segment against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from layerloom.kernels import adaln_modulate, gated_residual, modulate, qk_norm

pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")


def modulation_case(rows: int, seed: int, grad: bool, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, 7, 8, 20, 33][: rows + 2]
    runs = tuple(
        (a, b, (i * 2) % rows) for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    )
    shapes = {
        "x": (2, bounds[-1], 16),
        "y": (2, bounds[-1], 16),
        "weight": (16,),
        "bias": (16,),
        "shift": (2, rows, 16),
        "scale": (2, rows, 16),
    }
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)
        for name, shape in shapes.items()
    }
    index = torch.cat([torch.full((b - a,), row) for a, b, row in runs])
    return tensors, runs, index


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_adaln_and_gate_equal_their_formulas(rows, grad):
    t, runs, index = modulation_case(rows, seed=rows, grad=grad)
    if rows == 1:
        runs = ((0, t["x"].shape[1], 0),)
    normed = F.layer_norm(t["x"], (16,), t["weight"], t["bias"], 1e-5)
    expected = normed * (1 + t["scale"][:, index]) + t["shift"][:, index]
    before = t["x"].detach().clone()
    out = adaln_modulate(t["x"], t["weight"], t["bias"], t["shift"], t["scale"], runs, eps=1e-5)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    expected_sum = t["x"] + t["scale"][:, index] * t["y"]
    if grad:
        used = [t[name] for name in ("x", "weight", "bias", "shift", "scale")]
        cotangent = torch.randn_like(out)
        for got, wanted in zip(
            torch.autograd.grad(out, used, cotangent),
            torch.autograd.grad(expected, used, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        consumed = normed.detach().clone()
        assert torch.equal(modulate(consumed, t["shift"], t["scale"], runs), out)
    total = gated_residual(t["x"], t["y"], t["scale"], runs)
    torch.testing.assert_close(total, expected_sum, atol=1e-12, rtol=1e-12)
    assert torch.equal(t["x"], before)
    if grad:
        used = [t[name] for name in ("x", "y", "scale")]
        for got, wanted in zip(
            torch.autograd.grad(total, used, cotangent),
            torch.autograd.grad(expected_sum, used, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def test_modulation_path_makes_no_concatenation_and_no_gather_without_autograd():
    t, runs, _ = modulation_case(3, seed=0, grad=True, dtype=torch.float32)
    with torch.profiler.profile() as profile, torch.no_grad():
        h = adaln_modulate(t["x"], t["weight"], t["bias"], t["shift"], t["scale"], runs)
        gated_residual(t["x"], h, t["scale"], runs)
        gated_residual(t["x"], h.bfloat16(), t["scale"], runs)
    names = {event.name for event in profile.events()}
    assert "aten::native_layer_norm" in names
    assert not names & {"aten::cat", "aten::index", "aten::index_select", "aten::gather"}


def test_gated_residual_promotes_as_addition_does():
    x, y, gate = torch.randn(1, 4, 8), torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 2, 8)
    runs = ((0, 1, 0), (1, 4, 1))
    expected = x + gate[:, torch.tensor([0, 1, 1, 1])] * y
    torch.testing.assert_close(gated_residual(x, y, gate, runs), expected)


def test_runs_that_leave_tokens_out_are_refused():
    x, rows = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8)
    for runs in ((), ((0, 3, 0),), ((0, 2, 0), (3, 4, 1)), ((1, 4, 0),)):
        with pytest.raises(ValueError, match="do not cover 4 tokens"):
            adaln_modulate(x, None, None, rows, rows, runs)
        with pytest.raises(ValueError, match="do not cover 4 tokens"):
            gated_residual(x, x, rows, runs)


def test_qk_norm_is_layer_norm_over_the_head_size():
    q, k = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).unbind(0)
    weights = torch.randn(4, 8, dtype=torch.float64).unbind(0)
    outs = qk_norm(q, k, *weights, eps=1e-6)
    for x, out, weight, bias in ((q, outs[0], *weights[:2]), (k, outs[1], *weights[2:])):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        expected = centred / (variance + 1e-6).sqrt() * weight + bias
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
