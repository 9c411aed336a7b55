"""Training the starter segmenter: pictures and askings of sprite world, the stage, its recipe."""

import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_clicks import refused
from tiny_segmenter import TINY

from layerloom.engine.conditioning.segmenter import Segmenter
from layerloom.engine.training.recipe import train_from_recipe
from layerloom.engine.training.segment_world import (
    BACKGROUND,
    WAYS,
    Way,
    ask,
    draw_pictures,
    picture_at,
    touching,
)
from layerloom.engine.training.segmenter import (
    SegmentData,
    SegmenterStage,
    answer_all,
    build_segmenter_stage,
)
from layerloom.engine.training.settings import TrainingSettings
from layerloom.engine.training.shares import Shares
from layerloom.engine.training.sprite_world import HELD_OUT_PAIRS

pytest.importorskip("segment_anything")
ROOT = Path(__file__).resolve().parents[1]


def stage(batch: int = 3) -> SegmenterStage:
    torch.manual_seed(0)
    recipe = {"data": {"seed": 5}, "segmenter": asdict(TINY)}
    return build_segmenter_stage(recipe, TrainingSettings(steps=1, batch=batch, learning_rate=1))


# --- the world ------------------------------------------------------------------------------


def test_pictures_are_the_same_whenever_drawn():
    assert picture_at(1, 7) == picture_at(1, 7) != picture_at(1, 8)
    assert picture_at(1, 7) != picture_at(2, 7)
    counts = [len(picture_at(3, index)) for index in range(200)]
    assert set(counts) == {1, 2, 3, 4} and counts.count(1) < 80


def test_held_out_pairs_are_kept_apart():
    for held_out in (False, True):
        sprites = [s for index in range(150) for s in picture_at(3, index, held_out)]
        assert {(s.colour, s.shape) in HELD_OUT_PAIRS for s in sprites} == {held_out}
    for index in range(150):
        sprites = picture_at(4, index)
        assert all(s.colour != sprites[0].background_colour for s in sprites)


def test_sprites_hide_what_is_below_and_add_up():
    scenes = [picture_at(6, index) for index in range(24)]
    drawn = draw_pictures(scenes, (48, 64), (24, 32))
    assert drawn.pictures.shape == (24, 3, 48, 64) and drawn.visible.shape == (24, 4, 24, 32)
    assert drawn.pictures.min() >= 0 and drawn.pictures.max() <= 1
    assert drawn.visible.sum(1).max() <= 1 + 1e-5
    for row, sprites in enumerate(scenes):
        shown = drawn.visible[row] > 0.5
        assert shown[: len(sprites)].any((1, 2)).all() and not shown[len(sprites) :].any()
        everything = drawn.answer(row, frozenset(range(len(sprites))))
        ground = drawn.answer(row, frozenset((BACKGROUND,)))
        assert torch.allclose(everything + ground, torch.ones(24, 32), atol=1e-5)


def blocks() -> tuple[np.ndarray, np.ndarray]:
    """Three sprites in a row, of which the first two touch."""
    visible = torch.zeros(4, 20, 40)
    for number, left in enumerate((2, 10, 26)):
        visible[number, 6:14, left : left + 8] = 1
    return visible.numpy(), touching(visible[None])[0].numpy()


def test_askings_mean_what_was_clicked():
    visible, touches = blocks()
    assert touches[:3, :3].tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]
    seen = set()
    for number in range(400):
        way = WAYS[number % len(WAYS)]
        asking = ask(way, visible, touches, random.Random(number))
        assert len(asking.points) == way.points and (asking.box is not None) == way.box
        clicked = {0: set(), 1: set()}
        for x, y, label in asking.points:
            assert 0 <= x <= 1 and 0 <= y <= 1
            hit = np.flatnonzero(visible[:, int(y * 20), int(x * 40)] > 0.5)
            clicked[label].update(hit.tolist() or [BACKGROUND])
        meant, near, everything = asking.answers
        assert meant
        if not way.box and BACKGROUND not in clicked[1]:
            assert meant == clicked[1]
            pair = {0, 1} if meant & {0, 1} else set()
            assert near == (meant | pair) - clicked[0]
            assert everything == {0, 1, 2} - clicked[0]
        elif not way.box:
            assert asking.answers == (frozenset((BACKGROUND,)),) * 3
        else:
            assert clicked[1] <= meant and not clicked[0] & meant
            assert near == everything == meant
            x0, y0, x1, y1 = asking.box
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        seen.add((way, bool(clicked[0]), len(meant)))
    # Negative points, several wanted, boxes around two: all of it happens.
    assert {(Way(2), True, 1), (Way(2), False, 2), (Way(3), True, 2)} <= seen
    assert {(Way(0, True), False, 2), (Way(1, True), True, 1)} <= seen


# --- the stage ------------------------------------------------------------------------------


