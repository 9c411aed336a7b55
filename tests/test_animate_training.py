"""The animator's training: what a step draws, its loss, the phases and what they export."""

from dataclasses import replace

import pytest
import torch
from small_animation import (
    PROJECTOR,
    UNET,
    draw,
    small_network,
    small_stage,
)
from small_training import RECIPES, SMALL_CLIPS, SMALL_PHASE, small_animator, small_autoencoder

from layerloom.engine.checkpoints.dynamicrafter import load_dynamicrafter, open_dynamicrafter
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.video_blocks import plain_attention
from layerloom.engine.training.animate import (
    AnimateTask,
    detail_of,
    matrix_attention,
)
from layerloom.engine.training.animate_networks import (
    TEMPORAL,
    Shapes,
    build_animate_network,
)
from layerloom.engine.training.distributed import checkpoint_blocks
from layerloom.engine.training.moving_world import (
    WORDS,
)
from layerloom.engine.training.recipe import load_recipe, train_from_recipe
from layerloom.engine.training.shares import Shares

# The stage


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
