"""From clicks to masks: a picture is embedded once, then every click is answered at once.

The arithmetic is segment-anything's (arXiv 2304.02643), its predictor's to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..checkpoints.segmenter import SegmenterInfo, load_segmenter
from ..errors import LayerLoomError
from .clicks import Clicks

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

STARTER = Path(__file__).resolve().parents[2] / "starter" / "segmenter.safetensors"


@dataclass(frozen=True)
class Embedding:
    """A picture as the mask decoder sees it.

    features: [1, C, h, w]. scaled: (height, width) it was scaled to. size: (height, width) it has.
    """

    features: torch.Tensor
    scaled: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Candidates:
    """Three answers to the same clicks: a part, a thing, or what it belongs to.

    scaled: logits [3, h, w] at the size that the picture was scaled to. scores: [3], the network's
    guess at each candidate's overlap with what was meant (intersection over union, near 0..1).
    size: (height, width) of the picture. threshold: logits above it are inside.
    """

    scaled: torch.Tensor
    scores: torch.Tensor
    size: tuple[int, int]
    threshold: float = 0.0

    @property
    def logits(self) -> torch.Tensor:
        """[3, H, W] at the picture's size."""
        return self._at(slice(None), self.size)

    @property
    def masks(self) -> torch.Tensor:
        """bool [3, H, W]."""
        return self.logits > self.threshold

    @property
    def best(self) -> int:
        """The candidate with the highest score."""
        return int(self.scores.argmax())

    def mask(
        self, candidate: int | None = None, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """One candidate (0, 1 or 2; the best where None), bool [H, W].

        size: (height, width) to have it at, the picture's where None.

        Raises:
            LayerLoomError: there is no such candidate, or it is empty.
        """
        number = self.best if candidate is None else candidate
        if not 0 <= number < len(self.scores):
            raise LayerLoomError(
                f"There is no candidate {number}; give 0 to {len(self.scores) - 1}."
            )
        # Alone: enlarging a picture's masks takes longer than making them.
        chosen = self._at(slice(number, number + 1), size or self.size)[0] > self.threshold
        if not bool(chosen.any()):
            raise LayerLoomError(
                "The clicks select nothing that the segmenter sees; click on the middle of it, or "
                "draw a box around it."
            )
        return chosen

    def _at(self, rows: slice, size: tuple[int, int]) -> torch.Tensor:
        return nn.functional.interpolate(
            self.scaled[None, rows], size, mode="bilinear", align_corners=False
        )[0]


class Segmenter:
    """Answers clicks on pictures; holds nothing of either.

    Args:
        network: segment-anything's, float32.
        info: what its file is.
    """

    def __init__(self, network: Sam, info: SegmenterInfo):
        from segment_anything.utils.transforms import ResizeLongestSide

        self.network, self.info = network, info
        self.transform = ResizeLongestSide(network.image_encoder.img_size)

    @classmethod
    def open(cls, path: str | Path | None = None, device: str | None = None) -> Segmenter:
        """The segmenter of a file, the starter where None.

        device: "cpu", "cuda", ...; None takes the best there is.

        Raises:
            LayerLoomError: the file is missing, damaged or no segmenter; no such device.
        """
        from ..device import pick_device

        if path is None and not STARTER.exists():
            raise LayerLoomError(
                f"The starter segmenter {STARTER.name} is not there; make it with `layerloom train "
                "starter/segmenter.toml`, or name a segment-anything checkpoint."
            )
        return cls(*load_segmenter(STARTER if path is None else path, pick_device(device)))

    @property
    def device(self) -> torch.device:
        return self.network.mask_decoder.mask_tokens.weight.device

    @torch.no_grad()
    def embed(self, picture: np.ndarray) -> Embedding:
        """Look at a picture, uint8 [H, W, 3]: the slow part, once for all its clicks.

        Raises:
            LayerLoomError: the picture is so narrow that nothing would be left of it.
        """
        height, width = picture.shape[:2]
        side = self.network.image_encoder.img_size
        if min(height, width) * side < max(height, width):
            raise LayerLoomError(
                f"The picture of {width}x{height} pixels is too narrow to be segmented; cut it to "
                "what matters."
            )
        scaled = torch.as_tensor(self.transform.apply_image(picture), device=self.device)
        scaled = scaled.permute(2, 0, 1)[None]
        features = self.network.image_encoder(self.network.preprocess(scaled))
        return Embedding(features, tuple(scaled.shape[-2:]), (height, width))

    @torch.no_grad()
    def masks(self, embedding: Embedding, clicks: Clicks) -> Candidates:
        """Three candidates for what the clicks select.

        Points and one box go together. Of several boxes each is asked for on its own, with the
        wanted points inside it and all unwanted ones, wanted points in no box likewise; then the
        answers are joined, the best ones first.

        Raises:
            LayerLoomError: the clicks select nothing.
        """
        points, labels, boxes = clicks.require().pixels(embedding.size)
        if len(boxes) <= 1:
            scaled, scores = self._ask(embedding, points, labels, boxes)
            return self._candidates(scaled, scores, embedding)
        answers = [
            self._ask(embedding, points[rows], labels[rows], box[None])
            for box, rows in _by_box(points, labels, boxes)
        ]
        alone = (labels == 1) & ~np.any([_inside(points, box) for box in boxes], axis=0)
        if alone.any():
            rows = alone | (labels == 0)
            answers.append(self._ask(embedding, points[rows], labels[rows], boxes[:0]))
        return self._candidates(*_joined(answers), embedding)

    def _candidates(
        self, scaled: torch.Tensor, scores: torch.Tensor, embedding: Embedding
    ) -> Candidates:
        return Candidates(scaled, scores, embedding.size, self.network.mask_threshold)

    def _ask(
        self, embedding: Embedding, points: np.ndarray, labels: np.ndarray, boxes: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled logits [3, h, w] and scores [3]; points [N, 2] and one box [1, 4] or none."""
        network, device = self.network, self.device
        given = None
        if len(points):
            scaled = self.transform.apply_coords(points, embedding.size)
            given = (
                torch.as_tensor(scaled, dtype=torch.float, device=device)[None],
                torch.as_tensor(labels, dtype=torch.int, device=device)[None],
            )
        box = None
        if len(boxes):
            scaled = self.transform.apply_boxes(boxes, embedding.size)
            box = torch.as_tensor(scaled, dtype=torch.float, device=device)
        sparse, dense = network.prompt_encoder(points=given, boxes=box, masks=None)
        small, scores = network.mask_decoder(
            image_embeddings=embedding.features.to(device),
            image_pe=network.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        # As the package's ``postprocess_masks`` begins; ``Candidates`` ends it.
        side = network.image_encoder.img_size
        padded = nn.functional.interpolate(
            small, (side, side), mode="bilinear", align_corners=False
        )
        height, width = embedding.scaled
        return padded[0, :, :height, :width], scores[0]


def _inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = box
    return (points >= (x0, y0)).all(1) & (points <= (x1, y1)).all(1)


def _by_box(points: np.ndarray, labels: np.ndarray, boxes: np.ndarray):
    for box in boxes:
        yield box, (labels == 0) | _inside(points, box)


def _joined(
    answers: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of all answers, of each its best with the others' bests, and so on."""
    logits, scores = [], []
    for each, score in answers:
        order = score.argsort(descending=True)
        logits.append(each[order])
        scores.append(score[order])
    return torch.stack(logits).amax(0), torch.stack(scores).mean(0)
