"""Paths of boxes: what is read, what is refused with a sentence, and where boxes end up."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_clicks import refused

from layerloom.engine.conditioning.box_paths import (
    box_at,
    box_masks,
    box_shares,
    pixel_boxes,
    thinned,
    track_masks,
)
from layerloom.engine.conditioning.box_sources import (
    along,
    between,
    from_bounding_boxes,
    from_masks,
    from_tracks,
    read_path,
    to_bounding_boxes,
)
from layerloom.engine.conditioning.boxes import (
    EASES,
    MOST_FRAMES,
    MOST_TRACKS,
    BoxPaths,
    Key,
    Track,
    parse_boxes,
    pixel_track,
    read_key,
)

BOX = {"x": 0.25, "y": 0.25, "w": 0.5, "h": 0.5}


def document(*keys: dict, frames: int = 9, **rest) -> dict:
    return {"version": 1, "frames": frames, "tracks": [{"id": "a", "keyframes": list(keys)}]} | rest


def key(frame: int = 0, **changes) -> dict:
    return {"frame": frame, **BOX, **changes}


@st.composite
def tracks(draw) -> tuple[Track, int]:
    """A track with boxes that touch the picture, and the length of its clip."""
    frames = draw(st.integers(1, 40))
    at = draw(st.lists(st.integers(0, frames - 1), min_size=1, max_size=7, unique=True))
    side = st.floats(0.01, 1.5)
    keys = []
    for frame in sorted(at):
        w, h = draw(side), draw(side)
        x, y = (draw(st.floats(-length + 0.005, 0.99)) for length in (w, h))
        keys.append(Key(frame, x, y, w, h, draw(st.sampled_from(EASES))))
    return Track("a", tuple(keys)), frames


# --- the contract -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(tracks())
def test_paths_survive_being_written_and_read(made):
    track, frames = made
    paths = BoxPaths(frames, (track,))
    assert parse_boxes(paths.to_json()) == paths


def test_nothing_drawn_is_read_and_refused_where_boxes_are_wanted():
    for text in ("", " ", '{"frames": 3}', '{"version": 1, "frames": 3, "tracks": []}'):
        assert parse_boxes(text).tracks == ()
    refused(lambda: parse_boxes("").require(), "no boxes", "draw")
    assert parse_boxes(document(key())).require().frames == 9


def test_key_frames_in_any_order_are_put_in_order():
    paths = parse_boxes(document(key(5), key(0), key(3)))
    assert [k.frame for k in paths.tracks[0].keys] == [0, 3, 5]
    assert paths.tracks[0].keys[0].ease == "linear"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", ["not JSON", "character 1"]),
        ("[" * 100_000, ["not JSON"]),
        ("3", ["are 3"]),
        ("[]", ["[]"]),
        ("null", ["None"]),
        ({"version": 2}, ["version 2", "update"]),
        ({"boxes": []}, ["'boxes'"]),
        ({"tracks": []}, ["how many frames"]),
        ({"frames": 0}, ["frames is 0"]),
        ({"frames": 2.5}, ["2.5"]),
        ({"frames": True}, ["True"]),
        ({"frames": MOST_FRAMES + 1}, [str(MOST_FRAMES)]),
        ({"frames": "9"}, ["'9'"]),
        ({"frames": 9, "tracks": "ab"}, ["tracks are 'ab'"]),
        ({"frames": 9, "tracks": [3]}, ["A track", "3"]),
        ({"frames": 9, "tracks": [{"id": "", "keyframes": []}]}, ["id is ''"]),
        ({"frames": 9, "tracks": [{"id": "a" * 65, "keyframes": []}]}, ["64"]),
        ({"frames": 9, "tracks": [{"id": "a", "keyframes": []}]}, ["no key frames"]),
        ({"frames": 9, "tracks": [{"id": "a", "keyframes": 3}]}, ["keyframes are 3"]),
        ({"frames": 9, "tracks": [{"id": "a", "keyframes": [1]}]}, ["key frame", "1"]),
        (document(key(), key()), ["two key frames at frame 0"]),
        (document(key(9)), ["key frame 9", "0 to 8"]),
        (document(key(-1)), ["key frame -1"]),
        (document(key(0.5)), ["frame = 0.5"]),
        (document(key(x=float("nan"))), ["x = nan"]),
        (document(key(w=float("inf"))), ["w = inf"]),
        (document(key(y="0.5")), ["y = '0.5'"]),
        (document(key(y=10**400)), ["y ="]),
        (document(key(h=True)), ["h = True"]),
        (document(key(w=0)), ["without area"]),
        (document(key(h=-0.5)), ["without area"]),
        (document(key(x=1)), ["outside the picture"]),
        (document(key(y=-0.5)), ["outside the picture"]),
        (document(key(w=9)), ["outside the picture"]),
        (document(key(ease="bounce")), ["'bounce'", "smooth"]),
        (document(key(z=1)), ["A key frame", "ease"]),
        (document(*(key(f) for f in range(1000))), ["1000 key frames", "9 frames"]),
        (document(*(key(f % 9) for f in range(10))), ["10 key frames", "9 frames"]),
    ],
)
def test_what_is_wrong_with_boxes_is_said(value, words):
    refused(lambda: parse_boxes(value), *words)


def test_too_many_or_doubled_tracks_are_refused():
    one = {"id": "a", "keyframes": [key()]}
    refused(lambda: parse_boxes({"frames": 3, "tracks": [one] * 2}), "'a'", "id of its own")
    many = [{**one, "id": str(number)} for number in range(MOST_TRACKS + 1)]
    refused(lambda: parse_boxes({"frames": 3, "tracks": many}), f"{MOST_TRACKS + 1} tracks")
    paths = parse_boxes({"frames": 3, "tracks": many[:MOST_TRACKS]})
    refused(lambda: paths.joined(paths), f"{2 * MOST_TRACKS} tracks")


def test_a_thousand_key_frames_of_a_thousand_frames_are_fine():
    paths = parse_boxes(document(*(key(f, x=f / 2000) for f in range(1000)), frames=1000))
    boxes = pixel_boxes(paths.tracks[0], 1000, (480, 832))
    assert boxes.shape == (1000, 4) and (np.diff(boxes[:, 0]) >= 0).all()
    assert len(thinned(paths.tracks[0]).keys) == 2


def test_a_clip_of_another_length_has_the_same_path():
    paths = parse_boxes(document(key(0), key(4, x=0.5), key(8, x=0.0)), frames=17)
    assert [k.frame for k in paths.tracks[0].keys] == [0, 8, 16]
    assert [k.frame for k in paths.retimed(2).tracks[0].keys] == [0, 1]
    assert [k.frame for k in paths.retimed(1).tracks[0].keys] == [0]
    # The first and the last box are those that stay.
    assert [k.x for k in paths.retimed(2).tracks[0].keys] == [0.25, 0.0]
    refused(lambda: parse_boxes(document(key()), frames=0), "frames is 0")


def test_subjects_are_chosen_and_joined():
    first = parse_boxes(document(key(), frames=4))
    both = first.joined(parse_boxes(document(key(8, x=0.1))))
    assert [track.id for track in both.tracks] == ["a", "a 2"] and both.frames == 4
    assert both.tracks[1].keys[0].frame == 3
    assert both.only(0) == both and both.only(2).tracks == both.tracks[1:]
    refused(lambda: both.only(3), "subject 3", "1 to 2")


def test_boxes_of_the_command():
    assert read_key("0:40,60,32,32") == (0, 40, 60, 32, 32, "linear")
    assert read_key(" 15: 4.5,6,7,8 :smooth") == (15, 4.5, 6, 7, 8, "smooth")
    for text in ("", "40,60,32,32", "0:1,2,3", "a:1,2,3,4", "0:1,2,3,nan", "-1:1,2,3,4", "0;1"):
        refused(lambda text=text: read_key(text), repr(text), "FRAME:X,Y,W,H")
    refused(lambda: read_key("0:1,2,3,4:bounce"), "ease", "hold")
    track = pixel_track("a", [(15, 0, 0, 8, 4, "linear"), (0, 4, 2, 8, 4, "hold")], 16, (8, 16))
    assert track.keys[0] == Key(0, 0.25, 0.25, 0.5, 0.5, "hold")
    refused(lambda: pixel_track("a", [(16, 0, 0, 8, 4, "linear")], 16, (8, 16)), "0 to 15")
    refused(lambda: pixel_track("a", [(0, 16, 0, 8, 4, "linear")], 16, (8, 16)), "outside")
    refused(lambda: pixel_track("a", [], 16, (8, 16)), "no key frames")


# --- a box a frame ----------------------------------------------------------------------------


def middle_x(ease: str) -> list[float]:
    keys = (Key(0, 0.0, 0.2, 0.2, 0.2, ease), Key(8, 0.8, 0.2, 0.2, 0.2))
    return box_shares(Track("a", keys), 9)[:, 0].tolist()


def test_eases_do_what_their_names_say():
    even = middle_x("linear")
    assert even == pytest.approx([f / 10 for f in range(9)])
    assert middle_x("hold") == [0.0] * 8 + [0.8]
    slow, fast, both = middle_x("ease_in"), middle_x("ease_out"), middle_x("ease_in_out")
    assert slow[4] == pytest.approx(0.2) and fast[4] == pytest.approx(0.6)
    assert both[4] == pytest.approx(0.4) and both[1] < even[1] and both[7] > even[7]
    assert all(one[0] == 0 and one[-1] == 0.8 for one in (slow, fast, both))


def test_smooth_goes_through_all_key_frames_without_a_corner():
    places = [(0, 0.1), (5, 0.2), (10, 0.6), (15, 0.7)]
    track = Track("a", tuple(Key(f, x, 0.2, 0.2, 0.2, "smooth") for f, x in places))
    for frame, x in places:
        assert box_at(track, frame)[0] == x
    for frame, _ in places[1:-1]:
        before, here, after = (box_at(track, frame + step)[0] for step in (-1e-4, 0, 1e-4))
        assert (here - before) == pytest.approx(after - here, rel=1e-2)
    # As scipy.interpolate.PchipInterpolator slopes it: harmonic mean of 0.02 and 0.08.
    slope = (box_at(track, 5 + 1e-6)[0] - 0.2) / 1e-6
    assert slope == pytest.approx(2 / (1 / 0.02 + 1 / 0.08), rel=1e-3)


@settings(max_examples=150, deadline=None)
@given(tracks(), st.integers(1, 70), st.integers(1, 70))
def test_boxes_stay_between_their_key_frames_and_in_the_picture(made, height, width):
    track, frames = made
    shares = box_shares(track, frames)
    keys = np.array([(k.x, k.y, k.w, k.h) for k in track.keys])
    assert (shares >= keys.min(0) - 1e-9).all() and (shares <= keys.max(0) + 1e-9).all()
    for k in track.keys:
        assert tuple(shares[k.frame]) == (k.x, k.y, k.w, k.h)
    boxes = pixel_boxes(track, frames, (height, width))
    assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    masks = box_masks(boxes, (height, width))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert masks.dtype == bool and (masks.sum((1, 2)) == areas).all()


def test_pixels_are_half_open_and_masks_too():
    track = pixel_track("a", [(0, 2, 1, 3, 2, "linear")], 1, (5, 8))
    assert pixel_boxes(track, 1, (5, 8)).tolist() == [[2, 1, 5, 3]]
    (mask,) = box_masks(pixel_boxes(track, 1, (5, 8)), (5, 8))
    assert mask[1:3, 2:5].all() and mask.sum() == 6
    # The same place at twice the size; beyond the border it is cut off.
    assert pixel_boxes(track, 1, (10, 16)).tolist() == [[4, 2, 10, 6]]
    out = pixel_track("a", [(0, -2, 4, 4, 4, "linear")], 1, (5, 8))
    assert pixel_boxes(out, 1, (5, 8)).tolist() == [[0, 4, 2, 5]]
    paths = BoxPaths(1, (track, out))
    assert track_masks(paths, (5, 8)).sum((1, 2, 3)).tolist() == [6, 2]
    assert track_masks(BoxPaths(3), (5, 8)).shape == (0, 3, 5, 8)


# --- where paths come from --------------------------------------------------------------------


def test_from_the_first_and_the_last_box():
    paths = between((0, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 5, "ease_in_out")
    assert box_at(paths.tracks[0], 2) == pytest.approx((0.25, 0.25, 0.5, 0.5))
    assert between((0, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 1).tracks[0].keys[0].x == 0
    refused(lambda: between((0, 0, 0, 1), (0, 0, 1, 1), 5), "without area")


def test_along_a_drawn_path_at_an_even_pace():
    # Twice as far right as down, drawn with many points at first and few later.
    line = [(0.001 * i, 0) for i in range(400)] + [(0.4, 0), (0.4, 0.2)]
    paths = along((0.1, 0.1, 0.2, 0.2), line, 13)
    boxes = box_shares(paths.tracks[0], 13)
    middles = boxes[:, :2] + 0.1
    assert middles[0] == pytest.approx([0.2, 0.2]) and middles[-1] == pytest.approx([0.6, 0.4])
    assert middles[8] == pytest.approx([0.6, 0.2], abs=0.003)
    steps = np.hypot(*np.diff(middles, axis=0).T)
    assert steps == pytest.approx(0.05, abs=0.003)
    assert (boxes[:, 2:] == 0.2).all() and len(paths.tracks[0].keys) == 3
    outside = along((0.1, 0.1, 0.2, 0.2), [(0, 0), (5, 0)], 4)
    assert box_at(outside.tracks[0], 3)[0] == pytest.approx(0.9)
    refused(lambda: along((0.1, 0.1, 0.2, 0.2), [(0, 0), (0, 0)], 4), "no length")
    refused(lambda: along((0.1, 0.1, 0.2, 0.2), [(0, 0)], 4), "no length")
    refused(lambda: along((0.1, 0.1, 0.2, 0.2), [(0, float("nan"))], 4), "no point")


def test_from_masks_with_gaps_and_back():
    masks = np.zeros((6, 20, 40), np.float32)
    for frame in (1, 2, 4):
        masks[frame, 4:10, 4 * frame : 4 * frame + 8] = 1
    masks[:, 0, 0] = 0.4
    boxes = pixel_boxes(from_masks(masks).tracks[0], 6, (20, 40))
    assert boxes[:, 0].tolist() == [4, 4, 8, 12, 16, 16] and (boxes[:, 1] == 4).all()
    assert (boxes[:, 2] - boxes[:, 0] == 8).all() and (boxes[:, 3] == 10).all()
    again = from_masks(box_masks(boxes, (20, 40)))
    assert (pixel_boxes(again.tracks[0], 6, (20, 40)) == boxes).all()
    refused(lambda: from_masks(masks * 0), "empty")
    refused(lambda: from_masks(masks[0]), "one mask a frame")
    refused(lambda: from_masks(masks, smooth=7), "smooth is 7")


def test_a_shaky_mask_is_smoothed():
    masks = np.zeros((12, 20, 60), bool)
    for frame in range(12):
        left = 4 * frame + (frame % 2) * 3
        masks[frame, 4:10, left : left + 8] = True
    shaky, calm = (box_shares(from_masks(masks, s).tracks[0], 12)[:, 0] for s in (0, 3))
    inner = slice(3, -3)
    assert np.abs(np.diff(calm[inner], 2)).max() < 0.2 * np.abs(np.diff(shaky[inner], 2)).max()
    assert calm[0] == pytest.approx(shaky[0]) and calm[-1] == pytest.approx(shaky[-1])
    few = from_masks(masks, 3, keep=0.02).tracks[0]
    assert len(few.keys) < 6 and np.abs(box_shares(few, 12)[:, 0] - calm).max() <= 0.02 + 1e-9


def pixel_box(x, y=2, width=4, height=3, **more) -> dict:
    return {"x": x, "y": y, "width": width, "height": height, **more}


def test_bounding_boxes_of_the_host_there_and_back():
    size = (10, 20)
    stays = from_bounding_boxes(pixel_box(5), size, 4)
    assert pixel_boxes(stays.tracks[0], 4, size).tolist() == [[5, 2, 9, 5]] * 4
    moves = from_bounding_boxes([pixel_box(x) for x in (1, 3, 2)], size, 3)
    assert len(moves.tracks) == 1
    assert pixel_boxes(moves.tracks[0], 3, size)[:, 0].tolist() == [1, 3, 2]
    two = from_bounding_boxes([pixel_box(1), pixel_box(9)], size, 3)
    assert len(two.tracks) == 2 and len(two.tracks[0].keys) == 1
    lists = to_bounding_boxes(moves.joined(two), size)
    assert [len(boxes) for boxes in lists] == [3, 3, 3]
    assert lists[1][0] == pixel_box(3, label="a")
    again = from_bounding_boxes(lists, size, 3)
    assert to_bounding_boxes(again, size)[2][1]["x"] == 1
    assert to_bounding_boxes(BoxPaths(2), size) == [[], []]


def test_detections_that_come_and_go_or_change_places():
    size = (10, 20)
    lists = [[pixel_box(1)], [], [pixel_box(5)]]
    boxes = pixel_boxes(from_bounding_boxes(lists, size, 3).tracks[0], 3, size)
    assert boxes[:, 0].tolist() == [1, 3, 5]
    cat, dog = pixel_box(1, label="cat"), pixel_box(12, label="dog")
    paths = from_bounding_boxes([[cat, dog], [dog, cat]], size, 2)
    assert pixel_boxes(paths.tracks[0], 2, size)[:, 0].tolist() == [1, 1]
    # Two cats are told apart by their places alone.
    paths = from_bounding_boxes([[cat, {**dog, "label": "cat"}]], size, 2)
    assert len(paths.tracks) == 2
    # Ten detections for a clip of four frames.
    paths = from_bounding_boxes([[pixel_box(x)] for x in range(10)], size, 4)
    assert pixel_boxes(paths.tracks[0], 4, size)[[0, -1], 0].tolist() == [0, 9]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, ["are 3"]),
        ("boxes", ["'boxes'"]),
        ([], ["no bounding boxes"]),
        ([[], []], ["no bounding boxes"]),
        ([[3]], ["frame 0", "3"]),
        ([3], ["frame 0", "3"]),
        ([{"x": 1}], ["numbers"]),
        ([[], [pixel_box(float("nan"))]], ["frame 1", "numbers"]),
        (pixel_box(1, width=0), ["0x3"]),
        (pixel_box(30), ["outside"]),
        ([[pixel_box(1)] * 17], ["17"]),
    ],
)
def test_what_is_wrong_with_bounding_boxes_is_said(value, words):
    refused(lambda: from_bounding_boxes(value, (10, 20), 4), *words)


def test_tracks_of_other_packs():
    size = (100, 200)
    cloud = torch.tensor([[[20.0 + f, 30], [80 + f, 70]] for f in range(5)])
    visible = torch.ones(5, 2)
    visible[2] = 0
    tracks = {"track_path": cloud, "track_visibility": visible}
    (track,) = from_tracks(tracks, size, 5).tracks
    assert box_at(track, 0) == pytest.approx((0.1, 0.3, 0.3, 0.4))
    assert box_at(track, 2)[0] == pytest.approx(22 / 200)
    line = [{"x": 50 + 10 * f, "y": 50} for f in range(11)]
    for value in (line, [line], json.dumps([line])):
        (track,) = from_tracks(value, size, 6).tracks
        assert box_at(track, 5) == pytest.approx((0.75 - 0.125, 0.375, 0.25, 0.25))
    both = from_tracks([line, line[:2]], size, 11)
    assert len(both.tracks) == 2 and both.frames == 11
    assert box_at(both.tracks[1], 10) == pytest.approx((0.3 - 0.125, 0.375, 0.25, 0.25))


def test_whatever_holds_a_path_is_read():
    size = (100, 200)
    line = [{"x": 50 + 10 * f, "y": 50} for f in range(5)]
    box = {"x": 40, "y": 30, "width": 20, "height": 40}
    tracks = {"track_path": torch.full((5, 1, 2), 50.0)}
    contract = document(key())
    for value in (line, [line], json.dumps(line), box, [box], [[box]], [[], [box]], tracks):
        (track,) = read_path(value, size, 5).tracks
        x, y, w, h = box_at(track, 0)
        assert (x + w / 2, y + h / 2) == pytest.approx((0.25, 0.5)), value
    for value in (contract, json.dumps(contract)):
        assert read_path(value, size, 9) == parse_boxes(contract)
    refused(lambda: read_path(3, size, 5), "are 3")
    refused(lambda: read_path({"a": 1}, size, 5), "numbers")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["are []"]),
        (3, ["are 3"]),
        ([[]], ["A track is []"]),
        ([{"x": 1}], ["A track"]),
        ([{"x": float("nan"), "y": 1}], ["A track"]),
        ([{"x": 500, "y": 5}], ["no visible point"]),
        ({"track_path": [[1, 2]]}, ["shape"]),
        ({"track_path": "abc"}, ["numbers"]),
        ({"track_path": torch.zeros(2, 1, 2), "track_visibility": torch.zeros(3)}, ["visibility"]),
        ({"track_path": torch.ones(2, 1, 2), "track_visibility": torch.zeros(2, 1)}, ["visible"]),
        ([[{"x": 1, "y": 1}]] * 17, ["17 tracks"]),
    ],
)
def test_what_is_wrong_with_tracks_is_said(value, words):
    refused(lambda: from_tracks(value, (100, 200), 5), *words)
