"""The Triton kernel where q has fewer rows than k and v, whose static part a cache fills in."""

from __future__ import annotations

import pytest
import torch
from attention_cases import layerflow_rgba, make_plan, oracle, oracle_bias, qkv, relative_error

from layerloom.kernels import (
    Segment,
    SegmentKVCache,
    SegmentMask,
    SequenceLayout,
    blended_sees_all,
    clean_sees_clean,
    segment_attention,
    use_backend,
)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1])
def test_the_others_queries_see_kept_keys(window):
    layout = SequenceLayout(
        Segment(s.name, s.kind, s.length, s.layer, s.grid, clean=s.name in ("alpha", "background"))
        for s in layerflow_rgba(grid=(2, 4, 5), text=11).segments
    )
    size = len(layout.segments)
    bias = [[0.5 * ((i + j) % 3) for j in range(size)] for i in range(size)]
    mask = SegmentMask(blended_sees_all(layout).visibility, bias, window)
    mask = clean_sees_clean(layout, mask)
    q, k, v = qkv(layout, 2, 32)
    expected, expected_lse = oracle(q, k, v, oracle_bias(layout, mask), 32**-0.5)
    plan, cache = make_plan(layout, mask, 2, 32), SegmentKVCache(2**20)
    with use_backend("triton"):
        for step in range(2):
            now = cache.begin(plan, 1, [k])
            rows = [now.take_queries(x, 2) for x in (q, k, v)]
            out, lse = segment_attention(*rows, now, return_lse=True, kv_cache=cache)
            assert bool(now.dropped) == (step == 1)
            assert relative_error(out, now.take_queries(expected, 2)) <= 1e-6
            assert relative_error(lse, now.take_queries(expected_lse, 2)) <= 2e-6
