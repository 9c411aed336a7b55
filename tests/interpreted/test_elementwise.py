"""The element-wise Triton kernels in Triton's interpreter against their formulas in float64."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.library import opcheck

from layerloom.engine.models.layered_transformer import LayeredTransformer, LayerSegment
from layerloom.kernels import adaln_modulate, gated_residual, qk_norm
from layerloom.kernels.backends.triton import elementwise_operators as operators

# Accuracy a type allows; the interpreter truncates to bfloat16 instead of rounding.
BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}
DTYPES = list(BOUNDS)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


def layer_norm(x, weight, bias, eps):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight.double()
    return out if bias is None else out + bias.double()


def by_token(rows: torch.Tensor, runs: list[int]) -> torch.Tensor:
    triples = zip(runs[::3], runs[1::3], runs[2::3], strict=True)
    index = torch.cat([torch.full((b - a,), row) for a, b, row in triples])
    return rows.double()[:, index]


class Random:
    """Seeded tensors and runs."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def runs(self, tokens: int, rows: int) -> list[int]:
        """Up to five stretches, empty ones among them."""
        cuts = sorted(self.number(0, tokens) for _ in range(self.number(0, 4)))
        bounds = [0, *cuts, tokens]
        return [
            number
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
            for number in (start, stop, self.number(0, rows - 1))
        ]


def heads_case(random: Random, head_dim: int):
    """q and k as views of projections [B, N, H * D]."""
    batch, heads = random.number(1, 2), random.number(1, 3)
    lengths = random.number(1, 150), random.number(1, 150)
    q, k = (
        (random(batch, n, heads * head_dim) * 3 + 1).unflatten(-1, (heads, -1)).transpose(1, 2)
        for n in lengths
    )
    return q, k, random(head_dim), random(head_dim), random(head_dim), random(head_dim)


def tokens_case(random: Random, channels: int):
    batch, tokens, rows = random.number(1, 2), random.number(1, 70), random.number(1, 3)
    x, y = random(batch, tokens, channels) * 3 + 1, random(batch, tokens, channels)
    # As the transformer makes them: shift, scale and gate are views of one projection.
    shift, scale, gate = random(batch, rows, 3, channels).unbind(2)
    return x, y, shift, scale, gate, random.runs(tokens, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_qk_layer_norm_equals_its_formula(head_dim, dtype):
    for seed in range(3):
        q, k, *parameters = heads_case(Random(seed, dtype), head_dim)
        if seed == 1:
            parameters[1] = parameters[3] = None
        if seed == 2:
            parameters = [None] * 4
        outs = operators.qk_layer_norm(q, k, *parameters, 1e-6)
        for x, out, weight, bias in ((q, outs[0], *parameters[:2]), (k, outs[1], *parameters[2:])):
            assert out.is_contiguous() and out.dtype == dtype
            assert relative_error(out, layer_norm(x, weight, bias, 1e-6)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 24, 1920])
def test_adaln_and_gate_equal_their_formulas(channels, dtype):
    for seed in range(4):
        random = Random(seed, dtype)
        x, y, shift, scale, gate, runs = tokens_case(random, channels)
        weight, bias = (None, None) if seed == 1 else (random(channels), random(channels))
        bias = None if seed == 2 else bias
        if seed == 3:
            # Every other token of a longer sequence, and parameters in float32.
            x = x.repeat_interleave(2, 1)[:, ::2]
            shift, scale, gate, weight = shift.float(), scale.float(), gate.float(), weight.float()
        out = operators.adaln_modulate(x, weight, bias, shift, scale, runs, 1e-5)
        expected = layer_norm(x, weight, bias, 1e-5) * (1 + by_token(scale, runs))
        assert out.is_contiguous() and out.dtype == dtype
        assert relative_error(out, expected + by_token(shift, runs)) <= BOUNDS[dtype]

        expected = x.double() + by_token(gate, runs) * y.double()
        total = operators.gated_residual(x, y, gate, runs)
        assert relative_error(total, expected) <= BOUNDS[dtype]
        operators.gated_residual_(x, y, gate, runs)
        assert torch.equal(y, total)


