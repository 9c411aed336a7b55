"""Runs the subject network inside ComfyUI's own model and samplers and prints numbers, as JSON.

Run by tests/test_host_trajectory_model.py in a process of its own, in ComfyUI's folder:
python host_trajectory.py REPOSITORY CHECKPOINT_FOLDER.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
from pathlib import Path

REPOSITORY, FILES = (Path(sys.argv.pop(1)) for _ in range(2))
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, str(Path.cwd()))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(True)

import comfy.context_windows  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])


def part(name: str):
    return importlib.import_module(f"pack.{name}")


loader, model = part("nodes.host.trajectory_loader"), part("nodes.host.trajectory_model")
LayerLoomError = part("engine.errors").LayerLoomError
convert = part("engine.checkpoints.convert").convert_checkpoint
folder_paths.add_model_folder_path("checkpoints", str(FILES))
WHOLE, ADDED, BASE = (str(FILES / f"{name}.safetensors") for name in ("whole", "added", "base"))
SIDE, FACTOR, DIM = 4, 8, 24


@torch.no_grad()
def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


class Bench:
    """Two subjects on random boxes, a prompt and noise, for a tiny model."""

    def __init__(self, frames: int = 4):
        torch.manual_seed(0)
        pictures = torch.randn(2, 4, SIDE, SIDE)
        boxes = torch.rand(2, frames, SIDE * FACTOR, SIDE * FACTOR) > 0.5
        self.text, self.negative, no_text = torch.randn(3, 1, 8, DIM)
        self.subjects = model.Subjects(pictures, boxes, 0.75, no_text)
        self.noise = torch.randn(frames, 4, SIDE, SIDE)

    def host(self, patcher, steps: int = 2, clips: int = 1, **entry) -> torch.Tensor:
        extra = {model.SUBJECTS: self.subjects, **entry}
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds([[self.text, extra]], [[self.negative, extra]])
        guider.set_cfg(2.0)
        sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "simple", steps)
        noise = self.noise.repeat(clips, 1, 1, 1)
        with torch.inference_mode():
            return guider.sample(
                noise, noise * 0, comfy.samplers.sampler_object("euler"), sigmas, seed=0
            )


def once() -> dict:
    """Passes of a run of three steps, and what stays of it."""
    bench, patcher = Bench(), loader.load_model(WHOLE)
    network, counts = patcher.model.diffusion_model, {"subjects": 0, "boxes": 0, "clips": []}
    features, place, forward = network.subject_features, network.place, network.forward

    def seen(*given, **more):
        counts["subjects"] += 1
        return features(*given, **more)

    def placed(*given, **more):
        counts["boxes"] += 1
        return place(*given, **more)

    def predicted(x, *given, **more):
        counts["clips"].append(len(x) // 4)
        return forward(x, *given, **more)

    network.subject_features, network.place, network.forward = seen, placed, predicted
    bench.host(patcher, 3)
    gc.collect()
    return {**counts, "kept": len(patcher.model._placed)}


def clips() -> dict:
    bench, patcher = Bench(), loader.load_model(WHOLE)
    one, two = bench.host(patcher), bench.host(patcher, clips=2)
    return {"two are one twice": largest(two, one.repeat(2, 1, 1, 1))}


def kept_as_stored(path: str, computes: torch.dtype | None):
    """A MODEL as on a GPU that has the stored type; it computes in another one, or in that."""
    management = comfy.model_management
    usual = management.unet_dtype, management.unet_manual_cast
    management.unet_dtype = lambda *_, weight_dtype=None, **__: weight_dtype
    management.unet_manual_cast = lambda *_, **__: computes
    try:
        return loader.load_model(path)
    finally:
        management.unet_dtype, management.unet_manual_cast = usual


def files() -> dict:
    """What was added on its base, and several element types, against the whole in float32."""
    bench = Bench()
    wanted = bench.host(loader.load_model(WHOLE))
    found = {"added": largest(bench.host(loader.load_model(ADDED, BASE)), wanted)}
    for name in ("float16", "bfloat16", "float8_e4m3fn"):
        target = str(FILES / f"{name}.safetensors")
        convert(WHOLE, target, dtype=getattr(torch, name))
        plain = bench.host(loader.load_model(target), 1)
        kept = kept_as_stored(target, torch.float32)
        kinds = {str(t.dtype) for t in kept.model.diffusion_model.state_dict().values()}
        found[name] = {"kinds": sorted(kinds), "error": largest(bench.host(kept, 1), plain)}
        if name == "bfloat16":
            in_half = bench.host(kept_as_stored(target, None), 1)
            found["in half"] = float((in_half - plain).std() / plain.std())
    return found


def adapters() -> dict:
    """A patch of a layer that only the subject's picture goes through."""
    bench, patcher = Bench(), loader.load_model(WHOLE)
    name = "reference.0.attn1.to_k"
    weight = patcher.model.diffusion_model.get_submodule(name).weight
    halves = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    state = {
        f"diffusion_model.{name}.lora_{half}.weight": t
        for half, t in zip("AB", halves, strict=True)
    }
    plain = bench.host(patcher)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 0.0)
    changed = bench.host(patched)
    return {"changed": largest(changed, plain), "back": largest(bench.host(patcher), plain)}


