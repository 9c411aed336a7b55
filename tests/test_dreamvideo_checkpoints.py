"""Checkpoints that move subjects along boxes: ModelScope's names, ours, and additions alone."""

import pytest
import torch
from test_video_unet import inputs, randomised
from tiny_director import CONTROL, NETWORK, SETTINGS, build, write_director

from layerloom.engine.checkpoints.convert import convert_checkpoint
from layerloom.engine.checkpoints.dreamvideo import from_store, load_trajectory, open_trajectory
from layerloom.engine.checkpoints.dreamvideo_save import network_states, save_trajectory
from layerloom.engine.checkpoints.load import open_checkpoint
from layerloom.engine.checkpoints.lora import inspect_file
from layerloom.engine.checkpoints.reader import memory_store
from layerloom.engine.checkpoints.save import save_tensors
from layerloom.engine.checkpoints.video_names import unet_modules
from layerloom.engine.errors import LayerLoomError

# ModelScope's in miniature: what its shapes cannot tell is as there, 64 dims a head but for this.
WIDTHS = (32, 64)


def base():
    from diffusers import UNet3DConditionModel

    return randomised(
        UNet3DConditionModel(
            block_out_channels=WIDTHS,
            layers_per_block=1,
            norm_num_groups=32,
            cross_attention_dim=24,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )


def original_names(state, prefix=""):
    """The same under ModelScope's own names: its way down is not wrapped."""
    unet = from_store(memory_store(state, "base")).info.unet
    modules = {
        engine: name for name, engine in unet_modules({**unet, "scalar_embeddings": ()}).items()
    }
    made = {}
    for name, tensor in state.items():
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if (module := modules.get(".".join(parts[:length]))) is not None:
                break
        else:
            raise AssertionError(name)
        if module.endswith(".0.op"):
            module = module.removesuffix(".0.op") + ".op"
        if "transformer_in.proj_" in name and tensor.dim() == 2:
            tensor = tensor[..., None]
        made[".".join([prefix + module, *parts[length:]])] = tensor
    return made


@pytest.mark.parametrize("naming", ["diffusers", "original", "prefixed"])
def test_the_base_opens_in_both_namings(tmp_path, naming):
    theirs = base()
    state = dict(theirs.state_dict())
    if naming != "diffusers":
        state = original_names(state, "model.diffusion_model." if naming == "prefixed" else "")
        assert any(key.endswith("input_blocks.2.op.weight") for key in state)
    save_tensors(tmp_path / "base.safetensors", state, {})
    checkpoint = open_trajectory(tmp_path / "base.safetensors")
    info = checkpoint.info
    assert info.variant == "modelscope" and info.parts == ("unet",) and not info.reference
    assert info.source == ("diffusers" if naming == "diffusers" else "modelscope")
    assert info.parameters == sum(t.numel() for t in state.values()) and not info.ignored
    network = load_trajectory(checkpoint)
    x, t, text = inputs()
    with torch.no_grad():
        expected, found = theirs(x, t, text).sample, network(x, t, text)
    assert (found - expected).abs().max() <= 2e-5
    assert inspect_file(tmp_path / "base.safetensors") == info


def test_a_folder_of_diffusers_opens(tmp_path):
    base().save_pretrained(tmp_path / "unet")
    assert open_trajectory(tmp_path).info.source == "diffusers"


def test_what_we_write_we_read(tmp_path):
    path = write_director(tmp_path / "tiny.safetensors")
    checkpoint = open_trajectory(path)
    assert checkpoint.info.parts == (
        "unet",
        "reference",
        "box_encoder",
        "control",
        "vae",
        "text_encoder",
    )
    assert checkpoint.info.control == CONTROL and checkpoint.info.reference
    assert checkpoint.variant == SETTINGS
    found, expected = load_trajectory(checkpoint).state_dict(), build().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_additions_alone_stand_on_their_base(tmp_path):
    theirs, path = base(), tmp_path / "added.safetensors"
    save_tensors(tmp_path / "base.safetensors", original_names(theirs.state_dict()), {})
    unet = open_trajectory(tmp_path / "base.safetensors").info.unet
    network = build(unet=unet)
    states = network_states(network, base=False)
    save_trajectory(path, states, **{**NETWORK, "unet": unet}, settings=SETTINGS, half=True)
    alone = open_trajectory(path)
    assert alone.info.needs_base and "unet" not in alone.info.parts
    with pytest.raises(LayerLoomError, match="--base"):
        load_trajectory(alone)
    whole = open_trajectory(path, tmp_path / "base.safetensors")
    assert not whole.info.needs_base and whole.info.dtype == "float32"
    loaded = load_trajectory(whole).state_dict()
    assert torch.equal(loaded["unet.conv_in.weight"], theirs.conv_in.weight)
    added = network.state_dict()["reference.0.attn1.to_q.weight"]
    assert torch.equal(loaded["reference.0.attn1.to_q.weight"], added.half())
    convert_checkpoint(path, tmp_path / "one.safetensors", base=tmp_path / "base.safetensors")
    assert not open_trajectory(tmp_path / "one.safetensors").info.needs_base
    other = write_director(tmp_path / "other.safetensors")
    with pytest.raises(LayerLoomError, match="not what added.safetensors stands on"):
        open_trajectory(path, other)


def test_wrong_files_are_named(tmp_path):
    state = dict(base().state_dict())
    del state["mid_block.attentions.0.norm.weight"]
    save_tensors(tmp_path / "cut.safetensors", state, {})
    with pytest.raises(LayerLoomError, match="mid_block.attentions.0.norm.weight is missing"):
        load_trajectory(tmp_path / "cut.safetensors")
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(2)}, {})
    with pytest.raises(LayerLoomError, match="moves subjects along boxes"):
        open_trajectory(tmp_path / "other.safetensors")
    with pytest.raises(LayerLoomError, match="layerloom trajectory"):
        open_checkpoint(write_director(tmp_path / "tiny.safetensors"))
    with pytest.raises(ValueError, match="part 'other'"):
        save_trajectory(tmp_path / "x.safetensors", {"other": {}}, **NETWORK, settings=SETTINGS)
