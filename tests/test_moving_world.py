"""What the animator learns from: a frame-by-frame autoencoder, moving scenes, cached clips."""

import random
from dataclasses import replace

import pytest
import torch
from small_animation import (
    moving_sprites,
)
from small_training import small_autoencoder

from layerloom.engine.conditioning.encoders import StarterCodec
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.training.autoencoder import edges, load_autoencoder
from layerloom.engine.training.data.moving_sprites import MovingClips
from layerloom.engine.training.moving_world import (
    PATH_PER_MOTION,
    TOKENS,
    WORDS,
    caption,
    frozen,
    moving_scene_at,
    plain_caption,
)
from layerloom.engine.training.sprite_prompts import direction_phrases, tokenise
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS, render

# The autoencoder


@pytest.mark.parametrize("blocks", ["dense", "depthwise"])
def test_a_frame_by_frame_autoencoder_codes_each_frame_alone(blocks):
    torch.manual_seed(0)
    shape = {"latent_channels": 3, "width": 32, "encoder_blocks": 1, "decoder_blocks": 1}
    codec = StarterCodec(StarterAutoencoder(**shape, temporal_factor=1, blocks=blocks).eval())
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
    name = "starter_animate_autoencoder"
    path = small_autoencoder(tmp_path, name, **{"autoencoder.width": "32"})
    config, network = load_autoencoder(path)
    assert config["temporal_factor"] == 1 and network.temporal_factor == 1


# Moving scenes


@pytest.mark.parametrize("held_out", [False, True])
def test_a_clip_moves_as_far_as_its_number_says_and_keeps_its_sprite(held_out):
    for index in range(60):
        moving = moving_scene_at(3, index, held_out, returning=0.3)
        scene = moving.scene
        assert ((scene.colour, scene.shape) in HELD_OUT_PAIRS) == held_out
        assert (scene.change, scene.growth, scene.turn) == ("none", 1.0, 0.0)
        boxes = render([scene], 9, (64, 64)).boxes[0]
        assert boxes.min() > 0 and boxes.max() < 1
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        way = centres.diff(dim=0).norm(dim=1).sum().item()
        expected = 0 if scene.direction == "still" else PATH_PER_MOTION * moving.motion
        assert way == pytest.approx(expected, abs=1e-4)
        if scene.returns:
            assert torch.allclose(centres[0], centres[-1], atol=1e-5)


def test_a_frozen_scene_is_that_frame_of_the_clip():
    scenes = [moving_scene_at(4, index, returning=0.5).scene for index in range(12)]
    clips = render(scenes, 16, (48, 48)).blended
    for frame in (0, 6, 15):
        stills = render([frozen(scene, frame, 16) for scene in scenes], 1, (48, 48)).blended
        torch.testing.assert_close(stills[:, 0], clips[:, frame], atol=1e-4, rtol=0)


def test_captions_name_the_direction_in_known_words():
    kinds = set()
    for index in range(400):
        scene = moving_scene_at(5, index, returning=0.3).scene
        text = caption(scene, random.Random(index))
        assert set(tokenise(text)) <= set(WORDS) and len(tokenise(text)) <= TOKENS
        assert scene.returns == bool({"back", "returns"} & set(tokenise(text)))
        if scene.direction != "still":
            assert any(phrase in text for phrase in direction_phrases(scene.direction)), text
        kinds.add((scene.shape in text, any(p in text for p in (" over ", " on ", "in front"))))
    assert len(kinds) >= 3  # the sprite, the sprite with its background, motion alone


def test_a_plain_caption_takes_any_direction():
    scene = replace(moving_scene_at(5, 0).scene, colour="red", shape="star", returns=False)
    assert plain_caption(scene, "up-left") == "a red star moving up and left"
    assert plain_caption(scene, "still") == "a red star standing still"


# Cached clips


def test_clips_are_encoded_once_and_again_when_stale(tmp_path):
    done = []
    source = moving_sprites(tmp_path)
    source.encode(lambda *now: done.append(now))
    assert done == [(5, 5)]
    source.encode(lambda *now: done.append(now))
    moving_sprites(tmp_path).encode(lambda *now: done.append(now))
    assert len(done) == 1
    moving_sprites(tmp_path, seed=2).encode(lambda *now: done.append(now))
    assert len(done) == 2


def test_a_batch_is_the_clips_their_captions_and_the_pictures_asked_for(tmp_path):
    source = moving_sprites(tmp_path)
    source.encode()
    picks = source.draw(torch.Generator().manual_seed(3), 3)
    clips = source.load(picks, [0, 3, 1])
    scenes = [moving_scene_at(1, pick.index, returning=0.4) for pick in picks]
    rendered = render([moving.scene for moving in scenes], 4, (32, 32)).blended * 2 - 1
    torch.testing.assert_close(clips.image, rendered[range(3), [0, 3, 1]], atol=1e-4, rtol=0)
    with torch.no_grad():
        latents = source.parts.codec.encode(rendered[1], None)
    # Encoded in bf16.
    assert (clips.latents[1].float() - latents).abs().mean() < 0.05
    assert clips.motion.tolist() == pytest.approx([moving.motion for moving in scenes])
    assert all(isinstance(text, str) and text for text in clips.text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"returning": 1.5}, "returning"), ({"scenes": 0}, "scenes"), ({"size": 20}, "size")],
)
def test_bad_data_settings_are_named(changes, message):
    with pytest.raises(LayerLoomError, match=message):
        MovingClips(**changes)
