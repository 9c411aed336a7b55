"""ModelScope's weights learn subjects along boxes from a person's clips and masks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import RECIPES
from test_click import write_base
from test_dreamvideo_checkpoints import base

from layerloom.engine.checkpoints.dreamvideo import load_trajectory, open_trajectory
from layerloom.engine.conditioning.boxes import BoxPaths, Key, Track
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.dreamvideo import DreamVideo, TrajectorySettings
from layerloom.engine.training.data.clip_folder import CaptionedClips
from layerloom.engine.training.data.clips import ClipParts
from layerloom.engine.training.data.source import Pick
from layerloom.engine.training.data.subject_folder import open_subject_folder, plan_subjects
from layerloom.engine.training.data.subject_masks import Sight, box_clip, boxes_within, sight
from layerloom.engine.training.distributed import checkpoint_blocks
from layerloom.engine.training.recipe import train_from_recipe
from layerloom.engine.training.trajectory import TrajectoryNetwork, TrajectoryStage, TrajectoryTask
from layerloom.engine.trajectory import TrajectoryPipeline
from layerloom.engine.trajectory_request import Subject, TrajectoryRequest

HEIGHT, WIDTH, FRAMES = 64, 80, 5
RED, GREEN = (255, 0, 0), (0, 255, 0)


def place(frame, green=False):
    """The box of the red or of the green square in a frame, in pixels."""
    x = 50 - 10 * frame if green else 4 + 10 * frame
    return (x, 30, x + 16, 50) if green else (x, 8, x + 20, 24)


def draw_squares(folder, name, squares, masks):
    """A clip of squares, and a mask clip of each by the name it shall have."""
    (folder / "clips" / name).mkdir(parents=True)
    for frame in range(FRAMES):
        picture = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
        for colour, mask in zip(squares, masks, strict=True):
            x0, y0, x1, y1 = place(frame, colour == GREEN)
            picture[y0:y1, max(x0, 0) : x1] = colour
            where = np.zeros((HEIGHT, WIDTH), np.uint8)
            where[y0:y1, max(x0, 0) : x1] = 255
            (folder / "masks" / mask).mkdir(parents=True, exist_ok=True)
            Image.fromarray(where).save(folder / "masks" / mask / f"{frame}.png")
        Image.fromarray(picture).save(folder / "clips" / name / f"{frame}.png")


def write_clips(folder):
    draw_squares(folder, "one", [RED], ["one"])
    draw_squares(folder, "two", [RED, GREEN], ["two_1", "two_2"])
    lines = [
        {"sample": "clips/one", "caption": ["a red square", "red"]},
        {"sample": "clips/two", "caption": "two squares"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


def settings(folder, **changes):
    given = {"frames": 5, "height": 64, "width": 64, "strides": [1, 1], "pieces": 1}
    return CaptionedClips(str(folder), **{**given, **changes})


# Masks


def test_boxes_are_those_of_the_masks(clips):
    seen = sight(clips / "masks" / "one", "mask")
    assert (seen.frames, seen.height, seen.width) == (FRAMES, HEIGHT, WIDTH)
    assert [tuple(box) for box in seen.boxes] == [place(frame) for frame in range(FRAMES)]
    # The bucket shows the middle 64 columns; what reaches beyond it is cut in pixels alone.
    boxes = boxes_within(seen, range(FRAMES), (64, 64))
    assert boxes[0] == pytest.approx((-4, 8, 16, 24)) and boxes[4] == pytest.approx((36, 8, 56, 24))
    masks = box_clip(boxes, (64, 64))
    assert masks[0, 8:24, :16].all() and masks[0].sum() == 16 * 16
    assert masks[4, 8:24, 36:56].all() and masks[4].sum() == 16 * 20


def test_frames_without_a_subject_have_the_box_between():
    seen = Sight(3, 64, 64, ((0, 0, 16, 16), None, (16, 0, 32, 16)))
    masks = box_clip(boxes_within(seen, range(3), (64, 64)), (64, 64))
    assert masks[1, :16, 8:24].all() and masks[1].sum() == 256
    # Whole beside the part that is seen is as if it were not there.
    aside = Sight(1, 64, 128, ((0, 0, 16, 16),))
    assert boxes_within(aside, [0, 4], (64, 64)) == [None, None]


def test_a_folder_is_planned_with_its_subjects(clips):
    plan = plan_subjects(settings(clips), 16)
    assert {name: len(paths) for name, paths in plan.masks.items()} == {
        "clips/one": 1,
        "clips/two": 2,
    }
    assert [path.name for path in plan.masks["clips/two"]] == ["two_1", "two_2"]
    # Red before green; green leaves to the left.
    red, green = plan.boxes(plan.pieces[1], FRAMES)
    assert red[2][1] == pytest.approx(8) and green[2][1] == pytest.approx(30)
    # What was seen is kept, and known again.
    cache = clips / "cache"
    cache.mkdir()
    first = plan_subjects(settings(clips), 16, cache)
    assert (cache / "masks.json").exists()
    assert plan_subjects(settings(clips), 16, cache).boxes(first.pieces[0], 5) == first.boxes(
        first.pieces[0], 5
    )


def spoil(folder, how):
    masks = folder / "masks"
    if how == "missing":
        (masks / "one").rename(folder / "elsewhere")
    elif how == "strange":
        (masks / "one").rename(masks / "three")
    elif how == "short":
        (masks / "one" / "4.png").unlink()
    elif how == "narrow":
        for path in (masks / "one").iterdir():
            Image.new("L", (30, 64), 255).save(path)
    elif how == "empty":
        for path in (masks / "one").iterdir():
            Image.new("L", (WIDTH, HEIGHT)).save(path)
    elif how == "aside":
        for path in (masks / "one").iterdir():
            aside = Image.new("L", (WIDTH, HEIGHT))
            aside.paste(255, (0, 0, 6, 6))
            aside.save(path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "clips/one: has no mask; add masks/one.webm"),
        ("strange", "has no mask"),
        ("short", "masks/one: has 4 frames and its clip 5"),
        ("narrow", "masks/one: is 30x64 and its clip 80x64"),
        ("empty", "masks/one: is empty in every frame"),
        ("aside", "clips/one: shows its subject in too few frames"),
    ],
)
def test_masks_that_do_not_fit_are_named(clips, how, words):
    spoil(clips, how)
    with pytest.raises(LayerLoomError, match=words):
        plan_subjects(settings(clips), 16)


# What a step draws


class Text:
    model = torch.nn.Linear(1, 1)

    def encode(self, prompts):
        return torch.stack([torch.full((3, 24), float(len(text))) for text in prompts])


class Codec:
    """A latent position is the mean of its pixels."""

    spatial_factor, model = 8, torch.nn.Linear(1, 1)

    def encode(self, pictures, generator):
        small = torch.nn.functional.avg_pool2d(pictures, 8)
        return torch.cat([small, small[:, :1]], dim=1)


def source(clips, **changes):
    table = {"kind": "folder", "path": str(clips), "pieces": 1, "strides": [1, 1], "buckets": False}
    parts = ClipParts(Codec(), 5, (64, 64), 16, clips)
    made = open_subject_folder({**table, **changes}, parts, Text())
    made.encode()
    made.release()
    return made


def test_picks_are_clips_boxes_and_subjects_on_white(clips):
    made = source(clips)
    assert "64x64 with 1 subject 1" in made.describe()[0]
    by_count = {}
    for seed in range(8):
        picks = made.draw(torch.Generator().manual_seed(seed), 3)
        batch = made.load(picks)
        assert torch.equal(batch.subjects, made.load(picks).subjects)
        by_count[batch.masks.shape[1]] = batch
    assert set(by_count) == {1, 2}
    one, two = by_count[1], by_count[2]
    assert one.latents.shape == (3, 5, 4, 8, 8) and one.masks.shape == (3, 1, 5, 64, 64)
    assert two.subjects.shape == (3, 2, 4, 8, 8)
    assert {float(x) for x in one.captions[:, 0, 0]} <= {3.0, 12.0} and one.captions.shape[1] == 3
    assert one.masks[0, 0, 2, 8:24, 16:36].all() and one.masks[0, 0, 2].sum() == 16 * 20
    # Red, then green, in the middle of white.
    corner, middle = two.subjects[0, :, :3, 0, 0], two.subjects[0, :, :3, 4, 4]
    assert (corner == 1).all()
    assert middle[0].tolist() == [1, -1, -1] and middle[1].tolist() == [-1, 1, -1]


def test_masks_may_be_smaller_than_their_clips(clips):
    for path in (clips / "masks" / "one").iterdir():
        Image.open(path).resize((WIDTH // 2, HEIGHT // 2)).save(path)
    made = source(clips)
    index = next(i for i, p in enumerate(made.plan.pieces) if p.name == "clips/one")
    batch = made.load([Pick(index, 0)])
    assert batch.masks[0, 0, 2, 8:24, 16:36].all() and batch.masks[0, 0, 2].sum() == 16 * 20
    assert batch.subjects[0, 0, 0, 4, 4] == 1 and batch.subjects[0, 0, 1, 4, 4] < 0


def test_what_is_encoded_is_known_again_until_a_mask_changes(clips):
    source(clips)
    cache = clips / ".layerloom"
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    # Two pieces as clips and as subjects, and three captions.
    assert len(stamps) == 2 * 2 + 3
    source(clips)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")} == stamps
    first = clips / "masks" / "one" / "0.png"
    changed = np.array(Image.open(first))
    changed[:4] = 255
    Image.fromarray(changed).save(first)
    source(clips)
    after = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert sum(after[p] != stamps[p] for p in stamps) == 2


UNET = {
    "block_channels": (16, 16),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "context_dim": 24,
    "head_dim": 8,
    "norm_groups": 8,
    "temporal_convolution": True,
    "temporal_transformer": True,
}


def stage(clips, checkpointing=False, **task):
    torch.manual_seed(0)
    control = {"widths": (4, 4, 8, 8), "heads": 2}
    video = DreamVideo(unet=UNET, reference=True, control=control)
    video.start_from_base()
    for parameter in [*video.reference.parameters(), *video.control.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    video.unet.requires_grad_(False)
    found = source(clips)
    made = TrajectoryStage(
        TrajectoryNetwork(video),
        found,
        TrajectoryTask(**task),
        2,
        TrajectorySettings(),
        None,
        empty=found.empty,
    )
    if checkpointing:
        checkpoint_blocks(made.blocks)
    return made


def test_texts_are_features_and_dropped_ones_the_empty_prompt(clips):
    made = stage(clips, text_dropout=0.5)
    kept = set()
    for seed in range(4):
        drawn = made.draw(torch.Generator().manual_seed(seed))[0]
        lengths = made.context(drawn.clips, drawn.text)[:, 0, 0].tolist()
        assert [length > 0 for length in lengths] == drawn.text.tolist()
        kept |= set(drawn.text.tolist())
    assert kept == {True, False}


def test_checkpointed_gradients_are_the_same(clips):
    gradients = []
    for checkpointing in (False, True):
        made = stage(clips, checkpointing)
        loss, _ = made.loss(made.draw(torch.Generator().manual_seed(5))[0])
        loss.backward()
        trained = [p for p in made.network.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert all(p.grad is None for p in made.network.video.unet.parameters())
        gradients.append([p.grad for p in trained])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


# The recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """ModelScope's folder in miniature, and clips."""
    folder = tmp_path_factory.mktemp("modelscope")
    write_base(folder / "ms", 24)
    base().save_pretrained(folder / "ms" / "unet")
    write_clips(folder / "clips")
    return folder


