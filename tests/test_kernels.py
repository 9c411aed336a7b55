"""Segment attention and its neighbours against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    LAYERS,
    QUICK,
    cases,
    layerflow_rgba,
    layouts,
    make_plan,
    oracle,
    oracle_bias,
    qkv,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from layerloom.kernels import (
    BackendUnavailableError,
    Segment,
    SegmentMask,
    SequenceLayout,
    adaln_modulate,
    blended_sees_all,
    full,
    gated_residual,
    layer_isolated,
    list_backends,
    merge_attention_states,
    plan_attention,
    prompt_isolated,
    qk_norm,
    segment_attention,
    use_backend,
)
from layerloom.kernels.backends import Constraints, Request

BACKENDS = ("dispatch", "reference")
pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@QUICK
def test_attention_agrees_with_the_dense_oracle(backend, case):
    layout, mask = case
    q, k, v = qkv(layout)
    plan = make_plan(layout, mask)
    bias = oracle_bias(layout, mask)
    expected, expected_lse = oracle(q, k, v, bias, 8**-0.5)
    with use_backend(backend):
        out = segment_attention(q, k, v, plan)
        again, lse = segment_attention(q, k, v, plan, return_lse=True)
    # Rounded scores cost more the longer the sequence is (the largest score grows), and by how much
    # depends on the processor: the allowance is six times what the formula itself loses in float32,
    # the golden cases' factor, and at least some ten float32 roundings.
    plain, _ = oracle(q, k, v, bias, 8**-0.5, torch.float32)
    bound = max(1e-6, 6 * relative_error(plain, expected))
    assert bound < 2e-5
    assert relative_error(out, expected) <= bound
    assert relative_error(again, expected) <= bound
    hidden = torch.isneginf(expected_lse)
    assert torch.equal(torch.isneginf(lse), hidden)
    seen = expected_lse.masked_fill(hidden, 0.0)
    assert relative_error(lse.masked_fill(hidden, 0.0), seen) <= 1e-6
    assert out[hidden].abs().sum() == 0


@given(case=cases(most_tokens=600))
@settings(QUICK, max_examples=30)
def test_plan_covers_every_query_once_and_counts_the_visible_pairs(case):
    layout, mask = case
    plan = make_plan(layout, mask)
    expected = oracle_bias(layout, mask)
    queries = sorted(stretch for group in plan.groups for stretch in group.queries)
    assert queries[0][0] == 0 and queries[-1][1] == layout.length
    assert all(a[1] == b[0] for a, b in zip(queries[:-1], queries[1:], strict=True))
    visible = (~torch.isneginf(expected)).double().mean().item()
    assert plan.flop_fraction == pytest.approx(visible, abs=1e-12)
    assert torch.equal(plan.to_dense_mask(dtype=torch.float64), expected)
    assert hash(plan) == hash(make_plan(layout, mask)) and plan == make_plan(layout, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(most_tokens=200))
@settings(QUICK, max_examples=15)
def test_gradients_agree_with_the_dense_oracle(backend, case):
    layout, mask = case
    inputs = [x.requires_grad_() for x in qkv(layout, dtype=torch.float64)]
    expected, expected_lse = oracle(*inputs, oracle_bias(layout, mask), 8**-0.5)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    # Only rows that see something have a log-sum-exp to differentiate.
    seen = ~torch.isneginf(expected_lse)
    visible = oracle_bias(layout, mask).exp().sum(-1) > 0
    if not visible.all():
        # The softmax of a row of -inf has NaN gradients in the oracle: leave such rows out of it.
        bias = oracle_bias(layout, mask)[visible]
        expected, lse_rows = oracle(inputs[0][:, :, visible], *inputs[1:], bias, 8**-0.5)
        loss = (expected * weight[:, :, visible]).sum() + lse_rows.sum()
    else:
        loss = (expected * weight).sum() + expected_lse.sum()
    if not visible.any():
        return
    wanted = torch.autograd.grad(loss, inputs)
    with use_backend(backend):
        plain = segment_attention(*inputs, make_plan(layout, mask))
        out, lse = segment_attention(*inputs, make_plan(layout, mask), return_lse=True)
    torch.testing.assert_close(plain, out, atol=1e-12, rtol=0)
    got = torch.autograd.grad((out * weight).sum() + lse[seen].sum(), inputs)
    for value, reference in zip(got, wanted, strict=True):
        assert relative_error(value, reference) <= 1e-10
    only_out = torch.autograd.grad((plain * weight).sum(), inputs, retain_graph=True)
    assert all(torch.isfinite(value).all() for value in only_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-4), (torch.bfloat16, 8e-3)])
def test_half_precision_stays_within_its_rounding(backend, dtype, bound):
    # Bounds of the project: half a unit in the last place of the type, with room for the sums.
    layout = layerflow_rgba(grid=(2, 4, 4), text=11)
    visibility = blended_sees_all(layout).visibility
    size = len(layout.segments)
    bias = [[0.5 if (i + j) % 2 else 0.0 for j in range(size)] for i in range(size)]
    for mask in (None, SegmentMask(visibility), SegmentMask(visibility, bias, 2)):
        q, k, v = qkv(layout, head_dim=64, dtype=dtype)
        plan = make_plan(layout, mask, head_dim=64, dtype=dtype)
        expected, _ = oracle(q, k, v, oracle_bias(layout, mask), 64**-0.5)
        with use_backend(backend):
            out = segment_attention(q, k, v, plan)
        assert out.dtype == dtype
        assert relative_error(out, expected) <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cuda_agrees_with_the_dense_oracle(dtype):
    device = torch.device("cuda")
    layout = layerflow_rgba(grid=(2, 4, 4), text=11)
    size = len(layout.segments)
    bias = [[0.5 * ((i + j) % 3) for j in range(size)] for i in range(size)]
    mask = SegmentMask(blended_sees_all(layout).visibility, bias, 2)
    q, k, v = (x.to(device) for x in qkv(layout, head_dim=64, dtype=dtype))
    plan = plan_attention(layout, mask, 2, 64, dtype, device)
    dense = oracle_bias(layout, mask).to(device)
    expected, expected_lse = oracle(q, k, v, dense, 64**-0.5)
    out, lse = segment_attention(q, k, v, plan, return_lse=True)
    plain = segment_attention(q, k, v, plan)
    # Rounding of the type; merged states are rounded once more.
    bound = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    assert relative_error(out, expected) <= bound and relative_error(plain, expected) <= bound
    assert relative_error(lse, expected_lse) <= bound


def test_hosts_attention_is_called_on_slices_only_and_used():
    layout = layerflow_rgba(grid=(2, 4, 4), text=11)
    q, k, v = qkv(layout)
    calls = []

    def host(q, k, v, scale):
        calls.append((q.shape[2], k.shape[2], q._base is not None))
        return F.scaled_dot_product_attention(q, k, v, scale=scale) * 2

    for mask in (None, full(layout), blended_sees_all(layout)):
        plan = make_plan(layout, mask)
        calls.clear()
        doubled = segment_attention(q, k, v, plan, scale=0.3, attention=host)
        expected, _ = oracle(q, k, v, oracle_bias(layout, mask), 0.3)
        assert relative_error(doubled, 2 * expected) <= 2e-6
        pairs = sum(queries * keys for queries, keys, _ in calls)
        assert pairs == round(plan.flop_fraction * layout.length**2)
        assert all(is_view for *_, is_view in calls)


def test_no_dense_mask_is_allocated():
    layout = SequenceLayout([Segment(f"s{i}", "text", 256) for i in range(4)])
    visibility = [[i >= j for j in range(4)] for i in range(4)]
    bias = [[0.1 * (i + j) for j in range(4)] for i in range(4)]
    q, k, v = qkv(layout, heads=1, head_dim=8)
    plan = make_plan(layout, SegmentMask(visibility, bias), heads=1)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        segment_attention(q, k, v, plan)
    largest = max(event.cpu_memory_usage for event in profile.events())
    # An N x N float32 mask would be 4 MiB; every tensor here holds 1,024 x 8 x 2 numbers or less.
    assert largest < 2**20


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    empty=st.booleans(),
)
@settings(QUICK, max_examples=30)
def test_merging_partial_attention_equals_attention_over_all_keys(sizes, seed, empty):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, 5, 8, generator=generator)
    k, v = torch.randn(2, 2, 3, sum(sizes), 8, generator=generator).unbind(0)
    states = []
    for keys, values in zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True):
        out, lse = oracle(q, keys, values, 0.0, 1.0)
        states.append((out.float(), lse.float()))
    if empty:
        states.insert(0, (torch.zeros(2, 3, 5, 8), torch.full((2, 3, 5), -math.inf)))
    out, lse = merge_attention_states(*zip(*states, strict=True))
    expected, expected_lse = oracle(q, k, v, 0.0, 1.0)
    assert relative_error(out, expected) <= 1e-6
    assert relative_error(lse, expected_lse) <= 1e-6


def test_merging_only_empty_states_gives_zero_and_minus_infinity():
    empty = torch.full((1, 1, 2), -math.inf)
    out, lse = merge_attention_states([torch.zeros(1, 1, 2, 4)] * 2, [empty] * 2)
    assert torch.equal(out, torch.zeros(1, 1, 2, 4)) and torch.isneginf(lse).all()
    with pytest.raises(ValueError, match="one lse an output"):
        merge_attention_states([], [])


@given(layout=layouts(), grad=st.booleans())
@settings(QUICK, max_examples=30)
def test_pack_and_split_are_inverse_and_differentiable(layout, grad):
    parts = [torch.randn(2, s.length, 3, requires_grad=grad) for s in layout.segments]
    packed = layout.pack(parts)
    assert torch.equal(packed, torch.cat(parts, dim=1))
    pieces = layout.split(packed)
    assert all(torch.equal(a, b) for a, b in zip(pieces, parts, strict=True))
    assert all(
        piece.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        for piece in pieces
    )
    if grad:
        (packed * 3).sum().backward()
        assert all(torch.equal(part.grad, torch.full_like(part, 3)) for part in parts)
    for segment, piece in zip(layout.segments, pieces, strict=True):
        assert torch.equal(packed[:, layout.slice(segment.name)], piece)
    assert torch.bincount(layout.segment_ids()).tolist() == [s.length for s in layout.segments]


def test_runs_merge_neighbours_with_one_row():
    layout = layerflow_rgba(grid=(4, 30, 45), text=226)
    assert layout.cu_seqlens == (0, 226, 452, 678, 6078, 11478, 16878, 22278)
    assert layout.runs(lambda s: int(s.kind == "video")) == ((0, 678, 0), (678, 22278, 1))
    assert len(layout.runs(lambda s: layout.segments.index(s))) == 7


def sees(layout: SequenceLayout, mask: SegmentMask) -> dict[str, set[str]]:
    names = [segment.name for segment in layout.segments]
    return {
        query: {key for key, visible in zip(names, row, strict=True) if visible}
        for query, row in zip(names, mask.visibility, strict=True)
    }


def test_presets_leave_the_promised_share_of_the_work():
    layout = layerflow_rgba(grid=(4, 30, 45), text=226)
    assert layout.length == 22_278  # LayerFlow's RGBA sequence
    share = {}
    for preset in (full, prompt_isolated, layer_isolated, blended_sees_all):
        plan = make_plan(layout, preset(layout), heads=30, head_dim=64)
        share[preset] = plan.flop_fraction
    assert share[full] == 1
    # Four equal layers: (2 + 2 + 1 + 4) / 16 of the pairs.
    assert share[blended_sees_all] == pytest.approx(0.5625, abs=0.005)
    assert share[layer_isolated] == pytest.approx(0.25, abs=0.005)
    # A video token misses two of the three prompts: 452 of 22,278 keys, alpha like foreground;
    # a prompt sees one or two layers.
    rows = 21_600 * 21_826 + 226 * (226 + 10_800) + 2 * 226 * (226 + 5_400)
    assert share[prompt_isolated] == pytest.approx(rows / 22_278**2, abs=1e-12)
    # 3.81 TFLOP: 4 N^2 C.
    assert make_plan(layout, None, 30, 64).flops == 4 * 22_278**2 * 1920


def test_presets_show_each_layer_what_they_say():
    layout = layerflow_rgba(grid=(1, 1, 1), text=1)
    pair = {"text:foreground", "foreground", "alpha"}
    everything = {segment.name for segment in layout.segments}
    view = sees(layout, blended_sees_all(layout))
    assert view["foreground"] == view["alpha"] == view["text:foreground"] == pair
    assert view["background"] == {"text:background", "background"}
    assert view["blended"] == view["text:blended"] == everything
    view = sees(layout, layer_isolated(layout))
    assert view["alpha"] == {"text:foreground", "alpha"}
    assert view["foreground"] == {"text:foreground", "foreground"}
    view = sees(layout, prompt_isolated(layout))
    assert view["background"] == {"text:background", *LAYERS}
    assert view["alpha"] == {"text:foreground", *LAYERS}
    assert view["text:background"] == {"text:background", "background"}
    shared = SequenceLayout((Segment("prompt", "text", 3), *layout.segments))
    for preset in (prompt_isolated, layer_isolated, blended_sees_all):
        view = sees(shared, preset(shared))
        assert all("prompt" in visible for visible in view.values())


def test_a_mask_that_hides_nothing_costs_nothing():
    layout = layerflow_rgba(grid=(2, 4, 4), text=11)
    q, k, v = qkv(layout)
    for mask in (None, full(layout), SegmentMask(full(layout).visibility, frame_window=99)):
        plan = make_plan(layout, mask)
        assert plan.is_full
        with torch.profiler.profile() as profile, torch.no_grad():
            segment_attention(q, k, v, plan)
        names = [event.name for event in profile.events()]
        assert names.count("aten::scaled_dot_product_attention") == 1
        assert "aten::copy_" not in names and "aten::cat" not in names


def test_explain_names_layers_frames_and_shares():
    layout = layerflow_rgba(grid=(4, 30, 45), text=226)
    visibility = blended_sees_all(layout).visibility
    text = make_plan(layout, SegmentMask(visibility, frame_window=1), 30, 64).explain()
    assert text.splitlines()[0].startswith("22,278 tokens, 30 heads x 64, float32: 19.0% of")
    assert "foreground[1:2]" in text and "foreground[0:3]" in text
    nothing = SequenceLayout([Segment("a", "text", 2)])
    assert "nothing" in make_plan(nothing, SegmentMask([[False]])).explain()


def test_mistakes_in_a_mask_or_layout_are_named():
    layout = SequenceLayout([Segment("a", "text", 2), Segment("b", "video", 6)])
    with pytest.raises(ValueError, match="mask is for 1 segments, but the layout has 2"):
        make_plan(layout, SegmentMask([[True]]))
    with pytest.raises(ValueError, match="grid .* of segment 'b'"):
        make_plan(layout, SegmentMask([[True] * 2] * 2, frame_window=1))
    with pytest.raises(ValueError, match="square"):
        SegmentMask([[True, False]])
    with pytest.raises(ValueError, match="finite"):
        SegmentMask([[True]], [[math.nan]])
    with pytest.raises(ValueError, match="unique"):
        SequenceLayout([Segment("a", "text", 2)] * 2)
    with pytest.raises(ValueError, match="6 tokens"):
        Segment("b", "video", 6, grid=(2, 2, 2))
    with pytest.raises(ValueError, match="takes 6 tokens, got 5"):
        layout.pack([torch.zeros(1, 2, 4), torch.zeros(1, 5, 4)])
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 9, 8\)"):
        x = torch.zeros(1, 2, 9, 8)
        segment_attention(x, x, x, make_plan(layout, None))


def test_backends_are_listed_and_one_can_be_named():
    assert [info.name for info in list_backends() if info.available] == list(BACKENDS)
    with pytest.raises(ValueError, match="no backend 'magic'; there are dispatch, triton, refer"):
        with use_backend("magic"):
            pass
    layout = SequenceLayout([Segment("a", "text", 5)])
    q, k, v = qkv(layout)

    def host(q, k, v, scale):
        return torch.full_like(q, 7.0)

    plan = make_plan(layout, None)
    assert (segment_attention(q, k, v, plan, attention=host) == 7).all()
    with use_backend("reference"):
        # The oracle never lets the host compute.
        assert not (segment_attention(q, k, v, plan, attention=host) == 7).any()
    assert (segment_attention(q, k, v, plan, attention=host) == 7).all()


def test_when_no_backend_fits_every_reason_is_given(monkeypatch):
    from dataclasses import replace

    from layerloom.kernels import registry

    only_half = Constraints(dtypes=(torch.float16,), head_dims=(64,))
    crowd = (
        replace(registry._BACKENDS[0], name="half", constraints=only_half),
        replace(registry._BACKENDS[0], name="absent", probe=lambda: "is not installed"),
    )
    monkeypatch.setattr(registry, "_BACKENDS", crowd)
    layout = SequenceLayout([Segment("a", "text", 5)])
    with pytest.raises(BackendUnavailableError) as caught:
        segment_attention(*qkv(layout), make_plan(layout, None))
    assert "half: takes torch.float16, not torch.float32" in str(caught.value)
    assert "absent: is not installed" in str(caught.value)
    infos = {info.name: info for info in list_backends()}
    assert infos["absent"].reason == "is not installed" and infos["half"].available
    request = Request(torch.device("cpu"), torch.float16, 32, gradients=True)
    assert only_half.refusal(request) == "takes heads of (64,), not of 32"
    assert Constraints(gradients=False).refusal(request) == "has no gradients"
    assert Constraints(devices=("cuda",)).refusal(request) == "runs on cuda, not on cpu"


def test_one_block_compiles_without_a_graph_break():
    layout = layerflow_rgba(grid=(2, 2, 2), text=3)
    runs = layout.runs(lambda segment: int(segment.kind == "video"))
    plan = make_plan(layout, SegmentMask(blended_sees_all(layout).visibility, frame_window=1))

    def block(q, k, v, x, rows):
        h = adaln_modulate(x, None, None, rows, rows, runs)
        q, k = qk_norm(q, k, None, None, None, None)
        attended = segment_attention(q, k, v, plan).transpose(1, 2).flatten(2)
        return gated_residual(x, attended + h, rows, runs)

    x = torch.randn(2, layout.length, 16)
    inputs = (*qkv(layout), x, torch.randn(2, 2, 16))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for grad in (False, True):
        x.requires_grad_(grad)
        torch.testing.assert_close(compiled(*inputs), block(*inputs), atol=1e-5, rtol=1e-5)


def test_a_backend_that_fails_at_work_is_told_once_and_left_out(monkeypatch, caplog):
    from dataclasses import replace

    from layerloom.kernels import registry
    from layerloom.kernels.policy import Preference

    calls = []

    def fail(*arguments):
        calls.append(len(arguments))
        raise RuntimeError("no driver\nand a long story")

    fragile = replace(registry._BACKENDS[0], name="fragile", segment_attention=fail)
    monkeypatch.setattr(registry, "_BACKENDS", (*registry._BACKENDS, fragile))
    monkeypatch.setattr(registry, "preference", lambda *_: Preference(("fragile",), "a test"))
    monkeypatch.setattr(registry, "_broken", {})
    layout = SequenceLayout([Segment("a", "text", 5)])
    q, k, v = qkv(layout)
    plan = make_plan(layout, None)
    with caplog.at_level("WARNING", logger="layerloom.kernels"):
        for _ in range(3):
            expected, _ = oracle(q, k, v, 0.0, 8**-0.5)
            assert relative_error(segment_attention(q, k, v, plan), expected) <= 1e-6
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "fragile failed with RuntimeError: no driver;" in caplog.text
    info = {info.name: info for info in list_backends()}["fragile"]
    assert not info.available and "no driver" in info.reason
    # Whoever insists on it hears about it.
    with use_backend("fragile"), pytest.raises(BackendUnavailableError, match="no driver"):
        segment_attention(q, k, v, plan)


def test_a_backend_that_gets_ready_is_passed_over_until_then(monkeypatch):
    from dataclasses import replace

    from layerloom.kernels import registry
    from layerloom.kernels.policy import Preference

    asked = []

    def prepare(q, k, v, plan, must):
        asked.append(must)
        return None if must else "its kernel is still being compiled"

    def sevens(q, k, v, *_):
        return torch.full_like(q, 7.0), None

    slow = replace(registry._BACKENDS[0], name="slow", segment_attention=sevens, prepare=prepare)
    monkeypatch.setattr(registry, "_BACKENDS", (*registry._BACKENDS, slow))
    monkeypatch.setattr(registry, "preference", lambda *_: Preference(("slow",), "a test"))
    layout = SequenceLayout([Segment("a", "text", 5)])
    q, k, v = qkv(layout)
    assert not (segment_attention(q, k, v, make_plan(layout, None)) == 7).any()
    with use_backend("slow"):
        assert (segment_attention(q, k, v, make_plan(layout, None)) == 7).all()
    assert asked == [False, True]
