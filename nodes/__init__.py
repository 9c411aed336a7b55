"""ComfyUI nodes: one file a capability."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io


class LayerLoomExtension(ComfyExtension):
    """All nodes of the pack, for the host to register."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .host.version import too_old

        reason = too_old()
        if reason:
            logging.getLogger("layerloom").error(reason)
            return []
        from . import (
            animate,
            animate_guidance,
            attention,
            boxes,
            click,
            click_animate,
            compose,
            layered,
            layered_inputs,
            lora,
            save,
            train,
            trajectory,
        )
        from .host.click_route import add_route

        add_route()

        return [
            layered.LoadCheckpoint,
            layered_inputs.LayerPrompts,
            layered_inputs.LayeredLatent,
            layered_inputs.ConditionLayers,
            layered.LayeredGuider,
            attention.LayerAttention,
            lora.LoraToggles,
            lora.LoadLora,
            train.TrainLora,
            layered.DecodeLayers,
            animate.LoadAnimator,
            animate.AnimateImage,
            animate_guidance.DualStreamGuider,
            animate_guidance.ImageStreamGate,
            click.LoadSegmenter,
            click.ClickMask,
            click_animate.LoadRegionAnimator,
            click_animate.ClickAnimate,
            click_animate.HoldBackground,
            boxes.BoxTrajectory,
            boxes.BoxesFromMask,
            trajectory.LoadSubjectModel,
            trajectory.SubjectTrajectory,
            compose.CompositeLayers,
            save.SaveLayers,
        ]