def train(files, name, note=print, dry_run=False, **changes):
    overrides = {
        "start": str(files / "ms"),
        "folder": str(files / name),
        "data.path": str(files / "clips"),
        "data.frames": "4",
        "data.height": "64",
        "data.width": "64",
        "data.strides": "[1, 1]",
        "data.pieces": "1",
        "control.widths": "[4, 4, 8, 8]",
        "control.heads": "2",
        "training.steps": "2",
        "training.batch": "2",
        "training.accumulate": "1",
        "training.log_every": "1",
        "training.warmup": "1",
    }
    recipe = RECIPES / "dreamvideo2_subject.toml"
    return train_from_recipe(recipe, {**overrides, **changes}, note=note, dry_run=dry_run)


@pytest.fixture(scope="module")
def trained(files):
    return train(files, "first")


def test_additions_are_trained_and_the_base_is_not(files, trained):
    alone = open_trajectory(trained)
    assert alone.info.needs_base and alone.info.parts == ("reference", "box_encoder", "control")
    assert alone.variant.name == "dreamvideo-2" and alone.variant.guidance == 9
    assert (alone.variant.height, alone.variant.width, alone.variant.frames) == (64, 64, 4)
    whole = load_trajectory(open_trajectory(trained, files / "ms"))
    started = load_trajectory(open_trajectory(files / "ms"))
    own, theirs = whole.unet.state_dict(), started.unet.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    moved = whole.reference[0].attn1.to_out[0].weight, whole.control.controlnet_mid_block.weight
    assert all(weight.abs().max() > 0 for weight in moved)


