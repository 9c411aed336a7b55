"""The starters' autoencoder and word encoder: shapes, standardised latents, words to ids."""

import pytest
import torch

from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordEncoder, WordTokenizer
from layerloom.engine.training.sprite_world import VOCABULARY

SMALL = {"latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}


def autoencoder() -> StarterAutoencoder:
    torch.manual_seed(0)
    return StarterAutoencoder(**SMALL)


@torch.no_grad()
def test_four_frames_and_eight_pixels_make_one_latent():
    model = autoencoder()
    clip = torch.rand(2, 8, 3, 16, 24) * 2 - 1
    latents = model.encode(clip)
    assert latents.shape == (2, 2, 4, 2, 3)
    assert model.decode(latents).shape == clip.shape


@torch.no_grad()
def test_groups_of_four_frames_know_nothing_of_each_other():
    model = autoencoder()
    clip = torch.rand(1, 8, 3, 16, 16)
    whole = model.encode(clip)
    parts = torch.cat([model.encode(clip[:, :4]), model.encode(clip[:, 4:])], dim=1)
    # Another batch size may sum in another order.
    assert torch.allclose(whole, parts, atol=1e-5)
    decoded = model.decode(whole)
    assert torch.allclose(decoded[:, 4:], model.decode(whole[:, 1:]), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 6, 3, 16, 16), (1, 4, 3, 12, 16), (1, 4, 3, 16, 20)])
def test_clips_that_do_not_divide_are_refused(shape):
    with pytest.raises(ValueError, match="frames must divide by 4, sides by 8"):
        autoencoder().encode(torch.zeros(shape))


@torch.no_grad()
def test_latents_are_standardised_by_what_training_saw():
    model = autoencoder()
    clip = torch.rand(16, 4, 3, 16, 16) * 2 - 1
    codes = model.encode_groups(clip) * 5 + 3  # far from mean 0 and spread 1
    latents = model.bottleneck(codes, torch.zeros(codes.shape))
    assert float(latents.mean((0, 2, 3)).abs().max()) < 1e-4
    # 1e-4 is added to the spread.
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=5e-3)
    noise = torch.randn(codes.shape)
    assert torch.allclose(model.bottleneck(codes, noise) - latents, noise, atol=1e-5)

    codes = model.encode_groups(clip)
    for _ in range(500):
        model.bottleneck(codes, torch.zeros(codes.shape))
    found = model.encode(clip)[:, 0]
    # The running statistics have met the batch's own: 0.98 ** 500 is 4e-5.
    assert torch.allclose(found, model.bottleneck(codes, torch.zeros(codes.shape)), atol=1e-2)


def test_words_become_ids():
    tokenizer = WordTokenizer(["a", "red", "circle", "0"], tokens=5)
    assert tokenizer("0, A red CIRCLE!").tolist() == [5, 2, 3, 4, 0]
    assert tokenizer("a zebra").tolist() == [2, 1, 0, 0, 0]
    assert tokenizer("a a a a a red red").tolist() == [2] * 5
    assert tokenizer("").tolist() == [0] * 5
    assert tokenizer.unknown_words("0, a blue-red Zebra") == ["blue", "zebra"]


def test_the_starters_vocabulary_holds_the_prompt_indices():
    tokenizer = WordTokenizer(VOCABULARY, tokens=16)
    assert tokenizer.unknown_words("0, a red circle") == []
    assert len({int(tokenizer(f"{index}, a")[0]) for index in range(3)}) == 3


@torch.no_grad()
def test_features_are_word_plus_position():
    encoder = WordEncoder(vocabulary=4, tokens=3, dim=6)
    ids = torch.tensor([[2, 2, 0], [5, 2, 1]])
    features = encoder(ids)
    assert features.shape == (2, 3, 6)
    assert torch.equal(features[1, 1], features[0, 1])
    # The same word at two places differs by the places alone.
    moved = features[0, 0] - features[0, 1]
    expected = encoder.position.weight[0] - encoder.position.weight[1]
    assert torch.allclose(moved, expected, atol=1e-6)
