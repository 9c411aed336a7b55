"""Samples with given layers inside ComfyUI's own sampler and prints what was computed, as JSON.

Run by tests/test_host.py in a process of its own, in ComfyUI's folder:
python host_reuse.py REPOSITORY.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
from pathlib import Path

REPOSITORY = Path(sys.argv.pop(1))
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, str(Path.cwd()))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(True)

import comfy.sample  # noqa: E402
import torch  # noqa: E402

STEPS = 4


def import_pack():
    """The pack under another name than the installed one, as the host does."""
    spec = importlib.util.spec_from_file_location(
        "pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])


def part(name: str):
    return importlib.import_module(f"pack.{name}")


class Bench:
    """The starter with a given background, sampled in several ways."""

    def __init__(self):
        conditioning, loader = part("nodes.host.conditioning"), part("nodes.host.loader")
        loaded = loader.load_checkpoint("starter/layered.safetensors")
        self.model = loaded.model
        settings = loader.layered_settings(self.model)
        sequence, size = settings.frames(0), settings.size(0, 0)
        texts = part("engine.conditioning.prompts").indexed_prompts(
            "background", "a red circle moving right", "green stripes", None
        )
        branches = conditioning.encode_prompts(loaded.clip, texts)[:2]
        torch.manual_seed(0)
        layers = {"background": torch.rand(1, sequence.frames, 3, *size)}
        given, latent = conditioning.given_latent(
            settings, loaded.vae, layers, sequence, "background", size, 1
        )
        self.latent = latent["samples"]
        self.branches = [conditioning.condition(b, "background", given) for b in branches]

    def choose(self, **choice):
        attention = part("nodes.host.attention")
        return attention.with_attention(self.model, attention.LayerAttention(**choice))

    def sample(self, model, apart: bool = False, callback=None):
        """The latents, and [batch, tokens] of every call of the network's last MLP."""
        calls: list[list[int]] = []
        block = model.model.diffusion_model.transformer_blocks[-1]
        hook = block.ff.register_forward_hook(lambda _, x, __: calls.append([*x[0].shape[:2]]))
        kind = type(model.model)
        asked = kind.memory_required
        if apart:  # the host then thinks that both branches do not fit together
            kind.memory_required = lambda self, shape, cond_shapes=None: 1e30 * (shape[0] > 1)
        try:
            with torch.inference_mode():
                out = comfy.sample.sample(
                    model,
                    comfy.sample.prepare_noise(self.latent, 7),
                    STEPS,
                    2.5,
                    "ddim",
                    "simple",
                    *self.branches,
                    self.latent,
                    seed=7,
                    callback=callback,
                )
        finally:
            hook.remove()
            kind.memory_required = asked
        return out, calls


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def caches_in_memory() -> int:
    """How many caches hold something."""
    gc.collect()
    kind = part("kernels").SegmentKVCache
    return sum(1 for x in gc.get_objects() if type(x) is kind and x.held_bytes)


def asked_and_held(bench: Bench) -> list[int]:
    """Bytes that a run asks the host to leave free, and those it then holds."""
    reuse, kind = part("nodes.host.reuse"), part("kernels").SegmentKVCache
    needed, reset, numbers = reuse._needed, kind.reset, []

    def spy_needed(*arguments):
        numbers.append(needed(*arguments))
        return numbers[-1]

    def spy_reset(cache):
        if getattr(cache, "_rows", None):
            numbers.append(cache.held_bytes)
        reset(cache)

    reuse._needed, kind.reset = spy_needed, spy_reset
    try:
        bench.sample(bench.choose(reuse=True, refresh_every=None))
    finally:
        reuse._needed, kind.reset = needed, reset
    return numbers


def cancelled(bench: Bench) -> int:
    """Caches that hold something after a run that was cancelled in its second step."""

    class Cancel(Exception):
        pass

    def callback(step, *_):
        if step == 1:
            raise Cancel

    try:
        bench.sample(bench.choose(reuse=True), callback=callback)
    except Cancel:
        return caches_in_memory()
    raise AssertionError("the run was not cancelled")


def main() -> None:
    torch.set_num_threads(1)
    import_pack()
    bench = Bench()
    full, full_calls = bench.sample(bench.model)
    isolated, _ = bench.sample(bench.choose(visibility="given_isolated"))
    result = {"full": {"calls": full_calls, "to_isolated": distance(full, isolated)}}
    for apart in (False, True):
        for refresh in (1, 2, None):
            model = bench.choose(reuse=True, refresh_every=refresh)
            made, calls = bench.sample(model, apart)
            again, _ = bench.sample(model, apart)
            result[f"{'apart' if apart else 'together'}, {refresh}"] = {
                "calls": calls,
                "to_isolated": distance(made, isolated),
                "to_itself": distance(again, made),
            }
    made, calls = bench.sample(bench.choose(reuse=True, reuse_bytes=1000))
    result["too little"] = {"calls": calls, "to_isolated": distance(made, isolated)}
    attention = part("nodes.host.attention")
    back = attention.with_attention(bench.choose(reuse=True), attention.LayerAttention())
    result["taken back"] = {"to_full": distance(bench.sample(back)[0], full)}
    result["asked and held"] = asked_and_held(bench)
    result["left"] = [caches_in_memory(), cancelled(bench)]
    print("RESULT " + json.dumps(result))


main()
