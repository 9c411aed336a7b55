"""DynamiCrafter on the video UNet: its published variants, and the query transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .video_unet import VideoUNet


@dataclass(frozen=True)
class Variant:
    """What a published weight file was trained and is sampled with (arXiv 2310.12190).

    Attributes:
        name: what ``layerloom info`` prints.
        height, width: native size in pixels.
        prediction: "eps" or "v".
        zero_terminal_snr: the noise schedule ends in pure noise.
        rescale_base: dynamic rescale of the clean estimate: its scale falls from 1 to this over
            the first 400 of 1000 timesteps and stays (arXiv 2310.12190, appendix); None is off.
        image_gate: a learnt factor on the image stream of each layer.
        spacing: which timesteps a run visits, "uniform" or "trailing".
        guidance_rescale: pulls the guided prediction's spread back to the conditional one's.
        speed: what the number ``fps_embedding`` reads is: "frame stride" or "fps".
        speed_default, speed_range: its default and useful range.
        more_is_faster: larger numbers give more motion.
        frame_by_frame: the autoencoder takes one frame at a time.
        interpolates: trained between a first and a last frame.
        frames: clip length it was trained on.
        latent_scale: factor on the autoencoder's latents; a posterior sample is the condition.
        spatial_factor: pixels a latent position stands for, a side.
        steps, eta, guidance: the released sampler's settings.
    """

    name: str
    height: int
    width: int
    prediction: str
    zero_terminal_snr: bool
    rescale_base: float | None
    image_gate: bool
    spacing: str
    guidance_rescale: float
    speed: str
    speed_default: int
    speed_range: tuple[int, int]
    more_is_faster: bool
    frame_by_frame: bool
    interpolates: bool = False
    frames: int = 16
    latent_scale: float = 0.18215
    spatial_factor: int = 8
    steps: int = 50
    eta: float = 1.0
    guidance: float = 7.5


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="256",
            height=256,
            width=256,
            prediction="eps",
            zero_terminal_snr=False,
            rescale_base=None,
            image_gate=True,
            spacing="uniform",
            guidance_rescale=0.0,
            speed="frame stride",
            speed_default=3,
            speed_range=(1, 6),
            more_is_faster=True,
            frame_by_frame=False,
        ),
        Variant(
            name="512",
            height=320,
            width=512,
            prediction="v",
            zero_terminal_snr=True,
            rescale_base=0.7,
            image_gate=False,
            spacing="trailing",
            guidance_rescale=0.7,
            speed="fps",
            speed_default=24,
            speed_range=(15, 30),
            more_is_faster=False,
            frame_by_frame=True,
        ),
        Variant(
            name="1024",
            height=576,
            width=1024,
            prediction="v",
            zero_terminal_snr=True,
            rescale_base=0.3,
            image_gate=False,
            spacing="trailing",
            guidance_rescale=0.7,
            speed="fps",
            speed_default=10,
            speed_range=(5, 20),
            more_is_faster=False,
            frame_by_frame=True,
        ),
        Variant(
            name="512_interp",
            height=320,
            width=512,
            prediction="v",
            zero_terminal_snr=True,
            rescale_base=0.7,
            image_gate=False,
            spacing="trailing",
            guidance_rescale=0.7,
            speed="fps",
            speed_default=5,
            speed_range=(5, 30),
            more_is_faster=False,
            frame_by_frame=True,
            interpolates=True,
        ),
    )
}

# The scalar embedding that reads ``Variant.speed``.
SPEED = "fps_embedding"

UNET: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 4,
    "block_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_levels": (True, True, True, False),
    "context_dim": 1024,
    "head_dim": 64,
    "num_heads": None,
    "norm_groups": 32,
    "linear_projection": True,
    "temporal_convolution": True,
    "temporal_transformer": True,
    "initial_temporal_transformer": True,
    "image_attention": True,
    "image_gate": False,
    "image_tokens_per_frame": 16,
    "scalar_embeddings": (SPEED,),
}
IMAGE_PROJECTOR: dict[str, Any] = {
    "dim": 1024,
    "depth": 4,
    "heads": 12,
    "head_dim": 64,
    "queries": 16 * 16,
    "in_dim": 1280,
    "out_dim": 1024,
    "mlp_ratio": 4,
}


def published_unet(variant: Variant) -> dict[str, Any]:
    """``VideoUNet`` keywords of a published variant."""
    return {**UNET, "image_gate": variant.image_gate}


class Perceiver(nn.Module):
    """Attention of the queries to the image tokens and to themselves."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, device=None, dtype=None, operations: Any = nn
    ):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        kwargs = {"bias": False, "device": device, "dtype": dtype}
        self.to_q = operations.Linear(dim, inner, **kwargs)
        self.to_k = operations.Linear(dim, inner, **kwargs)
        self.to_v = operations.Linear(dim, inner, **kwargs)
        self.to_out = nn.ModuleList([operations.Linear(inner, dim, **kwargs)])

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        parts = (self.to_q(queries), self.to_k(tokens), self.to_v(tokens))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class ProjectedGELU(nn.Module):
    """Linear without bias, then GELU."""

    def __init__(self, dim: int, out: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        self.proj = operations.Linear(dim, out, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.proj(x))


class TokenMLP(nn.Module):
    """Two linear layers without bias (``net.1`` is diffusers' dropout slot)."""

    def __init__(self, dim: int, inner: int, device=None, dtype=None, operations: Any = nn):
        super().__init__()
        first = ProjectedGELU(dim, inner, device, dtype, operations)
        last = operations.Linear(inner, dim, bias=False, device=device, dtype=dtype)
        self.net = nn.ModuleList([first, nn.Identity(), last])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class QueryBlock(nn.Module):
    """Perceiver attention and MLP, each with a residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        mlp_ratio: int,
        device=None,
        dtype=None,
        operations: Any = nn,
    ):
        super().__init__()
        rest = (device, dtype, operations)
        self.ln0 = operations.LayerNorm(dim, device=device, dtype=dtype)
        self.ln1 = operations.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = Perceiver(dim, heads, head_dim, *rest)
        norm = operations.LayerNorm(dim, device=device, dtype=dtype)
        self.ff = nn.Sequential(norm, TokenMLP(dim, mlp_ratio * dim, *rest))

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.ln1(queries)
        queries = queries + self.attn(normed, torch.cat([self.ln0(tokens), normed], dim=1))
        return queries + self.ff(queries)


class QueryTransformer(nn.Module):
    """Image tokens to context tokens: learnt queries attend to what the image encoder saw.

    DynamiCrafter's ``image_proj_model`` (arXiv 2310.12190, section 3.2); parameter names follow
    diffusers' ``IPAdapterPlusImageProjection``, which is the same network.

    Args:
        dim, depth, heads, head_dim, mlp_ratio: its size.
        queries: tokens it makes, T * 16 in the published weights.
        in_dim, out_dim: width of the image encoder's tokens and of the context.
    """

    def __init__(
        self,
        *,
        dim: int = 1024,
        depth: int = 4,
        heads: int = 12,
        head_dim: int = 64,
        queries: int = 256,
        in_dim: int = 1280,
        out_dim: int = 1024,
        mlp_ratio: int = 4,
        device=None,
        dtype=None,
        operations: Any = None,
    ):
        super().__init__()
        operations = operations or nn
        kwargs = {"device": device, "dtype": dtype}
        latents = torch.empty(1, queries, dim, device=device)
        if not latents.is_meta:  # where there are no numbers torch would import its compiler
            latents.normal_(std=dim**-0.5)
        self.latents = nn.Parameter(latents.to(dtype or latents.dtype))
        self.proj_in = operations.Linear(in_dim, dim, **kwargs)
        self.layers = nn.ModuleList(
            QueryBlock(dim, heads, head_dim, mlp_ratio, device, dtype, operations)
            for _ in range(depth)
        )
        self.proj_out = operations.Linear(dim, out_dim, **kwargs)
        self.norm_out = operations.LayerNorm(out_dim, **kwargs)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image encoder tokens [B, N, in_dim] to context tokens [B, queries, out_dim]."""
        tokens = self.proj_in(tokens)
        queries = self.latents.to(tokens).expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return self.norm_out(self.proj_out(queries))


class DynamiCrafter(nn.Module):
    """The two networks of a checkpoint side by side.

    Args:
        unet: ``VideoUNet`` keywords.
        image_projector: ``QueryTransformer`` keywords, or None where there is none.
    """

    def __init__(
        self,
        *,
        unet: Mapping[str, Any],
        image_projector: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        operations: Any = None,
    ):
        super().__init__()
        rest = {"device": device, "dtype": dtype, "operations": operations}
        self.unet = VideoUNet(**unet, **rest)
        self.image_projector = (
            None if image_projector is None else QueryTransformer(**image_projector, **rest)
        )
