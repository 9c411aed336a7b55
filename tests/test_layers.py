"""LayerSequence: order, frames, the duplicated frame, premultiplication, joining and splitting."""

import pytest
import torch

from layerloom.engine.conditioning.layers import (
    GIVEN,
    RGB,
    RGBA,
    LayerSequence,
    composite,
    premultiply,
    unpremultiply,
)
from layerloom.engine.conditioning.prompts import indexed_prompts
from layerloom.engine.errors import LayerLoomError


def clips(sequence: LayerSequence, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, sequence.frames, 3, size, size)
    return {name: torch.rand(shape, generator=generator) for name in sequence.layers}


@pytest.mark.parametrize("layers", [RGB, RGBA])
@pytest.mark.parametrize("duplicate", [False, True])
def test_pixels_survive_joining_and_splitting(layers, duplicate):
    sequence = LayerSequence(layers, frames=8, duplicate_first_frame=duplicate)
    given = clips(sequence)
    joined = sequence.join_pixels(given)
    assert joined.shape[1] == 8 * len(layers) + duplicate
    if duplicate:
        assert torch.equal(joined[:, 0], joined[:, 1])
    for name, clip in sequence.split_pixels(joined).items():
        assert torch.equal(clip, given[name])


def test_latent_frames_are_layerflows():
    # reference: RGB 12 = 4/4/4, RGBA 16 = 4/4/4/4, RGBA conditioned 17 = 5/4/4/4.
    def lengths(sequence):
        return [sequence.latent_frames(layer) for layer in sequence.layers]

    assert lengths(LayerSequence(RGB)) == [4, 4, 4]
    assert lengths(LayerSequence(RGBA)) == [4, 4, 4, 4]
    assert lengths(LayerSequence(RGBA, duplicate_first_frame=True)) == [5, 4, 4, 4]


@pytest.mark.parametrize("task", GIVEN)
@pytest.mark.parametrize("layers", [RGB, RGBA])
def test_segments_cover_the_clip_and_mark_given_layers(layers, task):
    sequence = LayerSequence(layers)
    segments = sequence.segments(task)
    assert [segment.name for segment in segments] == list(layers)
    clean = tuple(segment.name for segment in segments if segment.clean)
    assert clean == tuple(name for name in layers if name in GIVEN[task])


def test_partly_given_blended_layer():
    # The released RGB decomposition gives the last two of four blended latents.
    segments = LayerSequence(RGB, decompose_latents=2).segments("decompose")
    assert [(s.name, s.frames, s.clean) for s in segments] == [
        ("foreground", 4, False),
        ("background", 4, False),
        ("blended", 2, False),
        ("blended.given", 2, True),
    ]


def test_latents_join_and_split():
    sequence = LayerSequence(RGBA, frames=8, duplicate_first_frame=True)
    latents = torch.randn(1, 9, 4, 2, 2)
    parts = sequence.split_latents(latents)
    assert [part.shape[1] for part in parts.values()] == [3, 2, 2, 2]
    assert torch.equal(sequence.join_latents(parts), latents)
    kept = sequence.split_latents(latents[:, :5], ("foreground", "alpha"))
    assert list(kept) == ["foreground", "alpha"]


def test_transparent_is_mid_grey_and_comes_back_straight():
    colour = torch.rand(1, 2, 3, 8, 8) * 2 - 1
    alpha = torch.rand(1, 2, 1, 8, 8) * 0.7 + 0.3
    alpha[..., :5, :] = 0
    held = premultiply(colour, alpha)
    assert held[..., :5, :].abs().max() == 0
    straight = unpremultiply(held, alpha)
    assert torch.allclose(straight[..., 5:, :], colour[..., 5:, :], atol=1e-5)
    assert straight[..., :4, :].abs().max() == 0  # nothing near: mid-grey
    over = composite(straight, alpha, torch.zeros_like(colour))
    assert torch.allclose(over, held, atol=1e-6)


def test_soft_edges_keep_the_colour_of_their_sprite():
    colour = torch.tensor([0.8, -0.6, 0.2])[:, None, None].expand(1, 1, 3, 16, 16)
    alpha = torch.linspace(0, 1, 16).expand(1, 1, 1, 16, 16)
    straight = unpremultiply(premultiply(colour, alpha), alpha)
    assert torch.allclose(straight[..., 1:], colour[..., 1:], atol=1e-5)
    # A network's error of 2 % there must not become a bright speck.
    noisy = premultiply(colour, alpha) + 0.02 * torch.randn(1, 1, 3, 16, 16)
    error = unpremultiply(noisy, alpha) - colour
    assert error[..., 2:].abs().max() < 0.5


@pytest.mark.parametrize("frames", [0, 6, 15])
def test_frame_counts_that_do_not_divide_are_refused(frames):
    with pytest.raises(LayerLoomError, match="do not divide by 4; use"):
        LayerSequence(frames=frames)


def test_wrong_lengths_are_named():
    sequence = LayerSequence(frames=8)
    layers = clips(sequence)
    layers["alpha"] = layers["alpha"][:, :3]
    with pytest.raises(LayerLoomError, match="alpha layer has 3 frames, 8"):
        sequence.join_pixels(layers)
    with pytest.raises(LayerLoomError, match="Unknown task"):
        sequence.segments("erase")


def test_prompts_carry_their_index():
    assert indexed_prompts("generate", "a cat", "grass ", None) == [
        "0, a cat",
        "1, grass",
        "2, a cat over grass",
    ]
    assert indexed_prompts("decompose", "a cat", "grass", "both") == ["0, a cat", "1, grass"]
