"""Classifier-free guidance whose scale follows LayerFlow's formulas, as a GUIDER of the host."""

from __future__ import annotations

import comfy.samplers

from ...engine.sampling.guidance import guidance


class LayeredGuider(comfy.samplers.CFGGuider):
    """The host's CFG guider with the scale set anew at each step (``engine.sampling.guidance``)."""

    def set_formula(self, name: str, scale: float) -> None:
        """``name``: "constant", "dynamic" or "dynamic-released". Raises LayerLoomError."""
        guidance(name, scale, 1)
        self.formula, self.scale = name, scale

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """One guided prediction at the noise level ``timestep`` (a sigma, as the host calls it)."""
        options = model_options or {}
        sigmas = options["transformer_options"]["sample_sigmas"]
        steps = max(1, len(sigmas) - 1)
        sigma = timestep.flatten()[:1].to(sigmas.device)
        index = int((sigmas[:steps] - sigma).abs().argmin())
        timestep_index = int(self.inner_model.model_sampling.timestep(sigma)[0])
        self.cfg = guidance(self.formula, self.scale, steps)(index, timestep_index, steps)
        return super().predict_noise(x, timestep, options, seed)
