"""Training subjects along boxes: its world, what a step draws, the loss, both phases, exports."""

import random

import numpy as np
import pytest
import torch
from small_animation import frame_autoencoder
from small_training import RECIPES, small_autoencoder
from tiny_animator import write_animator

from layerloom.engine.animate import STARTER
from layerloom.engine.checkpoints.dreamvideo import load_trajectory, open_trajectory
from layerloom.engine.checkpoints.dynamicrafter import open_dynamicrafter
from layerloom.engine.conditioning.boxes import BoxPaths
from layerloom.engine.conditioning.frame_codec import StarterFrameCodec
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.dreamvideo import DreamVideo, TrajectorySettings, pool_masks
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordEncoder, WordTokenizer
from layerloom.engine.models.video_unet import VideoUNet
from layerloom.engine.training.data.clips import ClipParts
from layerloom.engine.training.data.trajectory_sprites import TrajectoryClips, TrajectorySprites
from layerloom.engine.training.moving_world import WORDS
from layerloom.engine.training.recipe import load_recipe, train_from_recipe
from layerloom.engine.training.shares import Shares
from layerloom.engine.training.sprite_prompts import tokenise
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS
from layerloom.engine.training.trajectory import TrajectoryNetwork, TrajectoryStage, TrajectoryTask
from layerloom.engine.training.trajectory_foundation import (
    build_network,
    lay_trajectory_foundation,
)
from layerloom.engine.training.trajectory_world import (
    TOKENS,
    caption,
    plain_caption,
    portraits,
    render_trajectories,
    scene_paths,
    sprite_boxes,
    trajectory_scene_at,
)
from layerloom.engine.trajectory import TrajectoryPipeline
from layerloom.engine.trajectory_request import Subject, TrajectoryRequest

# The world


@pytest.mark.parametrize("count", [1, 2])
def test_boxes_are_those_of_the_pixels(count):
    scenes = [trajectory_scene_at(3, index, 5, count=count) for index in range(6)]
    made, boxes = render_trajectories(scenes, (64, 64)), sprite_boxes(scenes)
    assert made.clips.shape == (6, 5, 3, 64, 64) and boxes.shape == (6, count, 5, 4)
    assert boxes.min() >= 0 and boxes.max() <= 1
    inside = made.alphas > 0.5
    for axis, (low, high) in ((3, (1, 3)), (4, (0, 2))):
        seen = inside.any(7 - axis)
        first = seen.float().argmax(-1)
        last = seen.shape[-1] - seen.flip(-1).float().argmax(-1)
        assert (first - boxes[..., low] * 64).abs().max() <= 3
        assert (last - boxes[..., high] * 64).abs().max() <= 3
    tracks = scene_paths(boxes[0])
    assert len(tracks) == count and len(tracks[0].keys) == 5
    # They go somewhere, and the background does not.
    assert (boxes[:, 0, 0] - boxes[:, 0, -1]).abs().amax(-1).max() > 0.1
    still = made.alphas.amax((1, 2)) == 0
    assert ((made.clips - made.behind[:, None]).abs().amax((1, 2)) * still).max() < 1e-6


def test_the_first_of_two_sprites_stands_in_front():
    scenes = [trajectory_scene_at(1, index, 6, count=2) for index in range(20)]
    made = render_trajectories(scenes, (48, 48))
    both = (made.alphas[:, 0] == 1) & (made.alphas[:, 1] == 1)
    assert both.any()
    assert (made.seen[:, 1][both] == 0).all() and (made.seen[:, 0][both] == 1).all()


def test_held_out_pairs_are_never_trained_and_alone_evaluated():
    for index in range(100):
        for held_out in (False, True):
            scene = trajectory_scene_at(5, index, 4, held_out, 1 + index % 2)
            looks = [actor.looks for actor in scene.actors]
            colours = {scene.actors[0].looks.background_colour, *(each.colour for each in looks)}
            assert len(colours) == 1 + len(looks)
            assert all(((s.colour, s.shape) in HELD_OUT_PAIRS) == held_out for s in looks)
    assert trajectory_scene_at(5, 7, 4) == trajectory_scene_at(5, 7, 4)


