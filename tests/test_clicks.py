"""Clicks and masks: what is read, what is refused with a sentence, and where points end up."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from layerloom.engine.conditioning.clicks import (
    MOST,
    Click,
    Clicks,
    parse_clicks,
    pixel_clicks,
    read_box,
    read_point,
)
from layerloom.engine.conditioning.masks import check_mask, read_mask, refine, write_mask
from layerloom.engine.errors import LayerLoomError

SHARE = st.floats(0, 1)


def refused(call, *words: str) -> None:
    """One sentence that holds the words."""
    with pytest.raises(LayerLoomError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, text
    assert len(text) < 320
    for word in words:
        assert word in text, text


# --- clicks ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(SHARE, SHARE, st.integers(0, 1)), max_size=5),
    st.lists(st.tuples(SHARE, SHARE, SHARE, SHARE), max_size=3),
)
def test_clicks_survive_being_written_and_read(points, boxes):
    boxes = [box for box in boxes if box[0] != box[2] and box[1] != box[3]]
    text = json.dumps(
        {
            "version": 1,
            "points": [{"x": x, "y": y, "label": label} for x, y, label in points],
            "boxes": boxes,
        }
    )
    clicks = parse_clicks(text)
    assert [(p.x, p.y, p.label) for p in clicks.points] == points
    assert all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in clicks.boxes)
    assert parse_clicks(clicks.to_json()) == clicks
    assert clicks.selects == (bool(boxes) or any(label for *_, label in points))


def test_points_stay_on_the_object_whatever_the_size():
    clicks = parse_clicks({"points": [{"x": 0.25, "y": 0.5}], "boxes": [[0.5, 0, 1, 0.5]]})
    for height, width in ((4, 8), (100, 200), (1080, 1920)):
        points, labels, boxes = clicks.pixels((height, width))
        # Pixel 0 reaches from 0 to 1 in continuous coordinates, its centre is 0.5 away.
        assert points.tolist() == [[width / 4 - 0.5, height / 2 - 0.5]]
        assert labels.tolist() == [1]
        assert boxes.tolist() == [[width / 2 - 0.5, -0.5, width - 0.5, height / 2 - 0.5]]


def test_pixels_go_there_and_back():
    clicks = pixel_clicks([(0, 0), (7, 3, 0)], [(6, 3, 2, 1)], (4, 8))
    points, labels, boxes = clicks.pixels((4, 8))
    assert points.tolist() == [[0, 0], [7, 3]] and labels.tolist() == [1, 0]
    # Corners in any order; a box's numbers are borders between pixels.
    assert clicks.boxes == ((0.25, 0.25, 0.75, 0.75),)
    assert boxes.tolist() == [[1.5, 0.5, 5.5, 2.5]]
    assert parse_clicks('[{"x": 7, "y": 3, "label": 0}]', (4, 8)).points == (clicks.points[1],)
    # An editor that counts to the far border.
    assert parse_clicks([{"x": 8, "y": 4}], (4, 8)).points == (Click(1.0, 1.0),)


def test_nothing_clicked_is_read_and_refused_where_a_mask_is_wanted():
    for text in ("", " ", "{}", "[]", '{"version": 1, "points": [], "boxes": []}'):
        assert parse_clicks(text) == Clicks()
    refused(Clicks().require, "select nothing", "label 1")
    refused(Clicks((Click(0.5, 0.5, 0),)).require, "select nothing")
    assert Clicks(boxes=((0, 0, 1, 1),)).require().selects


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not JSON", "character 1"]),
        ("[" * 100_000, ["not JSON"]),
        ("3", ["are 3"]),
        ('"points"', ["'points'"]),
        ("null", ["None"]),
        ('{"version": 2}', ["version 2", "update"]),
        ('{"clicks": []}', ["'clicks'"]),
        ('{"points": 3}', ["points are 3"]),
        ('{"points": "abc"}', ["points are 'abc'"]),
        ('{"points": [[1, 2]]}', ["[1, 2]"]),
        ('{"points": [{"x": 0.5}]}', ["{'x': 0.5}"]),
        ('{"points": [{"x": 0.5, "y": 0.5, "z": 1}]}', ["'z'"]),
        ('{"points": [{"x": NaN, "y": 0.5}]}', ["x = nan"]),
        ('{"points": [{"x": 0.5, "y": 1e999}]}', ["y = inf"]),
        ('{"points": [{"x": "0.5", "y": 0.5}]}', ["x = '0.5'"]),
        ('{"points": [{"x": true, "y": 0.5}]}', ["x = True"]),
        ('{"points": [{"x": 1.5, "y": 0.5}]}', ["(1.5, 0.5)", "outside"]),
        ('{"points": [{"x": 0.5, "y": -0.1}]}', ["outside"]),
        ('{"points": [{"x": 0.5, "y": 0.5, "label": 2}]}', ["label 2"]),
        ('{"points": [{"x": 0.5, "y": 0.5, "label": "1"}]}', ["label '1'"]),
        ('{"boxes": [[0, 0, 1]]}', ["[0, 0, 1]"]),
        ('{"boxes": [[0, 0, 1, NaN]]}', ["nan"]),
        ('{"boxes": [[0, 0, 2, 1]]}', ["0,0,2,1", "beyond"]),
        ('{"boxes": [[0.5, 0, 0.5, 1]]}', ["no area"]),
        ('{"boxes": [0, 0, 1, 1]}', ["A box"]),
        ('[{"x": 5, "y": 5}]', ["pixels", "size"]),
    ],
)
def test_what_is_wrong_with_clicks_is_said(text, words):
    refused(lambda: parse_clicks(text), *words)


def test_points_outside_the_picture_are_refused():
    refused(lambda: parse_clicks([{"x": 9, "y": 1}], (4, 8)), "(9, 1)", "8x4")
    refused(lambda: pixel_clicks([(8, 0)], [], (4, 8)), "8,0", "7,3")
    refused(lambda: pixel_clicks([(-1, 0)], [], (4, 8)), "-1,0")
    refused(lambda: pixel_clicks([], [(0, 0, 9, 4)], (4, 8)), "0,0,9,4", "8x4")
    refused(lambda: pixel_clicks([], [(1, 1, 1, 4)], (4, 8)), "no area")
    many = {"points": [{"x": 0.5, "y": 0.5}] * (MOST + 1)}
    refused(lambda: parse_clicks(many), f"{MOST + 1} points")


def test_points_and_boxes_of_the_command():
    assert read_point("40,60") == (40, 60, 1) and read_point(" 4.5, 6 ,0") == (4.5, 6, 0)
    assert read_box("10,20,90,80") == (10, 20, 90, 80)
    for text in ("", "40", "40;60", "a,b", "1,2,3", "1,2,1,1", "nan,1", "1,inf"):
        refused(lambda text=text: read_point(text), repr(text), "X,Y")
    for text in ("", "1,2,3", "1,2,3,x", "1,2,3,nan"):
        refused(lambda text=text: read_box(text), repr(text), "X0,Y0,X1,Y1")


# --- masks ----------------------------------------------------------------------------------


def test_a_mask_is_written_and_read(tmp_path):
    mask = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    write_mask(tmp_path / "mask.png", mask)
    read = read_mask(tmp_path / "mask.png", (3, 4))
    assert read.dtype == np.float32 and np.abs(read - mask).max() <= 0.5 / 255 + 1e-6
    # A cut-out's transparency is its mask, whatever its colours.
    rgba = np.zeros((3, 4, 4), np.uint8)
    rgba[1, 1] = 255
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    assert read_mask(tmp_path / "cut.png", (3, 4)).sum() == 1


def test_masks_that_cannot_be_meant_are_refused(tmp_path):
    write_mask(tmp_path / "black.png", np.zeros((3, 4)))
    refused(lambda: read_mask(tmp_path / "black.png", (3, 4)), "empty", "black.png")
    refused(lambda: read_mask(tmp_path / "black.png", (6, 8)), "4x3", "8x6")
    refused(lambda: read_mask(tmp_path / "none.png", (3, 4)), "does not exist")
    refused(lambda: check_mask(torch.full((2, 2), math.nan), (2, 2)), "no numbers")
    refused(lambda: check_mask(np.full((2, 2), 0.49), (2, 2), "mask of region 2"), "region 2")
    refused(lambda: check_mask(np.ones((2, 2, 1)), (2, 2)), "1x2x2", "2x2")


def test_dilation_moves_the_outline_by_so_many_pixels():
    ys, xs = torch.meshgrid(torch.arange(61.0), torch.arange(81.0), indexing="ij")
    distance = ((ys - 30).square() + (xs - 40).square()).sqrt()
    disc = distance <= 10
    for pixels in (1, 4, 15, -4):
        grown = refine(disc, pixels)
        assert set(grown.unique().tolist()) == {0.0, 1.0} and grown.dtype == torch.float32
        # An octagon's corners reach 8 % further than its sides; outlines are whole pixels.
        reach = abs(pixels) * 0.083 + 1
        outer, inner = max(pixels, pixels * 1.083), min(pixels, pixels * 1.083)
        assert not grown[distance > 10 + outer + 1].any(), pixels
        assert grown[distance < 10 + inner - reach].all(), pixels
    assert torch.equal(refine(disc), disc.float())


def test_a_border_does_not_eat_the_mask():
    whole = torch.ones(2, 9, 7)
    assert refine(whole, -3, 4).min() > 0.999
    assert refine(whole * 0, 3, 4).max() == 0
    half = torch.zeros(9, 40)
    half[:, :20] = 1
    assert refine(half, -3)[:, :17].all() and not refine(half, -3)[:, 17:].any()


def test_feather_fades_over_so_many_pixels():
    half = torch.zeros(40, 80)
    half[:, :40] = 1
    soft = refine(half, 0, 12)[20]
    inside = (soft > 0.0227) & (soft < 0.9773)
    assert 11 <= inside.sum() <= 13
    assert abs(soft[39] + soft[40] - 1) < 1e-5, "the outline stays where it was"
    assert (soft[:-1] >= soft[1:] - 1e-6).all()
    # Whatever is far away does not change, and a small part of a large picture is enough.
    assert soft[:28].min() > 0.999 and soft[52:].max() < 1e-3


def test_refinement_out_of_range_is_refused():
    mask = torch.ones(4, 4)
    refused(lambda: refine(mask, 513), "513")
    refused(lambda: refine(mask, 0, -1), "-1")
    refused(lambda: refine(mask, 0, math.nan), "nan")
