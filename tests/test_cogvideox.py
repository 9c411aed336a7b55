"""CogVideoX weights in diffusers names: the same network, the same numbers as diffusers."""

import math

import pytest
import torch

from layerloom.engine.checkpoints.detect import inspect_checkpoint
from layerloom.engine.checkpoints.load import from_store, load_transformer, open_checkpoint
from layerloom.engine.checkpoints.reader import memory_store
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.layered_transformer import LayerSegment


def cogvideox(seed, **changes):
    """A tiny random diffusers CogVideoX whose norms and biases are not at their neutral values."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "time_embed_dim": 24,
        "text_embed_dim": 20,
        "max_text_seq_length": 7,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 9,
        **changes,
    }
    model = CogVideoXTransformer3DModel(**settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights of unit gain; norms' scales around 1; modulations and biases moderate.
            modulation = ".linear." in name
            spread = 0.3 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            centre = centre if parameter.ndim == 1 else 0.0
            spread = spread * 0.25 if modulation else spread
            parameter.copy_(torch.randn_like(parameter) * spread + centre)
    return model


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (2, 3, 16, 8, 12)),
        ({"attention_head_dim": 32, "num_attention_heads": 3, "num_layers": 3}, (1, 2, 16, 10, 4)),
        (
            {"in_channels": 4, "out_channels": 6, "spatial_interpolation_scale": 1.0},
            (2, 5, 4, 6, 14),
        ),
        ({"temporal_interpolation_scale": 2.0, "patch_size": 1}, (1, 4, 16, 5, 3)),
    ],
)
@pytest.mark.parametrize("final_norm", [1.0, 0.01])
def test_forward_equals_diffusers_on_shared_weights(tmp_path, changes, size, final_norm):
    model = cogvideox(len(changes), **changes)
    # A small norm before the last one brings out that one's eps: 1e-5 in diffusers' code, and
    # 1e-6 in CogVideoX's own and LayerFlow's (golden case lf_dit_rgb_eps).
    with torch.no_grad():
        model.norm_final.weight.mul_(final_norm)
        model.norm_final.bias.mul_(final_norm)
    model.save_pretrained(tmp_path / "transformer")
    network = load_transformer(tmp_path)
    latents = torch.randn(size)
    text = torch.randn(size[0], 7, 20)
    timestep = torch.tensor([731.0, 19.0])[: size[0]]
    with torch.no_grad():
        expected = model(latents, text, timestep, return_dict=False)[0]
        found = network(latents, timestep, text[:, None], [LayerSegment("blended", size[1])])
        # Several layers and a given one are the same joint attention over the same frames.
        split = network(
            latents[:, 1:],
            timestep,
            text[:, None],
            [LayerSegment("a", 1, clean=True), LayerSegment("b", size[1] - 1)],
            latents[:, :1],
        )
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) <= 2e-5
    assert float((split - expected[:, 1:]).abs().max()) <= 2e-5


def test_sharded_and_single_files_hold_the_same_network(tmp_path):
    model = cogvideox(1)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    alone = tmp_path / "alone"
    alone.mkdir()
    weights = (tmp_path / "one" / "diffusion_pytorch_model.safetensors").rename(alone / "w.bin")
    states = [open_checkpoint(path).transformer_state() for path in (weights, tmp_path / "many")]
    assert states[0].keys() == model.state_dict().keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    info = inspect_checkpoint(weights)
    assert (info.source, info.variant, info.adapters) == ("cogvideox-diffusers", "cogvideox", {})
    shard = next((tmp_path / "many").glob("*00002-of*.safetensors"))
    shard.unlink()
    with pytest.raises(LayerLoomError, match=f"{shard.name}.* is missing"):
        open_checkpoint(tmp_path / "many")


def test_cogvideox_2b_is_named_and_5b_refused():
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    with torch.device("meta"):
        small = CogVideoXTransformer3DModel()
        large = CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=2, use_rotary_positional_embeddings=True
        )
    checkpoint = from_store(memory_store(small.state_dict(), "small"))
    checkpoint.check()
    assert checkpoint.info.variant == "cogvideox-2b"
    assert checkpoint.info.parameters == 1_693_783_872
    with pytest.raises(LayerLoomError, match="rotary positions"):
        from_store(memory_store(large.state_dict(), "large"))
