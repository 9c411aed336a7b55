"""Places of a box in its subject's picture: as the picture is made, wherever the box goes."""

import numpy as np
import pytest
import torch

from layerloom.engine.conditioning.subjects import on_white
from layerloom.engine.models.dreamvideo import DreamVideo, TrajectorySettings
from layerloom.engine.models.subject_places import (
    CHANNELS,
    box_edges,
    box_places,
    picture_places,
    waves,
)

SIZES = [(96, 96), (64, 112), (112, 64)]


def boxes(size, *edges):
    """Masks [1, 1, T, H, W], one a frame."""
    masks = torch.zeros(1, 1, len(edges), *size)
    for frame, (x0, y0, x1, y1) in enumerate(edges):
        masks[:, :, frame, y0:y1, x0:x1] = 1
    return masks


def test_edges_are_those_of_the_pixels():
    edges = [(0, 0, 96, 96), (3, 5, 4, 6), (10, 0, 96, 7), (95, 95, 96, 96)]
    assert box_edges(boxes((96, 96), *edges))[0, 0].tolist() == [list(map(float, e)) for e in edges]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wide, tall", [(20, 20), (12, 30), (40, 8)])
def test_a_box_lies_where_the_picture_shows_its_subject(size, wide, tall):
    """Pixels inside of a box are those that the picture has its subject in."""
    picture = on_white(np.zeros((tall, wide, 3), np.uint8), None, size)
    shown = torch.from_numpy(picture).float().mean(-1).flatten() < 128
    own = picture_places(size)[shown]
    places = box_places(boxes(size, (7, 9, 7 + wide, 9 + tall)), size)[0, 0].unflatten(0, size)
    inside = places[9 : 9 + tall, 7 : 7 + wide].flatten(0, 1)
    # Middles of pixels: half of one of either kind at most, and where the picture was rounded.
    zoom = 0.75 * min(size[0] / tall, size[1] / wide)
    allowed = (zoom / 2 + 1) / max(size)
    assert (inside.amin(0) - own.amin(0)).abs().max() <= allowed
    assert (inside.amax(0) - own.amax(0)).abs().max() <= allowed
    assert (inside.mean(0) - own.mean(0)).abs().max() <= 1 / max(size)


def test_places_go_with_the_box_and_grow_with_it():
    moved = box_places(boxes((96, 96), (8, 16, 32, 40), (40, 48, 64, 72)), (12, 12))
    first, second = moved[0, 0].unflatten(0, (2, 12, 12))
    torch.testing.assert_close(first[2:5, 1:4], second[6:9, 5:8])
    larger = box_places(boxes((96, 96), (0, 0, 96, 96)), (12, 12))[0, 0]
    torch.testing.assert_close(larger, 0.75 * picture_places((12, 12)))


def test_far_away_everywhere_is_alike_and_no_wave_comes_round():
    far = box_places(boxes((96, 96), (0, 0, 8, 8)), (12, 12))[0, 0].unflatten(0, (12, 12))
    assert torch.equal(far[11, 5], far[11, 11]) and far.abs().max() <= 1
    line = torch.linspace(-1, 0.5, 200)
    near = waves(torch.stack([line, torch.zeros(200)], -1))
    assert near.shape == (200, CHANNELS)
    # Seen from the picture's far side no other place looks like it.
    alike = near @ near[-1]
    assert alike.argmax() == 199 and alike[-1] == pytest.approx(CHANNELS / 2)
    assert alike[:150].max() < 0.75 * alike[-1]


def test_parts_of_a_subject_are_found_by_their_place():
    """Before any training: each place of the box sees most of its own part of the picture."""
    torch.manual_seed(0)
    unet = {
        "in_channels": 4,
        "out_channels": 4,
        "block_channels": (64, 64),
        "layers_per_block": 1,
        "attention_levels": (True, False),
        "context_dim": 8,
        "head_dim": 16,
        "norm_groups": 4,
    }
    settings = TrajectorySettings(placed_reference=True)
    model = DreamVideo(unet=unet, settings=settings, reference=True)
    layer = model.reference[0].attn1
    masks = boxes((96, 96), (40, 16, 88, 64))
    placement = model.place(masks)
    # Looks say nothing here: scores are by places alone.
    for part in (layer.to_q, layer.to_k):
        torch.nn.init.zeros_(part.weight)
    torch.nn.init.eye_(layer.to_v.weight)
    torch.nn.init.eye_(layer.to_out[0].weight)
    picture = torch.zeros(1, 1, 144, 64)
    # The picture's left half and its right one.
    picture[0, 0].unflatten(0, (12, 12))[:, :6] = 1
    seen = layer(
        torch.zeros(1, 144, 64),
        picture,
        placement.shares.at((12, 12)),
        places=placement.shares.places((12, 12)),
    )
    left = seen[0].mean(-1).detach().unflatten(0, (12, 12))[2:8, 5:11]
    assert left[:, :2].mean() > 0.8 and left[:, -2:].mean() < 0.2
