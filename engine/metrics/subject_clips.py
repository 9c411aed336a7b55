"""Measures of a clip of subjects along boxes, as DreamVideo-2 reports them (arXiv 2410.13830, 4.1).

CLIP-T, CLIP-I, DINO-I and temporal consistency are means of cosines over frames, as in the authors'
own evaluation of DreamVideo (ali-vilab/VGen); R-CLIP and R-DINO look at the boxes alone, as in
MotionBooth (arXiv 2406.17758). Dynamic degree is VBench's (arXiv 2311.17982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..conditioning.flow import RaftFlow
from .likeness import ClipLikeness, DinoLikeness
from .trajectory import box_scores

# VBench's: frames a second that are looked at, the share of pixels that move most, how far they
# must go from frame to frame, in pixels of a picture 256 high, and in how many of 16 frames.
RATE, FASTEST, FAR, OFTEN = 8.0, 0.05, 6.0 / 256, 4 / 16
# RAFT's refinements there.
UPDATES = 20
Found = Sequence[Sequence[Sequence[float] | None]]


@dataclass(frozen=True, eq=False)
class SubjectClip:
    """A clip and what was asked for.

    frames: uint8 [T, H, W, 3]. subjects: pictures uint8 [h, w, 3] of any sizes. boxes: int
    [S, T, 4] as (x0, y0, x1, y1) in the frames' pixels, half-open and inside. found: as many boxes
    that a detector or tracker saw, None where it saw nothing; None without one.
    """

    frames: np.ndarray
    subjects: Sequence[np.ndarray]
    boxes: np.ndarray
    prompt: str
    fps: float
    found: Found | None = None


def likeness_scores(
    clip: SubjectClip, seen_by: ClipLikeness | DinoLikeness, name: str
) -> dict[str, float]:
    """How like their pictures the subjects are: in whole frames, and inside of their boxes.

    ``name`` is "clip" or "dino". Keys are its with "_i" behind it and "r_" before it; by CLIP also
    "clip_t", the prompt's likeness, and "temporal_consistency", that of frames to their next.
    """
    pictures = seen_by.pictures(clip.subjects)
    frames = seen_by.pictures(clip.frames)
    regions = [
        seen_by.pictures(
            [
                frame[y0:y1, x0:x1]
                for frame, (x0, y0, x1, y1) in zip(clip.frames, track, strict=True)
            ]
        )
        for track in clip.boxes
    ]
    scores = {
        f"{name}_i": float((pictures @ frames.T).mean()),
        f"r_{name}": float(torch.stack(regions).mul(pictures[:, None]).sum(-1).mean()),
    }
    if isinstance(seen_by, ClipLikeness):
        scores["clip_t"] = float((frames @ seen_by.text(clip.prompt)).mean())
        if len(frames) > 1:
            following = (frames[1:] * frames[:-1]).sum(-1)
            scores["temporal_consistency"] = float(following.mean())
    return scores


def motion_scores(clip: SubjectClip, raft: RaftFlow) -> dict[str, float]:
    """Dynamic degree: 1.0 for a clip that moves, 0.0 for one that does not; {} of one frame."""
    kept = clip.frames[:: max(1, round(clip.fps / RATE))]
    if len(kept) < 2:
        return {}
    frames = torch.from_numpy(kept).movedim(-1, 1).float() / 255
    flow = raft.flow(frames, updates=UPDATES).cpu()
    return {"dynamic_degree": float(is_dynamic(flow, clip.fps))}


def is_dynamic(flow: Tensor, frames_per_second: float = RATE) -> bool:
    """Whether a clip moves, by flow [F-1, 2, H, W] in pixels between frames that are looked at.

    The mean length of the fastest ``FASTEST`` of its pixels must be more than ``FAR`` of the
    smaller side in at least ``OFTEN`` of its F frames, and in one; slower films must move further.
    """
    speed = flow.norm(dim=1).flatten(1)
    count = max(1, int(speed.shape[1] * FASTEST))
    fastest = speed.topk(count, dim=1).values.mean(1)
    far = FAR * min(flow.shape[-2:]) * max(1.0, RATE / frames_per_second)
    needed = max(1, round(OFTEN * (len(flow) + 1)))
    return int((fastest > far).sum()) >= needed


def place_scores(clip: SubjectClip) -> dict[str, float]:
    """mIoU and centre distance of the boxes that were found, in shares of the frame; {} of none."""
    if clip.found is None:
        return {}
    height, width = clip.frames.shape[1:3]
    scale = np.array([width, height, width, height], dtype=np.float64)
    rows = []
    for seen, asked in zip(clip.found, clip.boxes, strict=True):
        shares = [None if box is None else tuple(np.asarray(box) / scale) for box in seen]
        rows.append(box_scores(shares, asked / scale))
    overlap, distance = np.mean(rows, axis=0).tolist()
    return {"miou": overlap, "cd": distance}


def clip_scores(
    clip: SubjectClip,
    likeness: ClipLikeness | None = None,
    dino: DinoLikeness | None = None,
    raft: RaftFlow | None = None,
) -> dict[str, float]:
    """All measures of a clip that the given networks allow; see the functions above."""
    scores = place_scores(clip)
    if likeness is not None:
        scores |= likeness_scores(clip, likeness, "clip")
    if dino is not None:
        scores |= likeness_scores(clip, dino, "dino")
    if raft is not None:
        scores |= motion_scores(clip, raft)
    return scores
