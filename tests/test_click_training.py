"""Training the region animator: its world, what a step draws and reads, both phases, exports."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_animation import frame_autoencoder
from small_training import RECIPES, small_autoencoder
from tiny_animator import write_animator

from layerloom.engine.animate import STARTER
from layerloom.engine.checkpoints.click import load_click, open_click
from layerloom.engine.checkpoints.dynamicrafter import open_dynamicrafter
from layerloom.engine.click import ClickPipeline
from layerloom.engine.click_request import ClickRequest, Region
from layerloom.engine.conditioning.frame_codec import StarterFrameCodec
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.follow_your_click import SCALARS, ClickSettings, click_unet
from layerloom.engine.models.starter_text import WordEncoder, WordTokenizer
from layerloom.engine.models.video_unet import VideoUNet
from layerloom.engine.training.click import ClickNetwork, ClickStage, ClickTask
from layerloom.engine.training.click_foundation import (
    build_network,
    initialise,
    lay_click_foundation,
)
from layerloom.engine.training.click_world import (
    STRENGTH_RANGE,
    TOKENS,
    caption,
    click_scene_at,
    path_of,
    phrase,
    plain_phrase,
    reach,
    render_clicks,
)
from layerloom.engine.training.data.click_sprites import ClickSprites
from layerloom.engine.training.data.clips import ClipParts
from layerloom.engine.training.data.moving_sprites import MovingClips
from layerloom.engine.training.moving_world import WORDS
from layerloom.engine.training.recipe import load_recipe, train_from_recipe
from layerloom.engine.training.shares import Shares
from layerloom.engine.training.sprite_prompts import direction_phrases, tokenise
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS

# The world


def test_one_sprite_moves_the_other_stands_and_they_never_touch():
    scenes = [click_scene_at(3, index) for index in range(64)]
    low, high = STRENGTH_RANGE
    for scene in scenes:
        assert low <= scene.strength <= high and scene.meant.direction != "still"
        assert scene.other.direction == "still" and scene.other.path == 0
        assert len({scene.meant.colour, scene.other.colour, scene.meant.background_colour}) == 3
        for x, y in (
            scene.meant.start,
            [a + b for a, b in zip(scene.meant.start, scene.meant.travel, strict=True)],
        ):
            assert all(reach(scene.meant) <= place <= 1 - reach(scene.meant) for place in (x, y))
    rendered = render_clicks(scenes[:8], 6, (64, 64))
    assert not (rendered.masks & rendered.other_masks).any()
    change = (rendered.clips - rendered.clips[:, :1]).abs().amax(2)
    still = rendered.meant.alpha[:, :, 0].amax(1, keepdim=True) == 0
    assert (change * still).max() < 1e-6
    assert (change.amax((1, 2, 3)) > 0.1).all()


def test_the_strength_is_the_exact_flow_inside_the_mask():
    """At any length and size; the published range, since the way is counted at 512 pixels."""
    scenes = [click_scene_at(3, index) for index in range(6)]
    wanted = torch.tensor([scene.strength for scene in scenes])
    for frames, size in ((16, (64, 64)), (5, (48, 96))):
        strengths = render_clicks(scenes, frames, size).strengths
        assert torch.allclose(strengths, wanted, atol=1e-3)
    slow = click_scene_at(3, 0, strength=4.0)
    assert slow.strength == 4 and slow.meant.path == pytest.approx(4 * 15 / 512) == path_of(4)
    assert click_scene_at(3, 0, direction="up").meant.direction == "up"


def test_held_out_pairs_are_never_trained_and_alone_evaluated():
    for index in range(200):
        for held_out in (False, True):
            scene = click_scene_at(5, index, held_out)
            for part in (scene.meant, scene.other):
                assert ((part.colour, part.shape) in HELD_OUT_PAIRS) == held_out
    assert click_scene_at(5, 7) == click_scene_at(5, 7) != click_scene_at(6, 7)


def test_phrases_are_short_and_name_the_direction_and_captions_name_both():
    for index in range(100):
        scene, rng = click_scene_at(7, index), random.Random(index)
        said, whole = phrase(scene, rng), caption(scene, rng)
        names = direction_phrases(scene.meant.direction)
        assert any(said.endswith(name) for name in names) and len(said.split()) <= 5
        assert scene.meant.shape not in said and plain_phrase(scene).startswith("moving ")
        assert scene.meant.colour in whole and scene.other.shape in whole
        assert len(tokenise(whole)) <= TOKENS and set(tokenise(f"{said} {whole}")) <= set(WORDS)


# A step


def unet(phrase=True, **changes):
    return click_unet(
        "v2",
        phrase=phrase,
        in_channels=9,
        block_channels=(8, 16),
        layers_per_block=1,
        attention_levels=(False, True),
        context_dim=8,
        num_heads=2,
        norm_groups=4,
        **changes,
    )


def stage(folder, task=None, batch=4, settings=None, scenes=5):
    codec = StarterFrameCodec(frame_autoencoder())
    clips = MovingClips(frames=4, size=32, scenes=scenes, returning=0.0)
    source = ClickSprites(clips, ClipParts(codec, 4, (32, 32), 16, folder))
    source.encode()
    torch.manual_seed(1)
    words = WordEncoder(vocabulary=len(WORDS), tokens=TOKENS, dim=8)
    network = ClickNetwork(VideoUNet(**{**unet(), "norm_over_frames": False}), words)
    initialise(network)
    settings = settings or ClickSettings(picture="all", mask="all", stride=1.0)
    tokenizer = WordTokenizer(WORDS, TOKENS)
    return ClickStage(network, source, task or ClickTask(), batch, settings, None, tokenizer)


def draw(made, seed=0, shares=None):
    return made.draw(torch.Generator().manual_seed(seed), *([shares] if shares else []))


def test_the_shares_of_processes_are_one_large_batch(tmp_path):
    made = stage(tmp_path, batch=2)
    apart = [draw(made, 7, Shares([part], 2))[0] for part in (0, 1)]
    together = draw(made, 7, Shares([0, 1], 2))
    for one, other in zip(apart, together, strict=True):
        for name in ("noise", "timestep", "shown", "caption", "text"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.clips.latents, other.clips.latents)
        assert torch.equal(one.clips.mask, other.clips.mask)
        assert one.clips.captions == other.clips.captions


def test_the_pictures_latent_is_hidden_in_the_papers_share(tmp_path):
    made = stage(tmp_path, ClickTask(masked=0.5), batch=400)
    shown = draw(made)[0].shown
    assert shown.shape == (400, 1, 4, 4)
    whole = shown.flatten(1).all(1)
    # Half of 400: a standard deviation of 0.025; 16 places a picture, 3200 in all: 0.008.
    assert float(whole.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert float(shown[~whole].mean()) == pytest.approx(0.3, abs=0.03)
    assert draw(stage(tmp_path, ClickTask(masked=0.0)))[0].shown.all()


def test_captions_go_to_the_unet_and_phrases_to_the_motion_modules(tmp_path):
    made = stage(tmp_path, ClickTask(captions=0.5, text_dropout=0.25), batch=40)
    drawn = draw(made)[0]
    context, phrases = made.texts(drawn)
    clips = drawn.clips
    for row in range(40):
        kept, whole = bool(drawn.text[row]), bool(drawn.caption[row])
        said = clips.captions[row] if whole else clips.phrases[row]
        expected = made._features([said if kept else "", clips.phrases[row] if kept else ""])
        assert torch.equal(torch.stack([context[row], phrases[row]]), expected)
    assert 0 < int((~drawn.text).sum()) < 25 and 5 < int(drawn.caption.sum()) < 35
    plain = stage(tmp_path, ClickTask(captions=1.0, phrases=False))
    same = plain.texts(draw(plain)[0])
    assert torch.equal(*same)


def test_the_mask_is_of_the_meant_sprite_in_the_first_frame(tmp_path):
    made = stage(tmp_path, batch=8)
    picks = made.source.draw(torch.Generator().manual_seed(0), 8)
    batch = made.source.load(picks)
    scenes = [made.source._scene(pick.index) for pick in picks]
    rendered = render_clicks(scenes, 4, (32, 32))
    for row in range(8):
        inside = torch.nn.functional.max_pool2d(rendered.masks[row, :1].float(), 8)
        # A mask may be a little larger than the sprite, never elsewhere.
        assert (batch.mask[row, 0] <= torch.nn.functional.max_pool2d(inside, 3, 1, 1)[0]).all()
        assert batch.mask[row].any()
    assert torch.allclose(batch.strength, rendered.strengths, atol=1e-3)


def test_a_fresh_networks_loss_is_the_targets_own_size(tmp_path):
    """The last layer starts at zero: the loss is the mean square of v."""
    made = stage(tmp_path, ClickTask(), batch=6)
    drawn = draw(made)[0]
    loss, numbers = made.loss(drawn)
    latents = drawn.clips.latents.float().transpose(1, 2)
    target = made.schedule.velocity(latents, drawn.noise, drawn.timestep)
    assert loss.item() == pytest.approx(float(target.square().mean()), rel=1e-4)
    loss.backward()
    weighed, _ = stage(tmp_path, ClickTask(change_weight=3.0), batch=6).loss(drawn)
    assert weighed.item() != pytest.approx(loss.item(), rel=1e-4)


def test_the_first_frame_counts_more_where_the_picture_is_seen(tmp_path):
    made = stage(tmp_path, ClickTask(first_weight=5.0, masked=0.0), batch=2)
    drawn = draw(made)[0]
    shown = drawn.shown.clone()
    shown[1, :, 0, 0] = 0
    drawn = replace(drawn, shown=shown)
    latents = drawn.clips.latents.float().transpose(1, 2)
    error = made.schedule.velocity(latents, drawn.noise, drawn.timestep).square().mean(1)
    weight = torch.ones_like(error)
    weight[0, 0] = 6.0
    expected = (error * weight).sum() / weight.sum()
    assert made.loss(drawn)[0].item() == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) != pytest.approx(float(error.mean()), rel=1e-4)


def test_what_is_hidden_is_not_seen(tmp_path):
    made = stage(tmp_path)
    for parameter in made.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    drawn = replace(draw(made)[0], shown=torch.zeros(4, 1, 4, 4))
    seen = {}
    made.network.unet.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    made.loss(drawn)
    assert seen["x"].shape == (4, 9, 4, 4, 4) and not seen["x"][:, 5:].any()
    assert torch.equal(seen["x"][:, 4], drawn.clips.mask[:, 0][:, None].expand(-1, 4, -1, -1))


def test_a_bad_task_is_a_sentence():
    with pytest.raises(LayerLoomError, match="task.masked is 2"):
        ClickTask(masked=2)
    with pytest.raises(LayerLoomError, match="first_frame_masking"):
        ClickTask(first_frame_masking=-0.1)


# The recipes

SMALL = {
    "data.size": "32",
    "data.frames": "4",
    "data.scenes": "6",
    "training.steps": "2",
    "training.batch": "2",
    "training.log_every": "1",
    "training.compile": "false",
    "training.precision": "fp32",
}
# In place of the animator that the shipped recipe begins with.
FROM_NOTHING = """
stage = "click"
autoencoder = "{autoencoder}"
folder = "click"
[text]
dim = 8
[unet]
block_channels = [8, 16]
layers_per_block = 1
attention_levels = [false, true]
num_heads = 2
norm_groups = 4
temporal_convolution = false
temporal_transformer = false
initial_temporal_transformer = false
motion_modules = {{ heads = 2, middle = true }}
"""


def train(name, folder, **changes):
    overrides = {**SMALL, "folder": str(folder / name), "data.cache": str(folder / "clips")}
    return train_from_recipe(RECIPES / f"starter_click_{name}.toml", {**overrides, **changes})


def train_from_nothing(folder, autoencoder, dry_run=False, note=print, **changes):
    """The first phase without an animator."""
    shipped = (RECIPES / "starter_click_video.toml").read_text(encoding="utf-8")
    data, rest = shipped[shipped.index("[data]") :].split("[unet]")
    recipe = folder / "click_from_nothing.toml"
    recipe.parent.mkdir(exist_ok=True)
    head = FROM_NOTHING.format(autoencoder=autoencoder)
    recipe.write_text(head + data + rest[rest.index("[task]") :], encoding="utf-8")
    paths = {"folder": str(folder / "video"), "data.cache": str(folder / "clips")}
    return train_from_recipe(recipe, {**SMALL, **paths, **changes}, note=note, dry_run=dry_run)


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Both phases in miniature: (autoencoder, after the first, after the second)."""
    folder = tmp_path_factory.mktemp("click")
    changes = {"autoencoder.width": "32"}
    autoencoder = small_autoencoder(folder / "ae", "starter_animate_autoencoder", **changes)
    first = train_from_nothing(folder, autoencoder)
    motion = {"unet.motion_modules": "{ heads = 2, middle = true, phrase = true }"}
    return autoencoder, first, train("phrase", folder, start=str(first), **motion)


