"""Segment-anything networks (arXiv 2304.02643), by the package's own classes, of any size.

The published ones and the starter differ in these settings alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import LayerLoomError

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

# Mean and standard deviation of pixels 0..255 that the published networks were trained with.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
CANDIDATES = 3


@dataclass(frozen=True)
class SegmenterSettings:
    """Sizes of a network.

    Attributes:
        image_size: pixels that a picture's longer side is scaled to; the rest is padding.
        patch_size: pixels of a token's side; masks are drawn at a quarter of it.
        width, depth, heads, mlp: of the image encoder, a ViT; mlp is its hidden layers' width.
        window: tokens of a window's side, in blocks other than ``global_blocks``.
        relative_positions: whether attention in the image encoder knows relative positions.
        channels: width of an embedding and of the mask decoder.
        mask_channels: hidden channels of the encoder of given masks.
        decoder_depth, decoder_heads, decoder_mlp: of the mask decoder.
        score_depth, score_width: of the layers that score a candidate.
    """

    image_size: int = 1024
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    window: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    relative_positions: bool = True
    channels: int = 256
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    score_depth: int = 3
    score_width: int = 256

    def __post_init__(self):
        # Recipes and metadata have lists.
        object.__setattr__(self, "global_blocks", tuple(self.global_blocks))
        for number, divisor, what in (
            (self.image_size, self.patch_size, "image_size must be a multiple of patch_size"),
            (self.width, self.heads, "width must be a multiple of heads"),
            (self.channels, 2 * self.decoder_heads, "channels must divide by twice decoder_heads"),
        ):
            if min(number, divisor) < 1 or number % divisor:
                raise LayerLoomError(f"The segmenter's {what}; they are {number} and {divisor}.")

    @property
    def grid(self) -> int:
        """Tokens along the longer side."""
        return self.image_size // self.patch_size


PUBLISHED = {
    "vit_b": SegmenterSettings(),
    "vit_l": SegmenterSettings(
        width=1024, depth=24, heads=16, mlp=4096, global_blocks=(5, 11, 17, 23)
    ),
    "vit_h": SegmenterSettings(
        width=1280, depth=32, heads=16, mlp=5120, global_blocks=(7, 15, 23, 31)
    ),
}


def build_segmenter(settings: SegmenterSettings) -> Sam:
    """The network with random weights; its positions of prompts are random and stay so.

    Raises:
        LayerLoomError: segment-anything is not installed.
    """
    modeling = _modeling()
    network = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=settings.image_size,
            patch_size=settings.patch_size,
            embed_dim=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            mlp_ratio=settings.mlp / settings.width,
            out_chans=settings.channels,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=settings.relative_positions,
            window_size=settings.window,
            global_attn_indexes=settings.global_blocks,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=settings.channels,
            image_embedding_size=(settings.grid, settings.grid),
            input_image_size=(settings.image_size, settings.image_size),
            mask_in_chans=settings.mask_channels,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=settings.channels,
            transformer=modeling.TwoWayTransformer(
                depth=settings.decoder_depth,
                embedding_dim=settings.channels,
                num_heads=settings.decoder_heads,
                mlp_dim=settings.decoder_mlp,
            ),
            num_multimask_outputs=CANDIDATES,
            iou_head_depth=settings.score_depth,
            iou_head_hidden_dim=settings.score_width,
        ),
    )
    # Not among the stored tensors: they must be there on the meta device too.
    network.pixel_mean = torch.tensor(PIXEL_MEAN, device="cpu").view(-1, 1, 1)
    network.pixel_std = torch.tensor(PIXEL_STD, device="cpu").view(-1, 1, 1)
    return network.eval()


def _modeling():
    try:
        from segment_anything import modeling
    except ModuleNotFoundError as error:
        raise LayerLoomError(
            "Turning clicks into masks needs segment-anything, which is missing; pip install "
            "segment-anything torchvision."
        ) from error
    return modeling
