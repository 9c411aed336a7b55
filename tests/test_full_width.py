"""The published size with weights: what one denoising step takes."""

import json
import subprocess
import sys

import pytest
from peak_memory import PEAK_BYTES, needs_proc


@needs_proc
@pytest.mark.slow
def test_one_full_width_step_stays_under_12_gb(manifest_dir, tmp_path):
    """30 blocks of random bfloat16 weights from a file with published names, one guided step."""
    script = tmp_path / "step.py"
    script.write_text(PEAK_BYTES + FULL_STEP)
    command = [sys.executable, str(script), str(manifest_dir), str(tmp_path / "full.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    (tmp_path / "full.safetensors").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["finite"] and report["shape"] == [1, 4, 16, 8, 8]
    assert report["peak_gb"] < 12, report


FULL_STEP = """
import gzip, json, pathlib, sys
import torch
from layerloom.engine.checkpoints.load import load_transformer, open_checkpoint
from layerloom.engine.checkpoints.reader import TensorSpec
from layerloom.engine.checkpoints.save import Pending, write_safetensors
from layerloom.engine.conditioning.layers import LayerSequence
from layerloom.engine.sampling.guidance import constant
from layerloom.engine.sampling.samplers import sample_as_released

manifest = pathlib.Path(sys.argv[1]) / "layerflow_rgba_generate.json.gz"
shapes = json.loads(gzip.decompress(manifest.read_bytes()))
torch.manual_seed(0)

def pending(shape):
    spec = TensorSpec(tuple(shape), torch.bfloat16)
    return Pending(spec, lambda: torch.randn(shape, dtype=torch.bfloat16) * shape[-1] ** -0.5)

write_safetensors(sys.argv[2], {key: pending(shape) for key, shape in shapes.items()}, {})
checkpoint = open_checkpoint(sys.argv[2])
assert checkpoint.info.variant == "rgba-generate"
network = load_transformer(checkpoint)
segments = LayerSequence(frames=4).segments("generate")
text = torch.randn(1, 3, 16, 4096, dtype=torch.bfloat16)

def predict(x, timestep, scale):
    times = torch.full((2,), float(timestep))
    both = torch.cat([torch.zeros_like(text), text])
    v = network(torch.cat([x, x]).bfloat16(), times, both, segments).float()
    without, with_text = v.chunk(2)
    return without + scale * (with_text - without)

noise = torch.randn(1, 4, 16, 8, 8)
out = sample_as_released(predict, noise, 1, constant(6.0), torch.Generator())
peak = peak_bytes() / 1e9
finite = bool(out.isfinite().all())
print(json.dumps({"shape": list(out.shape), "finite": finite, "peak_gb": peak}))
"""
