"""The loss on decoded layers: what it weighs, and what it leaves alone."""

import pytest
import torch

from layerloom.engine.conditioning.layers import LayerSequence
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.training.pixel_loss import PixelLoss


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    config = {"latent_channels": 4, "width": 16, "encoder_blocks": 1, "decoder_blocks": 1}
    return StarterAutoencoder(**config).eval().requires_grad_(False)


def latents(layers):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, layers, 4, 3, 4, generator=generator)


def test_it_is_the_decoded_layers_error(autoencoder):
    segments = LayerSequence(frames=4).segments("generate")
    frames = segments[0].frames
    true = latents(4 * frames)
    found = true + 0.3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(2))
    amount = torch.tensor([1.0, 0.25])
    measured = PixelLoss(autoencoder, {"alpha": 2.0, "blended": 0.0}, 0.0)(
        found, true, amount, segments
    )
    alpha = slice(frames, 2 * frames)
    seen = autoencoder.decode(found[:, alpha]) - autoencoder.decode(true[:, alpha])
    each = seen.square().mean((1, 2, 3, 4))
    assert float(measured) == pytest.approx(float(2.0 * (each * amount).mean()), rel=1e-5)
    # Nothing is asked of layers without a weight.
    other = found.clone()
    other[:, : alpha.start] += 1
    other[:, alpha.stop :] += 1
    again = PixelLoss(autoencoder, {"alpha": 2.0}, 0.0)(other, true, amount, segments)
    assert torch.equal(measured, again)


def test_outlines_weigh_more(autoencoder):
    segments = LayerSequence(frames=4).segments("generate")
    true = latents(4 * segments[0].frames)
    whole = torch.ones(2)
    plain, outlined = (
        PixelLoss(autoencoder, {"alpha": 1.0}, weight)(true + 0.1, true, whole, segments)
        for weight in (0.0, 4.0)
    )
    assert plain < outlined <= 5 * plain


def test_given_layers_are_not_judged_and_gradients_reach_the_latents(autoencoder):
    segments = LayerSequence(frames=4).segments("decompose")
    made = sum(segment.frames for segment in segments if not segment.clean)
    true = latents(made)
    found = (true + 0.1).requires_grad_()
    loss = PixelLoss(autoencoder, {"alpha": 1.0, "blended": 5.0}, 1.0)
    loss(found, true, torch.ones(2), segments).backward()
    names = [segment.name for segment in segments if not segment.clean]
    assert "blended" not in names
    gradients = dict(zip(names, found.grad.split(segments[0].frames, 1), strict=True))
    assert {name for name, grad in gradients.items() if grad.abs().max() > 0} == {"alpha"}
    assert all(parameter.grad is None for parameter in autoencoder.parameters())
    assert float(loss(true, true, torch.ones(2), segments)) == 0.0
