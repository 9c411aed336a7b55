"""Keeps keys and values of given layers for the length of one sampling run of the host."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...kernels import SegmentKVCache, plan_attention
from ...kernels.kv_cache import cache_bytes
from .attention import CACHES, OPTION, LayerAttention
from .layered_model import GIVEN_LATENTS, PROMPTS, TASK, sequence_of

log = logging.getLogger("layerloom.nodes")


class RunCaches:
    """One cache a device, for one run; the host may run branches of guidance on several."""

    def __init__(self, choice: LayerAttention):
        self.choice = choice
        self._caches: dict[torch.device, SegmentKVCache] = {}

    def on(self, device: torch.device) -> SegmentKVCache:
        """The cache of a device."""
        made = SegmentKVCache(self.choice.reuse_bytes, self.choice.refresh_every)
        return self._caches.setdefault(device, made)

    def clear(self) -> None:
        """Free everything, also where somebody still holds the caches."""
        for cache in self._caches.values():
            cache.reset()
        self._caches.clear()


def install(model) -> None:
    """Make a MODEL's runs keep what they compute of given layers, where its choice says so."""
    remove(model)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, OPTION, _keep_for_a_run)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, OPTION, _ask_for_memory)


def remove(model) -> None:
    """The opposite of ``install``; nothing where it was not."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, OPTION)
    model.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, OPTION)


def _keep_for_a_run(executor, *args: Any, **kwargs: Any) -> torch.Tensor:
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    if not _given(guider.conds):
        log.info("Nothing is given, so Layer Attention has nothing to reuse.")
    caches = RunCaches(options[OPTION])
    options[CACHES] = caches
    try:
        return executor(*args, **kwargs)
    finally:
        # Also where the run was cancelled or failed.
        del options[CACHES]
        caches.clear()


def _ask_for_memory(executor, model, noise_shape, conds, *args: Any, **kwargs: Any) -> Any:
    """Loading leaves room for what the run will keep, beside its activations."""
    choice = model.model_options["transformer_options"][OPTION]
    model.model.kept_bytes = _needed(model.model, noise_shape, conds, choice)
    try:
        return executor(model, noise_shape, conds, *args, **kwargs)
    finally:
        # During the run it is taken, so that it no longer counts as needed.
        model.model.kept_bytes = 0


def _needed(model, noise_shape, conds, choice: LayerAttention) -> int:
    """Bytes that the run's cache will hold; 0 where nothing is given or it would not fit."""
    entries = _given(conds)
    if not entries:
        return 0
    network, (height, width) = model.diffusion_model, noise_shape[3:5]
    patch = network.patch_size
    layout = network.layout(
        entries[0][PROMPTS],
        entries[0]["cross_attn"].shape[1] // entries[0][PROMPTS],
        (height // patch, width // patch),
        sequence_of(network.sequence, noise_shape[2]).segments(entries[0][TASK]),
    )
    plan = plan_attention(
        layout,
        choice.mask(layout),
        network.heads,
        network.head_dim,
        model.get_dtype_inference(),
        "cpu",
    )
    blocks = len(network.transformer_blocks)
    needed = cache_bytes(plan, blocks, len(entries), len(entries) * noise_shape[0])
    return needed if needed <= choice.reuse_bytes else 0


def _given(conds) -> list[dict[str, Any]]:
    """The entries of all branches of guidance that bring given layers."""
    entries = [entry for branch in conds.values() for entry in branch]
    return [entry for entry in entries if entry.get(GIVEN_LATENTS) is not None]
