"""Kept keys and values of given segments against computing everything at every step."""

from __future__ import annotations

import logging
import math
from itertools import zip_longest

import pytest
import torch
from attention_cases import (
    QUICK,
    cases,
    layerflow_rgba,
    layouts,
    make_plan,
    oracle_bias,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from triton_interpreter import run_interpreted

from layerloom.kernels import (
    Segment,
    SegmentKVCache,
    SegmentMask,
    SequenceLayout,
    blended_sees_all,
    clean_sees_clean,
    full,
    plan_attention,
    prompt_isolated,
    segment_attention,
    use_backend,
)
from layerloom.kernels.kv_cache import cache_bytes

# Sums run in another order at most: float32 rounding over a few blocks.
EXACT = 1e-6
BACKENDS = ("dispatch", "reference")
HEADS, HEAD_DIM, BLOCKS = 2, 8, 2
ROOMY = 2**30


def off_by(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, -inf where -inf is expected; 0 of nothing."""
    assert value.shape == expected.shape
    hidden = torch.isneginf(expected)
    assert torch.equal(torch.isneginf(value), hidden)
    value, expected = value.masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0)
    return relative_error(value, expected.double()) if value.numel() else 0.0


def with_given(layout: SequenceLayout, clean: list[bool]) -> SequenceLayout:
    """The layout with some of its segments marked as given."""
    segments = [
        Segment(s.name, s.kind, s.length, s.layer, s.grid, clean=bool(given_one))
        for s, given_one in zip_longest(layout.segments, clean[: len(layout.segments)])
    ]
    return SequenceLayout(tuple(segments))


@st.composite
def given_cases(draw) -> tuple[SequenceLayout, SegmentMask]:
    """Random layouts with given segments, closed for them by clean_sees_clean or not at all."""
    layout, mask = draw(cases(most_tokens=200))
    layout = with_given(layout, draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    mask = full(layout) if mask is None else mask
    return layout, clean_sees_clean(layout, mask) if draw(st.integers(0, 3)) else mask


def test_static_segments_are_the_largest_closed_set_of_given_ones():
    @given(case=given_cases())
    @settings(QUICK, max_examples=40)
    def check(case):
        layout, mask = case
        plan = make_plan(layout, mask)
        static = set(plan.static_segments)
        ids = layout.segment_ids()
        visible = ~torch.isneginf(oracle_bias(layout, mask))
        eligible = {i for i, s in enumerate(layout.segments) if s.clean or s.kind == "text"}
        sees = {i: set(ids[visible[ids == i].any(0)].tolist()) for i in range(len(layout.segments))}
        assert static <= eligible and all(sees[i] <= static for i in static)
        # Largest: whatever else is eligible reaches, in some steps, something that is not.
        for start in eligible - static:
            reached = {start}
            while not reached - eligible:
                more = reached.union(*(sees[i] for i in reached & eligible))
                assert more != reached, "a closed set was left out"
                reached = more

    check()


def test_a_plan_without_static_queries_is_the_same_attention_for_the_others():
    @given(case=given_cases())
    @settings(QUICK, max_examples=40)
    def check(case):
        layout, mask = case
        plan = make_plan(layout, mask)
        part = plan.without_static()
        rows = part.take_queries(torch.arange(layout.length), 0)
        dense = oracle_bias(layout, mask)[rows]
        assert part.query_length == len(rows) == part.query_layout.length
        assert torch.equal(part.to_dense_mask(dtype=torch.float64), dense)
        middle = slice(len(rows) // 3, len(rows) // 2)
        assert torch.equal(part.to_dense_mask(dtype=torch.float64, queries=middle), dense[middle])
        stretches = sorted(stretch for group in part.groups for stretch in group.queries)
        covered = [row for start, stop in stretches for row in range(start, stop)]
        assert covered == list(range(len(rows)))
        visible = (~torch.isneginf(dense)).sum().item() / layout.length**2
        assert part.flop_fraction == pytest.approx(visible, abs=1e-12)
        assert part.static_segments == plan.static_segments
        assert part.without_static() is part
        assert hash(part) == hash(make_plan(layout, mask).without_static())
        runs = sorted((*plan.static_runs, *plan.dynamic_runs))
        tokens = [token for start, stop in runs for token in range(start, stop)]
        assert tokens == list(range(layout.length))
        assert part.is_full == (len(rows) > 0 and bool((dense == 0).all()))

    check()


class Toy:
    """Attention alone, several blocks deep, with residuals: given tokens' states never change."""

    def __init__(self, seed: int, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        width = HEADS * HEAD_DIM
        shape = (BLOCKS, 3, width, width)
        self.weights = torch.randn(shape, generator=generator, dtype=dtype) / width**0.5

    def __call__(self, x, plan, cache=None):
        """[B, N, C] to the last states of the plan's rows, and every block's log-sum-exp."""
        x, lses = plan.take_queries(x), []
        for block, weights in enumerate(self.weights):
            q, k, v = (
                F.layer_norm(x @ w, w.shape[-1:]).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
                for w in weights
            )
            out, lse = segment_attention(
                q, k, v, plan, return_lse=True, kv_cache=cache, cache_key=block
            )
            x = x + out.transpose(1, 2).flatten(2)
            lses.append(lse)
        return x, torch.stack(lses)


def given_part(plan, x):
    """What the static tokens are made of."""
    return torch.cat([x[:, start:stop] for start, stop in plan.static_runs], dim=1)


def states(layout, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layout.length, HEADS * HEAD_DIM, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reuse_equals_computing_everything(backend):
    @given(case=given_cases(), refresh=st.sampled_from([None, 1, 2]), seed=st.integers(0, 99))
    @settings(QUICK, max_examples=30 if backend == "dispatch" else 8)
    def check(case, refresh, seed):
        layout, mask = case
        plan, toy = make_plan(layout, mask), Toy(seed)
        cache = SegmentKVCache(ROOMY, refresh)
        fixed = states(layout, 2, seed)
        reused = 0
        for step in range(3):
            x = states(layout, 2, 1000 + step)
            for start, stop in plan.static_runs:
                x[:, start:stop] = fixed[:, start:stop]
            inputs = [given_part(plan, x)] if plan.static_segments else [x]
            time = torch.full((2,), 999.0 - step)
            now = cache.begin(plan, BLOCKS, inputs, time)
            reused += bool(now.dropped)
            with use_backend(backend):
                whole, whole_lse = toy(x, plan)
                made, made_lse = toy(x, now, cache)
            assert off_by(made, now.take_queries(whole)) <= EXACT
            assert off_by(made_lse, now.take_queries(whole_lse, 3)) <= EXACT
        steps = {None: 2, 1: 0, 2: 1}[refresh]
        assert reused == (steps if plan.static_segments else 0)

    with torch.no_grad():
        check()


LAYOUT = with_given(layerflow_rgba(grid=(2, 4, 4), text=5), [False] * 3 + [True] * 2)
PLAN = make_plan(LAYOUT, clean_sees_clean(LAYOUT))


def run_pass(toy, cache, x, time, plan=PLAN):
    """One pass with the cache; whether it reused, and its error against computing everything."""
    now = cache.begin(plan, BLOCKS, [given_part(plan, x)], torch.full((len(x),), float(time)))
    made, _ = toy(x, now, cache)
    whole, _ = toy(x, plan)
    return bool(now.dropped), off_by(made, now.take_queries(whole))


def noisy_like(x, seed, plan=PLAN):
    """The same given tokens among new noisy ones."""
    y = states(plan.layout, len(x), seed)
    for start, stop in plan.static_runs:
        y[:, start:stop] = x[:, start:stop]
    return y


@torch.no_grad()
def test_nothing_stale_is_ever_read():
    toy, cache = Toy(0), SegmentKVCache(ROOMY)
    x = states(LAYOUT, 2, 0)
    other = states(LAYOUT, 2, 1)
    passes = [
        (x, PLAN, False),
        (noisy_like(x, 2), PLAN, True),
        (other, PLAN, False),  # other given layers
        (noisy_like(other, 3), PLAN, True),
        (other[:1], PLAN, True),  # another batch, of rows that are known
        (torch.cat([other, states(LAYOUT, 1, 4)]), PLAN, False),
    ]
    small = with_given(layerflow_rgba(grid=(2, 3, 4), text=5), [False] * 3 + [True] * 2)
    small_plan = make_plan(small, clean_sees_clean(small))
    passes += [(states(small, 2, 5), small_plan, False), (x, PLAN, False)]
    looser = make_plan(LAYOUT, clean_sees_clean(LAYOUT, blended_sees_all(LAYOUT)))
    passes += [(x, looser, False), (noisy_like(x, 6), looser, True)]
    for index, (states_now, plan, reuse) in enumerate(passes):
        reused, error = run_pass(toy, cache, states_now, 999 - index, plan)
        assert reused == reuse, index
        assert error <= EXACT, index
    cache.reset()
    assert cache.held_bytes == 0
    assert run_pass(toy, cache, noisy_like(x, 7), 1, looser)[0] is False


@torch.no_grad()
def test_branches_of_guidance_may_come_together_apart_or_change_places():
    toy = Toy(1)
    both = states(LAYOUT, 2, 0)
    both[1, 15:79] = both[0, 15:79]  # the same given layers, other prompts
    alone = [both[1:], both[:1], both, both.flip(0), both[:1], both[1:]]
    cache = SegmentKVCache(ROOMY, refresh_every=2)
    found = []
    for index, branch in enumerate(alone):
        reused, error = run_pass(toy, cache, branch, 999 - index // 2)
        found.append(reused)
        assert error <= EXACT
    # Two calls fill at the first step; both refresh together at the third.
    assert found == [False, False, True, True, False, False]


@torch.no_grad()
def test_rows_with_the_same_inputs_are_kept_once():
    toy, cache = Toy(2), SegmentKVCache(ROOMY)
    x = states(LAYOUT, 1, 0).repeat(3, 1, 1)
    run_pass(toy, cache, x, 999)
    run_pass(toy, cache, x, 998)
    assert cache.held_bytes == cache_bytes(PLAN, BLOCKS, rows=1, batch=3)
    static = 2 * HEADS * HEAD_DIM * 4 * (15 + 64)
    assert cache.held_bytes == BLOCKS * static + 3 * 2 * HEADS * HEAD_DIM * 4 * LAYOUT.length


@torch.no_grad()
def test_what_does_not_fit_is_left_out_as_a_whole_and_said_once(caplog):
    toy, x = Toy(3), states(LAYOUT, 2, 0)
    needed = cache_bytes(PLAN, BLOCKS, rows=2, batch=2)
    for bound, fits in ((needed, True), (needed - 1, False), (0, False)):
        cache = SegmentKVCache(bound)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "layerloom.kernels"):
            found = [run_pass(toy, cache, noisy_like(x, i), 999 - i) for i in range(3)]
        assert [reused for reused, _ in found] == [False, fits, fits]
        assert all(error <= EXACT for _, error in found)
        assert cache.held_bytes == (needed if fits else 0)
        assert len(caplog.records) == (0 if fits else 1)
    assert "79 given tokens in 2 blocks" in caplog.text and "the 0 MiB allowed" in caplog.text


@torch.no_grad()
def test_new_rows_push_out_those_of_earlier_runs_before_giving_up():
    toy = Toy(4)
    cache = SegmentKVCache(cache_bytes(PLAN, BLOCKS, rows=2, batch=2))
    for run in range(3):
        x = states(LAYOUT, 2, run)
        found = [run_pass(toy, cache, noisy_like(x, 10 + i), 999 - i) for i in range(2)]
        assert [reused for reused, _ in found] == [False, True], run
        assert all(error <= EXACT for _, error in found)
    assert cache.held_bytes == cache.max_bytes


@torch.no_grad()
def test_a_mask_that_is_open_keeps_nothing_and_says_so_once(caplog):
    toy, cache = Toy(5), SegmentKVCache(ROOMY)
    plan = make_plan(LAYOUT, prompt_isolated(LAYOUT))
    assert plan.static_segments == () and plan.without_static() is plan
    with caplog.at_level(logging.WARNING, "layerloom.kernels"):
        for step in range(3):
            now = cache.begin(plan, BLOCKS, [states(LAYOUT, 2, step)])
            assert now is plan
            toy(states(LAYOUT, 2, step), now, cache)
    assert len(caplog.records) == 1 and "clean_sees_clean" in caplog.text
    assert cache.held_bytes == 0


@torch.no_grad()
def test_a_pass_that_was_cancelled_counts_for_nothing():
    toy, cache = Toy(6), SegmentKVCache(ROOMY)
    x = states(LAYOUT, 2, 0)
    now = cache.begin(PLAN, BLOCKS, [given_part(PLAN, x)], torch.tensor([999.0, 999.0]))
    q = torch.randn(2, HEADS, LAYOUT.length, HEAD_DIM)
    segment_attention(q, q, q, now, kv_cache=cache, cache_key=0)
    assert run_pass(toy, cache, x, 999) == (False, 0.0)
    assert run_pass(toy, cache, x, 998)[0]


def test_what_inference_mode_kept_serves_outside_of_it_and_back():
    toy, cache = Toy(7), SegmentKVCache(ROOMY, refresh_every=2)
    x = states(LAYOUT, 2, 0)
    for step, mode in enumerate([torch.inference_mode, torch.no_grad] * 3):
        with mode():
            reused, error = run_pass(toy, cache, noisy_like(x, step), 999 - step)
        assert reused == bool(step % 2) and error <= EXACT


@torch.no_grad()
def test_the_cache_may_hold_every_token():
    layout = with_given(LAYOUT, [True] * 7)
    plan, toy, cache = make_plan(layout, None), Toy(8), SegmentKVCache(ROOMY)
    x = states(layout, 1, 0)
    assert run_pass(toy, cache, x, 1, plan)[0] is False
    for backend in BACKENDS:
        with use_backend(backend):
            now = cache.begin(plan, BLOCKS, [given_part(plan, x)])
            out, lse = toy(x, now, cache)
        assert now.query_length == 0 and out.shape[1] == 0 and lse.shape[-1] == 0


@torch.no_grad()
def test_clean_sees_clean_hides_noisy_layers_from_given_ones_and_prompts():
    names = [segment.name for segment in LAYOUT.segments]
    mask = clean_sees_clean(LAYOUT)
    everything = set(names)
    known = {*names[:3], "foreground", "alpha"}
    for name, row in zip(names, mask.visibility, strict=True):
        seen = {key for key, visible in zip(names, row, strict=True) if visible}
        assert seen == (known if name in known else everything)
    base = SegmentMask(prompt_isolated(LAYOUT).visibility, [[0.5] * 7] * 7, 2)
    closed = clean_sees_clean(LAYOUT, base)
    assert closed.bias == base.bias and closed.frame_window == 2
    assert closed.visibility[4][1] is False and closed.visibility[4][0] is True
    nothing_given = layerflow_rgba(grid=(2, 4, 4), text=5)
    assert clean_sees_clean(nothing_given) == full(nothing_given)


def test_explain_says_what_is_known_and_what_is_left():
    layout = with_given(layerflow_rgba(grid=(4, 30, 45), text=226), [False] * 3 + [True] * 2)
    plan = plan_attention(layout, clean_sees_clean(layout), 30, 64, torch.bfloat16, "cpu")
    assert plan.explain().splitlines()[0].startswith("22,278 tokens, 30 heads x 64, bfloat16: 75.0")
    text = plan.without_static().explain()
    assert "48.5% of full attention" in text
    assert "keys and values known, no queries: text:foreground + text:background" in text
    assert "foreground + alpha (11,478 tokens)" in text
    row = text.splitlines()[-1]
    assert row.startswith("background + blended  10,800  everything  22,278")
    # 30 blocks of bf16 keys and values of 11,478 tokens, two branches, and their workspace.
    assert cache_bytes(plan, 30, 2, 2) == 2 * 1920 * 2 * (30 * 2 * 11_478 + 2 * 22_278)


def test_mistakes_are_named():
    cache = SegmentKVCache(ROOMY)
    x = states(LAYOUT, 2, 0)
    part = PLAN.without_static()
    whole_k = torch.randn(2, HEADS, LAYOUT.length, HEAD_DIM)
    part_k = part.take_queries(whole_k, 2)

    def call(plan, k, q=None, key=0, v=None, cache=cache):
        q = k if q is None else q
        v = k if v is None else v
        return segment_attention(q, k, v, plan, kv_cache=cache, cache_key=key)

    def begin(plan=PLAN):
        return cache.begin(plan, 1, [given_part(PLAN, x)])

    with torch.no_grad():
        with pytest.raises(ValueError, match="not the one that kv_cache.begin returned"):
            call(PLAN, whole_k)
        begin()
        with pytest.raises(ValueError, match="no keys and values are kept for 0"):
            call(part, part_k)
        with pytest.raises(ValueError, match="begin got a batch of 2, this call has 1"):
            call(PLAN, whole_k[:1])
        with pytest.raises(ValueError, match="plan is for torch.float32, the call has .*float64"):
            call(PLAN, whole_k.double())
        with pytest.raises(ValueError, match=r"k has shape \(2, 2, 142, 8\), but the plan expects"):
            call(PLAN, whole_k[:, :, 1:], q=whole_k)
        call(PLAN, whole_k)
        with pytest.raises(ValueError, match="told of 1 blocks; 1 is one more"):
            call(PLAN, whole_k, key=1)
        assert begin() == part
        with pytest.raises(ValueError, match=rf"k has shape \(2, 2, {LAYOUT.length}, 8\)"):
            call(part, whole_k, q=part_k)
        with pytest.raises(ValueError, match=rf"q has shape \(2, 2, {LAYOUT.length}, 8\)"):
            call(part, part_k, q=whole_k)
        # Without a cache the keys and values of a reduced plan are the whole sequence's.
        with pytest.raises(ValueError, match="k has shape"):
            segment_attention(part_k, part_k, part_k, part)
        expected = segment_attention(whole_k, whole_k, whole_k, PLAN)
        out = segment_attention(part_k, whole_k, whole_k, part)
        torch.testing.assert_close(out, part.take_queries(expected, 2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="torch.no_grad"):
        call(part, part_k.requires_grad_())
    for arguments in ((-1,), (1, 0)):
        with pytest.raises(ValueError, match="must"):
            SegmentKVCache(*arguments)


def test_hosts_attention_sees_all_keys_and_fewer_queries():
    cache, calls = SegmentKVCache(ROOMY), []

    def host(q, k, v, scale):
        calls.append((q.shape[2], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    k = torch.randn(1, HEADS, LAYOUT.length, HEAD_DIM)
    inputs = [given_part(PLAN, states(LAYOUT, 1, 0))]
    outs = []
    for _ in range(2):
        now = cache.begin(PLAN, 1, inputs)
        x = now.take_queries(k, 2)
        outs.append(segment_attention(x, x, x, now, attention=host, kv_cache=cache, cache_key=0))
    # 4 layers of 32 tokens and 3 prompts of 5; foreground, alpha and the prompts are given.
    assert calls == [(79, 79), (64, 143), (64, 143)]
    torch.testing.assert_close(now.take_queries(outs[0], 2), outs[1], atol=1e-6, rtol=0)


def test_the_triton_kernel_takes_fewer_rows_of_q_than_of_k():
    run_interpreted("test_kv_cache.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_reuse_on_cuda_equals_computing_everything():
    plan = plan_attention(LAYOUT, PLAN.mask, HEADS, HEAD_DIM, torch.float32, "cuda")
    toy, cache = Toy(9), SegmentKVCache(ROOMY)
    toy.weights = toy.weights.cuda()
    x = states(LAYOUT, 2, 0)
    for step in range(3):
        reused, error = run_pass(toy, cache, noisy_like(x, step).cuda(), 999 - step, plan)
        # Float32 without tensor cores' TF32.
        assert reused == (step > 0) and error <= 1e-5


@given(layout=layouts(max_segments=4, most_tokens=200))
@settings(QUICK, max_examples=10)
def test_rows_of_q_are_a_view_where_they_are_one_stretch(layout):
    clean = with_given(layout, [index == 0 for index in range(len(layout.segments))])
    plan = make_plan(clean, clean_sees_clean(clean)).without_static()
    x = torch.randn(1, layout.length, 4)
    rows = plan.take_queries(x)
    assert rows.shape[1] == plan.query_length
    if len(plan.dynamic_runs) == 1:
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert math.isclose(rows.sum().item(), sum(x[:, a:b].sum() for a, b in plan.dynamic_runs) + 0.0)
