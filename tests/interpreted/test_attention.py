"""The Triton attention kernel in Triton's interpreter against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    cases,
    layerflow_rgba,
    make_plan,
    oracle,
    oracle_bias,
    qkv,
    relative_error,
)
from hypothesis import HealthCheck, given, settings

from layerloom.kernels import (
    Segment,
    SegmentMask,
    SequenceLayout,
    blended_sees_all,
    list_backends,
    segment_attention,
    use_backend,
)
from layerloom.kernels.backends import triton as backend
from layerloom.kernels.backends.triton import attention as kernels
from layerloom.kernels.backends.triton.operators import segment_attention as operator
from layerloom.kernels.tables import run_table

# The interpreter needs milliseconds for every program and every block of keys.
FEW = settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# Accuracy a type allows, as for every backend; the interpreter truncates to bfloat16.
BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


def compare(layout, mask, head_dim: int, dtype: torch.dtype, heads: int = 2) -> None:
    q, k, v = qkv(layout, heads, head_dim, dtype)
    plan = make_plan(layout, mask, heads, head_dim, dtype)
    expected, expected_lse = oracle(q, k, v, oracle_bias(layout, mask), head_dim**-0.5)
    with use_backend("triton"):
        out, lse = segment_attention(q, k, v, plan, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, expected) <= BOUNDS[dtype]
    hidden = torch.isneginf(expected_lse)
    assert torch.equal(torch.isneginf(lse), hidden)
    assert out[hidden].abs().sum() == 0
    # The scores are exact products of rounded inputs: the log-sum-exp is as good as float32's.
    seen = expected_lse.masked_fill(hidden, 0.0)
    assert relative_error(lse.masked_fill(hidden, 0.0), seen) <= 2e-6


def test_the_backend_is_there():
    info = {info.name: info for info in list_backends()}["triton"]
    assert info.available, info.reason


@given(case=cases(most_tokens=900))
@FEW
def test_random_layouts_masks_biases_and_windows(case):
    compare(*case, head_dim=32, dtype=torch.float32, heads=1)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_types_and_head_sizes(dtype, head_dim):
    layout = layerflow_rgba(grid=(2, 4, 5), text=11)
    size = len(layout.segments)
    bias = [[0.5 * ((i + j) % 3) for j in range(size)] for i in range(size)]
    visibility = blended_sees_all(layout).visibility
    for mask in (None, SegmentMask(visibility), SegmentMask(visibility, bias, 1)):
        compare(layout, mask, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_configuration(monkeypatch, dtype):
    """The interpreter's own larger tiles are for speed; these are what a GPU runs."""
    config = kernels.config_for(64, (8, 0))
    monkeypatch.setattr(kernels, "CONFIG_INTERPRETED", config)
    lengths = (config.block_m + 1, 3, 2 * config.block_n, config.block_n - 1)
    layout = SequenceLayout([Segment(f"s{i}", "text", n) for i, n in enumerate(lengths)])
    visibility = [[(i + j) % 4 != 1 for j in range(4)] for i in range(4)]
    compare(layout, SegmentMask(visibility), 64, dtype, heads=1)


def test_views_of_a_packed_projection_are_read_in_place():
    layout = layerflow_rgba(grid=(1, 4, 4), text=5)
    packed = torch.randn(2, layout.length, 3, 2, 32)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    plan = make_plan(layout, blended_sees_all(layout), 2, 32)
    expected, _ = oracle(q, k, v, oracle_bias(layout, plan.mask), 0.3)
    with use_backend("triton"):
        out = segment_attention(q, k, v, plan, scale=0.3)
        # Not even the last stride has to be 1.
        spread = torch.stack([q, q], -1)[..., 0]
        again = segment_attention(spread, k, v, plan, scale=0.3)
    assert relative_error(out, expected) <= 1e-6 and torch.equal(out, again)
    assert out.transpose(1, 2).is_contiguous()


def test_large_scores_and_hidden_segments_give_no_nan():
    layout = SequenceLayout([Segment("a", "text", 70), Segment("b", "text", 130)])
    q, k, v = qkv(layout, 1, 32)
    mask = SegmentMask([[False, False], [True, True]], [[0, 0], [-80, 60]])
    plan = make_plan(layout, mask, 1, 32)
    expected, _ = oracle(q * 100, k, v, oracle_bias(layout, plan.mask), 1.0)
    with use_backend("triton"):
        out, lse = segment_attention(q * 100, k, v, plan, scale=1.0, return_lse=True)
    # Scores reach some thousands, where float32 is 1e-4 apart: so are the weights' exponents.
    assert relative_error(out, expected) <= 1e-4
    assert torch.isneginf(lse[..., :70]).all() and torch.isfinite(lse[..., 70:]).all()


