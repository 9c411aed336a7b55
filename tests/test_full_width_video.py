"""DynamiCrafter at its published size with random weights: loading and one step."""

import gzip
import json
import subprocess
import sys

import pytest
import torch
from peak_memory import PEAK_BYTES, needs_proc

from layerloom.engine.checkpoints.reader import TensorSpec
from layerloom.engine.checkpoints.save import Pending, write_safetensors

PRUNED = ("model.diffusion_model.", "first_stage_model.", "image_proj_model.")


def draw(shape):
    """Values that neither grow nor vanish over the layers."""
    if len(shape) < 2:
        return torch.rand(shape).half() * 0.1 + 0.95
    return (torch.randn(shape) * torch.Size(shape[1:]).numel() ** -0.5).half()


@pytest.fixture(scope="module")
def pruned_file(manifest_dir, tmp_path_factory):
    """UNet, autoencoder and projector as the pruned files of 3.14 GB hold them, in fp16."""
    packed = (manifest_dir / "dynamicrafter_512.json.gz").read_bytes()
    shapes = {k: s for k, s in json.loads(gzip.decompress(packed)).items() if k.startswith(PRUNED)}
    torch.manual_seed(0)
    pending = {
        key: Pending(TensorSpec(tuple(shape), torch.float16), lambda shape=shape: draw(shape))
        for key, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("full") / "pruned.safetensors"
    write_safetensors(path, pending, {})
    yield path
    path.unlink()


def in_a_process(script, *arguments):
    command = [sys.executable, "-c", PEAK_BYTES + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_proc
@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_file(pruned_file):
    """Peak of a process of its own, with all that interpreter and libraries allocate.

    Only the libraries' code is left out: its pages are those of files, shared by every process,
    and how many of them the kernel maps is not ours to say.
    """
    report = in_a_process(LOAD, pruned_file)
    size = pruned_file.stat().st_size
    print({**report, "file": size, "ratio": report["peak"] / size})
    assert report["parameters"] == 1_438_854_980 + 48_787_456
    assert report["variant"] == "512" and report["dtype"] == "torch.float16"
    assert report["peak"] - report["libraries"] <= 1.15 * size


@needs_proc
@pytest.mark.slow
def test_one_step_at_the_published_size(pruned_file):
    """16 frames of 320x512 in bfloat16: finite, and as spread as its input."""
    report = in_a_process(STEP, pruned_file)
    print(report)
    assert report["shape"] == [1, 4, 16, 40, 64]
    assert report["finite"] and 0.05 < report["std"] < 20
    # 2.98 GB of weights, half a gigabyte of libraries, and what a step holds beside them.
    assert report["peak"] < 6e9


LOAD = """
import json, sys
from layerloom.engine.checkpoints.dynamicrafter import load_dynamicrafter, open_dynamicrafter

libraries = file_bytes()
checkpoint = open_dynamicrafter(sys.argv[1])
network = load_dynamicrafter(checkpoint)
print(json.dumps({
    "peak": peak_bytes(),
    "libraries": libraries,
    "parameters": sum(p.numel() for p in network.parameters()),
    "variant": checkpoint.info.variant,
    "dtype": str(next(network.parameters()).dtype),
}))
"""
STEP = """
import json, sys, time
import torch
from layerloom.engine.checkpoints.dynamicrafter import load_dynamicrafter

network = load_dynamicrafter(sys.argv[1], dtype=torch.bfloat16)
torch.manual_seed(1)
x, text = torch.randn(1, 8, 16, 40, 64).bfloat16(), torch.randn(1, 77, 1024).bfloat16()
start, busy = time.perf_counter(), time.process_time()
with torch.no_grad():
    image = network.image_projector(torch.randn(1, 257, 1280).bfloat16())
    speed = {"fps_embedding": torch.tensor([24])}
    out = network.unet(x, torch.tensor([999]), text, image_context=image, scalars=speed)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "processor_seconds": time.process_time() - busy,
    "threads": torch.get_num_threads(),
    "peak": peak_bytes(),
    "shape": list(out.shape),
    "finite": bool(out.isfinite().all()),
    "std": float(out.float().std()),
}))
"""
