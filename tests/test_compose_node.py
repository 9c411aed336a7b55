"""A foreground lies where, as large and as long as it was asked to, with clean edges."""

import pytest
import torch

from layerloom.engine.conditioning.compose import frame_count, layer_bytes, place_foreground
from layerloom.engine.errors import LayerLoomError

RED, GREEN, BLUE = (torch.tensor(c) for c in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]))


def flat(frames: int, height: int, width: int, colour: torch.Tensor) -> torch.Tensor:
    return colour.expand(frames, height, width, 3).clone()


def numbered(frames: int, height: int, width: int) -> torch.Tensor:
    """Grey frames whose value says which one it is."""
    values = (torch.arange(frames) + 1) / 100
    return values[:, None, None, None].expand(frames, height, width, 3).clone()


def order(image: torch.Tensor, row: int = 0, column: int = 0) -> list[int]:
    return (image[:, row, column, 0] * 100).round().int().tolist()


def test_same_size_is_composited_exactly():
    torch.manual_seed(0)
    foreground, background = torch.rand(3, 7, 9, 3), torch.rand(3, 7, 9, 3)
    alpha = torch.rand(3, 7, 9)
    image, mask = place_foreground(foreground, alpha, background)
    weight = alpha[..., None]
    # One rounding more or less of float32.
    torch.testing.assert_close(image, weight * foreground + (1 - weight) * background)
    assert torch.equal(mask, alpha)


def test_position_is_the_centre_and_scale_one_fits():
    image, mask = place_foreground(
        flat(1, 10, 10, RED), torch.ones(1, 10, 10), flat(1, 20, 40, BLUE), x=0.25, scale=0.5
    )
    assert image.shape == (1, 20, 40, 3)
    inside = torch.zeros(1, 20, 40)
    inside[:, 5:15, 5:15] = 1  # 10 x 10 around (10, 10)
    torch.testing.assert_close(mask, inside)
    torch.testing.assert_close(image, torch.where(inside[..., None] > 0, RED, BLUE))


def test_proportions_are_kept():
    _, mask = place_foreground(
        flat(1, 10, 30, RED), torch.ones(1, 10, 30), flat(1, 60, 60, BLUE), scale=1.0
    )
    rows, columns = mask[0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 0, 59)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (1.0, 1.0), (-0.1, 1.2), (3.0, -2.0)])
def test_what_lies_outside_is_cut_off(x, y):
    """The same picture on a background with wide margins, cut out afterwards."""
    torch.manual_seed(0)
    foreground, alpha = torch.rand(1, 12, 12, 3), torch.rand(1, 12, 12)
    background = torch.rand(1, 16, 16, 3)
    image, mask = place_foreground(foreground, alpha, background, x=x, y=y)
    margin = 64
    wide = torch.nn.functional.pad(background, (0, 0, margin, margin, margin, margin))
    size = 16 + 2 * margin
    large, large_mask = place_foreground(
        foreground,
        alpha,
        wide,
        x=(x * 16 + margin) / size,
        y=(y * 16 + margin) / size,
        scale=16 / size,
    )
    inner = slice(margin, margin + 16)
    # Bicubic weights computed at other coordinates: float32 rounding.
    torch.testing.assert_close(image, large[:, inner, inner], atol=2e-4, rtol=0)
    torch.testing.assert_close(mask, large_mask[:, inner, inner], atol=2e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.3, 0.77, 1.6])
def test_hidden_colours_do_not_bleed_into_edges(scale):
    foreground = flat(1, 40, 40, GREEN)
    alpha = torch.zeros(1, 40, 40)
    foreground[:, 10:30, 10:30] = RED
    alpha[:, 10:30, 10:30] = 1
    image, mask = place_foreground(foreground, alpha, flat(1, 40, 40, BLUE), scale=scale)
    assert mask.max() > 0.99
    assert image[..., 1].max() < 1e-5
    assert image.min() >= 0 and image.max() <= 1 + 1e-6
    torch.testing.assert_close(image[..., 0], mask, atol=1e-5, rtol=0)


