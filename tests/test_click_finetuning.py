"""Published weights become a region animator on a person's clips: labels, phases, missing parts."""

import json

import pytest
import torch
from small_training import RECIPES
from test_animate_finetuning import write_clips
from test_click import write_base
from test_click_checkpoints import adapter

from layerloom.engine.checkpoints.click import load_click, open_click
from layerloom.engine.click import ClickPipeline
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.follow_your_click import click_unet
from layerloom.engine.training.click import ClickNetwork, ClickStage, ClickTask
from layerloom.engine.training.click_world import click_scene_at, render_clicks
from layerloom.engine.training.data.click_folder import FlowLabels, open_click_folder
from layerloom.engine.training.recipe import train_from_recipe

PHRASE = "{ heads = 8, middle = true, norm_over_frames = false, phrase = true }"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """AnimateDiff v2's modules, Stable Diffusion 1.5 and RAFT in miniature, and clips."""
    from torchvision.models.optical_flow import raft_small

    folder = tmp_path_factory.mktemp("click")
    write_base(folder / "sd15", 24)
    torch.save(dict(adapter("v2").state_dict()), folder / "mm.ckpt")
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), folder / "raft.pth")
    clips = write_clips(folder / "clips", frames=5)
    lines = [json.loads(line) for line in (clips / "captions.jsonl").read_text().splitlines()]
    lines[0]["phrase"] = ["waves", "turns left"]
    (clips / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def train(files, name, **changes):
    overrides = {
        "start": str(files / "mm.ckpt"),
        "base": str(files / "sd15"),
        "folder": str(files / name),
        "data.path": str(files / "clips"),
        "data.raft": str(files / "raft.pth"),
        "data.frames": "4",
        "data.height": "64",
        "data.width": "64",
        "data.strides": "[1, 1]",
        "data.pieces": "1",
        "training.steps": "2",
        "training.accumulate": "1",
        "training.log_every": "1",
        "training.warmup": "1",
        "training.precision": "fp32",
        "training.frozen": "fp32",
        "training.gradient_checkpointing": "false",
    }
    recipe = RECIPES / f"follow_your_click_{name}.toml"
    return train_from_recipe(recipe, {**overrides, **changes})


@pytest.fixture(scope="module")
def phases(files):
    first = train(files, "video")
    motion = {"start": str(first), "unet.motion_modules": PHRASE}
    return first, train(files, "phrase", **motion)


def test_both_phases_on_a_persons_clips(files, phases):
    first, second = (open_click(path) for path in phases)
    assert first.info.unet["in_channels"] == 9 and first.info.motion == "v2"
    assert first.info.reading == second.info.reading == "code"
    assert first.variant.prediction == "v" and first.variant.zero_terminal_snr
    assert second.info.unet["motion_modules"]["phrase"]
    assert [p["phrases"] for p in second.metadata["phases"]] == [False, True]
    # The spatial layers stay as they were, to half precision.
    whole = open_click(files / "mm.ckpt", files / "sd15").part_state("unet")
    trained = load_click(second).unet.state_dict()
    for name, tensor in whole.items():
        if "motion_modules." not in name and "conv_in." not in name:
            assert torch.equal(trained[name], tensor.half())
    grown = trained["conv_in.weight"]
    assert grown.shape[1] == 9 and not torch.equal(grown[:, :4], whole["conv_in.weight"].half())
    pipeline = ClickPipeline.open(phases[1], base=files / "sd15", device="cpu")
    assert pipeline.settings.frames == 4 and pipeline.native_size == (64, 64)


def test_texts_are_features_and_dropped_ones_the_empty_prompt(files):
    class Text:
        model = torch.nn.Linear(1, 1)

        def encode(self, prompts):
            return torch.stack([torch.full((3, 24), float(len(text))) for text in prompts])

    class Codec:
        spatial_factor, model = 8, torch.nn.Linear(1, 1)

        def encode(self, pictures, generator):
            return pictures[:, :1, ::8, ::8].repeat(1, 4, 1, 1)

    from layerloom.engine.training.data.clips import ClipParts

    table = {
        "kind": "folder",
        "path": str(files / "clips"),
        "raft": str(files / "raft.pth"),
        "pieces": 1,
        "strides": [1, 1],
        "cache": str(files / "cache"),
    }
    source = open_click_folder(table, ClipParts(Codec(), 4, (64, 64), 16, files), Text())
    source.encode()
    source.release()
    unet = click_unet(block_channels=(16, 32), attention_levels=(False, True), context_dim=24)
    from layerloom.engine.models.video_unet import VideoUNet

    network = ClickNetwork(VideoUNet(**{**unet, "norm_groups": 8}))
    settings = open_click(files / "mm.ckpt", files / "sd15").variant
    task = ClickTask(captions=0.5, text_dropout=0.3)
    stage = ClickStage(network, source, task, 12, settings, None, None, source.empty)
    drawn = stage.draw(torch.Generator().manual_seed(0))[0]
    context, phrases = (x[:, 0, 0].tolist() for x in stage.texts(drawn))
    # As long as "clip 0", "a clip", "waves", "turns left"; the second clip has no phrase.
    assert set(context) <= {0.0, 5.0, 6.0, 10.0} and {0.0} < set(phrases)
    for row, kept in enumerate(drawn.text.tolist()):
        assert kept == (phrases[row] > 0) == (context[row] > 0)
    assert {5.0, 10.0} & set(phrases)
    assert drawn.clips.mask.shape == (12, 1, 8, 8)


def test_labels_say_where_a_clip_moves_and_how_strongly():
    class Exact:
        """Sprite world's own flow instead of an estimate."""

        network = torch.nn.Linear(1, 1)

        def __init__(self, rendered):
            self.rendered = rendered

        def flow(self, frames):
            assert 0 <= frames.min() and frames.max() <= 1
            return self.rendered.meant.flow[0]

    scene = click_scene_at(2, 0, strength=8.0)
    rendered = render_clicks([scene], 16, (96, 96))
    label = FlowLabels(Exact(rendered), 8).label(rendered.clips[0] * 2 - 1)
    assert label.shape == (12, 12)
    # The mask is where it goes at any time, so the mean over frames is below the sprite's own.
    strength = float(label.max())
    assert 1 < strength < 8 and set(label.unique().tolist()) == {0.0, strength}
    reached = rendered.masks[0, :-1].any(0).float()[None]
    inside = torch.nn.functional.max_pool2d(reached, 8)[0] > 0
    assert (inside | (label == 0)).all() and (label > 0).sum() > 0.4 * inside.sum()


def test_what_is_missing_is_a_sentence(files):
    for changes, words in (
        ({"data.raft": str(files / "no.pth")}, "data.raft"),
        ({"data.kind": "sprites"}, "data.kind = 'folder'"),
        ({"base": str(files / "mm.ckpt")}, "is not what mm.ckpt stands on"),
        ({"data.height": "72"}, "do not divide by 16"),
        ({"trainable": "some"}, "trainable is 'some'"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            train(files, "video", **{"folder": str(files / "bad"), **changes})


def test_a_rehearsal_counts_clips_and_phrases(files):
    said = []
    recipe = RECIPES / "follow_your_click_video.toml"
    overrides = {
        "start": str(files / "mm.ckpt"),
        "base": str(files / "sd15"),
        "folder": str(files / "rehearsed"),
        "data.path": str(files / "clips"),
        "data.raft": str(files / "raft.pth"),
        "data.frames": "4",
        "data.height": "64",
        "data.width": "64",
    }
    train_from_recipe(recipe, overrides, note=said.append, dry_run=True)
    assert "2 clips, 1 with a short phrase" in said[0] and "trained; 1 clips" in said[1]
    assert not (files / "rehearsed").exists()
