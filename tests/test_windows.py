"""Temporal windows: every frame is covered, nothing shows where they meet, and nothing changes
for a network that needs no neighbours."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerloom.engine.errors import LayerLoomError
from layerloom.engine.sampling.windows import (
    SlidingWindows,
    Window,
    chained_windows,
    frame_shares,
    fuse,
)


@st.composite
def clips(draw):
    """Windows, a clip's length and a step."""
    length = draw(st.integers(2, 24))
    overlap = draw(st.integers(1, length - 1))
    return SlidingWindows(length, overlap), draw(st.integers(1, 200)), draw(st.integers(0, 60))


@given(clips())
@settings(deadline=None)
def test_every_frame_is_covered_and_shares_sum_to_one(clip):
    sliding, frames, step = clip
    windows = sliding.at(frames, step)
    shares = frame_shares(windows, frames)
    assert bool((shares.sum(0) - 1).abs().max() < 1e-12)
    covered = {frame for window in windows for frame in range(window.start, window.stop)}
    assert covered == set(range(frames))
    # The network sees the length it knows wherever the clip has it.
    assert {w.stop - w.start for w in windows} == {min(frames, sliding.length)}
    # Neighbours share frames, and no window comes twice.
    for left, right in pairwise(windows):
        assert left.start < right.start
        assert left.stop - right.start >= sliding.overlap


@given(clips())
@settings(deadline=None)
def test_a_network_that_is_pointwise_in_time_gives_the_unwindowed_result(clip):
    sliding, frames, step = clip
    x = torch.randn(1, 2, frames, 3, generator=torch.Generator().manual_seed(frames))

    def network(part):
        return torch.sin(3 * part) + part**2

    windows = sliding.at(frames, step)
    fused = fuse(windows, lambda window: network(window.take(x, 2)), frames, 2)
    assert torch.equal(fused, network(x))


@given(clips())
@settings(deadline=None)
def test_no_seam_where_a_window_begins_or_ends(clip):
    """A window's share never sets in at once: windows that disagree are crossed over slowly."""
    sliding, frames, step = clip
    windows = sliding.at(frames, step)
    shares = frame_shares(windows, frames)
    limit = 1 / (sliding.overlap + 1) + 1e-9
    for window, row in zip(windows, shares, strict=True):
        if window.start > 0:
            assert 0 < float(row[window.start]) <= limit
        if window.stop < frames:
            assert 0 < float(row[window.stop - 1]) <= limit


def test_evenly_spaced_windows_cross_over_in_a_line():
    """At no shift the trapeziums add up to one, so that shares are the ramp itself."""
    sliding = SlidingWindows(16, 8)
    windows = sliding.at(32, 0)
    assert [window.start for window in windows] == [0, 8, 16]
    shares = frame_shares(windows, 32)
    expected = torch.arange(1, 9, dtype=torch.float64) / 9
    torch.testing.assert_close(shares[1, 8:16], expected)
    torch.testing.assert_close(shares[0, 8:16], 1 - expected)
    assert float(shares[0, :8].min()) == 1


@pytest.mark.parametrize("frames", [24, 32, 47, 64, 100])
def test_windows_shift_so_that_no_frame_stays_at_a_border(frames):
    sliding = SlidingWindows(16, 8)
    counts = torch.zeros(frames)
    steps = 50
    for step in range(steps):
        for window in sliding.at(frames, step):
            if window.start > 0:
                counts[window.start] += 1
            if window.stop < frames:
                counts[window.stop - 1] += 1
    # The two windows at the ends cannot move; every other border is spread over the stride.
    fixed = {frames - 16, 15}
    moving = [int(counts[frame]) for frame in range(frames) if frame not in fixed]
    assert max(moving) <= steps // 2
    offsets = {tuple(w.start for w in sliding.at(frames, step)) for step in range(steps)}
    assert len(offsets) == 8


def test_the_last_frames_have_their_window_where_the_stride_does_not_divide():
    """(T - 16) % 4 != 0 left the last frames out in a known port."""
    for frames in range(16, 80):
        for step in range(8):
            windows = SlidingWindows(16, 12).at(frames, step)
            assert windows[-1].stop == frames
            assert windows[-1].stop - windows[-1].start == 16


def test_short_clips_are_one_window_and_reach_the_network_unchanged():
    for frames in (1, 2, 15, 16):
        windows = SlidingWindows(16, 8).at(frames, 3)
        assert [(w.start, w.stop) for w in windows] == [(0, frames)]
        x = torch.randn(1, 4, frames)
        seen = []

        def network(window, x=x, seen=seen):
            seen.append(window)
            return window.take(x, 2)

        assert torch.equal(fuse(windows, network, frames, 2), x)
        assert seen == windows


@given(st.integers(1, 9), st.integers(2, 20))
@settings(deadline=None)
def test_chained_pieces_share_their_key_frames_alone(pieces, length):
    windows = chained_windows(pieces, length)
    frames = pieces * (length - 1) + 1
    shares = frame_shares(windows, frames)
    keys = {piece * (length - 1) for piece in range(1, pieces)}
    for frame in range(frames):
        column = shares[:, frame]
        assert float(column.sum()) == 1
        assert int((column > 0).sum()) == (2 if frame in keys else 1)
    assert [window.piece for window in windows] == list(range(pieces))
    x = torch.randn(3, frames)
    assert torch.equal(fuse(windows, lambda window: window.take(x, 1), frames, 1), x)


def test_fuse_averages_by_weight():
    windows = [Window(0, 3, (1.0, 1.0, 1.0)), Window(2, 4, (3.0, 1.0))]
    parts = iter([torch.zeros(1, 3), torch.ones(1, 2)])
    fused = fuse(windows, lambda window: next(parts), 4, -1)
    torch.testing.assert_close(fused, torch.tensor([[0.0, 0.0, 0.75, 1.0]]))
    with pytest.raises(ValueError, match="frame 3 of 5"):
        holes = [Window(0, 3, (1.0,) * 3), Window(4, 5, (1.0,))]
        fuse(holes, lambda window: torch.zeros(1, window.stop - window.start), 5, 1)


@pytest.mark.parametrize(
    ("length", "overlap", "words"),
    [(1, 1, "2 or more"), (16, 0, "1 to 15"), (16, 16, "1 to 15")],
)
def test_windows_that_cannot_cover_are_a_sentence(length, overlap, words):
    with pytest.raises(LayerLoomError, match=words):
        SlidingWindows(length, overlap).at(40, 0)
