"""Eight-bit attention of other packages: never chosen by itself, and trusted only after a check."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from attention_cases import layerflow_rgba, make_plan, oracle, oracle_bias, qkv, relative_error
from torch.nn import functional as F

from layerloom.kernels import (
    BackendUnavailableError,
    blended_sees_all,
    list_backends,
    segment_attention,
    use_backend,
)
from layerloom.kernels.backends import Request, quantized
from layerloom.kernels.policy import preference


def int8(x: torch.Tensor) -> torch.Tensor:
    """x rounded to eight bits a row, as the packages do with q and k."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def eight_bit(q, k, v, scale):
    return F.scaled_dot_product_attention(int8(q), int8(k), v, scale=scale)


@pytest.fixture
def operands():
    layout = layerflow_rgba(grid=(2, 4, 4), text=11)
    plan = make_plan(layout, blended_sees_all(layout), 2, 64)
    q, k, v = qkv(layout, 2, 64)
    return layout, plan, q, k, v


def test_eight_bits_pass_the_check_and_reach_the_result(operands, monkeypatch):
    layout, plan, q, k, v = operands
    module = types.ModuleType("sageattention")
    layouts = []

    def sageattn(q, k, v, tensor_layout, is_causal, sm_scale):
        layouts.append((tensor_layout, is_causal))
        return eight_bit(q, k, v, sm_scale)

    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    out, _ = quantized.SAGE.segment_attention(q, k, v, plan, 64**-0.5, False, None)
    expected, _ = oracle(q, k, v, oracle_bias(layout, plan.mask), 64**-0.5)
    error = relative_error(out, expected)
    assert 1e-4 < error < 0.02  # eight bits, and not torch's own attention
    # One call a stretch of queries: fg + alpha and background twice (their prompts lie apart),
    # blended with its prompt.
    assert set(layouts) == {("HND", False)} and len(layouts) == 6


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda q, k, v, scale: eight_bit(q, k, v, scale) * float("nan"), "not finite"),
        (lambda q, k, v, scale: eight_bit(q, k, v, scale * 3), "strays from exact attention by"),
        (lambda q, k, v, scale: eight_bit(q, k, v, scale).roll(1, 2), "strays"),
    ],
)
def test_a_wrong_result_is_told_once_and_never_used(operands, caplog, fault, told):
    _, _, q, k, v = operands
    checked = quantized.SelfChecked("sage", fault)
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.2)
    with caplog.at_level(logging.WARNING, logger="layerloom.kernels"):
        for _ in range(3):
            assert torch.equal(checked(q, k, v, 0.2), exact)
    assert len(caplog.records) == 1 and told in caplog.text


def test_checks_end_with_the_first_step(operands):
    _, _, q, k, v = operands
    checked = quantized.SelfChecked("sage", lambda q, k, v, scale: torch.zeros_like(q))
    checked.calls = quantized.CHECKED_CALLS
    assert not checked(q, k, v, 0.2).any()


def test_they_run_only_where_they_are_named(operands):
    _, plan, q, k, v = operands
    infos = {info.name: info for info in list_backends()}
    for name in ("sage", "int8"):
        assert infos[name].approximate
        for dtype in (torch.float16, torch.float32):
            order = preference(plan, Request(torch.device("cuda"), dtype, 64)).order
            assert name not in order
        if not infos[name].available:
            assert "not installed (pip install" in infos[name].reason or (
                infos[name].reason == "there is no CUDA device"
            )
            with use_backend(name), pytest.raises(BackendUnavailableError, match=f"{name}: "):
                segment_attention(q, k, v, plan)
