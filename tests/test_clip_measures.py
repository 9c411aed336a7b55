"""Measures of clips of subjects along boxes: against transformers, by hand, and on files."""

import json
import math

import numpy as np
import pytest
import torch
from animate_files import write_tokenizer
from PIL import Image
from test_cli import assert_one_sentence, run

from layerloom.engine.errors import LayerLoomError
from layerloom.engine.media import write_webm
from layerloom.engine.metrics import detector as detecting
from layerloom.engine.metrics.detector import Detector
from layerloom.engine.metrics.likeness import ClipLikeness, DinoLikeness, prepared
from layerloom.engine.metrics.results import evaluate_results, find_results, read_result
from layerloom.engine.metrics.subject_clips import (
    SubjectClip,
    clip_scores,
    is_dynamic,
    likeness_scores,
    motion_scores,
    place_scores,
)

SIDE = 32
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """CLIP and DINO in miniature, random, as transformers writes them."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = {**VISION, "vocab_size": 514, "max_position_embeddings": 12, **ends}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    CLIPModel(config).save_pretrained(folder / "clip")
    write_tokenizer(folder / "clip")
    # As DINO's own folder, which has a pooler that was never trained, or none.
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder / "dino")
    return folder


@pytest.fixture(scope="module")
def clip(encoders):
    return ClipLikeness.open(encoders / "clip", "cpu")


@pytest.fixture(scope="module")
def dino(encoders):
    return DinoLikeness.open(encoders / "dino", "cpu")


def picture(seed, height=40, width=56):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def sample(**changes):
    frames = np.stack([picture(seed) for seed in range(3)])
    boxes = np.array([[[0, 0, 20, 30], [4, 4, 30, 24], [10, 2, 56, 40]], [[5, 5, 9, 20]] * 3])
    given = {
        "frames": frames,
        "subjects": [picture(7), picture(8, 30, 30)],
        "boxes": boxes,
        "prompt": "a cat runs",
        "fps": 8.0,
    }
    return SubjectClip(**{**given, **changes})


def test_clip_is_transformers(encoders, clip):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    theirs = CLIPModel.from_pretrained(encoders / "clip").eval()
    words = CLIPTokenizer.from_pretrained(encoders / "clip")
    process = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pictures = [picture(0), picture(1, 31, 90), picture(2, 64, 33)]
    with torch.no_grad():
        out = theirs(
            input_ids=words(["a cat"], return_tensors="pt").input_ids,
            pixel_values=process(pictures, return_tensors="pt").pixel_values,
        )
    # Pillow and torchvision round differently by a level of 255.
    assert torch.allclose(clip.pictures(pictures), out.image_embeds, atol=5e-3)
    assert torch.allclose(clip.text("a cat"), out.text_embeds[0], atol=1e-6)
    assert clip.text("a very long prompt of many words").shape == (12,)


def test_dino_is_transformers(encoders, dino):
    from transformers import ViTModel

    theirs = ViTModel.from_pretrained(encoders / "dino", add_pooling_layer=False).eval()
    # Of the scaled picture's 37 rows the middle 32: what DINO's own evaluation looks at.
    scaled = Image.fromarray(picture(3, 74, 90)).resize((45, 37), Image.Resampling.BICUBIC)
    middle = np.asarray(scaled)[2:34, 6:38]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy((middle / 255 - mean) / deviation).movedim(-1, 0)[None].float()
    with torch.no_grad():
        token = theirs(pixel_values=pixels).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(token, dim=-1)
    assert torch.allclose(dino.pictures([picture(3, 74, 90)]), expected, atol=1e-5)


def test_scores_are_means_of_cosines(clip, dino):
    given = sample()
    scores = clip_scores(given, clip, dino)
    assert set(scores) == {
        *("clip_t", "clip_i", "r_clip", "temporal_consistency"),
        *("dino_i", "r_dino"),
    }

    def cosines(seen_by, first, second):
        a, b = seen_by.pictures([first])[0], seen_by.pictures([second])[0]
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    for name, seen_by in (("clip", clip), ("dino", dino)):
        whole, region = [], []
        for subject, track in zip(given.subjects, given.boxes, strict=True):
            for frame, (x0, y0, x1, y1) in zip(given.frames, track, strict=True):
                whole.append(cosines(seen_by, subject, frame))
                region.append(cosines(seen_by, subject, frame[y0:y1, x0:x1]))
        assert scores[f"{name}_i"] == pytest.approx(np.mean(whole), abs=1e-5)
        assert scores[f"r_{name}"] == pytest.approx(np.mean(region), abs=1e-5)
    following = [cosines(clip, *given.frames[i : i + 2]) for i in (0, 1)]
    assert scores["temporal_consistency"] == pytest.approx(np.mean(following), abs=1e-5)
    text = clip.text("a cat runs")
    spoken = np.mean([float(clip.pictures([frame])[0] @ text) for frame in given.frames])
    assert scores["clip_t"] == pytest.approx(spoken, abs=1e-5)


def test_the_subject_in_its_box_is_as_like_as_can_be(clip):
    subject, frames = picture(5, 24, 24), np.full((2, 40, 56, 3), 127, np.uint8)
    boxes = np.array([[[3, 4, 27, 28], [20, 10, 44, 34]]])
    for frame, (x0, y0, x1, y1) in zip(frames, boxes[0], strict=True):
        frame[y0:y1, x0:x1] = subject
    scores = likeness_scores(sample(frames=frames, subjects=[subject], boxes=boxes), clip, "clip")
    assert scores["r_clip"] == pytest.approx(1, abs=1e-5) and scores["clip_i"] < 0.999


def test_one_frame_has_no_consistency(clip):
    one = sample(frames=picture(0)[None], boxes=np.array([[[0, 0, 9, 9]]]), subjects=[picture(1)])
    assert "temporal_consistency" not in likeness_scores(one, clip, "clip")


def test_slivers_are_looked_at(clip):
    assert prepared(picture(0, 2, 4000), SIDE, SIDE, ((0, 0, 0), (1, 1, 1))).shape == (3, 32, 32)
    assert torch.isfinite(clip.pictures([picture(0, 1, 40), picture(1, 40, 1)])).all()


def test_a_clip_moves_where_its_fastest_pixels_go_far():
    # VBench: more than 6 pixels of 256, in 4 of 16 frames, by the fastest twentieth.
    still = torch.zeros(15, 2, 256, 300)
    assert not is_dynamic(still)
    some = still.clone()
    some[:4, 0, :13] = 6.1  # 13 of 256 rows are a bit more than a twentieth
    assert is_dynamic(some)
    some[3] = 0
    assert not is_dynamic(some)
    few = still.clone()
    few[:, 1, :6] = 11.0  # in half of the fastest twentieth: 5.2 pixels on the mean
    assert not is_dynamic(few)
    # A slow film's frames are further apart; a small picture's ways are shorter.
    far = torch.full((15, 2, 256, 256), 6.1 / math.sqrt(2))
    assert is_dynamic(far) and not is_dynamic(far, 4.0)
    assert is_dynamic(torch.full((15, 2, 64, 64), 1.6 / math.sqrt(2)))


def test_frames_are_looked_at_eight_times_a_second():
    class Raft:
        """Takes whatever is bright as moving that far."""

        def flow(self, frames, updates):
            assert updates == 20 and frames.max() <= 1
            self.seen = len(frames)
            return torch.full((len(frames) - 1, 2, *frames.shape[-2:]), 9.0)

    raft, frames = Raft(), np.full((7, 16, 16, 3), 255, np.uint8)
    assert motion_scores(sample(frames=frames, fps=24.0), raft) == {"dynamic_degree": 1.0}
    assert raft.seen == 3
    assert motion_scores(sample(frames=frames, fps=8.0), raft) and raft.seen == 7
    assert motion_scores(sample(frames=frames[:1]), raft) == {}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Grounding DINO in miniature, random."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("detector")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *".a?", "cat"])
    )
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    words = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
        "model_type": "bert",
    }
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=words,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        num_queries=4,
        max_text_len=8,
        tie_word_embeddings=False,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def test_the_detector_is_transformers(detector, monkeypatch):
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

    theirs = GroundingDinoForObjectDetection.from_pretrained(detector).eval()
    processor = GroundingDinoProcessor.from_pretrained(detector)
    frames = np.stack([picture(seed) for seed in range(5)])
    given = processor(images=list(frames), text=["a cat."] * 5, return_tensors="pt")
    with torch.no_grad():
        out = theirs(**given)
    middle = float(out.logits.sigmoid().amax((1, 2)).median())
    monkeypatch.setattr(detecting, "THRESHOLD", middle - 1e-5)
    expected = processor.post_process_grounded_object_detection(
        out, given.input_ids, threshold=middle - 1e-5, target_sizes=[(40, 56)] * 5
    )
    found = Detector.open(detector, "cpu").find(frames, "A cat. ")
    assert None in found and any(found)
    for box, seen in zip(found, expected, strict=True):
        assert (box is None) == (len(seen["scores"]) == 0)
        if box is not None:
            best = seen["boxes"][int(seen["scores"].argmax())]
            limits = torch.tensor([56.0, 40.0, 56.0, 40.0])
            assert torch.allclose(torch.tensor(box), best.clamp(min=0).minimum(limits), atol=1e-3)


def test_found_boxes_are_compared_with_those_asked():
    boxes = np.array([[[0, 0, 28, 20], [0, 0, 28, 20]]])
    found = [[[14, 0, 42, 20], None]]
    given = sample(frames=np.zeros((2, 40, 56, 3), np.uint8), boxes=boxes, found=found)
    # Half of each box is common; the second frame is lost: 0, and half a side away.
    assert place_scores(given) == {
        "miou": pytest.approx((1 / 3 + 0) / 2),
        "cd": pytest.approx((0.25 + 0.5) / 2),
    }
    assert place_scores(sample()) == {}


def test_other_folders_are_refused(encoders, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    with pytest.raises(LayerLoomError, match="There is no folder"):
        ClipLikeness.open(tmp_path / "none")
    with pytest.raises(LayerLoomError, match="nothing to compare with"):
        DinoLikeness.open(tmp_path)
    with pytest.raises(LayerLoomError, match="model of kind 'clip'"):
        DinoLikeness.open(encoders / "clip")
    text = CLIPTextConfig(**{k: v for k, v in VISION.items() if k[1] != "m"}, vocab_size=9)
    CLIPTextModel(text).save_pretrained(tmp_path / "half")
    with pytest.raises(LayerLoomError, match="lacks"):
        ClipLikeness.open(tmp_path / "half")


# Results on disk


def write_result(folder, *, arrays=True, **changes):
    folder.mkdir(parents=True)
    frames = np.stack([picture(seed) for seed in range(3)])
    Image.fromarray(picture(7)).save(folder / "cat.png")
    boxes = [[0, 0, 20, 30], [4, 4, 30, 24], [10, 2, 56, 40]]
    subjects = [{"image": "cat.png", "mask": None, "points": [], "boxes": boxes}]
    record = {"prompt": "a cat", "fps": 4.0, "subjects": subjects, **changes}
    (folder / "run.json").write_text(json.dumps(record))
    if arrays:
        kept = picture(7)[None]
        np.savez_compressed(folder / "video.npz", video=frames, subjects=kept)
    else:
        write_webm(folder / "video.webm", frames, 8)
    return folder


def test_results_are_read(tmp_path):
    kept = read_result(write_result(tmp_path / "a"))
    assert np.array_equal(kept.frames[1], picture(1)) and kept.fps == 4 and kept.found is None
    # The subject lies on a white square.
    assert kept.subjects[0].shape == (56, 56, 3) and (kept.subjects[0][:8] == 255).all()
    assert np.array_equal(kept.subjects[0][8:48], picture(7))
    assert kept.boxes.tolist()[0][1] == [4, 4, 30, 24]
    seen = read_result(write_result(tmp_path / "b", arrays=False))
    assert seen.frames.shape == (3, 40, 56, 3) and seen.subjects[0].shape == (56, 56, 3)
    assert [p.name for p in find_results(tmp_path)] == ["a", "b"]


def test_what_was_found_is_read_from_boxes_or_masks(tmp_path):
    a = write_result(tmp_path / "a")
    (a / "found.json").write_text(json.dumps([[[0, 0, 20, 30], None, [10, 2, 56, 40]]]))
    assert place_scores(read_result(a)) == {
        "miou": pytest.approx(2 / 3),
        "cd": pytest.approx(1 / 6),
    }
    b = write_result(tmp_path / "b")
    boxes = read_result(b).boxes[0]
    (b / "found_1").mkdir()
    for frame, (x0, y0, x1, y1) in enumerate(boxes):
        mask = np.zeros((40, 56), np.uint8)
        mask[y0:y1, x0:x1] = 255 * (frame != 1)
        Image.fromarray(mask).save(b / "found_1" / f"{frame}.png")
    assert place_scores(read_result(b)) == place_scores(read_result(a))
    (a / "found.json").write_text("[[]]")
    with pytest.raises(LayerLoomError, match="does not fit 1 subjects in 3 frames"):
        read_result(a)
    (b / "found_1" / "2.png").unlink()
    with pytest.raises(LayerLoomError, match="2 frames and the clip 3"):
        read_result(b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subjects": []}, "no clip of subjects"),
        ({"prompt": ""}, "no clip of subjects"),
        ({"subjects": [{"image": "cat.png", "boxes": [[0, 0, 1, 1]]}]}, "do not fit its clip of 3"),
        ({"subjects": [{"image": "cat.png", "boxes": [[0, 0, "x", 1]] * 3}]}, "do not fit"),
    ],
)
def test_other_records_are_a_sentence(tmp_path, changes, words):
    with pytest.raises(LayerLoomError, match=words):
        read_result(write_result(tmp_path / "a", **changes))


def test_missing_files_are_a_sentence(tmp_path):
    folder = write_result(tmp_path / "a", arrays=False)
    (folder / "cat.png").unlink()
    with pytest.raises(LayerLoomError, match="cat.png of .* is not there"):
        read_result(folder)
    (folder / "video.webm").unlink()
    with pytest.raises(LayerLoomError, match="holds no clip"):
        read_result(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(LayerLoomError, match="no JSON"):
        read_result(folder)
    (folder / "run.json").unlink()
    with pytest.raises(LayerLoomError, match="holds no results"):
        evaluate_results(tmp_path, lambda read: {})


def test_the_command_looks_for_subjects(detector, tmp_path, capsys):
    write_result(tmp_path / "a")
    options = ["--detector", detector, "--device", "cpu", "-q"]
    assert run("eval", "clips", tmp_path, *options, "--name", "a cat") == 0
    scores = json.loads(capsys.readouterr().out)["each"]["a"]
    assert 0 <= scores["miou"] <= 1 and 0 <= scores["cd"] <= 1.5
    for names in ([], ["--name", "a cat", "--name", "a dog"]):
        assert run("eval", "clips", tmp_path, *options, *names) == 2
        assert_one_sentence(capsys.readouterr().err)


def test_the_command_prints_means(encoders, tmp_path, capsys):
    from torchvision.models.optical_flow import raft_small

    for name in ("a", "b"):
        write_result(tmp_path / "runs" / name)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    options = ["--clip", encoders / "clip", "--dino", encoders / "dino", "--device", "cpu", "-q"]
    assert run("eval", "clips", tmp_path / "runs", *options, "--raft", tmp_path / "raft.pth") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["clips"] == 2 and scores["each"]["a"] == scores["each"]["b"] == scores["mean"]
    assert -1 <= scores["mean"]["r_dino"] <= 1 and scores["mean"]["dynamic_degree"] in (0, 1)
    assert "miou" not in scores["mean"]
    for wrong in (
        [tmp_path / "runs"],
        [tmp_path / "none", *options],
        [tmp_path / "runs", "--clip", tmp_path / "nowhere"],
        [tmp_path / "runs", "--dino", encoders / "clip"],
    ):
        assert run("eval", "clips", *wrong) == 2
        assert_one_sentence(capsys.readouterr().err)
