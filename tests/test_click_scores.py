"""Scores of clicked regions: what the measures give for true, still, wrong and spilt motion."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_cli import run
from tiny_clicker import WORDS as TINY_WORDS
from tiny_clicker import write_clicker

from layerloom.engine.metrics.animate import spearman
from layerloom.engine.metrics.click import evaluate_clicks, score_clip, trials
from layerloom.engine.metrics.click_pairs import evaluate_pairs, pairs, score_pair, split
from layerloom.engine.training.click_world import STRENGTH_RANGE, render_clicks

SIZE, FRAMES = (48, 48), 6


@pytest.fixture(scope="module")
def wanted():
    return trials(8, 0, FRAMES, SIZE)


def clip_of(scene):
    rendered = render_clicks([scene], FRAMES, SIZE).clips[0]
    return (rendered.movedim(1, -1) * 255).round().byte().numpy()


def test_the_true_clip_scores_full(wanted):
    for trial in wanted:
        scores = score_clip(trial.frames, trial)
        assert scores["energy"] > 0.999 and scores["direction"] == 1
        assert scores["other_change"] == scores["background_change"] == scores["i_mse"] == 0
        assert scores["way"] == pytest.approx(trial.scene.strength, rel=0.05)
        assert scores["colour"] == 1


def test_trials_are_held_out_evenly_strong_and_turned():
    many = trials(40, 3, 2, (32, 32))
    strengths = sorted(trial.scene.strength for trial in many)
    low, high = STRENGTH_RANGE
    assert low <= strengths[0] < low + 1 and high - 1 < strengths[-1] <= high
    assert len(set(strengths)) == 40
    assert len({trial.scene.meant.direction for trial in many}) == 8
    again = trials(40, 3, 2, (32, 32))[7]
    assert again.scene == many[7].scene and np.array_equal(again.frames, many[7].frames)
    request = many[0].request
    assert request.regions[0].phrase.startswith("moving ")
    assert request.regions[0].strength == many[0].scene.strength
    for trial in many:
        assert not (trial.mask & trial.other).any() and (trial.own | ~trial.mask).all()


def test_motion_of_the_wrong_sprite_is_told(wanted):
    trial = wanted[0]
    scene = trial.scene
    swapped = replace(
        scene,
        meant=replace(scene.meant, direction="still", path=0.0),
        other=replace(scene.other, direction="left", path=0.0),
    )
    still = clip_of(swapped)
    wrong = still.copy()
    # The other sprite fades away, the clicked one stays.
    for index in range(FRAMES):
        wrong[index][trial.other] = still[0][trial.other] * (1 - index / FRAMES)
    scores = score_clip(wrong, trial)
    assert scores["energy"] < 0.01 and scores["other_change"] > 20 and scores["direction"] == 0


def test_a_flickering_background_costs_energy(wanted):
    trial = wanted[1]
    noisy = trial.frames.astype(int) + np.arange(FRAMES)[:, None, None, None]
    scores = score_clip(noisy.clip(0, 255).astype(np.uint8), trial)
    assert 2 < scores["background_change"] < 4 and scores["energy"] < 0.999


class Fake:
    """A pipeline whose clips are given; its autoencoder loses the last bit."""

    def __init__(self, make):
        self.make, self.asked = make, []

    def generate_batch(self, requests):
        self.asked += requests
        return np.stack(
            [self.make(len(self.asked) - len(requests) + i) for i in range(len(requests))]
        )

    def reconstruct(self, frames):
        return frames & 0xFE


def test_a_whole_evaluation(wanted):
    true = [trial.frames for trial in wanted]
    fake = Fake(lambda index: true[index])
    seen = []
    scores = evaluate_clicks(
        fake,
        scenes=8,
        batch=3,
        frames=FRAMES,
        size=SIZE,
        settings={"steps": 5},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert scores["clicked"]["direction"] == 1 and scores["clicked"]["strength_rank"] > 0.97
    assert scores["clicked"]["i_mse_ratio"] == 0 and scores["ceiling"]["i_mse"] > 0.3
    assert scores["baseline"]["direction"] == 0 and scores["baseline"]["energy"] == 0
    assert [request.seed for request in fake.asked] == list(range(8))
    assert all(request.steps == 5 for request in fake.asked)
    assert seen[-1] == (24, 24) and json.dumps(scores)


def test_two_regions_are_judged_each_by_its_own(wanted):
    true = evaluate_pairs(None, scenes=6, frames=16, size=(96, 96))["ceiling"]
    assert true["both"] == 1 and true["background_change"] == 0 and true["strength_rank"] > 0.95
    trial = pairs(3, 0, 6, (64, 64))[2]
    first, second = trial.scenes
    assert first.direction != second.direction and len(trial.request.regions) == 2
    assert [region.strength for region in trial.request.regions] == list(trial.strengths)
    assert not (trial.masks[0] & trial.masks[1]).any()
    # The first one's motion alone: half of the directions.
    alone = trial.frames.copy()
    alone[:] = trial.frames[0]
    moved = np.abs(trial.frames.astype(int) - trial.background).max(-1) > 30
    alphas = split(trial.frames, trial.background, trial.scenes)
    firsts = (alphas[0] > alphas[1]).numpy()
    for frame in range(1, 6):
        alone[frame][trial.masks[0]] = trial.background[trial.masks[0]]
        place = moved[frame] & firsts[frame]
        alone[frame][place] = trial.frames[frame][place]
    assert score_pair(alone, trial)["direction"] == 0.5


def test_spearman_is_of_ranks():
    assert spearman([1, 2, 3], [10, 11, 1000]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2], [1, 2]) == 0 and spearman([1, 2, 3], [5, 5, 5]) == 0


def test_the_command_prints_scores(tmp_path, capsys):
    assert "left" in TINY_WORDS
    clicker = write_clicker(tmp_path / "tiny.safetensors")
    arguments = [
        "--checkpoint",
        clicker,
        "--scenes",
        2,
        "--pairs",
        2,
        "--steps",
        1,
        "--quiet",
        "--device",
        "cpu",
    ]
    assert run("eval", "click", *arguments, "--hold-background") == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) == {"settings", "ceiling", "baseline", "clicked", "pairs"}
    assert set(scores["pairs"]) == {"ceiling", "clicked"}
    assert scores["settings"]["hold_background"] is True
    assert run("eval", "click", "--scenes", 0) == 2
    assert "--scenes is 0" in capsys.readouterr().err
