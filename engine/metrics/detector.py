"""Grounding DINO (arXiv 2303.05499), which finds subjects by their names, through transformers.

A folder that a person names; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conditioning.encoders import first_line
from ..conditioning.video_encoders import quiet_loading
from ..device import pick_device
from ..errors import LayerLoomError
from .subject_clips import SubjectClip

WHERE = "a folder of Grounding DINO (IDEA-Research/grounding-dino-tiny on Hugging Face)"
# Below this score nothing was found; the authors' own (IDEA-Research/GroundingDINO).
THRESHOLD = 0.35
_BATCH = 4


class Detector:
    """Grounding DINO and what makes its inputs.

    Args:
        model, processor: of transformers.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    @classmethod
    def open(cls, folder: Path, device: str | None = None) -> Detector:
        """The detector of a folder of transformers.

        Raises:
            LayerLoomError: there is none, or no such device.
        """
        from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

        target = pick_device(device)
        try:
            with quiet_loading():
                model, report = GroundingDinoForObjectDetection.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True
                )
                processor = GroundingDinoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library fails in its own ways on a wrong folder
            raise LayerLoomError(
                f"{folder} holds no detector ({first_line(error)}); give {WHERE}."
            ) from error
        if report["missing_keys"]:
            missing = min(report["missing_keys"])
            raise LayerLoomError(f"{folder} lacks {missing} among others; give {WHERE}.")
        return cls(model.float().eval().to(target), processor)

    @torch.no_grad()
    def find(self, frames: np.ndarray, name: str) -> list[tuple[float, ...] | None]:
        """Boxes (x0, y0, x1, y1) in pixels of what best fits a name in each frame.

        frames: uint8 [T, H, W, 3]. None in frames where nothing scores ``THRESHOLD``.
        """
        text = f"{name.lower().strip().rstrip('.')}."
        found: list[tuple[float, ...] | None] = []
        for start in range(0, len(frames), _BATCH):
            part = list(frames[start : start + _BATCH])
            given = self.processor(images=part, text=[text] * len(part), return_tensors="pt")
            out = self.model(**given.to(next(self.model.parameters()).device))
            # Places of the text that hold no word are minus infinity.
            scores = out.logits.sigmoid().amax(-1)
            rows = zip(scores, out.pred_boxes, strict=True)
            found += [_best(*row, frames.shape[1:3]) for row in rows]
        return found


def _best(scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[float, ...] | None:
    """The box of the highest score, cut to the frame; ``boxes`` are (x, y, w, h) around middles."""
    at = int(scores.argmax())
    if not float(scores[at]) >= THRESHOLD:
        return None
    x, y, w, h = boxes[at].tolist()
    height, width = size
    x0, x1 = (min(max(side, 0.0), 1.0) * width for side in (x - w / 2, x + w / 2))
    y0, y1 = (min(max(side, 0.0), 1.0) * height for side in (y - h / 2, y + h / 2))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def detected(clip: SubjectClip, detector: Detector, names: Sequence[str]) -> SubjectClip:
    """The clip with what a detector finds in it.

    names: what each subject is called, in their order.

    Raises:
        LayerLoomError: as many names as subjects are needed.
    """
    if len(names) != len(clip.subjects):
        raise LayerLoomError(
            f"A clip has {len(clip.subjects)} subjects and {len(names)} names; say what each of "
            "them is called, in their order."
        )
    return replace(clip, found=[detector.find(clip.frames, name) for name in names])