def test_two_phases_make_a_starter_that_runs(phases):
    _, first, second = phases
    early, late = open_click(first), open_click(second)
    assert not early.info.unet["motion_modules"].get("phrase")
    assert late.info.unet["motion_modules"]["phrase"] and late.info.motion == "v2"
    assert late.info.parts == ("unet", "vae", "text_encoder") and late.info.reading == "own"
    settings = late.variant
    assert (settings.picture, settings.mask, settings.strength_default) == ("all", "all", 8.0)
    assert settings.strength_range == STRENGTH_RANGE and settings.frames == 4
    notes = late.metadata["phases"]
    assert [phase["phrases"] for phase in notes] == [False, True]
    assert len(late.metadata["preview"]["factors"]) == 4
    pipeline = ClickPipeline.open(second, device="cpu")
    rendered = render_clicks([click_scene_at(9, 0, True)], 1, (32, 32))
    image = (rendered.clips[0, 0].permute(1, 2, 0) * 255).byte().numpy()
    mask = rendered.masks[0, 0].float().numpy()
    asked = ClickRequest(image, (Region(mask, "moving left"),), steps=2)
    assert pipeline.run(asked).frames.shape == (4, 32, 32, 3)
    assert not any("does not know" in note for note in pipeline.prepare(asked))


