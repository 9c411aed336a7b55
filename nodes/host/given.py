"""Clips that a user connects as given layers: checked, cut and resized for the network."""

from __future__ import annotations

import torch

from ...engine.conditioning.layers import LayerSequence
from ...engine.errors import LayerLoomError
from ...engine.frames import resize


def given_layers(
    task: str,
    clip,
    alpha: torch.Tensor | None,
    sequence: LayerSequence,
    size: tuple[int, int],
    notes: list[str],
) -> dict[str, torch.Tensor]:
    """Layers [1, F, C, H, W] in [0, 1] of an IMAGE batch or VIDEO, by name.

    ``alpha`` is a MASK [F or 1, H, W], 1 is opaque. What is cut or resized goes into ``notes``.

    Raises:
        LayerLoomError: too few frames, or a foreground without alpha.
    """
    names = sequence.given(task)
    colour, own = _frames(clip)
    alpha = own if alpha is None else alpha
    layers = {names[0]: _fit(colour.movedim(-1, 1)[None, :, :3], names[0], sequence, size, notes)}
    if "alpha" in names:
        if alpha is None:
            raise LayerLoomError(
                "The given foreground has no alpha; connect a MASK (1 is opaque) or a clip with "
                "transparency."
            )
        if len(alpha) == 1:
            alpha = alpha.expand(len(colour), -1, -1)
        if len(alpha) != len(colour):
            raise LayerLoomError(
                f"The foreground has {len(colour)} frames and its alpha {len(alpha)}; give as "
                "many masks as frames, or one for all."
            )
        layers["alpha"] = _fit(alpha[None, :, None], "alpha", sequence, size, notes)
    elif alpha is not None and task != "foreground":
        notes.append(f"The alpha is not used for the task {task}.")
    return layers


def _frames(clip) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Colour [F, H, W, C] and alpha [F, H, W] or None of an IMAGE batch or a VIDEO."""
    own = None
    if not torch.is_tensor(clip):
        components = clip.get_components()
        clip, own = components.images, getattr(components, "alpha", None)
    if own is not None:
        own = own[..., 0] if own.ndim == 4 else own
    if clip.shape[-1] == 4:
        own, clip = clip[..., 3], clip[..., :3]
    return clip.float(), own


def _fit(
    clip: torch.Tensor,
    name: str,
    sequence: LayerSequence,
    size: tuple[int, int],
    notes: list[str],
) -> torch.Tensor:
    count, (height, width) = clip.shape[1], clip.shape[-2:]
    if count < sequence.frames:
        raise LayerLoomError(
            f"The given {name} has {count} frames, but {sequence.frames} a layer are needed; give "
            f"a longer clip or set frames to a multiple of {sequence.temporal_factor} that it has."
        )
    if count > sequence.frames:
        notes.append(f"Only the first {sequence.frames} of the given {name}'s {count} frames.")
    if (height, width) != size:
        notes.append(f"The given {name} is resized from {width}x{height} to {size[1]}x{size[0]}.")
    return resize(clip[:, : sequence.frames].float(), size)