def test_what_is_trained_runs_on_its_base(files, trained):
    pipeline = TrajectoryPipeline.open(trained, base=files / "ms", device="cpu")
    paths = BoxPaths(4, (Track("a", (Key(0, 0.1, 0.1, 0.4, 0.4), Key(3, 0.5, 0.1, 0.4, 0.4))),))
    picture = np.full((20, 20, 3), 200, np.uint8)
    asked = TrajectoryRequest([Subject(picture)], paths, "a red square", steps=2)
    assert pipeline.run(asked).frames.shape == (4, 64, 64, 3)


def test_a_later_run_goes_on(files, trained):
    again = train(files, "second", start=str(trained), base=str(files / "ms"))
    made = open_trajectory(again)
    assert made.info.needs_base and len(made.metadata["phases"]) == 2
    before, after = (load_trajectory(open_trajectory(p, files / "ms")) for p in (trained, again))
    first, second = (x.box_encoder.conv_in.weight for x in (before, after))
    assert not torch.equal(first, second) and (first - second).abs().max() < 1e-2


def test_what_is_missing_is_a_sentence(files, trained, tmp_path):
    weights = files / "ms" / "unet" / "diffusion_pytorch_model.safetensors"
    for changes, words in (
        ({"start": str(weights)}, "needs ModelScope's vae"),
        ({"start": str(trained)}, "name that as base"),
        ({"vae": str(tmp_path / "no")}, "vae .* does not exist"),
        ({"data.kind": "sprites"}, "is unknown"),
        ({"data.path": '""'}, "set data.kind = 'folder' and data.path"),
        ({"data.height": "72"}, "do not divide by 16"),
        ({"trainable": "some"}, "trainable is 'some'"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            train(files, "bad", **changes)


def test_a_rehearsal_counts_clips_and_subjects(files):
    said = []
    assert train(files, "rehearsed", note=said.append, dry_run=True) is None
    assert "2 clips, 1 with several subjects, 2 pieces" in said[0]
    assert "trained; 2 clips a step" in said[1]
    assert not (files / "rehearsed").exists()