def test_what_the_second_phase_adds_has_no_effect_at_first(phases, tmp_path):
    _, first, _ = phases
    recipe = load_recipe(
        RECIPES / "starter_click_phrase.toml",
        {**SMALL, "start": str(first), "unet.motion_modules": "{ heads = 2, middle = true }"},
    )
    recipe["unet"]["motion_modules"]["phrase"] = True
    grown = build_network(lay_click_foundation(recipe), "temporal")
    before = load_click(first, dtype=torch.float32)
    x, t = torch.randn(1, 9, 4, 4, 4), torch.tensor([500])
    text, scalars = torch.randn(1, 5, 8), {n: torch.ones(1) for n in grown.unet.scalar_embeddings}
    with torch.no_grad():
        expected = before.unet(x, t, text, scalars=scalars)
        found = grown.unet(x, t, text, scalars=scalars, phrase=torch.randn(1, 5, 8))
    # Nothing is added, but where numbers lie in memory decides the order of sums.
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    trained = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert any(".phrase_attn." in name for name in trained)
    assert all("resnets" not in name and "attentions" not in name for name in trained)


ON_ANIMATOR = {"unet.motion_modules": "{ heads = 2, middle = false }"}


@pytest.fixture(scope="module")
def animator(tmp_path_factory) -> Path:
    return write_animator(tmp_path_factory.mktemp("animator") / "tiny.safetensors", WORDS)