def test_shrinking_averages_instead_of_picking():
    checks = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float()
    foreground = checks[None, :, :, None].expand(1, 64, 64, 3)
    image, _ = place_foreground(
        foreground, torch.ones(1, 64, 64), flat(1, 64, 64, BLUE), scale=0.125
    )
    assert image[0, 30:34, 30:34].sub(0.5).abs().max() < 0.02


@pytest.mark.parametrize(
    ("length", "repeat", "front", "back"),
    [
        ("foreground", "loop", [1, 2], [1, 2]),
        ("background", "loop", [1, 2, 1, 2, 1], [1, 2, 3, 4, 5]),
        ("longest", "hold", [1, 2, 2, 2, 2], [1, 2, 3, 4, 5]),
        ("shortest", "hold", [1, 2], [1, 2]),
    ],
)
def test_length_and_repeat(length, repeat, front, back):
    alpha = torch.ones(2, 4, 4)
    options = {"length": length, "repeat": repeat}
    image, mask = place_foreground(numbered(2, 4, 4), alpha, numbered(5, 4, 8), **options)
    assert order(image, column=3) == front
    assert order(image, column=0) == back
    assert len(mask) == len(image) == frame_count(2, 5, length)


def test_a_still_background_lasts_as_long_as_the_foreground():
    steps = []
    image, _ = place_foreground(
        numbered(3, 4, 4),
        torch.zeros(3, 4, 4),
        flat(1, 4, 4, BLUE),
        on_frame=lambda: steps.append(1),
    )
    torch.testing.assert_close(image, flat(3, 4, 4, BLUE))
    assert len(steps) == 3


def test_one_mask_serves_all_frames_and_inputs_stay_untouched():
    foreground, background = flat(3, 4, 4, RED), flat(3, 4, 4, BLUE)
    image, mask = place_foreground(foreground, torch.ones(4, 4), background)
    torch.testing.assert_close(image, foreground)
    assert mask.shape == (3, 4, 4)
    assert torch.equal(background, flat(3, 4, 4, BLUE))


def test_alpha_of_another_clip_is_refused():
    foreground, background = flat(4, 8, 8, RED), flat(4, 8, 8, BLUE)
    with pytest.raises(LayerLoomError, match="alpha is 6x5 and the foreground 8x8"):
        place_foreground(foreground, torch.ones(4, 5, 6), background)
    with pytest.raises(LayerLoomError, match="alpha has 3 frames and the foreground 4"):
        place_foreground(foreground, torch.ones(3, 8, 8), background)
    with pytest.raises(LayerLoomError, match="without frames"):
        place_foreground(foreground, torch.ones(4, 8, 8), background[:0])


def test_magnified_far_beyond_the_background_needs_little_memory():
    image, mask = place_foreground(
        flat(1, 64, 64, RED), torch.ones(1, 64, 64), flat(1, 64, 64, BLUE), scale=4000.0
    )
    torch.testing.assert_close(image, flat(1, 64, 64, RED))
    torch.testing.assert_close(mask, torch.ones(1, 64, 64))


def test_layer_bytes_round_instead_of_cutting_off():
    values = (torch.arange(256) / 255).reshape(1, 16, 16)
    layers = layer_bytes(
        foreground=values[..., None].expand(1, 16, 16, 3), alpha=values, blended=None
    )
    assert list(layers) == ["foreground", "alpha"]
    assert layers["alpha"].flatten().tolist() == list(range(256))
    assert layers["foreground"].shape == (1, 16, 16, 3)
    assert layer_bytes(alpha=torch.tensor([[[-0.5, 1.5]]]))["alpha"].tolist() == [[[0, 255]]]


def test_a_transparent_foreground_brings_its_own_alpha():
    foreground = torch.rand(2, 4, 4, 4)
    layers = layer_bytes(foreground=foreground)
    assert (layers["alpha"] == (foreground[..., 3] * 255).round().byte().numpy()).all()
    assert layers["foreground"].shape[-1] == 3
    assert len(layer_bytes(foreground=foreground, alpha=torch.ones(4, 4))["alpha"]) == 2
