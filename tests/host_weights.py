"""Run by test_host_lora.py beside a ComfyUI: weights after toggling, in every stored type.

Arguments: the ComfyUI folder and a checkpoint that carries motion and content. Prints one JSON line
a type: what switching off and on again did to the bits, and the distance to exact folding.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

comfy, checkpoint = sys.argv[1:3]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfy)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(True)

import comfy.model_management  # noqa: E402
import torch  # noqa: E402

# The pack under a name of its own, as the host loads it: an installed package has no nodes.
root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location(
    "pack", root / "__init__.py", submodule_search_locations=[str(root)]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
open_checkpoint = importlib.import_module("pack.engine.checkpoints.load").open_checkpoint
folded_state = importlib.import_module("pack.engine.checkpoints.lora").folded_state
loader, lora = (importlib.import_module(f"pack.nodes.host.{name}") for name in ("loader", "lora"))

STRENGTHS = {"motion": 0.7, "content": -0.4}


def weights(patcher) -> dict[str, torch.Tensor]:
    """Copies of the network's weights once the host has patched them."""
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    return {k: t.clone() for k, t in patcher.model.diffusion_model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    # float8 has no comparison of its own.
    return all(torch.equal(first[k].float(), second[k].float()) for k in first)


opened = open_checkpoint(checkpoint)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
    model = loader.load_model(checkpoint)
    copy = lora.toggled(model, STRENGTHS).clone(force_deepcopy=True)
    network = model.model.diffusion_model.to(dtype)
    stored = {k: t.clone() for k, t in network.state_dict().items()}
    default = weights(model)
    off = lora.toggled(model, {})
    on = lora.toggled(off, STRENGTHS)
    off_weights, on_weights = weights(off), weights(on)
    again = weights(lora.toggled(lora.toggled(on, {}), STRENGTHS))
    pairs = [(opened.lora(name), strength) for name, strength in STRENGTHS.items()]
    exact = folded_state({k: t.double() for k, t in stored.items()}, pairs)
    changed = [f"{module}.weight" for module in pairs[0][0].targets]
    error = max(float((on_weights[k].double() - exact[k]).abs().max()) for k in changed)
    size = max(float(exact[k].abs().max()) for k in changed)
    print(
        json.dumps(
            {
                "type": str(dtype).removeprefix("torch."),
                "off is stored": same(off_weights, stored),
                "on changes": not same(on_weights, stored),
                "twice is once": same(again, on_weights),
                "default comes back": same(weights(model), default),
                "error": error / size,
                "copy": same(weights(copy), on_weights) if dtype == torch.float32 else None,
            }
        )
    )