def test_empty_tensors_and_a_row_shared_by_the_batch():
    random = Random(0, torch.float32)
    x, row = random(2, 5, 16), random(1, 1, 16)
    out = operators.adaln_modulate(x, None, None, row, row, [0, 5, 0], 1e-5)
    assert relative_error(out, layer_norm(x, None, None, 1e-5) * (1 + row.double()) + row) <= 1e-6
    out = operators.gated_residual(x, x, row, [0, 5, 0])
    assert relative_error(out, x * (1 + row.double())) <= 1e-6
    assert operators.gated_residual(x[:, :0], x[:, :0], row, [0, 0, 0]).shape == (2, 0, 16)
    q = random(2, 3, 0, 32)
    assert operators.qk_layer_norm(q, q, None, None, None, None, 1e-6)[1].shape == q.shape


def operator_cases(grad: bool):
    random = Random(3, torch.float32)
    q, k, *parameters = (x.requires_grad_(grad) for x in heads_case(random, 32))
    x, y, shift, scale, gate, runs = tokens_case(random, 24)
    x, y, shift, scale, gate = (t.detach().requires_grad_(grad) for t in (x, y, shift, scale, gate))
    weight, bias = random(24).requires_grad_(grad), random(24).requires_grad_(grad)
    return {
        operators.qk_layer_norm: (q, k, *parameters, 1e-6),
        operators.adaln_modulate: (x, weight, bias, shift, scale, runs, 1e-5),
        operators.gated_residual: (x, y, gate, runs),
    }


@pytest.mark.parametrize("grad", [False, True])
def test_operators_pass_opcheck(grad):
    for operator, arguments in operator_cases(grad).items():
        opcheck(operator, arguments)
    if not grad:
        opcheck(operators.gated_residual_, operator_cases(False)[operators.gated_residual])


def formulas(operator, arguments):
    """The operator written in torch, differentiable."""
    if operator is operators.qk_layer_norm:
        q, k, *parameters, eps = arguments
        return layer_norm(q, *parameters[:2], eps), layer_norm(k, *parameters[2:], eps)
    if operator is operators.adaln_modulate:
        x, weight, bias, shift, scale, runs, eps = arguments
        normed = layer_norm(x, weight, bias, eps)
        return (normed * (1 + by_token(scale, runs)) + by_token(shift, runs),)
    x, y, gate, runs = arguments
    return (x.double() + by_token(gate, runs) * y.double(),)


def test_gradients_equal_those_of_the_formulas():
    for operator, arguments in operator_cases(True).items():
        outs = operator(*arguments)
        outs = outs if isinstance(outs, tuple) else (outs,)
        expected = formulas(operator, arguments)
        cotangents = [torch.randn_like(out) for out in outs]
        inputs = [x for x in arguments if isinstance(x, torch.Tensor)]
        wanted = torch.autograd.grad(expected, inputs, [c.double() for c in cotangents])
        got = torch.autograd.grad(outs, inputs, cotangents)
        for ours, theirs in zip(got, wanted, strict=True):
            assert relative_error(ours, theirs.double()) <= 1e-5


def test_operators_compile_without_a_graph_break():
    def block(x, weight, bias, shift, scale, runs, q, k):
        q, k = operators.qk_layer_norm(q, k, None, None, None, None, 1e-6)
        h = operators.adaln_modulate(x, weight, bias, shift, scale, runs, 1e-5)
        return operators.gated_residual(x, h, scale, runs).sum() + (q.sum(2) * k.sum(2)).sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for grad in (False, True):
        cases = operator_cases(grad)
        q, k, *_ = cases[operators.qk_layer_norm]
        *inputs, _ = cases[operators.adaln_modulate]
        out, expected = compiled(*inputs, q, k), block(*inputs, q, k)
        torch.testing.assert_close(out, expected)
        if grad:
            wanted = torch.autograd.grad(expected, (inputs[0], q))
            torch.testing.assert_close(torch.autograd.grad(out, (inputs[0], q)), wanted)