def windowed(patcher, length: int):
    windows = patcher.clone()
    context = comfy.context_windows
    windows.model_options["context_handler"] = context.IndexListContextHandler(
        context_schedule=context.get_matching_context_schedule("standard_static"),
        fuse_method=context.get_matching_fuse_method("pyramid"),
        context_length=length,
        context_overlap=2,
        context_stride=1,
        closed_loop=False,
        dim=0,
    )
    return windows


def context_windows() -> dict:
    """The host's own windows over a long clip: each sees its own frames' boxes."""
    bench, patcher = Bench(10), loader.load_model(WHOLE)
    plain = bench.host(patcher)
    made = bench.host(windowed(patcher, 4))
    bench.subjects.boxes[:, 8:] ^= True
    other = bench.host(windowed(patcher, 4))
    return {
        "finite": bool(made.isfinite().all()),
        "as if whole": largest(bench.host(windowed(patcher, 10)), bench.host(patcher)),
        "cut": largest(made, plain),
        "last frames' boxes in the first": largest(made[:4], other[:4]),
        "and in the last": largest(made[-1:], other[-1:]),
        "two clips": said(lambda: bench.host(windowed(patcher, 4), clips=2)),
    }


def said(run) -> str:
    try:
        run()
    except LayerLoomError as error:
        return str(error)
    return ""


def wrong() -> dict:
    bench, patcher = Bench(), loader.load_model(WHOLE)
    parts = loader.load_parts("added.safetensors", "base.safetensors")
    return {
        "area": said(lambda: bench.host(patcher, area=(2, 2, 0, 0), strength=1.0)),
        "clip": parts.clip.message,
        "vae": parts.vae.message,
        "added alone": said(lambda: loader.load_model(ADDED)),
        "base alone": said(lambda: loader.load_model(BASE)),
    }


def preview() -> list:
    """Size of a preview of a clip."""
    latents = loader.load_model(WHOLE).model.latent_format
    shown = importlib.import_module("latent_preview").Latent2RGBPreviewer(
        latents.latent_rgb_factors,
        latents.latent_rgb_factors_bias,
        latents.latent_rgb_factors_reshape,
    )
    return list(shown.decode_latent_to_preview(torch.randn(4, 4, SIDE, SIDE)).size)


for name, what in {
    "once": once,
    "clips": clips,
    "files": files,
    "adapters": adapters,
    "windows": context_windows,
    "wrong": wrong,
    "preview": preview,
}.items():
    print("RESULT", json.dumps({name: what()}, default=str), flush=True)
