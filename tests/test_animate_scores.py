"""The animator's scores: what they allow, what they catch, and what they ask of a pipeline."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import small_animator
from typer.testing import CliRunner

from layerloom.engine.animate import AnimatePipeline
from layerloom.engine.cli import app
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.metrics.animate import (
    LOOP_MOTION,
    MODES,
    MOTIONS,
    evaluate_animation,
    motion_rank,
    requests,
    score_clip,
    trials,
)
from layerloom.engine.metrics.cut_out import cut_out
from layerloom.engine.training.moving_world import moving_scene_at
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS, render

FRAMES, SIZE = 8, (64, 64)


def clips(mode: str, count: int = 6):
    return trials(mode, count, 5, FRAMES, SIZE, batch=2)


def moving(mode: str = "animate", count: int = 12):
    """A trial whose sprite goes a long way."""
    return max(
        (t for t in clips(mode, count) if t.scene.direction != "still"), key=lambda t: t.motion
    )


def test_cutting_out_gives_the_exact_alpha_of_any_background():
    scenes = [moving_scene_at(7, index).scene for index in range(24)]
    batch = render(scenes, 4, SIZE)
    for index, scene in enumerate(scenes):
        clip = (batch.blended[index].movedim(1, -1) * 255).round().to(torch.uint8).numpy()
        alpha, colour = cut_out(clip, batch.background[index, 0].movedim(0, -1))
        true = batch.alpha[index, :, 0]
        # Rounded to 1/255 and divided by a colour difference of 0.45 at least.
        assert float((alpha - true).abs().max()) < 0.02, scene
        torch.testing.assert_close(colour, batch.foreground[index, 0, :, 0, 0], atol=3e-3, rtol=0)


def test_nothing_is_cut_out_of_a_bare_background():
    background = np.full((32, 32, 3), 90, np.uint8)
    clip = np.repeat(background[None], 3, axis=0)
    clip[:, ::2] += 9  # noise
    alpha, colour = cut_out(clip, background)
    assert colour is None and not alpha.any()


def test_trials_are_held_out_and_their_motion_is_what_is_asked():
    for mode in MODES:
        wanted = clips(mode)
        assert all((t.scene.colour, t.scene.shape) in HELD_OUT_PAIRS for t in wanted)
        expected = [LOOP_MOTION] * 6 if mode == "loop" else list(np.repeat(MOTIONS[:3], 2))
        assert [t.motion for t in wanted] == expected
        for trial, asked in zip(wanted, requests(mode, wanted, 3), strict=True):
            assert asked.motion == trial.motion and asked.loop == (mode == "loop")
            assert (asked.end is not None) == (mode == "interpolate")
            assert np.array_equal(asked.image, trial.frames[0])
            asked.validate()
    assert len({asked.seed for asked in requests("animate", clips("animate"), 3)}) == 6


def test_turned_trials_ask_for_another_direction_from_the_same_place():
    for plain, other in zip(clips("animate", 12), clips("turned", 12), strict=True):
        assert np.array_equal(plain.frames[0], other.frames[0])
        assert plain.scene.direction != other.scene.direction
        boxes = render([other.scene], FRAMES, SIZE).boxes
        assert boxes.min() > -1e-6 and boxes.max() < 1 + 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_true_clips_score_full_marks(mode):
    for trial in clips(mode):
        clip = trial.frames[:-1] if mode == "loop" else trial.frames
        scores = score_clip(mode, clip, trial)
        labels = {"colour", "shape", "direction"} | ({"closed"} if mode == "loop" else set())
        assert {scores[name] for name in labels} == {1.0}, (trial.scene, scores)
        assert scores["first_db"] == scores["clip_db"] == 60.0
        if "way" in scores:
            assert scores["way"] == pytest.approx(1, abs=0.05)


def test_a_ghost_at_the_old_place_spoils_the_shape():
    trial = moving()
    alpha, _ = cut_out(trial.frames, trial.background)
    clip = trial.frames.copy()
    first = (alpha[0] > 0.5).numpy()
    clip[:, first] = (0.5 * trial.frames[0][first] + 0.5 * clip[:, first]).astype(np.uint8)
    assert score_clip("animate", clip, trial)["shape"] == 0.0


def test_a_sprite_that_turns_another_colour_or_shape_is_caught():
    trial = moving()
    alpha, _ = cut_out(trial.frames, trial.background)
    recoloured = trial.frames.copy()
    inside = (alpha > 0.5).numpy()
    recoloured[inside] = 255 - recoloured[inside]
    assert score_clip("animate", recoloured, trial)["colour"] == 0.0
    other = replace(trial.scene, shape="circle" if trial.scene.shape != "circle" else "star")
    changed = render([other], FRAMES, SIZE).blended[0].movedim(1, -1)
    late = trial.frames.copy()
    late[4:] = (changed[4:] * 255).round().to(torch.uint8).numpy()
    assert score_clip("animate", late, trial)["shape"] == 0.0


def test_a_sprite_that_goes_elsewhere_or_nowhere_is_caught():
    trial = moving()
    scores = score_clip("animate", trial.frames[::-1], trial)
    assert scores["direction"] == 0.0 and scores["shape"] == 1.0
    still = np.repeat(trial.frames[:1], FRAMES, axis=0)
    scores = score_clip("animate", still, trial)
    assert scores["direction"] == 0.0 and scores["way"] == 0.0 and scores["first_db"] == 60.0


def test_a_loop_that_jumps_back_is_not_closed():
    trial = moving("loop")
    clip = trial.frames[[0, 0, 1, 1, 2, 2, 3]]
    assert score_clip("loop", clip, trial)["closed"] == 0.0


def test_the_rank_of_motion_needs_more_motion_to_be_more():
    wanted = [t for t in trials("animate", 12, 5, FRAMES, SIZE, batch=3)]
    true = [score_clip("animate", t.frames, t) for t in wanted]
    # Ways of one motion tie on one side only.
    assert motion_rank(true, wanted) > 0.95
    equal = [
        {**row, "way": 1 / t.motion} for row, t in zip(true, wanted, strict=True) if "way" in row
    ]
    movers = [t for row, t in zip(true, wanted, strict=True) if "way" in row]
    assert motion_rank(equal, movers) == 0.0


class Still:
    """Repeats the image, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def generate_batch(self, wanted):
        self.asked += wanted
        count = FRAMES - wanted[0].loop
        return np.stack([np.repeat(r.image[None], count, axis=0) for r in wanted])

    def reconstruct(self, frames):
        return frames // 16 * 16