def test_captions_are_known_words_and_name_sprites_only_when_asked():
    for index in range(200):
        scene, rng = trajectory_scene_at(7, index, 4, count=1 + index % 2), random.Random(index)
        looks = scene.actors[0].looks
        named, vague = caption(scene, rng, True), caption(scene, rng, False)
        assert looks.colour in named and looks.shape in named
        assert looks.shape not in vague and looks.background_colour in vague
        for text in (named, vague, plain_caption(scene)):
            assert len(tokenise(text)) <= TOKENS and set(tokenise(text)) <= set(WORDS)


# A step

UNET = {
    "block_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "context_dim": 8,
    "head_dim": 4,
    "norm_groups": 4,
}
CONTROL = {"widths": (4, 4, 8, 8), "heads": 2}


def source(folder, **changes):
    clips = TrajectoryClips(**{"frames": 4, "size": 32, "scenes": 8, "pairs": 0.5, **changes})
    codec = StarterFrameCodec(frame_autoencoder())
    made = TrajectorySprites(clips, ClipParts(codec, 4, (32, 32), 16, folder))
    made.encode()
    return made


def stage(folder, task=None, batch=2, **network):
    torch.manual_seed(1)
    video = DreamVideo(**{"unet": UNET, "reference": True, "control": CONTROL, **network})
    video.start_from_base()
    words = WordEncoder(vocabulary=len(WORDS), tokens=TOKENS, dim=8)
    made = TrajectoryNetwork(video, words)
    tokenizer, settings = WordTokenizer(WORDS, TOKENS), TrajectorySettings()
    found = source(folder)
    return TrajectoryStage(made, found, task or TrajectoryTask(), batch, settings, None, tokenizer)


def draw(made, seed=0, shares=None):
    return made.draw(torch.Generator().manual_seed(seed), *([shares] if shares else []))


def test_what_a_pick_stands_for(tmp_path):
    made = source(tmp_path)
    counts = set()
    for seed in range(6):
        picks = made.draw(torch.Generator().manual_seed(seed), 3)
        batch, again = made.load(picks), made.load(picks)
        counts.add(batch.masks.shape[1])
        assert batch.captions == again.captions
        assert torch.equal(batch.subjects, again.subjects)
        boxes = sprite_boxes([made._scene(pick.index) for pick in picks])
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        assert (batch.masks.mean((-1, -2)) - area).abs().max() < 0.05
        assert batch.latents.shape == (3, 4, 4, 4, 4)
        assert batch.subjects.shape == (3, batch.masks.shape[1], 4, 4, 4)
    assert counts == {1, 2}
    alone = source(tmp_path / "alone", pairs=0.0)
    assert alone.load(alone.draw(torch.Generator().manual_seed(0), 2)).masks.shape[1] == 1


def test_stars_are_drawn_as_often_as_asked(tmp_path):
    def shares(stars):
        made = source(tmp_path, scenes=40, stars=stars)
        draws = [made.draw(torch.Generator().manual_seed(seed), 64) for seed in range(12)]
        shown = [
            "star" in [actor.looks.shape for actor in made._scene(pick.index).actors]
            for picks in draws
            for pick in picks
        ]
        # All clips of a step have as many subjects, with stars or without.
        for picks in draws:
            assert len({len(made._scene(pick.index).actors) for pick in picks}) == 1
        return sum(shown) / len(shown)

    plain = shares(0.0)
    assert 0.1 < plain < 0.6
    assert shares(0.5) == pytest.approx(0.5 + 0.5 * plain, abs=0.08)
    assert shares(1.0) == 1
    # The clips are the same ones, so a cache serves both.
    assert source(tmp_path, scenes=40)._file == source(tmp_path, scenes=40, stars=0.5)._file


