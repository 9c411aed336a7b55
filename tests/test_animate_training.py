"""The animator's training: frame-by-frame autoencoder, moving scenes, phases, cached clips."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from animate_files import whole_state, write_checkpoint, write_tokenizer
from PIL import Image
from safetensors.torch import save_file
from small_training import RECIPES, SMALL_CLIPS, SMALL_PHASE, small_animator, small_autoencoder

from layerloom.engine.checkpoints.dynamicrafter import load_dynamicrafter, open_dynamicrafter
from layerloom.engine.conditioning.encoders import StarterCodec
from layerloom.engine.conditioning.frame_codec import StarterFrameCodec
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.dynamicrafter import VARIANTS, QueryTransformer
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_image import StarterImageEncoder
from layerloom.engine.models.starter_text import WordEncoder, WordTokenizer
from layerloom.engine.models.video_blocks import plain_attention
from layerloom.engine.models.video_unet import VideoUNet
from layerloom.engine.training.animate import (
    AnimateNetwork,
    AnimateStage,
    AnimateTask,
    detail_of,
    matrix_attention,
)
from layerloom.engine.training.animate_card import AnimateCard
from layerloom.engine.training.animate_networks import (
    TEMPORAL,
    Shapes,
    build_animate_network,
    initialise,
)
from layerloom.engine.training.autoencoder import edges, load_autoencoder
from layerloom.engine.training.data.clip_folder import CaptionedClips, plan_clips
from layerloom.engine.training.data.clips import ClipParts
from layerloom.engine.training.data.moving_sprites import MovingClips, MovingSprites
from layerloom.engine.training.distributed import checkpoint_blocks
from layerloom.engine.training.moving_world import (
    PATH_PER_MOTION,
    TOKENS,
    WORDS,
    caption,
    frozen,
    moving_scene_at,
    plain_caption,
)
from layerloom.engine.training.recipe import load_recipe, train_from_recipe
from layerloom.engine.training.shares import Shares
from layerloom.engine.training.sprite_prompts import direction_phrases, tokenise
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS, render

# The autoencoder


def frame_autoencoder() -> StarterAutoencoder:
    torch.manual_seed(0)
    return StarterAutoencoder(
        latent_channels=4,
        temporal_factor=1,
        width=32,
        encoder_blocks=1,
        decoder_blocks=1,
        blocks="dense",
    ).eval()


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


def moving_sprites(folder, **changes) -> MovingSprites:
    clips = MovingClips(frames=4, size=32, scenes=5, returning=0.4, **changes)
    codec = StarterFrameCodec(frame_autoencoder())
    return MovingSprites(clips, ClipParts(codec, 4, (32, 32), 16, folder))


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


# The stage

UNET = {
    "out_channels": 4,
    "block_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "context_dim": 8,
    "head_dim": None,
    "num_heads": 2,
    "norm_groups": 4,
    "image_attention": True,
    "image_tokens_per_frame": 2,
    "scalar_embeddings": ("fps_embedding",),
}
PROJECTOR = {
    "dim": 8,
    "depth": 1,
    "heads": 2,
    "head_dim": 4,
    "queries": 8,
    "in_dim": 8,
    "out_dim": 8,
}


def small_network(in_channels: int = 8) -> AnimateNetwork:
    torch.manual_seed(1)
    network = AnimateNetwork(
        VideoUNet(in_channels=in_channels, **UNET),
        QueryTransformer(**PROJECTOR),
        WordEncoder(vocabulary=len(WORDS), tokens=TOKENS, dim=8),
        StarterImageEncoder(size=32, dim=8, width=8),
    )
    initialise(network)
    return network


def small_stage(folder, task: AnimateTask, batch: int = 4, variant: str = "512", network=None):
    source = moving_sprites(folder)
    source.encode()
    tokenizer = WordTokenizer(WORDS, TOKENS)
    network = network or small_network()
    return AnimateStage(network, source, task, batch, VARIANTS[variant], None, tokenizer)


def draw(stage, seed: int = 0, shares: Shares | None = None):
    generator = torch.Generator().manual_seed(seed)
    return stage.draw(generator, *([shares] if shares else []))


def test_the_shares_of_processes_are_one_large_batch(tmp_path):
    stage = small_stage(tmp_path, AnimateTask(ends=0.5), batch=2)
    apart = [draw(stage, 7, Shares([part], 2))[0] for part in (0, 1)]
    together = draw(stage, 7, Shares([0, 1], 2))
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.timestep, other.timestep)
        assert torch.equal(one.clips.latents, other.clips.latents)
        assert one.clips.text == other.clips.text


def test_the_picture_is_any_frame_the_first_or_both_ends(tmp_path):
    anywhere = small_stage(tmp_path, AnimateTask(random_frame=1.0), batch=40)
    assert set(draw(anywhere)[0].frame.tolist()) == {0, 1, 2, 3}
    first = small_stage(tmp_path, AnimateTask(random_frame=0.0), batch=40)
    assert set(draw(first)[0].frame.tolist()) == {0}
    both = small_stage(tmp_path, AnimateTask(random_frame=1.0, ends=0.5), batch=40)
    drawn = draw(both)[0]
    assert 5 < int(drawn.ends.sum()) < 35 and set(drawn.frame[drawn.ends].tolist()) == {0}

    latents = torch.randn(2, 3, 5, 2, 2)
    given = detail_of(latents, torch.tensor([2, 0]), torch.tensor([False, True]))
    assert all(torch.equal(given[0, :, t], latents[0, :, 2]) for t in range(5))
    assert torch.equal(given[1, :, [0, 4]], latents[1, :, [0, 4]])
    assert not given[1, :, 1:4].any()


def test_single_frames_are_trained_with_their_own_picture(tmp_path):
    stage = small_stage(tmp_path, AnimateTask(frames=1), batch=6, network=small_network(4))
    drawn = draw(stage)[0]
    assert drawn.clips.latents.shape == (6, 1, 4, 4, 4) and drawn.noise.shape == (6, 4, 1, 4, 4)
    with torch.no_grad():
        latents = stage.source.parts.codec.encode(drawn.clips.image, None)
    assert (drawn.clips.latents[:, 0].float() - latents).abs().mean() < 0.05
    loss, _ = stage.loss(drawn)
    loss.backward()


def test_conditions_are_left_out_in_the_papers_shares(tmp_path):
    stage = small_stage(tmp_path, AnimateTask(condition_dropout=0.1), batch=2000)
    picks = stage.source.draw
    stage.source.draw = lambda generator, batch: picks(generator, batch)[:1] * batch
    drawn = draw(stage)[0]
    text, image = drawn.text, drawn.image
    # Each share is 0.1 of 2000 draws: a standard deviation of 0.007.
    for left_out in (~text & image, ~text & ~image, text & ~image):
        assert float(left_out.float().mean()) == pytest.approx(0.1, abs=0.03)


def test_what_is_left_out_is_the_empty_prompt_and_a_grey_picture(tmp_path):
    stage = small_stage(tmp_path, AnimateTask())
    drawn = draw(stage)[0]
    none = torch.zeros(4, dtype=torch.bool)
    grey = stage.image(replace(drawn, image=none))
    pictures = drawn.clips._replace(image=torch.zeros_like(drawn.clips.image))
    assert torch.equal(grey, stage.image(replace(drawn, clips=pictures)))
    blank = drawn.clips._replace(text=[""] * 4)
    empty = stage.text(replace(drawn, clips=blank))
    assert torch.equal(stage.text(replace(drawn, text=none)), empty)


@pytest.mark.parametrize("variant", ["512", "256"])
def test_a_fresh_networks_loss_is_the_targets_own_size(tmp_path, variant):
    """The last layer starts at zero: the loss is the mean square of v, or of the noise."""
    stage = small_stage(tmp_path, AnimateTask(), batch=8, variant=variant)
    drawn = draw(stage)[0]
    loss, _ = stage.loss(drawn)
    x0 = drawn.clips.latents.float().transpose(1, 2)
    if variant == "256":
        target = drawn.noise
    else:
        # Dynamic rescale: the clean latents shrink with the noise (down to 0.7 at t >= 400).
        ramp = torch.linspace(1, 0.7, 400, dtype=torch.float64)
        scale = torch.where(
            drawn.timestep < 400, ramp[drawn.timestep.clamp(max=399)], torch.tensor(0.7)
        )
        x0 = x0 * scale[:, None, None, None, None]
        target = stage.schedule.velocity(x0, drawn.noise, drawn.timestep)
    assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_changed_places_can_weigh_more(tmp_path):
    plain = small_stage(tmp_path, AnimateTask(random_frame=0.0))
    heavy = small_stage(tmp_path, AnimateTask(random_frame=0.0, change_weight=9.0))
    drawn = draw(plain)[0]
    for part in heavy.network.unet.conv_out.parameters():
        torch.nn.init.zeros_(part)
    losses = [stage.loss(drawn)[0].item() for stage in (plain, heavy)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    heavy.task = replace(heavy.task, change_weight=1e-9)
    assert heavy.loss(drawn)[0].item() == pytest.approx(losses[0], rel=1e-5)


def test_computing_blocks_again_changes_no_gradient(tmp_path):
    gradients = []
    for again in (False, True):
        stage = small_stage(tmp_path, AnimateTask())
        for parameter in stage.network.unet.conv_out.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        if again:
            checkpoint_blocks(stage.blocks)
        stage.loss(draw(stage)[0])[0].backward()
        gradients.append({n: p.grad for n, p in stage.network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_attention_by_matrices_is_torchs_own():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4) for n in (5, 7, 7))
    torch.testing.assert_close(matrix_attention(q, k, v, 0.5), plain_attention(q, k, v, 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 3}, "task.frames is 3"),
        ({"random_frame": 2.0}, "random_frame is 2.0"),
        ({"condition_dropout": 0.5}, "condition_dropout is 0.5"),
        ({"frames": 1, "ends": 0.5}, "ends needs clips"),
    ],
)
def test_bad_tasks_are_named(changes, message):
    with pytest.raises(LayerLoomError, match=message):
        AnimateTask(**changes)


# Phases


def test_the_phases_follow_each_other_and_change_nothing_at_first(tmp_path):
    """Temporal layers and the detail stream come in without an effect."""
    start = open_dynamicrafter(small_animator(tmp_path, phases=1))
    start.check()
    keywords = start.info.unet
    network = load_dynamicrafter(start, dtype=torch.float32)
    temporal = {
        "temporal_convolution": True,
        "temporal_transformer": True,
        "initial_temporal_transformer": True,
    }
    words = {**start.metadata["text_encoder"], "vocabulary": len(WORDS)}
    words.pop("kind")
    image = {k: v for k, v in start.metadata["image_encoder"].items() if k != "kind"}
    shapes = Shapes(
        {**keywords, **temporal, "in_channels": 8}, start.info.image_projector, words, image
    )
    grown = build_animate_network(shapes, start)
    x, t = torch.randn(1, 4, 4, 4, 4), torch.tensor([500])
    text, given = torch.randn(1, 3, 8), torch.randn(1, 4, 4, 4, 4)
    tokens, number = torch.randn(1, 8, 8), {"fps_embedding": torch.ones(1)}
    with torch.no_grad():
        before = network.unet(x, t, text, image_context=tokens, scalars=number)
        after = grown.unet(torch.cat([x, given], 1), t, text, image_context=tokens, scalars=number)
    torch.testing.assert_close(before, after)


def test_three_phases_make_a_checkpoint_that_says_what_it_is(tmp_path):
    path = small_animator(tmp_path)
    made = open_dynamicrafter(path)
    made.check()
    assert made.info.parts == ("unet", "image_projector", "vae", "text_encoder", "image_encoder")
    assert (made.variant.name, made.variant.frames, made.variant.height) == ("starter", 4, 32)
    assert made.info.unet["in_channels"] == 8 and made.info.unet["temporal_transformer"]
    assert made.metadata["modes"] == ["animate", "interpolate", "loop"]
    assert [phase["frames"] for phase in made.metadata["phases"]] == [1, 0, 0]
    assert made.metadata["sampling"]["motion"] == 3
    # One cache serves all phases.
    assert not list(tmp_path.glob("detail/clips*")) and (tmp_path / "clips").is_dir()


def test_a_resumed_phase_equals_an_uninterrupted_one(tmp_path):
    exact = {"training.precision": "fp32", "training.optimizer": "adamw", "training.steps": "4"}
    small_animator(tmp_path, **exact)
    straight = torch.load(tmp_path / "detail" / "state.pt", weights_only=True)
    overrides = {
        **SMALL_CLIPS,
        **SMALL_PHASE,
        **exact,
        "data.cache": str(tmp_path / "clips"),
        "folder": str(tmp_path / "again"),
        "start": str(tmp_path / "adapt" / "final.safetensors"),
        "unet.in_channels": "8",
    }
    recipe = RECIPES / "starter_animate_detail.toml"

    def stop(phase, step, steps, numbers):
        if step == 2 and phase == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_from_recipe(recipe, overrides, progress=stop)
    train_from_recipe(recipe, overrides, resume=True)
    again = torch.load(tmp_path / "again" / "state.pt", weights_only=True)
    assert again["step"] == straight["step"] == 4
    for name, value in straight["network"].items():
        assert torch.equal(again["network"][name], value), name


def test_what_is_trained_follows_the_paper(tmp_path):
    shapes = Shapes({**UNET, "in_channels": 8}, PROJECTOR)
    torch.manual_seed(0)
    for trainable in ("projector", "spatial", "all"):
        network = build_animate_network(shapes, trainable=trainable)
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        every = {name for name, _ in network.named_parameters()}
        temporal = {name for name in every if any(mark in name for mark in TEMPORAL)}
        assert temporal and any("to_k_ip" in name for name in trained)
        assert any(name.startswith("image_projector.") for name in trained)
        assert ("unet.conv_in.weight" in trained) == (trainable != "projector")
        assert (temporal <= trained) if trainable == "all" else not temporal & trained
    with pytest.raises(LayerLoomError, match="trainable is 'most'"):
        build_animate_network(shapes, trainable="most")


def test_a_start_of_another_shape_is_refused(tmp_path):
    start = small_animator(tmp_path, phases=1)
    overrides = {
        **SMALL_CLIPS,
        "folder": str(tmp_path / "other"),
        "start": str(start),
        "unet.block_channels": "[8, 24]",
    }
    with pytest.raises(LayerLoomError, match="does not fit the recipe's networks: unet"):
        train_from_recipe(RECIPES / "starter_animate_adapt.toml", overrides)


def test_a_four_frame_autoencoder_is_refused(tmp_path):
    other = small_autoencoder(tmp_path / "four")
    overrides = {"autoencoder": str(other), "folder": str(tmp_path / "run")}
    with pytest.raises(LayerLoomError, match="folds 4 frames into one"):
        train_from_recipe(RECIPES / "starter_animate_projector.toml", overrides)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task.frame", "1", "key 'frame' is unknown"),
        ("unet.depth", "1", "unet.depth is unknown"),
        ("noise.prediction", "x0", "noise.prediction is 'x0'"),
        ("noise.prediction", "eps", "says nothing at pure noise"),
        ("sampling.spacing", "odd", "give spacing as one of"),
    ],
)
def test_bad_recipes_are_named_before_anything_is_opened(tmp_path, key, value, message):
    overrides = {key: value, "folder": str(tmp_path / "run")}
    with pytest.raises(LayerLoomError, match=message):
        train_from_recipe(RECIPES / "starter_animate_projector.toml", overrides)
    assert not (tmp_path / "run").exists()


# Published weights and a person's clips


def write_clips(folder, count: int = 2, frames: int = 9):
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        place = folder / "clips" / f"clip{number}"
        place.mkdir(parents=True)
        for frame in range(frames):
            picture = rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(picture).save(place / f"{frame:02}.png")
        lines.append({"sample": f"clips/clip{number}", "caption": [f"clip {number}", "a clip"]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory, golden_dir, manifest_dir):
    """A whole official file in miniature, and a tokenizer."""
    folder = tmp_path_factory.mktemp("official")
    write_tokenizer(folder / "tokenizer")
    write_checkpoint(folder / "model.ckpt", whole_state(golden_dir, manifest_dir))
    return folder


def finetuning(official, folder, name: str = "finetune", **changes) -> dict[str, str]:
    return {
        "start": str(official / "model.ckpt"),
        "text_encoder": str(official / "tokenizer"),
        "folder": str(folder / "run"),
        "data.path": str(folder / "data"),
        "data.frames": "4",
        "data.height": "64",
        "data.width": "64",
        "training.steps": "2",
        "training.accumulate": "1",
        "training.log_every": "1",
        "training.warmup": "1",
        **changes,
    }


@pytest.fixture
def recipe_with_encoders(tmp_path):
    """The shipped fine-tuning recipe with places for the parts that the tests name."""

    def write(name: str) -> Path:
        text = (RECIPES / f"dynamicrafter_{name}.toml").read_text()
        path = tmp_path / f"{name}.toml"
        path.write_text('text_encoder = ""\nimage_encoder = ""\nvae = ""\n' + text)
        return path

    return write


@pytest.mark.parametrize("name", ["finetune", "interpolate"])
def test_published_weights_are_fine_tuned_on_a_folder(
    official, tmp_path, recipe_with_encoders, name
):
    write_clips(tmp_path / "data")
    notes = []
    overrides = finetuning(official, tmp_path)
    path = train_from_recipe(recipe_with_encoders(name), overrides, note=notes.append)
    made, start = open_dynamicrafter(path), open_dynamicrafter(official / "model.ckpt", "512")
    made.check()
    assert made.variant.name == "512" and made.variant.frames == 4
    assert made.info.parts == ("unet", "image_projector", "vae")
    before, after = start.part_state("unet"), made.part_state("unet")
    still = [k for k in before if any(mark in k for mark in TEMPORAL)]
    assert still and all(torch.equal(before[k].half(), after[k]) for k in still)
    moved = [k for k in before if not torch.equal(before[k].half(), after[k])]
    assert "conv_in.weight" in moved and any("to_k_ip" in k for k in moved)
    assert any("2 clips" in note for note in notes)
    # Everything was encoded once; a second run reads it.
    cache = tmp_path / "data" / ".layerloom"
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert len(stamps) >= 2 * 2 + 3
    train_from_recipe(recipe_with_encoders(name), {**overrides, "folder": str(tmp_path / "second")})
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")} == stamps


def test_a_folders_clips_are_told_with_their_pace(official, tmp_path):
    plan = plan_clips(
        CaptionedClips(str(write_clips(tmp_path)), 4, 64, 64, strides=[2, 2], pieces=3), 8
    )
    assert {piece.stride for piece in plan.pieces} == {2}
    assert all(piece.numbers(4)[-1] <= 8 for piece in plan.pieces)
    assert {piece.bucket for piece in plan.pieces} == {(56, 72)}  # nearest to the clips' shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "captions.jsonl").unlink(), "captions.jsonl"),
        (lambda folder: (folder / "clips" / "new").mkdir(), "clips/new"),
        (
            lambda folder: [p.unlink() for p in (folder / "clips" / "clip0").glob("0[3-9].png")],
            "clips/clip0: has 3 frames; give at least 4",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, change, message):
    change(write_clips(tmp_path))
    with pytest.raises(LayerLoomError, match=message):
        plan_clips(CaptionedClips(str(tmp_path), 4, 64, 64), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [3, 1]}, "strides is"),
        ({"strides": 2}, "strides is"),
        ({"pictures": 1}, "pictures is 1"),
    ],
)
def test_bad_folder_settings_are_named(changes, message):
    with pytest.raises(LayerLoomError, match=message):
        CaptionedClips("somewhere", **changes)


def test_missing_parts_are_named_before_anything_is_read(official, tmp_path):
    write_clips(tmp_path / "data")
    overrides = finetuning(official, tmp_path, start=str(tmp_path / "pruned.safetensors"))
    overrides.pop("text_encoder")
    state = torch.load(official / "model.ckpt", weights_only=True)["state_dict"]
    kept = ("model.diffusion_model.", "image_proj_model.")
    save_file(
        {k: t.contiguous() for k, t in state.items() if k.startswith(kept)},
        tmp_path / "pruned.safetensors",
    )
    with pytest.raises(LayerLoomError, match="The recipe needs Stable Diffusion's autoencoder"):
        train_from_recipe(RECIPES / "dynamicrafter_finetune.toml", overrides)


def test_the_papers_phases_start_from_image_and_video_networks(tmp_path):
    """The video UNet of phase 2 takes the image UNet's place, but for the image stream."""
    torch.manual_seed(3)
    flat = {"temporal_convolution": False, "temporal_transformer": False}
    plain = {**UNET, "in_channels": 4, "image_attention": False, "scalar_embeddings": ()}
    image = VideoUNet(**{**plain, **flat, "initial_temporal_transformer": False})
    video = VideoUNet(**plain)
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    save_file(video.state_dict(), tmp_path / "video.safetensors")
    shape = {**UNET, **flat, "initial_temporal_transformer": False, "in_channels": 4}
    shape["scalar_embeddings"] = ()
    first = build_animate_network(
        Shapes(shape, PROJECTOR), base=tmp_path / "image.safetensors", trainable="projector"
    )
    x, t, text = torch.randn(1, 4, 1, 4, 4), torch.tensor([3]), torch.randn(1, 3, 8)
    tokens = first.image_projector(torch.randn(1, 5, 8))
    with torch.no_grad():
        made = first.unet(x, t, text, image_context=tokens)
        torch.testing.assert_close(made, image(x, t, text))
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    assert all("_ip." in n or n.startswith("image_projector.") for n in trained)

    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if name in trained:
                parameter.add_(0.01)
    card = AnimateCard(VARIANTS["256"], shape, PROJECTOR)
    card.write(tmp_path / "phase1.safetensors", first.state_dict())
    start = open_dynamicrafter(tmp_path / "phase1.safetensors")
    second = build_animate_network(
        Shapes({**UNET, "in_channels": 4}, PROJECTOR),
        start,
        tmp_path / "video.safetensors",
        "spatial",
    )
    state = second.unet.state_dict()
    for name, tensor in video.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name, tensor in first.unet.state_dict().items():
        if "_ip." in name:
            assert torch.equal(state[name], tensor.half().float()), name


def test_an_image_network_of_another_kind_is_refused(tmp_path):
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LayerLoomError, match="holds no UNet of Stable Diffusion's kind"):
        build_animate_network(
            Shapes({**UNET, "in_channels": 4}, PROJECTOR), base=tmp_path / "other.safetensors"
        )


def test_shipped_phases_fit_together():
    shipped = {path.stem: load_recipe(path) for path in RECIPES.glob("starter_animate_*.toml")}
    chain = load_recipe(RECIPES.parents[2] / "starter" / "animate.toml")["stages"]
    assert set(chain) == set(shipped)
    makers = {f"{recipe['folder']}/final.safetensors": recipe for recipe in shipped.values()}
    chained = {name: recipe for name, recipe in shipped.items() if "start" in recipe}
    assert len(chained) >= 3
    caches = {recipe["data"]["cache"] for recipe in shipped.values() if "unet" in recipe}
    assert len(caches) == 1
    for recipe in chained.values():
        assert recipe["start"] in makers
    autoencoder = makers[shipped["starter_animate_projector"]["autoencoder"]]
    channels = autoencoder["autoencoder"]["latent_channels"]
    assert shipped["starter_animate_detail"]["unet"]["in_channels"] == 2 * channels
