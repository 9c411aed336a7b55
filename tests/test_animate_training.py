"""The animator's training: frame-by-frame autoencoder, moving scenes, phases, cached data."""

import pytest
import torch
from small_training import small_autoencoder

from layerloom.engine.conditioning.encoders import StarterCodec
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.training.autoencoder import edges, load_autoencoder

# The autoencoder


@pytest.mark.parametrize("blocks", ["dense", "depthwise"])
def test_a_frame_by_frame_autoencoder_codes_each_frame_alone(blocks):
    torch.manual_seed(0)
    network = StarterAutoencoder(
        latent_channels=3, width=32, encoder_blocks=1, decoder_blocks=1, temporal_factor=1,
        blocks=blocks,
    )  # fmt: skip
    codec = StarterCodec(network.eval())
    clip = torch.rand(2, 5, 3, 16, 24) * 2 - 1
    latents = codec.encode(clip, None)
    assert latents.shape == (2, 5, 3, 2, 3) and codec.pixel_frames(5) == 5
    assert codec.decode(latents).shape == clip.shape
    # Kernels may differ by batch size.
    torch.testing.assert_close(latents[:, 3:4], codec.encode(clip[:, 3:4], None))


def test_edges_are_where_neighbours_differ():
    clip = torch.full((1, 1, 3, 8, 8), -1.0)
    clip[..., 1, :, 4:] = 1.0
    found = edges(clip)
    assert found.shape == (1, 1, 1, 8, 8)
    assert found[0, 0, 0].nonzero()[:, 1].unique().tolist() == [3, 4]


def test_the_animators_autoencoder_trains_frame_by_frame(tmp_path):
    path = small_autoencoder(tmp_path, "starter_animate_autoencoder", **{"autoencoder.width": "32"})
    config, network = load_autoencoder(path)
    assert config["temporal_factor"] == 1 and network.temporal_factor == 1