@pytest.mark.parametrize("transformers", ["false", "true"])
def test_an_animator_is_what_the_first_phase_begins_with(animator, transformers):
    changes = {**SMALL, **ON_ANIMATOR, "start": str(animator)}
    changes["unet.temporal_transformer"] = transformers
    recipe = load_recipe(RECIPES / "starter_click_video.toml", changes)
    found = lay_click_foundation(recipe)
    grown = build_network(found).unet.eval()
    start = open_dynamicrafter(animator)
    keywords = {**start.info.unet, "image_attention": False, "scalar_embeddings": ()}
    if transformers == "false":
        keywords |= {"temporal_transformer": False, "initial_temporal_transformer": False}
    plain = VideoUNet(**keywords).eval()
    state = start.part_state("unet", torch.float32)
    plain.load_state_dict({k: v for k, v in state.items() if k in plain.state_dict()})
    noisy, picture = torch.randn(2, 1, 4, 4, 4, 4)
    mask, t, text = torch.ones(1, 1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 5, 16)
    scalars = {name: torch.ones(1) for name in grown.scalar_embeddings}
    with torch.no_grad():
        expected = plain(torch.cat([noisy, picture], 1), t, text)
        made = grown(torch.cat([noisy, mask, picture], 1), t, text, scalars=scalars)
    assert expected.std() > 0.01 and len(scalars) == 2
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    assert found.words["tokens"] == TOKENS > 8 and set(WORDS) <= set(found.words["vocabulary"])