def test_shares_of_a_step_are_the_step():
    whole = stage(4).draw(torch.Generator().manual_seed(3), Shares((0,), 1))[0]
    halves = stage(2).draw(torch.Generator().manual_seed(3), Shares((0, 1), 2))
    again = stage(4).draw(torch.Generator().manual_seed(3))[0]
    assert torch.equal(whole.pictures, again.pictures)
    for number, question in enumerate(whole.questions):
        joined = torch.cat([half.questions[number].answers for half in halves])
        assert torch.equal(question.answers, joined)
    assert torch.equal(whole.pictures, torch.cat([half.pictures for half in halves]))


def test_many_pictures_at_once_are_answered_as_one_by_one():
    made = stage()
    network = made.network.eval()
    drawn = made.draw(torch.Generator().manual_seed(0))[0]
    with torch.no_grad():
        features = network.image_encoder(network.preprocess(drawn.pictures))
        for question in drawn.questions:
            logits, scores = answer_all(network, features, question)
            for row in range(len(features)):
                points = None
                if question.points is not None:
                    points = (question.points[[row]], question.labels[[row]])
                box = None if question.boxes is None else question.boxes[[row]]
                sparse, dense = network.prompt_encoder(points=points, boxes=box, masks=None)
                alone, score = network.mask_decoder(
                    image_embeddings=features[[row]],
                    image_pe=network.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=True,
                )
                assert torch.allclose(alone[0], logits[row, 1:], atol=1e-4)
                assert torch.allclose(score[0], scores[row, 1:], atol=1e-4)


def test_the_training_picture_is_what_the_predictor_sees():
    # Points and pictures of the stage, and the same through the segmenter's own way.
    made = stage()
    made.data = SegmentData(5, 0.0)
    drawn = made._questions([1], (32, 24), 2.0, torch.zeros(1, 1, 1, 1))
    scenes = [picture_at(5, 1)]
    shown = draw_pictures(scenes, (64, 48), (32, 24)).pictures[0]
    segmenter = Segmenter(made.network.eval(), None)
    embedding = segmenter.embed((shown.movedim(0, -1) * 255).round().byte().numpy())
    assert embedding.scaled == tuple(drawn.pictures.shape[-2:]) == (64, 48)
    with torch.no_grad():
        own = made.network.image_encoder(made.network.preprocess(drawn.pictures))
    assert torch.allclose(own, embedding.features, atol=1e-3)


def test_a_step_improves_every_way():
    made = stage(4)
    optimizer = torch.optim.AdamW(made.network.parameters(), lr=3e-3)
    drawn = made.draw(torch.Generator().manual_seed(1))[0]
    losses = []
    for _ in range(24):
        loss, numbers = made.loss(drawn)
        assert {"overlap", "overlap/point", "score_error"} == set(numbers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def tiny_recipe(folder: Path) -> Path:
    recipe = folder / "tiny.toml"
    text = (ROOT / "engine/training/recipes/starter_segmenter.toml").read_text(encoding="utf-8")
    for key, value in asdict(TINY).items():
        shown = str(list(value) if isinstance(value, tuple) else value).lower()
        line = next((line for line in text.splitlines() if line.startswith(f"{key} = ")), None)
        new = f"{key} = {shown}"
        text = text.replace(line, new) if line else text.replace("[data]", f"{new}\n[data]")
    text = text.replace("[data]", "").replace("seed = 21", "[data]\nseed = 21")
    recipe.write_text(text, encoding="utf-8")
    return recipe


def test_the_recipe_makes_a_segmenter_that_answers(tmp_path):
    folder = tmp_path / "run"
    changes = {"folder": str(folder), "training.steps": "2", "training.batch": "2"}
    final = train_from_recipe(tiny_recipe(tmp_path), changes)
    segmenter = Segmenter.open(final, "cpu")
    assert segmenter.info.variant == "starter" and segmenter.info.settings["image_size"] == 64
    # It goes on from a segmenter, ours or a published one.
    changes |= {"folder": str(tmp_path / "more"), "training.gradient_checkpointing": "true"}
    recipe = tmp_path / "more.toml"
    text = tiny_recipe(tmp_path).read_text(encoding="utf-8")
    recipe.write_text(f'start = "{final}"\n{text}', encoding="utf-8")
    assert Segmenter.open(train_from_recipe(recipe, changes), "cpu").info.settings == (
        segmenter.info.settings
    )


def test_recipes_that_do_not_fit_are_refused(tmp_path):
    notes = []
    shipped = ROOT / "engine/training/recipes/starter_segmenter.toml"
    train_from_recipe(shipped, {}, False, None, notes.append, True)
    assert "1,5" in notes[0] and "24 questions" in notes[0]

    def refuse(changes, *words):
        refused(lambda: train_from_recipe(shipped, changes, False, None, print, True), *words)

    refuse({"segmenter.image_size": "100"}, "image_size", "100")
    refuse({"segmenter.heads": "3"}, "heads", "3")
    refuse({"segmenter.patch_size": "32"}, "4x4 tokens", "at least 8")
    refuse({"segmenter.widht": "3"}, "'widht'")
    refuse({"data.noise": "3"}, "data.noise")
    refuse({"data.frames": "3"}, "'frames'")
    chain = ROOT / "starter/segmenter.toml"
    train_from_recipe(chain, {}, False, None, notes.append, True)
    assert "starter_segmenter" in " ".join(notes)
