"""Autoencoders that code one frame at a time, between pixels and latents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoints.dynamicrafter_names import VAE, plan_vae
from ..checkpoints.reader import TensorStore, open_tensors
from ..errors import LayerLoomError
from ..models.starter_autoencoder import SPATIAL_FACTOR, StarterAutoencoder
from ..sampling.samplers import draw_noise
from .encoders import first_line

WHERE = "the `vae` folder of a Stable Diffusion 1.5 or 2.1 repository, or its weight file"


class FrameCodec(Protocol):
    """Pictures [N, 3, H, W] in [-1, 1] to latents [N, C, h, w] as the network takes, and back."""

    spatial_factor: int
    channels: int

    def encode(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Latents; where they are drawn from a posterior, by the generator (on the CPU)."""

    def decode(self, latents: Tensor) -> Tensor: ...


class KLCodec:
    """Stable Diffusion's autoencoder through diffusers; latents are posterior samples, scaled.

    scale: what the network's latents were multiplied by in training, 0.18215.
    """

    def __init__(self, vae: Any, scale: float):
        self.vae, self.scale = vae, scale
        self.channels = vae.config.latent_channels
        self.spatial_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        posterior = self.vae.encode(pictures.to(self.vae.device, self.vae.dtype)).latent_dist
        noise = draw_noise(posterior.mean.shape, generator).to(posterior.mean)
        return (posterior.mean + posterior.std * noise).float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.vae.device, self.vae.dtype) / self.scale
        return self.vae.decode(scaled).sample.float()


class StarterFrameCodec:
    """The starters' small autoencoder, a frame at a time; it draws no noise."""

    spatial_factor = SPATIAL_FACTOR

    def __init__(self, model: StarterAutoencoder):
        self.model, self.channels = model, model.latent_channels

    def encode(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        return self.model.encode(pictures[:, None])[:, 0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents[:, None])[:, 0]


def kl_autoencoder(state: Mapping[str, Tensor], name: str) -> Any:
    """diffusers' ``AutoencoderKL`` with these weights, its settings told by their shapes.

    Raises:
        LayerLoomError: the tensors are not one; `name` is their file's.
    """
    from diffusers import AutoencoderKL

    problem = "what tells its size is missing"
    with contextlib.suppress(KeyError, ValueError, IndexError):
        vae = AutoencoderKL(**_keywords(state))
        expected = {key: tensor.shape for key, tensor in vae.state_dict().items()}
        strange = expected.keys() ^ state.keys()
        strange |= {key for key in expected.keys() & state if state[key].shape != expected[key]}
        if not strange:
            vae.load_state_dict({key: tensor.float() for key, tensor in state.items()})
            return vae.eval()
        problem = f"{min(strange)} is missing, left over or of another shape"
    raise LayerLoomError(
        f"{name} does not hold Stable Diffusion's autoencoder ({problem}); give {WHERE}."
    )


def read_autoencoder(path: Path) -> Any:
    """diffusers' ``AutoencoderKL`` from its folder, or from a file in its names or the original's.

    Raises:
        LayerLoomError: there is none.
    """
    if path.is_dir():
        from diffusers import AutoencoderKL

        folder = path / "vae" if (path / "vae" / "config.json").exists() else path
        try:
            vae = AutoencoderKL.from_pretrained(folder, local_files_only=True)
            return vae.float().eval()
        except Exception as error:  # the library fails in its own ways on a wrong folder
            raise LayerLoomError(
                f"{path} does not hold Stable Diffusion's autoencoder ({first_line(error)}); give "
                f"{WHERE}."
            ) from error
    store = open_tensors(path)
    if any(".mid_block." in key for key in store.specs):
        return kl_autoencoder({key: store.read(key) for key in store.specs}, path.name)
    inside = store if any(key.startswith(VAE) for key in store.specs) else _prefixed(store)
    found, _ = plan_vae(inside.specs, "")
    return kl_autoencoder({key: source.read(inside) for key, source in found.items()}, path.name)


def _prefixed(store: TensorStore) -> TensorStore:
    """A file of the autoencoder alone, its names as a whole checkpoint has them."""
    specs = {VAE + key: spec for key, spec in store.specs.items()}
    return TensorStore(store.name, specs, lambda key: store.read(key.removeprefix(VAE)))


def _keywords(state: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down_blocks."))
    start = "encoder.down_blocks.0.resnets."
    widths = tuple(
        state[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0]
        for level in range(levels)
    )
    return {
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": len({k.split(".")[4] for k in state if k.startswith(start)}),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        # In no shape; 32 in everything published.
        "norm_num_groups": min(32, *widths),
    }
