"""Measures of the motion and content adapters: exact answers on clips made for the purpose."""

import numpy as np
import pytest

from layerloom.engine.metrics.adapters import (
    STRENGTHS,
    alpha_edge_error,
    evaluate_content,
    evaluate_motion,
)
from layerloom.engine.metrics.layered import held_out_scenes, scene_layers
from layerloom.engine.metrics.motion import frame_change, matte_flow

SCENES = held_out_scenes(4, 0)
TRUTH = scene_layers(SCENES, 8, (96, 96))


def speed(alpha: np.ndarray) -> float:
    """Pixels a frame that the matte's centre travels."""
    rows, columns = np.mgrid[: alpha.shape[1], : alpha.shape[2]]
    mass = alpha.sum((1, 2), dtype=float)
    centres = np.stack([(alpha * axis).sum((1, 2)) / mass for axis in (rows, columns)], 1)
    return float(np.hypot(*np.diff(centres, axis=0).T).mean())


@pytest.mark.parametrize("index", range(4))
def test_flow_is_the_sprites_speed(index):
    alpha = TRUTH["alpha"][index]
    assert matte_flow(alpha) == pytest.approx(speed(alpha), rel=0.1)
    assert matte_flow(alpha[:1].repeat(8, 0)) < 1e-3
    assert matte_flow(np.zeros_like(alpha)) == 0


def test_change_counts_levels():
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1] = 10
    assert frame_change(clip) == 10


def test_edge_error_looks_near_the_outline_alone():
    truth = TRUTH["alpha"][0]
    assert alpha_edge_error(truth, truth) == 0
    far = truth.copy()
    far[:, :8, :8] = 255 - far[:, :8, :8]
    assert alpha_edge_error(far, truth) == 0
    assert alpha_edge_error(np.roll(truth, 1, axis=2), truth) > 20
    assert alpha_edge_error(truth, np.zeros_like(truth)) == 0


class Slower:
    """Plays true scenes at a share of their speed, with a haze over the matte."""

    def __init__(self, strengths):
        self.motion, self.content = strengths.get("motion", 0.0), strengths.get("content", 1.0)
        self.given = None

    def generate_batch(self, task, prompts, given, seed, steps, guidance):
        part = slice(seed, seed + len(prompts))
        frames = (np.arange(8) * (1 - self.motion)).astype(int)
        made = {name: clip[part][:, frames] for name, clip in TRUTH.items()}
        if not self.content:
            made["alpha"] = np.clip(made["alpha"], 40, 215)
        return made


def test_motion_is_measured_by_strength():
    found = evaluate_motion(Slower, scenes=4, batch=2, strengths=STRENGTHS[::2])
    assert found["strengths"] == list(STRENGTHS[::2])
    assert found["left"] == 0 and found["spearman"] == pytest.approx(1)
    assert found["flow"][0] == pytest.approx(
        np.mean([matte_flow(clip) for clip in TRUTH["alpha"]]), abs=1e-3
    )
    assert found["change"][-1] == 0 < found["change"][0]


def test_content_is_measured_without_and_with():
    found = evaluate_content(Slower, scenes=4, batch=4)
    for task in ("generate", "decompose"):
        assert set(found[task]) == {"without", "with"}
    taken = found["decompose"]
    assert taken["with"]["alpha_edge_error"] == 0 < taken["without"]["alpha_edge_error"]
    assert taken["with"]["recomposed_db"] > taken["without"]["recomposed_db"]
