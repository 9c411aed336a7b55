"""Stage: the starter segmenter, a small segment-anything that learns clicks on sprite world."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LayerLoomError
from ..models.segmenter import SegmenterSettings, build_segmenter
from .segment_world import (
    WAYS,
    Asking,
    Way,
    ask,
    draw_pictures,
    picture_at,
    touching,
)
from .settings import TrainingSettings, settings_from
from .shares import WHOLE, Shares

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

# Times that the mask decoder enlarges tokens.
UPSCALING = 4
# Shapes of pictures (height and width as shares of the longer side), and the sizes that they have
# before they are scaled, as shares of the scaled size.
SHAPES = ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.75, 1.0), (1.0, 0.75), (0.5625, 1.0))
SIZES = (0.75, 1.0, 1.5, 2.0)
# Of attention between prompts and picture at the start: how sharply a click looks at where it is.
SHARPNESS = 2.0
# Fewer cells of a mask along the longer side, and small sprites would not be seen.
FEWEST_CELLS = 32
# Least of a picture that a mask must cover to be scored by its overlap, against dividing by 0.
_TINY = 1e-6


@dataclass(frozen=True)
class SegmentData:
    """The ``[data]`` table: the seed of the pictures, and the most noise on them (0..1)."""

    seed: int = 21
    noise: float = 0.03

    def __post_init__(self):
        if not 0 <= self.noise <= 1:
            raise LayerLoomError(f"The recipe's data.noise is {self.noise}; give 0 to 1.")


@dataclass(frozen=True)
class Question:
    """Clicks on pictures, asked in one way, and their answers.

    points: [B, n, 2] (x, y) as the network counts pixels, None for none. labels: [B, n].
    boxes: [B, 4] likewise, or None. answers: [B, 3, h, w], the share of each cell that belongs to
    it.
    """

    points: Tensor | None
    labels: Tensor | None
    boxes: Tensor | None
    answers: Tensor


@dataclass(frozen=True)
class DrawnQuestions:
    """One share of a step: pictures [B, 3, H, W] in 0..255, and a question a way."""

    pictures: Tensor
    questions: tuple[Question, ...]


class SegmenterStage:
    """Every picture is embedded once and asked in all ways.

    Each of the three candidates learns its own answer (``segment_world``), the first and the one
    that the predictor gives for a single mask learn what is meant. Their scores learn the overlap
    with what is meant, so that the best one is the narrowest that is right.

    Loss: cross-entropy and Dice (arXiv 2304.02643, section 3, has focal loss in the first's
    place) on the mask decoder's own resolution, where a cell's share is the target, and the scores'
    squared error.

    Args:
        network: what ``build_segmenter`` makes of ``settings``.
        batch: pictures of a share.
    """

    hidden = (".attn.qkv.", ".attn.proj.", ".mlp.lin", "q_proj.", "k_proj.", "v_proj.", "out_proj.")

    def __init__(self, network: Sam, settings: SegmenterSettings, data: SegmentData, batch: int):
        self.network, self.settings = network, settings
        self.data, self.batch = data, batch
        decoder = network.mask_decoder.transformer
        self.blocks = (*network.image_encoder.blocks, *decoder.layers)

    def draw(self, generator: torch.Generator, shares: Shares = WHOLE) -> list[DrawnQuestions]:
        """Pictures of one shape and size, and what is asked of them."""
        total = self.batch * shares.count
        first = int(torch.randint(2**40, (), generator=generator))
        rng = random.Random(first)
        height, width = (round(side * self._cells) for side in rng.choice(SHAPES))
        scale = rng.choice(SIZES) / (self._cells / self.settings.image_size)
        noise = torch.rand(total, 1, 1, 1, generator=generator) * self.data.noise
        drawn = []
        for rows in shares.rows(self.batch):
            numbers = range(first + rows.start, first + rows.stop)
            drawn.append(self._questions(numbers, (height, width), scale, noise[rows]))
        return drawn

    @property
    def _cells(self) -> int:
        """Cells of a mask along the longer side."""
        return UPSCALING * self.settings.grid

    def _questions(
        self, numbers: Sequence[int], cells: tuple[int, int], scale: float, noise: Tensor
    ) -> DrawnQuestions:
        scenes = [picture_at(self.data.seed, number) for number in numbers]
        size = tuple(round(side * scale) for side in cells)
        drawn = draw_pictures(scenes, size, cells)
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        grain = [torch.randn(3, *size, generator=generator) for generator in generators]
        noisy = drawn.pictures + noise * torch.stack(grain)
        bytes_ = (noisy.clamp(0, 1) * 255).round()
        factor = self.settings.image_size // self._cells
        scaled = tuple(factor * side for side in cells)
        pictures = nn.functional.interpolate(bytes_, scaled, mode="bilinear", antialias=True)
        touches, visible = touching(drawn.visible).numpy(), drawn.visible.numpy()
        rngs = [random.Random(f"asking {self.data.seed} {number}") for number in numbers]
        questions = []
        for way in WAYS:
            asked = [ask(way, visible[i], touches[i], rng) for i, rng in enumerate(rngs)]
            answers = torch.stack(
                [
                    torch.stack([drawn.answer(row, sprites) for sprites in each.answers])
                    for row, each in enumerate(asked)
                ]
            )
            questions.append(_question(way, asked, answers, scaled))
        return DrawnQuestions(pictures, tuple(questions))

    def loss(self, drawn: DrawnQuestions) -> tuple[Tensor, dict[str, float]]:
        network = self.network
        device = network.mask_decoder.mask_tokens.weight.device
        features = network.image_encoder(network.preprocess(drawn.pictures.to(device)))
        losses, overlaps, gaps = [], [], []
        for question in drawn.questions:
            answers = question.answers.to(device)
            logits, scores = answer_all(network, features, question)
            logits = logits[..., : answers.shape[-2], : answers.shape[-1]].float()
            # The mask for a single answer first, then the candidates.
            wanted = torch.cat([answers[:, :1], answers], dim=1)
            entropy = nn.functional.binary_cross_entropy_with_logits(logits, wanted)
            found = logits.sigmoid()
            both = (found * wanted).sum((-2, -1))
            dice = 1 - (2 * both + 1) / (found.sum((-2, -1)) + wanted.sum((-2, -1)) + 1)
            overlap = overlap_of(logits > 0, answers[:, :1] > 0.5)
            gap = (scores.float() - overlap).square().mean()
            losses.append(4 * entropy + dice.mean() + gap)
            overlaps.append(overlap[:, 1].mean().item())
            gaps.append(gap.item())
        numbers = {"overlap": float(np.mean(overlaps)), "score_error": float(np.mean(gaps))}
        numbers["overlap/point"] = overlaps[0]
        return torch.stack(losses).mean(), numbers

    def export(self, path: Path, state: Mapping[str, Tensor]) -> None:
        from ..checkpoints.segmenter import save_segmenter

        training = {"data": asdict(self.data), "batch": self.batch}
        save_segmenter(path, state, self.settings, {"training": training})


def answer_all(network: Sam, features: Tensor, question: Question) -> tuple[Tensor, Tensor]:
    """All four masks' logits [B, 4, h, w] and scores [B, 4], picture b asked by prompt b.

    The mask decoder takes many prompts of one picture, or else repeats every picture for every
    prompt; since it adds the picture's features and the given mask's, they go in as the latter.
    """
    device = features.device
    points = None
    if question.points is not None:
        points = (question.points.to(device), question.labels.to(device))
    boxes = None if question.boxes is None else question.boxes.to(device)
    sparse, dense = network.prompt_encoder(points=points, boxes=boxes, masks=None)
    return network.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(features[:1]),
        image_pe=network.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=features + dense,
    )


def overlap_of(found: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of bool masks [..., H, W]."""
    both = (found & wanted).sum((-2, -1))
    return both / ((found | wanted).sum((-2, -1)) + _TINY)


