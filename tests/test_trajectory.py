"""Subjects along boxes on a tiny network: what it is told, several subjects, guidance, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_director import SETTINGS, SIDE, write_director

from layerloom.engine.conditioning.boxes import BoxPaths, Key, Track
from layerloom.engine.conditioning.subjects import on_white
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.sampling.guidance import DROPS
from layerloom.engine.trajectory import TrajectoryPipeline, subject_predictor
from layerloom.engine.trajectory_request import Subject, TrajectoryRequest


@pytest.fixture(scope="module")
def director(tmp_path_factory):
    return write_director(tmp_path_factory.mktemp("trajectory") / "tiny.safetensors")


@pytest.fixture
def pipeline(director):
    return TrajectoryPipeline.open(director, device="cpu")


def subject(seed=0, masked=True):
    rng = np.random.default_rng(seed)
    mask = np.zeros((20, 24), np.float32)
    mask[4:12, 6:22] = 1
    return Subject(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8), mask if masked else None)


ACROSS = Track("a", (Key(0, 0.0, 0.25, 0.5, 0.5), Key(3, 0.5, 0.25, 0.5, 0.5)))
BELOW = Track("b", (Key(0, 0.5, 0.5, 0.5, 0.5),))


def request(*subjects, tracks=(ACROSS,), **changes):
    subjects = subjects or (subject(),)
    given = {"prompt": "a sprite moving over blue stripes", "steps": 2, **changes}
    return TrajectoryRequest(subjects, given.pop("paths", BoxPaths(4, tracks)), **given)


def test_a_run_and_its_record(pipeline):
    steps = []
    result = pipeline.run(request(fps=12), lambda *numbers: steps.append(numbers))
    assert result.frames.shape == (4, SIDE, SIDE, 3) and result.frames.dtype == np.uint8
    assert result.boxes[0, 0].tolist() == [0, 8, 16, 24]
    assert result.boxes[0, -1].tolist() == [16, 8, 32, 24]
    assert result.subjects.shape == (1, SIDE, SIDE, 3) and result.fps == 12
    assert result.settings["reference_weight"] == SETTINGS.reference_weight
    assert steps[:2] == [("Denoising", 1, 2), ("Denoising", 2, 2)]
    assert steps[-1] == ("Decoding", 4, 4)
    assert np.array_equal(pipeline.run(request()).frames, result.frames)
    for other in (
        request(seed=1),
        request(subject(1)),
        request(tracks=(BELOW,)),
        request(reference_weight=0.0),
        request(prompt="blue"),
        request(guidance=1),
    ):
        assert not np.array_equal(pipeline.run(other).frames, result.frames)


def test_subjects_are_computed_once_a_run(pipeline):
    calls = []
    whole = pipeline.network.subject_features

    def counted(*given):
        calls.append(given)
        return whole(*given)

    pipeline.network.subject_features = counted
    pipeline.run(request(subject(), subject(1), tracks=(ACROSS, BELOW), steps=3))
    assert len(calls) == 1 and calls[0][0].shape == (1, 2, 4, 4, 4)


def test_timesteps_are_the_ones_modelscope_is_sampled_at(pipeline):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    theirs.set_timesteps(50)
    table = pipeline._plan(request(steps=50)).table
    assert table.timesteps == theirs.timesteps.tolist()
    x, noise = torch.randn(2, 1, 4, 4, 4)
    for index in (0, 49):
        expected = theirs.step(noise, table.timesteps[index], x).prev_sample
        a, before = table.alphas[index], table.alphas_prev[index]
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        assert (before.sqrt() * clean + (1 - before).sqrt() * noise - expected).abs().max() < 1e-5


def test_a_batch_is_its_single_runs(pipeline):
    requests = [request(subject(n), tracks=(t,), seed=n) for n, t in enumerate((ACROSS, BELOW))]
    clips = pipeline.generate_batch(requests)
    for clip, one in zip(clips, requests, strict=True):
        alone = pipeline.run(one).frames
        assert np.abs(clip.astype(int) - alone).max() <= 1


def test_what_guidance_drops():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, timestep, context, *, placement):
            seen.append((context, placement))
            return context.mean((1, 2)).view(-1, 1, 1, 1, 1).expand_as(x)

    text, no_text = torch.full((1, 3, 2), 2.0), torch.full((1, 3, 2), 1.0)

    class Placed:
        def repeated(self, times):
            return times

    x = torch.zeros(1, 4, 4, 4, 4)
    predict = subject_predictor(Spy(), Placed(), text, no_text, 3.0, "text", True)
    assert (predict(x, 1, 0) == 1 + 3 * (2 - 1)).all()
    assert seen[0][1] == 2 and torch.equal(seen[0][0], torch.cat([no_text, text]))
    placed = Placed()
    apart = subject_predictor(Spy(), placed, text, no_text, 3.0, "text", False)
    assert (apart(x, 1, 0) == 4).all() and [where for _, where in seen[1:]] == [placed, placed]
    # The other branch is the base: no subjects, no boxes, and never both in one batch.
    for together in (True, False):
        del seen[:]
        bare = subject_predictor(Spy(), placed, text, no_text, 3.0, "all", together)
        assert (bare(x, 1, 0) == 4).all()
        assert [where for _, where in seen] == [None, placed]
        assert torch.equal(seen[0][0], no_text) and torch.equal(seen[1][0], text)
    for drops in DROPS:
        alone = subject_predictor(Spy(), placed, text, no_text, 1.0, drops, True)
        assert (alone(x, 1, 0) == 2).all()


def test_dropping_all_compares_with_the_base(pipeline):
    made = {drops: pipeline.run(request(guidance=3.0, guidance_drops=drops)) for drops in DROPS}
    assert made["all"].settings["guidance_drops"] == "all"
    assert not np.array_equal(made["all"].frames, made["text"].frames)
    asked = pipeline.run(request(guidance=3.0))
    assert np.array_equal(asked.frames, made[pipeline.settings.guidance_drops].frames)
    with pytest.raises(LayerLoomError, match="'none'; give one of text, all"):
        pipeline.run(request(guidance_drops="none"))


def test_sizes_and_lengths_that_are_asked_for(pipeline):
    asked = request(width=40, height=20, frames=6)
    notes = pipeline.prepare(asked)
    assert any("40x20 does not divide by 16" in note for note in notes)
    assert any("retimed to 6" in note for note in notes)
    result = pipeline.run(asked)
    assert result.frames.shape == (6, 20, 40, 3) and result.boxes.shape == (1, 6, 4)
    assert result.boxes[0, -1].tolist() == [20, 5, 40, 15]
    assert pipeline.output_size(64, None) == (64, 64)


def test_a_subject_without_a_mask_is_all_of_its_picture(pipeline):
    assert any("no mask" in note for note in pipeline.prepare(request(subject(masked=False))))


def test_the_cut_out_is_in_the_middle_of_white():
    given = subject()
    made = on_white(given.image, given.mask, (32, 48))
    inside = (made < 255).any(-1)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    # 16x8 pixels grow to three quarters of the width.
    assert len(columns) == 36 and len(rows) == 18
    assert columns[0] == 48 - 1 - columns[-1] and rows[0] == 32 - 1 - rows[-1]
    same = on_white(given.image[4:12, 6:22], None, (32, 48))
    assert np.array_equal(made, same)
    thin = np.zeros((20, 24), np.float32)
    thin[3, 5] = 1
    assert (on_white(given.image, thin, (32, 48)) < 255).any(-1).sum() == 24 * 24
    # What a network's mask leaves everywhere is not the subject.
    faint = np.maximum(given.mask, 0.02).astype(np.float32)
    assert np.abs(on_white(given.image, faint, (32, 48)).astype(int) - made).max() <= 1


BAD = {
    "no boxes": ({"tracks": ()}, "no boxes"),
    "two for one": ({"tracks": (ACROSS, BELOW)}, "subjects is 1 and of paths of boxes 2"),
    "weight": ({"reference_weight": 1.5}, "reference weight is 1.5"),
    "not a number": ({"reference_weight": float("nan")}, "reference weight is nan"),
    "frames": ({"frames": 0}, "frames is 0"),
    "guidance": ({"guidance": -1.0}, "guidance is -1"),
}


@pytest.mark.parametrize("changes, words", BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_said(pipeline, changes, words):
    with pytest.raises(LayerLoomError, match=words):
        pipeline.prepare(request(**changes))


def test_bad_pictures_and_masks_are_said(pipeline):
    given = subject()
    for wrong, words in (
        (replace(given, image=given.image[..., 0]), "picture of subject"),
        (replace(given, mask=given.mask[:5]), "mask of subject"),
        (replace(given, mask=given.mask * 0), "is empty"),
    ):
        with pytest.raises(LayerLoomError, match=words):
            pipeline.prepare(request(wrong))


def test_a_base_is_no_network_for_this(tmp_path):
    path = write_director(tmp_path / "base.safetensors", reference=False, control=None)
    with pytest.raises(LayerLoomError, match="a start for training alone"):
        TrajectoryPipeline.open(path, device="cpu")


def test_without_the_starter_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("layerloom.engine.trajectory.STARTER", tmp_path / "trajectory.safetensors")
    with pytest.raises(LayerLoomError, match="starter trajectory.safetensors is not there"):
        TrajectoryPipeline.open()
