"""Scores of subjects along boxes: what the measures give for true, lost, wrong and shifted ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cli import run
from tiny_director import write_director

from layerloom.engine.metrics.trajectory import (
    LOST,
    box_scores,
    evaluate_trajectories,
    found_boxes,
    score_clip,
    trials,
)
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS
from layerloom.engine.training.trajectory_world import plain_caption, render_trajectories

SIZE, FRAMES = (96, 96), 4


@pytest.fixture(scope="module")
def wanted():
    return trials(4, 0, FRAMES, SIZE)


def clip_of(scene):
    made = render_trajectories([scene], SIZE).clips[0]
    return (made.movedim(1, -1) * 255).round().byte().numpy()


@pytest.mark.parametrize("subjects", [1, 2])
def test_true_clips_score_full(subjects):
    found = evaluate_trajectories(
        None, scenes=6, frames=FRAMES, size=SIZE, subjects=subjects, seed=3
    )
    scores, still = found["ceiling"], found["baseline"]
    # Tips of stars and triangles are thinner than a pixel.
    assert scores["miou"] > 0.8 and scores["cd"] < 0.02
    assert scores["colour"] == scores["shape"] == 1
    assert scores["background"] == scores["background_colour"] == 1
    if subjects > 1:
        both = scores["miou_1"], scores["miou_2"]
        assert both[0] >= both[1] and sum(both) / 2 == pytest.approx(scores["miou"], abs=1e-3)
    # A subject that stands still looks right and is not where it should be.
    assert still["shape"] == still["background"] == 1 and still["colour"] > 0.9
    assert still["miou"] < 0.67 and still["cd"] > 0.1


def test_trials_are_held_out_and_their_prompts_say_nothing_of_the_sprite(wanted):
    for trial in wanted:
        looks = trial.scene.actors[0].looks
        assert (looks.colour, looks.shape) in HELD_OUT_PAIRS
        request = trial.request
        assert request.prompt == plain_caption(trial.scene)
        assert looks.colour not in request.prompt and looks.shape not in request.prompt
        request.validate()
    assert np.array_equal(trials(4, 0, FRAMES, SIZE)[2].boxes, wanted[2].boxes)


def test_another_way_colour_or_shape_is_told(wanted):
    trial, other = wanted[0], wanted[1]
    scene, actor = trial.scene, trial.scene.actors[0]
    away = replace(actor, way=other.scene.actors[0].way)
    elsewhere = score_clip(clip_of(replace(scene, actors=(away,))), trial)
    assert elsewhere["miou"] < 0.6 and elsewhere["cd"] > 0.1 and elsewhere["colour"] == 1
    free = {"red", "green", "blue", "yellow"} - {actor.looks.colour, actor.looks.background_colour}
    painted = replace(actor, looks=replace(actor.looks, colour=min(free)))
    scores = score_clip(clip_of(replace(scene, actors=(painted,))), trial)
    assert scores["colour"] == 0 and scores["miou"] > 0.75
    shaped = "square" if actor.looks.shape != "square" else "star"
    formed = replace(actor, looks=replace(actor.looks, shape=shaped))
    assert score_clip(clip_of(replace(scene, actors=(formed,))), trial)["shape"] == 0


def test_a_clip_without_the_subject_is_lost(wanted):
    trial = wanted[0]
    behind = render_trajectories([trial.scene], SIZE).behind[0].movedim(0, -1)
    empty = (behind * 255).round().byte().numpy()[None].repeat(FRAMES, 0)
    scores = score_clip(empty, trial)
    assert scores["miou"] == scores["colour"] == scores["shape"] == 0 and scores["cd"] == LOST
    assert scores["background"] == 1


def test_boxes_are_compared_as_the_paper_does():
    asked = np.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]])
    overlap, distance = box_scores([(0.25, 0.0, 0.75, 0.5), None], asked)
    assert overlap == pytest.approx((1 / 3 + 0) / 2)
    assert distance == pytest.approx((0.25 + LOST) / 2)
    alpha = torch.zeros(1, 10, 20)
    alpha[0, 2:6, 5:15], alpha[0, 9, 0] = 1, 1
    assert found_boxes(alpha) == [(0.25, 0.2, 0.75, 0.6)]


def test_the_command_prints_scores(tmp_path, capsys):
    director = write_director(tmp_path / "tiny.safetensors")
    options = ["--scenes", 2, "--pairs", 1, "--steps", 1, "--checkpoint", director, "--quiet"]
    assert run("eval", "trajectory", *options, "--device", "cpu") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["settings"]["subjects"] == 1 and scores["pairs"]["settings"]["subjects"] == 2
    assert {"miou", "cd", "colour", "background"} <= scores["trajectory"].keys()
    assert run("eval", "trajectory", "--scenes", 0) == 2