def test_tables_hold_every_query_once_and_longest_first():
    layout = layerflow_rgba(grid=(3, 9, 17), text=26)
    plan = make_plan(layout, SegmentMask(blended_sees_all(layout).visibility, frame_window=1))
    table = run_table(plan, 64, torch.device("cpu"))
    rows, work = [], []
    for first, last, first_run, last_run in table.tiles.tolist():
        rows.extend(range(first, min(last, first + 64)))
        work.append(sum(stop - start for start, stop in table.runs[first_run:last_run].tolist()))
    assert sorted(rows) == list(range(layout.length))
    assert work == sorted(work, reverse=True)
    assert run_table(plan, 64, torch.device("cpu")) is table


def operands(requires_grad: bool = False):
    layout = layerflow_rgba(grid=(1, 2, 3), text=3)
    mask = SegmentMask(blended_sees_all(layout).visibility, [[0.1 * i] * 7 for i in range(7)])
    plan = make_plan(layout, mask, 2, 32)
    tensors = [x.requires_grad_(requires_grad) for x in qkv(layout, 2, 32)]
    return layout, plan, tensors, run_table(plan, 128, torch.device("cpu"))


def test_the_operator_is_well_made():
    for requires_grad in (False, True):
        _, _, tensors, table = operands(requires_grad)
        torch.library.opcheck(operator, (*tensors, *table, 0.2))


def test_gradients_equal_the_references():
    _, plan, tensors, _ = operands(requires_grad=True)
    weight = torch.linspace(-1, 1, tensors[0].numel()).view_as(tensors[0])
    gradients = {}
    for name in ("triton", "reference"):
        with use_backend(name):
            out, lse = segment_attention(*tensors, plan, return_lse=True)
        gradients[name] = torch.autograd.grad((out * weight).sum() + lse.sin().sum(), tensors)
    for ours, theirs in zip(*gradients.values(), strict=True):
        assert relative_error(ours, theirs.double()) <= 2e-6


def test_it_compiles_without_a_graph_break(monkeypatch):
    """Where the policy prefers it; on a CPU it never does, so the test says so in its place."""
    from layerloom.kernels import registry
    from layerloom.kernels.policy import Preference

    monkeypatch.setattr(registry, "preference", lambda *_: Preference(("triton",), "a test"))
    _, plan, tensors, _ = operands()
    expected = segment_attention(*tensors, plan)
    seen = []

    def watch(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(segment_attention, fullgraph=True, backend=watch)
    torch.testing.assert_close(compiled(*tensors, plan), expected, atol=1e-6, rtol=0)
    assert any("layerloom.segment_attention" in name for name in seen)
    torch.testing.assert_close(
        torch.compile(segment_attention, fullgraph=True, backend="aot_eager")(*tensors, plan),
        expected,
        atol=1e-6,
        rtol=0,
    )


def test_an_operator_registered_twice_still_works():
    """A ComfyUI with the package installed too loads this folder under two names."""
    import importlib.util
    import sys
    from pathlib import Path

    root = Path(backend.__file__).parents[3]
    spec = importlib.util.spec_from_file_location(
        "second_layerloom", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    second = importlib.util.module_from_spec(spec)
    sys.modules["second_layerloom"] = second
    spec.loader.exec_module(second)
    kernels_again = importlib.import_module("second_layerloom.kernels")
    _, plan, tensors, table = operands()
    with use_backend("triton"):
        before = segment_attention(*tensors, plan)
    layout, mask = plan.layout, plan.mask
    segments = [kernels_again.Segment(**vars(segment)) for segment in layout.segments]
    twin = kernels_again.plan_attention(
        kernels_again.SequenceLayout(segments),
        kernels_again.SegmentMask(mask.visibility, mask.bias),
        *(2, 32, torch.float32, "cpu"),
    )
    with kernels_again.use_backend("triton"):
        after = kernels_again.segment_attention(*tensors, twin)
    with use_backend("triton"):
        again = segment_attention(*tensors, plan)
    assert torch.equal(before, after) and torch.equal(before, again)
    assert math.isfinite(float(operator(*tensors, *table, 0.2)[0].sum()))