def test_the_shares_of_processes_are_one_large_batch(tmp_path):
    made = stage(tmp_path)
    apart = [draw(made, 7, Shares([part], 2))[0] for part in (0, 1)]
    together = draw(made, 7, Shares([0, 1], 2))
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.timestep, other.timestep)
        assert one.clips.captions == other.clips.captions
        assert torch.equal(one.clips.masks, other.clips.masks)


def test_errors_in_boxes_count_twice(tmp_path):
    plain, weighed = (stage(tmp_path, TrajectoryTask(box_weight=w)) for w in (1.0, 2.0))
    drawn = draw(plain)[0]
    with torch.no_grad():
        first, second = plain.loss(drawn)[0], weighed.loss(drawn)[0]
        latents = drawn.clips.latents.float().transpose(1, 2)
        noisy = plain.schedule.add_noise(latents, drawn.noise, drawn.timestep)
        kept = zip(drawn.clips.captions, drawn.text.tolist(), strict=True)
        text = plain.texts([c if k else "" for c, k in kept])
        # At first the whole network is its base.
        out = plain.network.video.unet(noisy, drawn.timestep, text)
        error = (out - drawn.noise).square().mean(1)
        inside = pool_masks(drawn.clips.masks.amax(1), (4, 4))
    assert torch.allclose(first, error.mean(), rtol=1e-4)
    assert torch.allclose(second, (error * (1 + inside)).mean(), rtol=1e-4)
    assert 0 < inside.mean() < 1


def test_a_base_is_trained_by_words_alone(tmp_path):
    made = stage(tmp_path, reference=False, control=None)
    drawn = draw(made)[0]
    assert made.place(drawn.clips) is None
    loss, shown = made.loss(drawn)
    loss.backward()
    assert loss.isfinite() and shown["loss/boxes"] > 0


def test_task_settings_are_checked():
    with pytest.raises(LayerLoomError, match="task.text_dropout is 2"):
        TrajectoryTask(text_dropout=2)
    with pytest.raises(LayerLoomError, match="task.box_weight is -1"):
        TrajectoryTask(box_weight=-1)
    with pytest.raises(LayerLoomError, match="data.pairs is 3"):
        TrajectoryClips(pairs=3)
    with pytest.raises(LayerLoomError, match="data.stars is -0.1"):
        TrajectoryClips(stars=-0.1)


# The recipes

SMALL = {
    "data.size": "32",
    "data.frames": "4",
    "data.scenes": "6",
    "training.steps": "2",
    "training.batch": "2",
    "training.log_every": "1",
    "training.precision": "fp32",
}
PHASES = ("base", "subject")
SMALL_BASE = {"training.compile": "false"}
SMALL_SUBJECT = {"control.widths": "[4, 4, 8, 8]", "control.heads": "2"}
# In place of the animator that the shipped recipe begins with.
FROM_NOTHING = """
stage = "trajectory"
autoencoder = "{autoencoder}"
folder = "trajectory"
[text]
dim = 8
[unet]
block_channels = [8, 16]
layers_per_block = 1
attention_levels = [false, true]
head_dim = 4
norm_groups = 4
"""


def train(name, folder, **changes):
    small = {**SMALL, **(SMALL_BASE if name == "base" else SMALL_SUBJECT)}
    overrides = {**small, "folder": str(folder / name), "data.cache": str(folder / "clips")}
    return train_from_recipe(RECIPES / f"starter_trajectory_{name}.toml", {**overrides, **changes})