def _question(
    way: Way, asked: Sequence[Asking], answers: Tensor, size: tuple[int, int]
) -> Question:
    """``size``: (height, width) of the scaled picture."""
    scale = torch.tensor([size[1], size[0]], dtype=torch.float32)
    points = labels = boxes = None
    if way.points:
        given = torch.tensor([each.points for each in asked])
        # As everywhere in segment-anything, whole numbers are centres.
        points, labels = given[..., :2] * scale - 0.5, given[..., 2].int()
    if way.box:
        boxes = torch.tensor([each.box for each in asked]) * scale.repeat(2) - 0.5
    return Question(points, labels, boxes, answers)


def build_segmenter_stage(recipe: Mapping[str, Any], training: TrainingSettings) -> SegmenterStage:
    """The stage of a recipe: a new network, or one to go on from (``start``).

    Raises:
        LayerLoomError: an entry is unknown or does not fit, or the start is no segmenter.
    """
    from ..checkpoints.segmenter import load_segmenter

    data = settings_from(recipe["data"], SegmentData)
    if recipe.get("start"):
        network, info = load_segmenter(recipe["start"])
        settings = SegmenterSettings(**info.settings)
    else:
        settings = settings_from(recipe.get("segmenter", {}), SegmenterSettings)
        if UPSCALING * settings.grid < FEWEST_CELLS:
            raise LayerLoomError(
                f"The recipe's segmenter sees pictures as {settings.grid}x{settings.grid} tokens; "
                f"at least {FEWEST_CELLS // UPSCALING} a side are needed: raise image_size or "
                "lower patch_size."
            )
        network = build_segmenter(settings)
        _begin(network)
    return SegmenterStage(network.requires_grad_(True).train(), settings, data, training.batch)


@torch.no_grad()
def _begin(network: Sam) -> None:
    """Random weights that learn fast; the package's own are made to be loaded over.

    Image tokens get positions. Attention between prompts and picture starts by comparing places,
    which are coded alike for both (sines, then cosines, of random frequencies): every head compares
    a few frequencies, so that a click looks at where it is, and what else there is speaks lower.
    """
    nn.init.normal_(network.image_encoder.pos_embed, std=0.02)
    network.image_encoder.neck[-1].weight.mul_(0.5)
    for embedding in network.prompt_encoder.point_embeddings:
        embedding.weight.mul_(0.3)
    transformer = network.mask_decoder.transformer
    crossing = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossing:
        rows, channels = attention.q_proj.weight.shape
        each, half = rows // attention.num_heads, rows // attention.num_heads // 2
        row = torch.arange(rows)
        frequency = row // each * half + row % half
        column = frequency + (row % each >= half) * (channels // 2)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(0.1)
            projection.weight[row, column] += SHARPNESS


def rehearse_segmenter(recipe: Mapping[str, Any], training: TrainingSettings) -> list[str]:
    """Check all that a recipe names; a line with what would be trained."""
    stage = build_segmenter_stage(recipe, training)
    weights = sum(parameter.numel() for parameter in stage.network.parameters())
    asked = training.batch * len(WAYS)
    return [f"{weights:,} weights, all trained; {asked} questions a step."]
