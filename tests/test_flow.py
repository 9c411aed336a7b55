"""Optical flow: torchvision's RAFT from a file, and what flow says of motion."""

import pytest
import torch
from test_clicks import refused

from layerloom.engine.checkpoints.save import save_tensors
from layerloom.engine.conditioning.flow import RaftFlow, motion_mask, motion_strength
from layerloom.engine.training.moving_world import PATH_PER_MOTION, moving_scene_at
from layerloom.engine.training.sprite_world import render

optical_flow = pytest.importorskip("torchvision.models.optical_flow")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return optical_flow.raft_small(weights=None).eval()


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(small.state_dict(), path)
    return path


def test_flow_is_torchvisions(small, file):
    frames = torch.rand(3, 3, 128, 136)
    raft = RaftFlow.open(file, "cpu")
    raft.updates = 2
    found = raft.flow(frames, batch=1)
    with torch.no_grad():
        expected = small(frames[:-1] * 2 - 1, frames[1:] * 2 - 1, num_flow_updates=2)[-1]
    assert found.shape == (2, 2, 128, 136)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_any_size_is_taken(small, file):
    raft = RaftFlow.open(file, "cpu")
    raft.updates = 1
    frames = torch.rand(2, 3, 96, 101)
    found = raft.flow(frames)
    assert found.shape == (1, 2, 96, 101)
    # Small pictures are looked at twice as large, and their flow is halved.
    large = torch.nn.functional.interpolate(frames, scale_factor=2, mode="bilinear")
    large = torch.nn.functional.pad(large, (0, 6, 0, 0), mode="replicate")
    with torch.no_grad():
        doubled = small(large[:1] * 2 - 1, large[1:] * 2 - 1, num_flow_updates=1)[-1][..., :202]
    halved = torch.nn.functional.avg_pool2d(doubled, 2) / 2
    assert torch.allclose(found, halved, atol=1e-4 * halved.abs().max())


def test_the_large_one_is_known_by_its_shapes(tmp_path):
    network = optical_flow.raft_large(weights=None).eval()
    save_tensors(tmp_path / "large.safetensors", network.state_dict())
    raft = RaftFlow.open(tmp_path / "large.safetensors", "cpu")
    stored = raft.network.state_dict()
    assert all(torch.equal(stored[name], t) for name, t in network.state_dict().items())
    assert not any(p.requires_grad for p in raft.network.parameters())


def test_other_files_are_refused(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"module.fnet.conv1.weight": torch.zeros(64, 3, 7, 7)})
    refused(lambda: RaftFlow.open(tmp_path / "x.safetensors"), "x.safetensors", "raft_large")
    first = {"feature_encoder.convnormrelu.0.weight": torch.zeros(64, 3, 7, 7)}
    save_tensors(tmp_path / "y.safetensors", first)
    refused(lambda: RaftFlow.open(tmp_path / "y.safetensors"), "y.safetensors")
    refused(lambda: RaftFlow.open(tmp_path / "none.pth"), "none.pth")


def test_exact_flow_tells_where_and_how_strong():
    for index in range(40):
        moving = moving_scene_at(8, index, motion=4.0)
        batch = render([moving.scene], 16, (96, 96))
        flow, masks = batch.flow, batch.masks
        found = motion_mask(flow)
        assert found.shape == (1, 96, 96)
        if moving.scene.direction == "still":
            assert not found.any()
            assert motion_strength(flow, masks[:, :-1]).item() < 1e-4
            continue
        # Wherever the sprite was, and nowhere else.
        assert torch.equal(found, masks[:, :-1].any(1))
        pixels = 4.0 * PATH_PER_MOTION * 96 / 15
        assert motion_strength(flow, masks[:, :-1]).item() == pytest.approx(pixels, rel=1e-3)
        # Inside its first place it is gone after a while.
        assert motion_strength(flow, masks[:, 0]).item() < pixels


def test_strength_of_masks_of_both_kinds():
    flow = torch.zeros(2, 3, 2, 4, 4)
    flow[:, :, 0, :2] = 3.0
    flow[1, :, 1, :2] = 4.0
    top = torch.zeros(2, 4, 4)
    top[:, :2] = 1.0
    assert motion_strength(flow, top).tolist() == [3.0, 5.0]
    assert motion_strength(flow, torch.ones(2, 4, 4)).tolist() == [1.5, 2.5]
    assert motion_strength(flow, torch.zeros(2, 4, 4)).tolist() == [0.0, 0.0]
    by_frame = torch.zeros(2, 3, 4, 4)
    by_frame[:, 0, :2] = 1.0
    assert motion_strength(flow, by_frame).tolist() == [3.0, 5.0]
    assert torch.equal(motion_mask(flow), top.bool())
