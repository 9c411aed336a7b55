"""Scores of a segmenter: perfect and useless ones are told apart, and the command prints them."""

import json

import numpy as np
import pytest
import torch
from test_cli import assert_one_sentence, run
from tiny_segmenter import write_segmenter

from layerloom.engine.conditioning.segmenter import STARTER, Candidates, Embedding, Segmenter
from layerloom.engine.metrics.segment import SIZES, evaluate_segmenter, trials

pytest.importorskip("segment_anything")


class Knowing:
    """Answers from the trials themselves; ``wrong`` of three times it scores a wrong mask best."""

    def __init__(self, seed: int, wrong: int = 0):
        self.seed, self.wrong, self.picture, self.asked = seed, wrong, -1, 0

    def embed(self, picture: np.ndarray) -> Embedding:
        self.picture += 1
        shown, self.trials = trials(self.seed, self.picture)
        assert np.array_equal(shown, picture)
        return Embedding(torch.zeros(1), picture.shape[:2], picture.shape[:2])

    def masks(self, embedding: Embedding, clicks) -> Candidates:
        meant = next(trial.meant for trial in self.trials if trial.clicks == clicks)
        logits = torch.where(torch.stack([meant, ~meant, meant]), 1.0, -1.0)
        self.asked += 1
        right = self.asked % 3 >= self.wrong
        return Candidates(logits, torch.tensor([float(right), 0.5, 0.0]), embedding.size)


def test_a_segmenter_that_knows_is_right():
    scores = evaluate_segmenter(Knowing(3), pictures=12, seed=3)
    kinds = {"point", "points", "negative", "box"}
    assert kinds <= set(scores) <= kinds | {"all", "background", "embed_ms", "click_ms"}
    assert scores["all"] == {"iou": 1.0, "right": 1.0, "best_iou": 1.0, "count": 60}
    assert sum(scores[kind]["count"] for kind in scores if "_" not in kind) == 120
    assert scores["click_ms"] >= 0


def test_a_wrong_choice_is_seen():
    scores = evaluate_segmenter(Knowing(3, wrong=1), pictures=12, seed=3)["all"]
    assert scores["iou"] == scores["right"] == pytest.approx(2 / 3, abs=1e-3)
    assert scores["best_iou"] == 1


def test_trials_are_held_out_clicks_on_pictures_of_several_shapes():
    for index in range(8):
        picture, asked = trials(0, index)
        height, width = SIZES[index % len(SIZES)]
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
        assert [len(trial.clicks.points) for trial in asked] == [1, 2, 3, 0, 1]
        for trial in asked:
            assert trial.meant.shape == (height, width) and trial.meant.any()
            points, labels, _ = trial.clicks.pixels((height, width))
            for (x, y), label in zip(points.round().astype(int), labels, strict=True):
                if not trial.clicks.boxes:
                    assert trial.meant[min(y, height - 1), min(x, width - 1)] == label


def test_the_command_prints_scores(tmp_path, capsys):
    file = write_segmenter(tmp_path / "s.pth")
    assert run("eval", "segment", "--checkpoint", file, "--pictures", 2, "--quiet") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["all"]["count"] == 10 and 0 <= scores["all"]["iou"] <= 1
    assert run("eval", "segment", "--pictures", 0) == 2
    assert_one_sentence(capsys.readouterr().err, "--pictures is 0")
    assert run("eval", "segment", "--checkpoint", tmp_path / "no.pth") == 2
    assert_one_sentence(capsys.readouterr().err, "no.pth")


@pytest.mark.skipif(not STARTER.exists(), reason="the starter segmenter is not trained yet")
def test_the_starter_knows_clicks_on_sprites_it_never_saw():
    scores = evaluate_segmenter(Segmenter.open(device="cpu"), pictures=100, seed=0)
    assert scores["point"]["iou"] >= 0.9 and scores["all"]["iou"] >= 0.9
    assert min(scores[kind]["iou"] for kind in ("points", "negative", "box")) >= 0.85
    assert STARTER.stat().st_size < 8_000_000
    assert scores["click_ms"] < 50