def spy(monkeypatch) -> list[str]:
    """The operators that the public functions go on to call."""
    called = []

    def wrap(name, operator):
        def call(*arguments):
            called.append(name)
            return operator(*arguments)

        return call

    for name in ("qk_layer_norm", "adaln_modulate", "gated_residual_"):
        monkeypatch.setattr(operators, name, wrap(name, getattr(operators, name)))
    return called


def test_public_functions_take_the_kernels_where_they_fit(monkeypatch):
    called = spy(monkeypatch)
    random = Random(5, torch.bfloat16)
    q, k, *parameters = heads_case(random, 64)
    x, y, shift, scale, gate, runs = tokens_case(random, 32)
    runs = tuple(zip(runs[::3], runs[1::3], runs[2::3], strict=True))
    out = qk_norm(q, k, *parameters)[0]
    assert relative_error(out, layer_norm(q, *parameters[:2], 1e-6)) <= 8e-3
    adaln_modulate(x, None, None, shift, scale, runs)
    assert gated_residual(x, y, gate, runs) is y
    assert called == ["qk_layer_norm", "adaln_modulate", "gated_residual_"]

    # Autograd, float64, a width or an address that is no multiple of 16, a result that would not
    # be contiguous, automatic casts: plain torch.
    called.clear()
    qk_norm(q.requires_grad_(), k, *parameters)
    with torch.no_grad():
        qk_norm(q[..., :24], k[..., :24], None, None, None, None)
        qk_norm(q.double(), k.double(), None, None, None, None)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
        adaln_modulate(shifted, None, None, shift, scale, runs)
        narrow = [t[..., :24].contiguous() for t in (x, shift, scale)]
        adaln_modulate(narrow[0], None, None, *narrow[1:], runs)
        gated_residual(x, y.transpose(0, 1).contiguous().transpose(0, 1), gate, runs)
        with torch.autocast("cpu", torch.bfloat16):
            adaln_modulate(x, None, None, shift, scale, runs)
    assert not called


def test_the_layered_transformer_uses_them(monkeypatch):
    called = spy(monkeypatch)
    torch.manual_seed(0)
    model = LayeredTransformer(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=16,
    )
    inputs = (
        torch.randn(1, 2, 4, 4, 4),
        torch.tensor([500]),
        torch.randn(1, 1, 3, 16),
        (LayerSegment("foreground", 2),),
    )
    with torch.no_grad():
        out = model(*inputs)
    block = ["adaln_modulate", "qk_layer_norm", "gated_residual_", "adaln_modulate"]
    assert called == [*block, "gated_residual_"]
    torch.testing.assert_close(out, model(*inputs), atol=1e-5, rtol=1e-5)

    class HostNorm(nn.LayerNorm):
        """A host's layer: what it does in `forward` is its own business."""

    called.clear()
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = HostNorm
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), out, atol=1e-5, rtol=1e-5)
    assert called == ["gated_residual_"] * 2


def test_a_second_copy_of_the_package_registers_its_operators(monkeypatch):
    names = ("qk_layer_norm", "adaln_modulate", "gated_residual")
    cases = operator_cases(True)
    expected = {name: getattr(operators, name)(*cases[getattr(operators, name)]) for name in names}
    root = Path(importlib.import_module("layerloom").__file__).parent
    name = "the_package_by_another_name"
    spec = importlib.util.spec_from_file_location(
        name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, package)
    spec.loader.exec_module(package)
    second = importlib.import_module(f"{name}.{operators.__name__.partition('.')[2]}")
    assert second is not operators
    for name in names:
        arguments = cases[getattr(operators, name)]
        # To torch a second registration replaces the first, whose handles then dangle.
        for copy in (operators, second):
            out = getattr(copy, name)(*arguments)
            torch.testing.assert_close(out, expected[name])
            outs = out if isinstance(out, tuple) else (out,)
            sum(part.sum() for part in outs).backward()
    opcheck(second.gated_residual, operator_cases(False)[operators.gated_residual])
