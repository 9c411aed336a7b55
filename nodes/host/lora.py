"""Adapters inside the host: weight patches on clones of a MODEL, made from pairs under its names.

A checkpoint's own adapters are never folded into the weights here. The loader keeps the base as it
is stored and puts the default strengths on the MODEL as patches; toggles take those patches off a
clone and put on what is asked. So a switch that is off leaves the stored bits, whatever their type
(a difference to folded weights would have been rounded twice, badly so in fp8); one that is on is
rounded once, by the host; and the host re-patches, streams, clones and saves as with any LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import folder_paths
import torch

from ...engine.checkpoints.load import Checkpoint
from ...engine.checkpoints.lora import LoRA, lora_tensors, read_lora
from ...engine.checkpoints.lora_names import split_key
from ...engine.errors import LayerLoomError

NONE = "[None]"


@dataclass(frozen=True)
class HostAdapter:
    """One adapter of a checkpoint, ready to be patched in.

    default: its strength when the checkpoint is loaded. patches: weight -> the host's own adapter
        object, which also tells our patches from those of other nodes.
    """

    default: float
    patches: Mapping[str, object]


def base_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The network's weights without any adapter, as they are stored."""
    return checkpoint.transformer_state(dict.fromkeys(checkpoint.info.adapters, 0.0))


def add_own_adapters(patcher, checkpoint: Checkpoint) -> None:
    """Give a freshly loaded MODEL its checkpoint's adapters, each at its default strength."""
    scales = checkpoint.adapter_scales
    patcher.model.adapters = {
        name: HostAdapter(
            scales[name], host_patches(patcher, lora_tensors(checkpoint.lora(name)), name)
        )
        for name in checkpoint.info.adapters
    }
    for adapter in patcher.model.adapters.values():
        if adapter.default:
            patcher.add_patches(adapter.patches, adapter.default)


def toggled(patcher, strengths: Mapping[str, float]):
    """A clone of a layered MODEL with its own adapters at these strengths, 0 where not named.

    Patches of other nodes stay; those of an earlier toggle are replaced.

    Raises:
        LayerLoomError: an adapter the checkpoint does not have.
    """
    own = patcher.model.adapters
    for name in strengths:
        if name not in own:
            has = ", ".join(own) or "none"
            raise LayerLoomError(
                f"{patcher.model.settings.name} has no {name} adapter (its adapters: {has}); "
                "switch it off or load a checkpoint that has one."
            )
    clone = patcher.clone()
    ours = {id(patch) for adapter in own.values() for patch in adapter.patches.values()}
    kept = {
        key: [entry for entry in entries if id(entry[1]) not in ours]
        for key, entries in clone.patches.items()
    }
    clone.patches = {key: entries for key, entries in kept.items() if entries}
    # Marks the clone as patched anew, which the host then does from the stored weights.
    clone.add_patches({})
    for name, adapter in own.items():
        if strengths.get(name):
            clone.add_patches(adapter.patches, strengths[name])
    return clone


def own_strengths(patcher) -> dict[str, float]:
    """The strengths that a MODEL's own adapters have in it now; those that are off are left out."""
    found = {}
    for name, adapter in patcher.model.adapters.items():
        ours = {id(patch) for patch in adapter.patches.values()}
        entries = [entry for listed in patcher.patches.values() for entry in listed]
        strengths = [entry[0] for entry in entries if id(entry[1]) in ours]
        if strengths:
            found[name] = strengths[0]
    return found


def patched_copy(patcher):
    """The MODEL once more, from its file and with the same patches: weights nobody else uses.

    Loaded outside of ``torch.inference_mode``, gradients may pass through it.
    """
    load, arguments = patcher.cached_patcher_init
    copy = load(*arguments, disable_dynamic=True)
    copy.patches = {key: entries[:] for key, entries in patcher.patches.items()}
    copy.add_patches({})
    return copy


def add_extra(patcher, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Patch a LORA_MODEL into a MODEL in place (give it a clone); an empty one does nothing."""
    if tensors:
        patcher.add_patches(host_patches(patcher, tensors, name), 1.0)


def host_patches(patcher, tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, object]:
    """Weight -> patch, from tensors under names that the host knows.

    Raises:
        LayerLoomError: it changes weights that the model does not have, or of another size.
    """
    targets = comfy.lora.model_lora_keys_unet(patcher.model, {})
    owner = patcher.model.settings.name
    for key in tensors:
        found = split_key(key)
        if found and found[0] not in targets:
            raise LayerLoomError(
                f"The adapter {name} does not fit {owner}, which has no "
                f"{found[0].removeprefix('diffusion_model.')}; give an adapter made for this "
                "checkpoint."
            )
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    patches = comfy.lora.load_lora(converted, targets, log_missing=False)
    if not patches:
        raise LayerLoomError(
            f"The adapter {name} changes nothing in {owner}; give one made for this checkpoint."
        )
    shapes = {key: tuple(weight.shape) for key, weight in patcher.model.state_dict().items()}
    for key, patch in patches.items():
        pair = getattr(patch, "weights", None)
        if getattr(patch, "name", None) != "lora" or pair is None:
            continue
        size = (pair[0].shape[0], pair[1].shape[1])
        if size != shapes.get(key, size):
            module = key.removeprefix("diffusion_model.").removesuffix(".weight")
            wanted = "x".join(map(str, shapes[key]))
            raise LayerLoomError(
                f"The adapter {name} does not fit {owner}: {module} is {wanted} there and "
                f"{size[0]}x{size[1]} in the adapter; give an adapter made for this checkpoint."
            )
    return patches


def list_loras() -> list[str]:
    """What can be chosen: nothing, or a file of models/loras."""
    return [NONE, *folder_paths.get_filename_list("loras")]


def find_lora(name: str) -> Path | None:
    """The file of a listed name; None for nothing.

    Raises:
        LayerLoomError: there is none.
    """
    if name == NONE:
        return None
    found = folder_paths.get_full_path("loras", name)
    if not found:
        raise LayerLoomError(
            f"There is no adapter {name!r}; put it into models/loras and refresh the list."
        )
    return Path(found)


def lora_model(name: str, strength: float) -> dict[str, torch.Tensor]:
    """A LORA_MODEL of a listed file, its alpha multiplied by the strength; empty for nothing.

    Raises:
        LayerLoomError: no such file, or no adapter of a layered model in it.
    """
    path = find_lora(name)
    if path is None:
        return {}
    return at_strength(read_lora(path), strength)


def at_strength(lora: LoRA, strength: float) -> dict[str, torch.Tensor]:
    """An adapter as the host's LORA_MODEL, its alpha multiplied by a strength."""
    return {
        # In float64, as the host would multiply the two.
        key: tensor.double() * strength if key.endswith(".alpha") else tensor
        for key, tensor in lora_tensors(lora).items()
    }
