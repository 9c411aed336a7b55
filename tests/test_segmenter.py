"""Segmenter: the package's own predictor's numbers, files by their keys, boxes, refusals."""

import json

import numpy as np
import pytest
import torch
from test_cli import run
from test_clicks import refused
from tiny_segmenter import TINY, picture, tiny_segmenter, write_segmenter

from layerloom.engine.checkpoints.lora import inspect_file
from layerloom.engine.checkpoints.reader import memory_store
from layerloom.engine.checkpoints.save import save_tensors
from layerloom.engine.checkpoints.segmenter import (
    identify_segmenter,
    load_segmenter,
    save_segmenter,
)
from layerloom.engine.conditioning.clicks import pixel_clicks
from layerloom.engine.conditioning.segmenter import STARTER, Candidates, Segmenter

segment_anything = pytest.importorskip("segment_anything")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Segmenter:
    return Segmenter.open(write_segmenter(tmp_path_factory.mktemp("sam") / "a.pth"), "cpu")


PROMPTS = {
    "a point": ([(20, 30)], []),
    "a corner": ([(0, 0)], []),
    "points of both kinds": ([(20, 30, 1), (5, 6, 0), (60.5, 40.25, 1)], []),
    "a box": ([], [(10, 5, 40, 30)]),
    "a box and points": ([(20, 20, 1), (60, 40, 0)], [(10, 5, 40, 30)]),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", [(48, 70), (64, 64), (150, 90), (20, 31)])
def test_same_numbers_as_the_packages_predictor(tiny, prompt, size):
    height, width = size
    points, boxes = PROMPTS[prompt]
    # The prompts were written for 48x70.
    stretch = np.array([width / 70, height / 48])
    points = [(*(np.array(point[:2]) * stretch), *point[2:]) for point in points]
    boxes = [tuple(np.array(box) * np.tile(stretch, 2)) for box in boxes]
    shown = picture(height, width)

    predictor = segment_anything.SamPredictor(tiny_segmenter())
    predictor.set_image(shown)
    labels = [point[2] if len(point) > 2 else 1 for point in points]
    logits, scores, _ = predictor.predict(
        np.array([point[:2] for point in points], float) if points else None,
        np.array(labels) if points else None,
        # Borders between pixels, where the package counts centres.
        np.array(boxes[0]) - 0.5 if boxes else None,
        return_logits=True,
    )
    found = tiny.masks(tiny.embed(shown), pixel_clicks(points, boxes, size))
    assert np.abs(found.logits.numpy() - logits).max() <= 1e-5
    assert np.abs(found.scores.numpy() - scores).max() <= 1e-5
    assert np.array_equal(found.masks.numpy(), logits > 0)
    assert found.best == scores.argmax()


def test_one_embedding_answers_many_clicks(tiny):
    embedding = tiny.embed(picture())
    first = tiny.masks(embedding, pixel_clicks([(20, 30)], [], (48, 70)))
    other = tiny.masks(embedding, pixel_clicks([(60, 10)], [], (48, 70)))
    again = tiny.masks(embedding, pixel_clicks([(20, 30)], [], (48, 70)))
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)


def test_several_boxes_are_joined(tiny):
    embedding, size = tiny.embed(picture()), (48, 70)
    boxes = [(2, 2, 30, 20), (40, 10, 68, 46)]
    points = [(10, 10, 1), (50, 20, 1), (35, 40, 1), (5, 45, 0)]

    def ask(points, boxes):
        return tiny.masks(embedding, pixel_clicks(points, boxes, size))

    joined = ask(points, boxes)
    alone = [
        ask([points[0], points[3]], boxes[:1]),
        ask([points[1], points[3]], boxes[1:]),
        ask([points[2], points[3]], []),
    ]
    best = torch.stack([each.scaled[each.best] for each in alone]).amax(0)
    assert torch.allclose(joined.scaled[0], best, atol=1e-6)
    mean = sum(float(max(each.scores)) for each in alone) / 3
    assert float(joined.scores[0]) == pytest.approx(mean, abs=1e-6)
    # Without points of their own, boxes are all there is.
    assert ask([], boxes).logits.shape == (3, 48, 70)


def test_candidates_are_chosen_by_score_or_number():
    logits = torch.full((3, 2, 2), -1.0)
    logits[0, 0, 0] = logits[1, 1] = 1.0
    found = Candidates(logits, torch.tensor([0.2, 0.9, 0.5]), (2, 2))
    assert found.best == 1 and found.mask().tolist() == [[False, False], [True, True]]
    assert found.mask(0).sum() == 1
    # At another size, an editor's say.
    assert found.mask(size=(4, 6)).tolist() == [[False] * 6] * 2 + [[True] * 6] * 2
    refused(lambda: found.mask(2), "select nothing")
    refused(lambda: found.mask(3), "candidate 3", "0 to 2")
    refused(lambda: found.mask(-1), "candidate -1")