def test_a_starter_on_an_animator_runs(animator, tmp_path):
    made = train("video", tmp_path, start=str(animator), **ON_ANIMATOR)
    motion = {"unet.motion_modules": "{ heads = 2, middle = false, phrase = true }"}
    path = train("phrase", tmp_path, start=str(made), **motion)
    made = open_click(path)
    assert [phase["captions"] for phase in made.metadata["phases"]] == [1.0, 0.2]
    assert made.info.unet["motion_modules"]["phrase"] and not made.info.unet["temporal_transformer"]
    assert not made.info.unet["image_attention"] and made.info.parts[1:] == ("vae", "text_encoder")
    image, mask = np.full((32, 32, 3), 90, np.uint8), np.ones((32, 32), np.float32)
    asked = ClickRequest(image, (Region(mask, "moving left"),), steps=2)
    frames = ClickPipeline.open(path, device="cpu").run(asked)
    assert frames.frames.shape == (4, 32, 32, 3)


def test_other_animators_are_a_sentence(animator, tmp_path):
    few = write_animator(tmp_path / "few.safetensors", WORDS[:4])
    with pytest.raises(LayerLoomError, match="few.safetensors does not know the word"):
        train("video", tmp_path, start=str(few))


def test_bad_recipes_are_a_sentence(phases, tmp_path):
    autoencoder, first, _ = phases
    for name, changes, words in (
        ("phrase", {"start": str(autoencoder)}, "final.safetensors"),
        ("video", {"autoencoder": str(first)}, "not an autoencoder"),
        ("video", {"sampling.mask": "middle"}, "write first or all"),
        ("video", {"task.masked": "3"}, "task.masked is 3"),
        ("video", {"unet.depth": "3"}, "unet.depth is unknown"),
        ("video", {"data.size": "40"}, "do not divide by 16"),
        ("video", {"data.scenes": "0"}, "data.scenes is 0"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            if name == "video":
                train_from_nothing(tmp_path, changes.pop("autoencoder", autoencoder), **changes)
            else:
                train(name, tmp_path, **changes)


def test_a_rehearsal_writes_nothing(phases, tmp_path):
    said = []
    assert train_from_nothing(tmp_path, phases[0], True, said.append) is None
    assert "all trained" not in said[0] and "trained; 2 clips a step" in said[0]
    assert not (tmp_path / "video").exists()


def test_the_shipped_starter_fits_into_eight_megabytes():
    from layerloom.engine.models.starter_autoencoder import StarterAutoencoder

    video, phrase = (load_recipe(RECIPES / f"starter_click_{n}.toml") for n in ("video", "phrase"))
    animator = open_dynamicrafter(STARTER)
    channels = animator.info.unet["out_channels"]
    keywords = {**animator.info.unet, "image_attention": False, "in_channels": 2 * channels + 1}
    keywords |= {"scalar_embeddings": SCALARS, **video["unet"], **phrase["unet"]}
    words = {k: animator.metadata["text_encoder"][k] for k in ("tokens", "dim")}
    vae = {k: v for k, v in animator.metadata["vae"].items() if k != "kind"}
    with torch.device("meta"):
        networks = (
            VideoUNet(**keywords),
            StarterAutoencoder(**vae),
            WordEncoder(vocabulary=len(WORDS), **{**words, "tokens": TOKENS}),
        )
    assert 2 * sum(p.numel() for n in networks for p in n.parameters()) < 7.9e6
