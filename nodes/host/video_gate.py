"""The image stream's factor in each spatial transformer of a MODEL, set on a clone."""

from __future__ import annotations

from ...engine.animate_request import GATE_LAYERS
from ...engine.animate_settings import AnimateSettings
from ...engine.conditioning.layer_list import layer_strengths
from .video_model import GATE, animate_settings

LISTED = "listed"
CHOICES = (*GATE_LAYERS, LISTED)


def gated(model, strength: float, layers: str, listed: str):
    """A clone of a MODEL whose image stream counts this much; factors of several gates multiply.

    layers: "all", "middle", or "listed" with the layers in ``listed`` (``layer_strengths``).

    Raises:
        LayerLoomError: not a model with an image stream, or a strength or list that is no use.
    """
    settings = animate_settings(model)
    scales = _scales(settings, strength, layers, listed)
    model = model.clone()
    options = dict(model.model_options.get("transformer_options", {}))
    before = options.get(GATE) or (1.0,) * settings.layers
    options[GATE] = tuple(a * b for a, b in zip(before, scales, strict=True))
    model.model_options["transformer_options"] = options
    return model


def _scales(
    settings: AnimateSettings, strength: float, layers: str, listed: str
) -> tuple[float, ...]:
    if layers == LISTED:
        return layer_strengths(listed, settings.layers, strength)
    scales = settings.gate(strength, layers)
    return scales if isinstance(scales, tuple) else (scales,) * settings.layers