def test_what_cannot_be_segmented_is_refused(tiny):
    refused(lambda: tiny.embed(picture(1, 200)), "200x1", "narrow")
    embedding = tiny.embed(picture())
    refused(lambda: tiny.masks(embedding, pixel_clicks([(5, 5, 0)], [], (48, 70))), "nothing")
    if not STARTER.exists():
        refused(Segmenter.open, "starter/segmenter.toml")
    refused(lambda: Segmenter.open("nowhere.pth"), "nowhere.pth")


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_published_files_are_known_by_their_shapes(name):
    with torch.device("meta"):
        state = segment_anything.sam_model_registry[name]().state_dict()
    info = identify_segmenter(memory_store(state, "renamed.bin"))
    assert (info.variant, info.source, info.family) == (name, "segment-anything", "segmenter")
    assert info.settings["image_size"] == 1024 and info.settings["channels"] == 256
    assert info.parameters == sum(tensor.numel() for tensor in state.values())


def test_our_own_file_says_what_it_is(tmp_path):
    network = tiny_segmenter()
    save_segmenter(tmp_path / "own.safetensors", network.state_dict(), TINY, {"steps": 7})
    loaded, info = load_segmenter(tmp_path / "own.safetensors")
    assert info == inspect_file(tmp_path / "own.safetensors")
    assert (info.variant, info.source, info.dtype) == ("starter", "layerloom", "float16")
    assert info.settings["window"] == 3 and info.bytes < 3 * info.parameters
    for name, tensor in network.state_dict().items():
        stored = loaded.state_dict()[name]
        assert stored.dtype == torch.float32 and torch.equal(stored, tensor.half().float())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.pixel_mean.device.type == "cpu"


def test_the_command_knows_and_converts_segmenters(tmp_path, capsys):
    file, made = write_segmenter(tmp_path / "any.name"), tmp_path / "made.safetensors"
    assert run("info", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "custom"
    assert run("convert", file, made, "--dtype", "fp16", "--quiet") == 0
    assert made.stat().st_size < 0.6 * file.stat().st_size
    size = (48, 70)
    clicks = pixel_clicks([(20, 30)], [], size)
    answers = []
    for path in (file, made):
        segmenter = Segmenter.open(path, "cpu")
        answers.append(segmenter.masks(segmenter.embed(picture(*size)), clicks).logits)
    scale = answers[0].abs().max()
    # Half precision keeps eleven bits of each weight.
    assert 0 < (answers[0] - answers[1]).abs().max() < 0.02 * scale


@pytest.mark.slow
def test_a_file_of_the_published_size_answers_as_the_predictor_does(tmp_path):
    torch.manual_seed(0)
    network = segment_anything.sam_model_registry["vit_b"]()
    torch.save(network.state_dict(), tmp_path / "b.pth")
    shown = picture(300, 500)
    predictor = segment_anything.SamPredictor(network)
    predictor.set_image(shown)
    logits, scores, _ = predictor.predict(
        np.array([[120.0, 80.0]]), np.array([1]), return_logits=True
    )
    segmenter = Segmenter.open(tmp_path / "b.pth", "cpu")
    found = segmenter.masks(segmenter.embed(shown), pixel_clicks([(120, 80)], [], (300, 500)))
    assert segmenter.info.variant == "vit_b"
    assert np.abs(found.logits.numpy() - logits).max() <= 1e-5
    assert np.abs(found.scores.numpy() - scores).max() <= 1e-5


def test_other_files_are_refused_by_what_they_hold(tmp_path):
    state = tiny_segmenter().state_dict()

    def refuse(changed, *words):
        save_tensors(tmp_path / "x.safetensors", changed)
        refused(lambda: load_segmenter(tmp_path / "x.safetensors"), "x.safetensors", *words)

    refuse({"weight": torch.zeros(2)}, "not a segmenter", "ViT-B")
    refuse({**state, "mask_decoder.hf_token.weight": torch.zeros(1)}, "mask_decoder.hf_token")
    first = "image_encoder.patch_embed.proj.weight"
    refuse({name: t for name, t in state.items() if name != first}, "another image encoder")
    last = "mask_decoder.transformer.norm_final_attn.weight"
    refuse({name: t for name, t in state.items() if name != last}, "incomplete", last)
    refuse({**state, last: torch.zeros(3)}, last, "[3]", "[32]")
    tokens = {"mask_decoder.mask_tokens.weight": torch.zeros(2, 32)}
    refuse({**state, **tokens}, "[2, 32]")
    content = json.dumps({"format": 1, "family": "layered", "variant": "starter"})
    save_tensors(tmp_path / "y.safetensors", state, {"layerloom": content})
    refused(lambda: load_segmenter(tmp_path / "y.safetensors"), "'layered'", "update")
    save_tensors(tmp_path / "z.safetensors", state, {"layerloom": "{"})
    refused(lambda: load_segmenter(tmp_path / "z.safetensors"), "cannot be read")
    (tmp_path / "cat.pth").write_bytes(b"GIF89a" * 10)
    refused(lambda: load_segmenter(tmp_path / "cat.pth"), "cat.pth")
