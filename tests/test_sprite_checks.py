"""The sprite measures: right on ground truth, silent on what is garbled."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerloom.engine.metrics.layered import (
    GIVEN,
    TASKS,
    evaluate,
    held_out_scenes,
    scene_layers,
    split_by_median,
)
from layerloom.engine.metrics.sprite_checks import (
    alpha_iou,
    classify_background,
    classify_colour,
    classify_direction,
    classify_shape,
    psnr,
    recompose,
)
from layerloom.engine.training.sprite_world import SHAPES, scene_at

SIZE = (96, 96)


def clips(scenes):
    layers = scene_layers(scenes, 8, SIZE)
    return [{name: clip[i] for name, clip in layers.items()} for i in range(len(scenes))]


def wrong_labels(scenes):
    wrong = []
    for scene, layers in zip(scenes, clips(scenes), strict=True):
        read = (
            classify_shape(layers["alpha"])[0],
            classify_direction(layers["alpha"]),
            classify_colour(layers["foreground"], layers["alpha"]),
            classify_colour(layers["blended"], layers["alpha"]),
            *classify_background(layers["background"]),
        )
        true = (scene.shape, scene.direction, scene.colour, scene.colour)
        if read != (*true, scene.pattern, scene.background_colour):
            wrong.append((scene, read))
    return wrong


def test_ground_truth_is_read_without_a_mistake():
    assert not wrong_labels(held_out_scenes(16, seed=1) + [scene_at(1, i) for i in range(16)])


@pytest.mark.slow
def test_three_hundred_held_out_scenes_are_read_right():
    assert len(wrong_labels(held_out_scenes(300, seed=2))) <= 1  # 99.5 %


def test_other_sizes_and_lengths_are_read_right():
    for scene in held_out_scenes(4, seed=3):
        layers = {k: v[0] for k, v in scene_layers([scene], 5, (80, 128)).items()}
        assert classify_shape(layers["alpha"])[0] == scene.shape
        assert classify_direction(layers["alpha"]) == scene.direction
        assert classify_background(layers["background"])[0] == scene.pattern


def blurred(clip: np.ndarray, sigma: float) -> np.ndarray:
    reach = int(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = torch.from_numpy(clip).float()[:, None]
    padded = torch.nn.functional.pad(padded, (reach,) * 4, mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    both = torch.nn.functional.conv2d(rows, kernel.view(1, 1, -1, 1))
    return both[:, 0].round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def every_shape():
    scene = replace(scene_at(1, 0), direction="right", speed="fast", start=(0.3, 0.5), angle=0.1)
    scene = replace(scene, size=0.16, change="none", growth=1.0, turn=0.0)
    return {
        shape: clip["alpha"]
        for shape, clip in zip(
            SHAPES, clips([replace(scene, shape=shape) for shape in SHAPES]), strict=True
        )
    }


def test_shape_survives_what_an_autoencoder_does(every_shape):
    rng = np.random.default_rng(0)
    for shape, alpha in every_shape.items():
        soft = blurred(alpha, 1.0).astype(np.float32) / 255
        soft += rng.normal(0, 0.03, soft.shape)
        label, overlap = classify_shape(soft.clip(0, 1))
        assert label == shape and overlap > 0.85


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_mixed_shapes_get_no_name(every_shape, shape, other):
    first, second = every_shape[shape], every_shape[other]
    halves = np.concatenate((first[:4], second[4:]))
    average = ((first.astype(int) + second) // 2).astype(np.uint8)
    expected = shape if shape == other else None
    assert classify_shape(halves)[0] == expected
    assert classify_shape(average)[0] == expected


def test_garbled_alpha_gets_no_shape(every_shape):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, *SIZE), dtype=np.uint8)
    blobs = np.where(blurred(noise, 5.0) > 127, 255, 0).astype(np.uint8)
    for alpha in (noise, blobs, np.zeros_like(noise), np.full_like(noise, 255)):
        assert classify_shape(alpha)[0] is None
    for alpha in every_shape.values():
        assert classify_shape(blurred(alpha, 4.0))[0] is None
        assert classify_shape(np.maximum(alpha, alpha[:, ::-1, ::-1]))[0] is None
        broken = alpha.copy()
        broken[5] = 0
        assert classify_shape(broken)[0] is None


def test_direction_needs_a_sprite_on_a_straight_path(every_shape):
    alpha = every_shape["star"]
    assert classify_direction(alpha) == "right"
    assert classify_direction(alpha[::-1]) == "left"
    assert classify_direction(alpha.transpose(0, 2, 1)) == "down"
    assert classify_direction(np.repeat(alpha[:1], 8, 0)) == "still"
    there_and_back = alpha[[0, 2, 4, 7, 7, 4, 2, 0]]
    jumping = alpha[[0, 0, 0, 0, 7, 7, 7, 7]]
    empty_frame = alpha.copy()
    empty_frame[3] = 0
    for path in (there_and_back, jumping, empty_frame, np.zeros_like(alpha)):
        assert classify_direction(path) is None


def test_colour_needs_one_clear_hue(every_shape):
    alpha = every_shape["square"]
    frames = np.zeros((*alpha.shape, 3), np.uint8)
    frames[:] = (20, 200, 40)
    assert classify_colour(frames, alpha) == "green"
    frames[::2] = (240, 30, 30)
    assert classify_colour(frames, alpha) is None
    frames[:] = (130, 120, 125)
    assert classify_colour(frames, alpha) is None
    frames[:] = (250, 130, 20)  # orange: between red and yellow
    assert classify_colour(frames, alpha) is None
    frames[:] = (20, 200, 40)
    assert classify_colour(frames, np.zeros_like(alpha)) is None


def backgrounds(pattern: str, count: int) -> list[np.ndarray]:
    scenes = (scene_at(4, i) for i in range(1000))
    scenes = [scene for scene in scenes if scene.pattern == pattern][:count]
    return [clip["background"] for clip in clips(scenes)]


def shuffled_tiles(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tiles = frames.reshape(8, 6, 16, 6, 16, 3).swapaxes(2, 3).reshape(8, 36, 16, 16, 3)
    tiles = tiles[:, rng.permutation(36)].reshape(8, 6, 6, 16, 16, 3)
    return tiles.swapaxes(2, 3).reshape(frames.shape)


@pytest.mark.parametrize("pattern", ["stripes", "checker", "gradient"])
def test_garbled_pattern_gets_no_name(pattern):
    rng = np.random.default_rng(0)
    plain = backgrounds("plain", 1)[0]
    for frames in backgrounds(pattern, 4):
        assert classify_background(frames)[0] == pattern
        noisy = frames + rng.normal(0, 40, frames.shape)
        half = frames.copy()
        half[:, :, 48:] = plain[:, :, 48:]
        changing = np.concatenate((frames[:4], frames[4:, ::-1, ::-1]))
        if pattern != "gradient":  # symmetric patterns may survive the turn: shift them instead
            changing = np.concatenate((frames[:4], np.roll(frames[4:], 13, (1, 2))))
        garbled = (shuffled_tiles(frames, rng), noisy.clip(0, 255).astype(np.uint8), half, changing)
        for index, clip in enumerate(garbled):
            assert classify_background(clip)[0] is None, index


@pytest.mark.parametrize("pattern", ["plain", "stripes", "checker", "gradient"])
def test_what_is_hidden_does_not_count(pattern):
    seen = torch.ones(SIZE, dtype=torch.bool)
    seen[20:60, 30:76] = False
    for frames in backgrounds(pattern, 4):
        expected = classify_background(frames)
        painted = np.where(seen.numpy()[..., None], frames, np.uint8([250, 20, 20]))
        assert classify_background(painted, seen) == expected and expected[0] == pattern
        assert classify_background(painted) != expected
    assert classify_background(frames, torch.zeros_like(seen)) == (None, None)


def test_noise_is_no_background():
    noise = np.random.default_rng(0).integers(0, 256, (8, *SIZE, 3), dtype=np.uint8)
    assert classify_background(noise) == (None, None)


def test_psnr_iou_and_composite_match_numbers_by_hand():
    black, grey = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(13.979, abs=1e-3)  # 20 log10(255 / 51)
    assert psnr(grey, grey) == 60.0
    assert psnr(grey, torch.full((1, 2, 2, 3), 0.2)) == 60.0
    first = np.array([[[255, 255, 0, 0]]], np.uint8)
    second = np.array([[[0, 200, 200, 100]]], np.uint8)
    assert alpha_iou(first, second) == pytest.approx(1 / 3)
    assert alpha_iou(black[..., 0], black[..., 0]) == 1.0
    half = np.full((1, 2, 2), 0.25, np.float32)
    mixed = recompose(np.full((1, 2, 2, 3), 255, np.uint8), half, grey)
    assert torch.allclose(mixed, torch.full((1, 2, 2, 3), 0.25 + 0.75 * 0.2))


class TruthPipeline:
    """Answers every task with the true layers, or with those of the next scene."""

    def __init__(self, scenes: int, seed: int, shift: int = 0):
        layers = scene_layers(held_out_scenes(scenes, seed), 8, SIZE)
        self.layers = {name: np.roll(clip, shift, 0) for name, clip in layers.items()}
        self.calls = []

    def generate_batch(self, task, prompts, given, seed, steps, guidance):
        start = sum(len(call[1]) for call in self.calls if call[0] == task)
        self.calls.append((task, prompts, sorted(given), seed, steps, guidance))
        return {name: clip[start : start + len(prompts)] for name, clip in self.layers.items()}

    def reconstruct(self, layers):
        return layers


def test_a_perfect_pipeline_gets_full_marks_and_is_asked_rightly():
    pipeline = TruthPipeline(3, seed=0)
    seen = []
    scores = evaluate(
        pipeline,
        scenes=3,
        batch=2,
        steps=7,
        guidance={"generate": 2.5},
        baseline=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    for task in TASKS:
        for measure, value in scores["tasks"][task].items():
            best = 50.0 if measure.endswith("_db") else 1.0  # 8-bit rounding costs some dB
            assert value >= best, (task, measure)
    assert scores["ceiling"]["shape"] == 1.0
    assert [call[0] for call in pipeline.calls] == [task for task in TASKS for _ in range(2)]
    for task, prompts, given, _, steps, guidance in pipeline.calls:
        assert tuple(given) == tuple(sorted(GIVEN[task]))
        assert steps == 7 and guidance == (2.5 if task == "generate" else None)
        assert all(len(wording) == 3 for wording in prompts)
    assert len({call[3] for call in pipeline.calls}) == 2  # each batch has noise of its own
    assert seen[-1] == (15, 15)
    json.dumps(scores)


def test_layers_of_another_scene_fail():
    scores = evaluate(TruthPipeline(3, seed=0, shift=1), scenes=3, batch=3, baseline=False)["tasks"]
    assert scores["background"]["blended_db"] < 20
    assert scores["foreground"]["blended_db"] < 20
    assert scores["decompose"]["alpha_iou"] < 0.5 and scores["decompose"]["recomposed_db"] < 20


def test_baseline_stays_far_below_what_is_asked():
    scores = evaluate(None, scenes=6, seed=1)
    assert scores["ceiling"]["pattern"] == 1.0 and scores["tasks"] == {}
    baseline = scores["baseline"]
    for task in ("generate", "foreground", "background"):
        assert baseline[task]["blended_db"] < 20
    assert baseline["decompose"]["alpha_iou"] < 0.7


def test_median_split_recomposes_its_clip():
    blended = clips(held_out_scenes(1, seed=0))[0]["blended"]
    layers = split_by_median(blended)
    assert (
        psnr(recompose(layers["foreground"], layers["alpha"], layers["background"]), blended) > 30
    )