def train_from_nothing(folder, autoencoder, **changes):
    """The base without an animator."""
    shipped = (RECIPES / "starter_trajectory_base.toml").read_text(encoding="utf-8")
    data, rest = shipped[shipped.index("[data]") :].split("[unet]")
    recipe = folder / "base_from_nothing.toml"
    recipe.parent.mkdir(exist_ok=True)
    head = FROM_NOTHING.format(autoencoder=autoencoder)
    recipe.write_text(head + data + rest[rest.index("[task]") :], encoding="utf-8")
    paths = {"folder": str(folder / "base"), "data.cache": str(folder / "clips")}
    return train_from_recipe(recipe, {**SMALL, **SMALL_BASE, **paths, **changes})


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Both phases in miniature: (autoencoder, the base, the whole)."""
    folder = tmp_path_factory.mktemp("trajectory")
    changes = {"autoencoder.width": "32"}
    autoencoder = small_autoencoder(folder / "ae", "starter_animate_autoencoder", **changes)
    base = train_from_nothing(folder, autoencoder)
    return autoencoder, base, train("subject", folder, start=str(base))


def held_out_request(subjects):
    scene = trajectory_scene_at(9, 0, 4, True, subjects)
    pictures, outlines = portraits([scene], 0, (32, 32))
    subjects = [Subject(*pair) for pair in zip(pictures[0], outlines[0], strict=True)]
    paths = BoxPaths(4, scene_paths(sprite_boxes([scene])[0]))
    return TrajectoryRequest(subjects, paths, plain_caption(scene), steps=2)


def test_two_phases_make_a_starter_that_runs(phases):
    _, base, whole = phases
    early, late = open_trajectory(base), open_trajectory(whole)
    assert early.info.parts == ("unet", "vae", "text_encoder") and not early.info.reference
    assert {"reference", "box_encoder", "control"} < set(late.info.parts)
    assert [phase["box_weight"] for phase in late.metadata["phases"]] == [2.0, 2.0]
    assert late.variant.placed_reference and not early.variant.placed_reference
    assert late.variant.frames == 4 and len(late.metadata["preview"]["factors"]) == 4
    # The base is frozen while what is added is trained.
    first, second = load_trajectory(early).unet.state_dict(), load_trajectory(late)
    assert all(torch.equal(first[n], t) for n, t in second.unet.state_dict().items())
    moved = second.reference[0].attn1.to_out[0].weight, second.control.controlnet_mid_block.weight
    assert all(weight.abs().max() > 0 for weight in moved)
    pipeline = TrajectoryPipeline.open(whole, device="cpu")
    asked = held_out_request(2)
    assert pipeline.prepare(asked) == []
    assert pipeline.run(asked).frames.shape == (4, 32, 32, 3)
    assert np.isfinite(pipeline.generate_batch([asked, asked])).all()


def test_bad_recipes_are_a_sentence(phases, tmp_path):
    autoencoder, base, whole = phases
    other = {"start": str(whole), "placed_reference": "false"}
    for name, changes, words in (
        ("subject", {"start": str(autoencoder)}, "final.safetensors"),
        ("base", {"autoencoder": str(base)}, "not an autoencoder"),
        ("base", {"sampling.reference_weight": "3.0"}, "sampling.reference_weight"),
        ("base", {"sampling.guidance_drops": "boxes"}, "sampling.guidance_drops"),
        ("base", {"task.text_dropout": "3.0"}, "task.text_dropout is 3"),
        ("base", {"unet.depth": "3"}, "unet.depth is unknown"),
        ("base", {"data.size": "40"}, "do not divide by 16"),
        ("subject", {"trainable": '"some"'}, "trainable is 'some'"),
        ("subject", {"control.widths": "[4, 8]"}, "control.widths halve"),
        ("subject", {"placed_reference": "3"}, "placed_reference is 3; give true or false"),
        ("subject", other, "placed_reference is false and .*final.safetensors was trained otherw"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            if name == "base":
                train_from_nothing(tmp_path, changes.pop("autoencoder", autoencoder), **changes)
            else:
                train(name, tmp_path, **{"start": str(base), **changes})


@pytest.fixture(scope="module")
def animator(tmp_path_factory):
    return write_animator(tmp_path_factory.mktemp("animator") / "tiny.safetensors", WORDS)


def test_an_animator_is_what_a_base_begins_with(animator):
    start = open_dynamicrafter(animator)
    state = start.part_state("unet", torch.float32)
    x, t, text = torch.randn(1, 4, 4, 4, 4), torch.tensor([500]), torch.randn(1, 5, 16)
    plain = VideoUNet(**{**start.info.unet, "image_attention": False, "scalar_embeddings": ()})
    plain.load_state_dict({k: v for k, v in state.items() if k in plain.state_dict()})
    with torch.no_grad():
        expected = plain.eval()(torch.cat([x, 0 * x], 1), t, text)
    assert expected.std() > 0.01
    # Transformers that it lacks have no effect at first.
    for levels in ("[true, false]", "[true, true]"):
        changes = {**SMALL, "start": str(animator), "unet.attention_levels": levels}
        changes["unet.temporal_transformer"] = "true"
        found = lay_trajectory_foundation(
            load_recipe(RECIPES / "starter_trajectory_base.toml", changes)
        )
        network = build_network(found)
        assert all(parameter.requires_grad for parameter in network.parameters())
        with torch.no_grad():
            made = network.video.eval()(x, t, text)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    assert found.settings.prediction == "v" and found.settings.zero_terminal_snr
    assert found.words["tokens"] == TOKENS > 8 and set(WORDS) <= set(found.words["vocabulary"])


def test_a_starter_on_an_animator_runs(animator, tmp_path):
    base = train("base", tmp_path, start=str(animator))
    made = open_trajectory(train("subject", tmp_path, start=str(base)))
    assert not made.info.unet["temporal_transformer"] and not made.info.unet["scalar_embeddings"]
    pipeline = TrajectoryPipeline.open(tmp_path / "subject" / "final.safetensors", device="cpu")
    asked = held_out_request(1)
    assert pipeline.run(asked).frames.shape == (4, 32, 32, 3)
    # A schedule that ends in pure noise is sampled from its end.
    assert pipeline._plan(asked).table.timesteps[0] == 999


def test_an_animator_of_other_words_or_shapes_is_a_sentence(animator, tmp_path):
    few = write_animator(tmp_path / "few.safetensors", WORDS[:4])
    for start, changes, words in (
        (few, {}, "few.safetensors does not know the word"),
        (animator, {"unet.scalar_embeddings": '["speed"]'}, "does not fit the recipe's network"),
        (animator, {"unet.block_channels": "[16, 24]"}, "has the shape"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            train("base", tmp_path, start=str(start), **changes)


def test_a_rehearsal_writes_nothing(phases, tmp_path):
    said = []
    overrides = {**SMALL, **SMALL_SUBJECT, "start": str(phases[1])}
    overrides["folder"] = str(tmp_path / "run")
    recipe = RECIPES / "starter_trajectory_subject.toml"
    assert train_from_recipe(recipe, overrides, note=said.append, dry_run=True) is None
    assert "trained; 2 clips a step" in said[0] and not (tmp_path / "run").exists()


def test_the_shipped_starter_fits_into_eight_megabytes():
    base, added = (load_recipe(RECIPES / f"starter_trajectory_{n}.toml") for n in PHASES)
    animator = open_dynamicrafter(STARTER)
    channels = animator.info.unet["out_channels"]
    unet = {**animator.info.unet, "image_attention": False, "in_channels": channels}
    unet |= {"scalar_embeddings": (), **base["unet"]}
    vae = {k: v for k, v in animator.metadata["vae"].items() if k != "kind"}
    with torch.device("meta"):
        networks = (
            DreamVideo(
                unet=unet,
                settings=TrajectorySettings(placed_reference=added["placed_reference"]),
                reference=added["reference"],
                control=added["control"],
            ),
            StarterAutoencoder(**vae),
            WordEncoder(vocabulary=len(WORDS), tokens=TOKENS, dim=unet["context_dim"]),
        )
    assert 2 * sum(p.numel() for n in networks for p in n.parameters()) < 7.9e6