def test_a_pipeline_is_scored_beside_ceiling_and_baseline():
    pipeline, done = Still(), []
    made = evaluate_animation(
        pipeline,
        scenes=2,
        trade_scenes=1,
        batch=2,
        frames=FRAMES,
        size=SIZE,
        settings={"steps": 4},
        progress=lambda *now: done.append(now),
    )
    json.dumps(made)
    assert done[-1][0] == done[-1][1] == len(done)
    assert set(made["modes"]) == set(made["ceiling"]) == set(made["baseline"]) == set(MODES)
    # A still image is what the baseline is.
    animate, baseline = made["modes"]["animate"], dict(made["baseline"]["animate"])
    assert {k: animate[k] for k in baseline} == baseline and "motion_rank" in animate
    assert made["ceiling"]["animate"]["first_db"] < 40
    assert made["modes"]["interpolate"]["end_db"] < made["baseline"]["interpolate"]["end_db"]
    assert made["modes"]["loop"]["closed"] == 1.0
    scales = [(p["text_scale"], p["image_scale"]) for p in made["trade"] if "gate" not in p]
    assert len(set(scales)) == 9 and {p["gate"] for p in made["trade"] if "gate" in p}
    assert all(asked.steps == 4 for asked in pipeline.asked)


def test_without_a_pipeline_the_measures_are_shown_to_allow_full_marks():
    made = evaluate_animation(None, scenes=2, frames=FRAMES, size=SIZE, modes=("turned",))
    assert made["ceiling"]["turned"]["shape"] == 1.0 and not made["modes"] and "trade" not in made


def test_a_trained_starter_animates_and_is_scored(tmp_path):
    """From the training's file through the pipeline and the command, at a tiny width."""
    path = small_animator(tmp_path, phases=4)
    pipeline = AnimatePipeline.open(path, device="cpu")
    assert pipeline.settings.modes == ("animate", "interpolate", "loop")
    assert pipeline.settings.variant.speed_range == (1, 6)
    trial = trials("animate", 1, 0, 4, (32, 32))[0]
    result = pipeline.run(requests("animate", [trial], 0, steps=2)[0])
    assert result.frames.shape == (4, 32, 32, 3)
    assert not pipeline.prepare(requests("interpolate", [trial], 0)[0])
    command = ["eval", "animate", "--checkpoint", str(path), "--scenes", "1", "--steps", "2"]
    plot = tmp_path / "trade.png"
    command += ["--trade-scenes", "1", "--quiet", "--plot", str(plot)]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    with Image.open(plot) as picture:
        assert picture.width == 900 and len(picture.getcolors(10000)) > 20
    scores = json.loads(made.stdout)
    assert scores["settings"]["frames"] == 4 and scores["settings"]["height"] == 32
    assert set(scores["modes"]) == set(MODES) and len(scores["trade"]) == 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenes", "0"], "--scenes is 0"),
        (["--plot", "scores.txt"], "--plot names a .png or .webp"),
        (["--plot", "a.png", "--trade-scenes", "0"], "needs --trade-scenes above 0"),
        (["--plot", "no/such/folder/a.png"], "does not exist"),
    ],
)
def test_bad_options_are_named_before_anything_is_opened(options, message):
    made = CliRunner().invoke(app, ["eval", "animate", *options])
    assert made.exit_code == 2 or isinstance(made.exception, LayerLoomError)
    assert message in (made.output + str(made.exception))
