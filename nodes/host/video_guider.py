"""Guidance by image and text as a GUIDER of the host (DynamiCrafter, arXiv 2310.12190)."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import torch

from ...engine.sampling.streams import StreamGuidance, rescale_spread
from .video_sampling import network_output

# The host's name for each branch of ``StreamGuidance``.
CONDITIONS = {"both": "positive", "image": "image_only", "none": "negative"}


class DualStreamGuider(comfy.samplers.CFGGuider):
    """Three forwards a step, or as few as the scales need (``StreamGuidance.branches``)."""

    def set_streams(self, guidance: StreamGuidance) -> None:
        """Raises LayerLoomError for scales that cannot be used."""
        guidance.check()
        self.guidance = guidance
        self.set_cfg(guidance.text)

    def set_conds(self, positive, image_only, negative) -> None:
        """``image_only`` has the picture and the negative text, ``negative`` neither's."""
        given = (positive, image_only, negative)
        self.inner_set_conds(dict(zip(CONDITIONS.values(), given, strict=True)))

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """One guided prediction at the noise level ``timestep`` (a sigma, as the host calls it)."""
        options, guidance = model_options or {}, self.guidance
        branches = guidance.branches
        conds = [self.conds[CONDITIONS[name]] for name in branches]
        made = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        parts = dict(zip(branches, made, strict=True))
        plain = replace(guidance, rescale=0.0)
        guided = plain.combine(parts["both"], parts.get("image"), parts.get("none"))
        if guidance.rescale:
            guided = self._rescaled(guided, parts["both"], x, timestep)
        for function in options.get("sampler_post_cfg_function", []):
            arguments = {
                "denoised": guided,
                "cond": self.conds["positive"],
                "uncond": self.conds["negative"],
                "cond_scale": guidance.text,
                "model": self.inner_model,
                "uncond_denoised": parts.get("none", guided),
                "cond_denoised": parts["both"],
                "sigma": timestep,
                "model_options": options,
                "input": x,
            }
            guided = function(arguments)
        return guided

    def _rescaled(self, guided, conditional, x, sigma) -> torch.Tensor:
        """With a share of its spread set back to the conditional prediction's, clip by clip.

        The published formula works on what the network predicts, not on what the host makes of it.
        """
        sampling = self.inner_model.model_sampling
        frames = self.conds["positive"][0]["model_conds"]["num_video_frames"].cond
        clips = [
            network_output(sampling, sigma, denoised, x).unflatten(0, (-1, frames))
            for denoised in (guided, conditional)
        ]
        wanted = rescale_spread(*clips, self.guidance.rescale).flatten(0, 1)
        return sampling.calculate_denoised(sigma.flatten()[:1], wanted, x)
