"""Optical flow of clips, and what it says of their motion: where it is, and how strong.

Flow is estimated by RAFT (arXiv 2003.12039), torchvision's network and weights; sprite world's own
is exact (``RenderedBatch.flow``) and of the same form.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoints.reader import open_tensors
from ..errors import LayerLoomError

if TYPE_CHECKING:
    from torchvision.models.optical_flow import RAFT

# RAFT compares at an eighth of the size, on four levels: smaller pictures leave nothing to compare.
_SMALLEST, _MULTIPLE = 128, 8
_FIRST = "feature_encoder.convnormrelu.0.weight"
# Channels of the first convolution.
_LARGE, _SMALL = 64, 32
_SUPPORTED = "torchvision's raft_large (raft_large_C_T_SKHT_V2-ff5fadd5.pth, say) or raft_small"


def motion_mask(flow: torch.Tensor) -> torch.Tensor:
    """Where a clip moves, bool [..., H, W], of flow [..., F-1, 2, H, W].

    A pixel counts if from any frame to the next it moves by more than that pair's mean
    (Follow-Your-Click, arXiv 2403.08268: the mask that its training is given).
    """
    speed = flow.norm(dim=-3)
    return (speed > speed.mean((-2, -1), keepdim=True)).any(-3)


def motion_strength(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean length [...] of flow [..., F-1, 2, H, W] inside a mask, in pixels from frame to frame.

    mask: [..., H, W] of the clip or [..., F-1, H, W] of each frame, inside from 0.5 up. 0 where
    the mask is empty (arXiv 2403.08268: the number that tells the network how strongly to move).
    """
    speed = flow.norm(dim=-3)
    inside = (mask if mask.ndim == speed.ndim else mask.unsqueeze(-3)) >= 0.5
    inside = inside.expand_as(speed)
    return (speed * inside).sum((-3, -2, -1)) / inside.sum((-3, -2, -1)).clamp_min(1)


class RaftFlow:
    """Estimates flow.

    Args:
        network: torchvision's RAFT.
        updates: refinements of an estimate.
    """

    def __init__(self, network: RAFT, updates: int = 12):
        self.network, self.updates = network.eval().requires_grad_(False), updates

    @classmethod
    def open(cls, path: str | Path, device: str | None = None) -> RaftFlow:
        """RAFT with a file's weights.

        device: "cpu", "cuda", ...; None takes the best there is.

        Raises:
            LayerLoomError: the file is missing, damaged or no RAFT; no such device.
        """
        from ..device import pick_device

        target = pick_device(device)
        store = open_tensors(path)
        network = _network(store.specs[_FIRST].shape[0] if _FIRST in store.specs else 0, store.name)
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        if expected != {name: spec.shape for name, spec in store.specs.items()}:
            raise _unknown(store.name)
        state = {name: store.read(name).clone() for name in store.specs}
        network.load_state_dict(state, assign=True)
        return cls(network.to(target))

    @torch.no_grad()
    def flow(
        self, frames: torch.Tensor, batch: int = 4, updates: int | None = None
    ) -> torch.Tensor:
        """Flow [F-1, 2, H, W] of frames [F, 3, H, W] in 0..1: (x, y) pixels to the next frame.

        batch: pairs of frames that are looked at together. updates: refinements, where others than
        the estimator's own are wanted.
        """
        updates = self.updates if updates is None else updates
        height, width = frames.shape[-2:]
        times = math.ceil(_SMALLEST / min(height, width))
        device = next(self.network.parameters()).device
        shown = frames.to(device).float() * 2 - 1
        if times > 1:
            shown = nn.functional.interpolate(shown, scale_factor=times, mode="bilinear")
        more = [-side % _MULTIPLE for side in shown.shape[-2:]]
        shown = nn.functional.pad(shown, (0, more[1], 0, more[0]), mode="replicate")
        found = []
        for start in range(0, len(frames) - 1, batch):
            stop = min(start + batch, len(frames) - 1)
            pair = shown[start:stop], shown[start + 1 : stop + 1]
            found.append(self.network(*pair, num_flow_updates=updates)[-1])
        flow = torch.cat(found)[..., : height * times, : width * times]
        return nn.functional.avg_pool2d(flow, times) / times


def _network(channels: int, name: str) -> RAFT:
    try:
        from torchvision.models import optical_flow
    except ModuleNotFoundError as error:
        raise LayerLoomError(
            "Estimating optical flow needs torchvision, which is missing; pip install torchvision."
        ) from error
    makers = {_LARGE: optical_flow.raft_large, _SMALL: optical_flow.raft_small}
    if channels not in makers:
        raise _unknown(name)
    with torch.device("meta"):
        return makers[channels](weights=None, progress=False)


def _unknown(name: str) -> LayerLoomError:
    return LayerLoomError(f"{name} is not a RAFT that estimates flow; give {_SUPPORTED}.")
